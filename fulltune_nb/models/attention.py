"""Attention: queries, keys and values of a block, how they meet, and what tokens may look at.

Dimension letters: B rows, T tokens, S keys (cached and new), D hidden_size, H heads, K key/value heads, G = H / K, C head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.cpu import fast_math as cpu_math
from fulltune_nb.models.kv_cache import KVCache
from fulltune_nb.models.layers import HeadNorms, Linear, Norm
from fulltune_nb.models.model_config import ModelConfig
from fulltune_nb.models.rope import Rotation, rotate


@dataclass(frozen=True)
class Scoring:
    """How products of queries and keys become shares."""

    scale: float
    """The products are multiplied by it."""
    cap: float | None = None
    """c: scores s become c tanh(s / c)."""
    sinks: mx.array | None = None
    """(H,): a further score of each head, whose share goes nowhere."""


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._config = config
        hidden, queries, keys = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        if "qkv_proj" in config.fused:
            self.qkv_proj = Linear(hidden, queries + 2 * keys, bias=False)
        else:
            self.q_proj = Linear(hidden, queries, bias="q_proj" in config.biases)
            self.k_proj = Linear(hidden, keys, bias="k_proj" in config.biases)
            self.v_proj = Linear(hidden, keys, bias="v_proj" in config.biases)
        self.o_proj = Linear(queries, hidden, bias="o_proj" in config.biases)
        if config.qk_norm:
            self.q_norm, self.k_norm = self._head_norm(config.num_heads), self._head_norm(config.num_kv_heads)
        if config.sinks:
            self.sinks = mx.zeros((config.num_heads,))

    def __call__(self, x: mx.array, rotation: Rotation | None, mask: mx.array | None, cache: KVCache | None = None) -> mx.array:
        queries, keys, values = self.heads(x, rotation)
        if cache is not None:
            keys, values = cache.update(keys, values)  # (B, K, T, C) -> (B, K, S, C)
        mixed = attend(queries, keys, values, mask, self.scoring_of())
        rows, _, length, _ = mixed.shape
        return self.o_proj(mixed.transpose(0, 2, 1, 3).reshape(rows, length, -1))

    def scoring_of(self, heads: slice = slice(None)) -> Scoring:
        """How products become shares, of all heads or some of H."""
        sinks = self.sinks[heads] if "sinks" in self else None
        return Scoring(self._config.attention_scale, self._config.score_cap, sinks)

    def heads(self, x: mx.array, rotation: Rotation | None) -> tuple[mx.array, mx.array, mx.array]:
        """Queries (B, H, T, C), keys and values (B, K, T, C) of inputs (B, T, D), as they meet each other."""
        config = self._config
        queries, keys, values = self._projected(x)  # (B, T, heads * C)
        if config.qk_norm == "width":
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if config.clip_qkv is not None:
            queries, keys, values = (mx.clip(part, -config.clip_qkv, config.clip_qkv) for part in (queries, keys, values))
        queries, keys, values = self._split(queries), self._split(keys), self._split(values)  # -> (B, heads, T, C)
        by_head = config.qk_norm not in ("", "width")
        if by_head and not config.qk_norm_after_rope:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if rotation is not None:
            queries, keys = (rotate(part, rotation, config.rope.interleaved) for part in (queries, keys))
            if len(rotation) > 2:
                queries = queries * rotation[2].astype(queries.dtype)
        if by_head and config.qk_norm_after_rope:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return queries, keys, values

    def _projected(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        if "qkv_proj" not in self:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        config = self._config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return tuple(mx.split(self.qkv_proj(x), [queries, queries + keys], axis=-1))

    def _split(self, x: mx.array) -> mx.array:
        rows, length, _ = x.shape
        return x.reshape(rows, length, -1, self._config.head_dim).transpose(0, 2, 1, 3)

    def _head_norm(self, heads: int) -> nn.Module:
        config = self._config
        kind, size, eps = config.qk_norm_kind, config.head_dim, config.norm_eps
        if config.qk_norm == "listed_heads":
            return HeadNorms(kind, heads, size, eps)
        return Norm(kind, {"head": size, "heads": (heads, size), "width": heads * size}[config.qk_norm], eps)


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None, scoring: Scoring) -> mx.array:
    """Softmax attention: queries (B, H, T, C), keys and values (B, K, S, C) -> (B, H, T, C).

    The mask is (T, S) bool, True where a token may look, or (B, 1, T, S) where that differs by row; None: everywhere.
    """
    plain = scoring.cap is None and scoring.sinks is None
    if plain and not cpu_math.applies(queries, keys, values):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scoring.scale, mask=mask)
    # The heads of a group share their keys, so they are one larger product instead of G small ones.
    rows, heads, length, head_dim = queries.shape
    kv_heads, num_keys = keys.shape[1:3]
    if not plain:  # tanh and the sinks' part in float32, as softmax
        queries, keys = queries.astype(mx.float32), keys.astype(mx.float32)
    grouped = (queries * scoring.scale).reshape(rows, kv_heads, -1, head_dim)  # (B, H, T, C) -> (B, K, G*T, C)
    scores = (grouped @ keys.swapaxes(-1, -2)).reshape(rows, heads, length, num_keys)  # (B, K, G*T, S) -> (B, H, T, S)
    shares = _shares(scores, mask, scoring).reshape(rows, kv_heads, -1, num_keys)
    return (shares.astype(values.dtype) @ values).reshape(rows, heads, length, head_dim)


def attention_shares(queries: mx.array, keys: mx.array, mask: mx.array | None, scoring: Scoring) -> mx.array:
    """How much each token attends to each, which `attend` does not tell: (B, H, T, C), (B, K, S, C) -> (B, H, T, S) float32."""
    groups = queries.shape[1] // keys.shape[1]
    scores = queries.astype(mx.float32) @ mx.repeat(keys, groups, axis=1).astype(mx.float32).swapaxes(-1, -2)
    return _shares(scores * scoring.scale, mask, scoring)


def _shares(scores: mx.array, mask: mx.array | None, scoring: Scoring) -> mx.array:
    """Scaled products (B, H, T, S) as shares of the attention; with sinks they sum up to less than one."""
    scores = soft_cap(scores, scoring.cap)
    if mask is not None:
        scores = mx.where(mask, scores, -math.inf)
    if scoring.sinks is None:
        return cpu_math.softmax(scores)
    sinks = mx.broadcast_to(scoring.sinks.astype(scores.dtype)[:, None, None], (*scores.shape[:-1], 1))
    return cpu_math.softmax(mx.concatenate([scores, sinks], axis=-1))[..., :-1]


def soft_cap(x: mx.array, cap: float | None) -> mx.array:
    """`cap tanh(x / cap)`, any shape; x itself without a cap."""
    return x if cap is None else cap * mx.tanh(x / cap)


def causal_mask(length: int, offset: int = 0, first: int = 0, window: int | None = None) -> mx.array | None:
    """What tokens at `offset ... offset + length - 1` may look at, among keys from position `first` on.

    Returns:
        (T, S) bool, True where allowed; None where everything is.
    """
    end = offset + length
    sees_all = window is None or end - first <= window
    if length == 1 and sees_all:
        return None
    queries = mx.arange(offset, end)[:, None]
    keys = mx.arange(first, end)[None, :]
    allowed = keys <= queries
    return allowed if sees_all else allowed & (keys > queries - window)


def within_segments(mask: mx.array | None, segments: mx.array | None) -> mx.array | None:
    """The mask (T, T), but tokens look only at those of their own segment: with segments (B, T), (B, 1, T, T) bool."""
    if mask is None or segments is None:
        return mask
    return (segments[:, None, :, None] == segments[:, None, None, :]) & mask
