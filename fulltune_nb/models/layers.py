"""What blocks are made of: linear maps, norms, the feed-forward part, and attention; a mixture of experts is in `experts`.

Dimension letters: B rows, T tokens, S keys (cached and new), D hidden_size, H heads, C head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.cpu import fast_math as cpu_math
from fulltune_nb.models.activations import ACTIVATIONS, XIELU, XIelu, gated
from fulltune_nb.models.kv_cache import KVCache
from fulltune_nb.models.model_config import ModelConfig
from fulltune_nb.models.rope import Rotation, rotate


class Linear(nn.Linear):
    """`nn.Linear`, with gradients that lie row by row."""

    def __call__(self, x: mx.array) -> mx.array:
        return cpu_math.linear(x, self.weight, self.get("bias"))


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm, with the parameters the kind has; computed in float32.

    Args:
        kind: as `Family.norm`.
        size: (D,); or (H, C), each head's own weight for x (B, H, T, C).
        eps: added to the variance.
        scale: what the output is multiplied by.
    """

    def __init__(self, kind: str, size: int | tuple[int, int], eps: float, scale: float | None = None):
        super().__init__()
        self._kind, self._eps, self._scale = kind, eps, scale
        if kind.endswith("plus_one"):
            self.weight = mx.zeros(size)
        elif kind != "layer_no_params":
            self.weight = mx.ones(size)
        if kind in ("layer", "layer_plus_one"):
            self.bias = mx.zeros(size)

    def __call__(self, x: mx.array) -> mx.array:
        normed = self._normed(x)
        return normed if self._scale is None else normed * self._scale

    def _normed(self, x: mx.array) -> mx.array:
        function = mx.fast.rms_norm if self._kind.startswith("rms") else mx.fast.layer_norm
        weight, bias = self.get("weight"), () if self._kind.startswith("rms") else (self.get("bias"),)
        if weight is not None and weight.ndim == 2:
            plain = function(x.astype(mx.float32), None, *([None] if bias else []), self._eps)
            return (plain * weight[:, None]).astype(x.dtype)
        if self._kind.endswith("plus_one"):  # in bfloat16, 1 + weight would lose the weight's last bits
            if x.dtype != mx.float32 and not cpu_math.on_cpu():
                return _by_one_plus(function, self._eps)(x, weight, *bias)
            scale = 1.0 + weight.astype(mx.float32)
            return function(x.astype(mx.float32), scale, *(part.astype(mx.float32) for part in bias), self._eps).astype(x.dtype)
        return function(x, weight, *bias, self._eps)


@cache
def _by_one_plus(function: Callable[..., mx.array], eps: float) -> Callable[..., mx.array]:
    """A norm whose output is multiplied by 1 + weight in float32, though all it reads and writes is in half precision, as a GPU's kernel
    wants it. Only the gradient of what is normalised sees 1 + weight rounded."""

    def normed(x: mx.array, *parameters: mx.array | None) -> mx.array:
        return function(x, *parameters, eps)

    @mx.custom_function
    def by_one_plus(x: mx.array, weight: mx.array, *bias: mx.array) -> mx.array:
        scaled = normed(x, None, *(None for _ in bias)) * (1.0 + weight.astype(mx.float32))
        return sum(bias, scaled).astype(x.dtype)

    @by_one_plus.vjp
    def gradients(primals: tuple[mx.array, ...], gradient: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
        x, weight, *bias = primals
        weight = mx.depends([weight], [gradient])[0]  # else MLX saw the sum of the forward pass here, and kept it
        scale = (1.0 + weight.astype(mx.float32)).astype(x.dtype)
        return tuple(mx.vjp(normed, [x, scale, *bias], [gradient])[1])

    return by_one_plus


class HeadNorms(nn.Module):
    """A norm for each head: (B, H, T, C) -> (B, H, T, C)."""

    def __init__(self, kind: str, heads: int, size: int, eps: float):
        super().__init__()
        self.norms = [Norm(kind, size, eps) for _ in range(heads)]

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([norm(x[:, head : head + 1]) for head, norm in enumerate(self.norms)], axis=1)


class MLP(nn.Module):
    """Feed-forward: `down(act(gate(x)) * up(x))` when gated (Shazeer 2020), else `down(act(up(x)))`.

    Args:
        config: of the model.
        size: of what is between; None: the model's intermediate_size.
        biased: whether it has the model's biases.
    """

    def __init__(self, config: ModelConfig, size: int | None = None, biased: bool = True):
        super().__init__()
        self._activation, self._numbers = config.activation, config.activation_numbers
        hidden, size, biases = config.hidden_size, size or config.intermediate_size, config.biases if biased else ()
        if "gate_up_proj" in config.fused:
            self.gate_up_proj = Linear(hidden, 2 * size, bias=False)
        else:
            if config.mlp != "plain":
                self.gate_proj = Linear(hidden, size, bias="gate_proj" in biases)
            self.up_proj = Linear(hidden, size, bias="up_proj" in biases)
        self.down_proj = Linear(size, hidden, bias="down_proj" in biases)
        if config.activation == XIELU:
            self.act_fn = XIelu()

    def __call__(self, x: mx.array) -> mx.array:
        return self.through(lambda names, x: [self[name](x) for name in names], x)

    def through(self, project: Callable[[Sequence[str], mx.array], list[mx.array]], x: mx.array) -> mx.array:
        """The output for x (..., D), with `project` for the linear maps: names of some that read one array, and that array."""
        if "gate_up_proj" in self:
            (both,) = project(["gate_up_proj"], x)
            (output,) = project(["down_proj"], self._gated(*mx.split(both, 2, axis=-1)))
        elif "gate_proj" in self:
            (output,) = project(["down_proj"], self._gated(*project(["gate_proj", "up_proj"], x)))
        else:
            activation = self.act_fn if "act_fn" in self else ACTIVATIONS[self._activation]
            (output,) = project(["down_proj"], activation(*project(["up_proj"], x)))
        return output

    def _gated(self, gate: mx.array, up: mx.array) -> mx.array:
        return gated(self._activation, self._numbers, gate, up)


# ---- attention

Mask = mx.array | str | None
"""What tokens may look at: True there. None: everything. "causal": all up to themselves, which MLX's GPU kernels need no array for.
Floats are added to the scores instead (`added_to_scores`), and have `attend` prepare for a backward pass of its own."""


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

    def __call__(self, x: mx.array, rotation: Rotation | None, mask: Mask, cache: KVCache | None = None) -> mx.array:
        queries, keys, values = self.heads(x, rotation)
        if cache is not None:
            keys, values = cache.update(keys, values)  # (B, K, T, C) -> (B, K, S, C)
        return self.o_proj(attend(queries, keys, values, mask, self.scoring_of()))

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
            if "growth" in rotation:
                queries = queries * rotation["growth"].astype(queries.dtype)
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


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: Mask, scoring: Scoring) -> mx.array:
    """Softmax attention: queries (B, H, T, C), keys and values (B, K, S, C) -> heads side by side (B, T, H * C).

    The mask is (T, S), or (B, 1, T, S) where it differs by row; or as `Mask` says.
    """
    plain = scoring.cap is None and scoring.sinks is None
    if plain and _is_added(mask):
        return _with_own_gradients(scoring.scale)(queries, keys, values, mask.astype(queries.dtype))[0]
    if plain and not cpu_math.applies(queries, keys, values):
        return _side_by_side(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scoring.scale, mask=mask))
    # The heads of a group share their keys, so they are one larger product instead of G small ones.
    rows, heads, length, head_dim = queries.shape
    kv_heads, num_keys = keys.shape[1:3]
    if not plain:  # tanh and the sinks' part in float32, as softmax
        queries, keys = queries.astype(mx.float32), keys.astype(mx.float32)
    grouped = (queries * scoring.scale).reshape(rows, kv_heads, -1, head_dim)  # (B, H, T, C) -> (B, K, G*T, C)
    scores = (grouped @ keys.swapaxes(-1, -2)).reshape(rows, heads, length, num_keys)  # (B, K, G*T, S) -> (B, H, T, S)
    shares = _shares(scores, mask, scoring).reshape(rows, kv_heads, -1, num_keys)
    return _side_by_side((shares.astype(values.dtype) @ values).reshape(rows, heads, length, head_dim))


def _side_by_side(mixed: mx.array) -> mx.array:
    """(B, H, T, C) -> (B, T, H * C)"""
    rows, _, length, _ = mixed.shape
    return mixed.transpose(0, 2, 1, 3).reshape(rows, length, -1)


@cache
def _with_own_gradients(scale: float) -> Callable[..., tuple[mx.array, mx.array]]:
    """`attend` by three kernels over the scores, and its backward pass by five: what it needs of the shares P and their gradient dP is
    P (dP - D), where D, the sum of P dP over the keys, is that of output times its gradient (Dao et al. 2022). Where a mask forbids,
    P is 0, so that the mask has no part in it."""

    @mx.custom_function
    def attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        by_group = mx.unflatten(queries, 1, (keys.shape[1], -1))  # (B, H, T, C) -> (B, K, G, T, C)
        if mask.ndim > 2:
            mask = mask[:, :, None]  # (B, 1, 1, T, S)
        scores = mx.addmm(mask, by_group, keys[:, :, None].swapaxes(-1, -2), alpha=scale)
        shares = mx.softmax(scores, axis=-1, precise=True).flatten(2, 3)  # (B, K, G*T, S)
        return _side_by_side((shares @ values).reshape(queries.shape)), shares

    @attention.vjp
    def gradients(primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        (queries, keys, values, mask), (output, shares), (gradient, _) = primals, outputs, cotangents
        rows, heads, length, head_dim = queries.shape

        def grouped(x: mx.array) -> mx.array:  # (B, T, H * C') -> (B, K, G*T, C')
            return x.reshape(rows, length, heads, -1).transpose(0, 2, 1, 3).reshape(*shares.shape[:3], -1)

        products = gradient.astype(mx.float32) * output.astype(mx.float32)
        sums = products.reshape(rows, length, heads, head_dim).sum(axis=-1)  # D
        gradient = grouped(gradient)
        to_scores = _to_scores(shares, gradient @ values.swapaxes(-1, -2), grouped(sums), scale)
        to_keys = to_scores.swapaxes(-1, -2) @ queries.reshape(gradient.shape)
        return (to_scores @ keys).reshape(queries.shape), to_keys, shares.swapaxes(-1, -2) @ gradient, mx.zeros_like(mask)

    return attention


@partial(mx.compile, shapeless=True)
def _to_scores(shares: mx.array, to_shares: mx.array, sums: mx.array, scale: float) -> mx.array:
    """Gradient with respect to the products of queries and keys, in the dtype of the shares; computed in float32, in one kernel."""
    return (scale * shares.astype(mx.float32) * (to_shares.astype(mx.float32) - sums)).astype(shares.dtype)


def attention_shares(queries: mx.array, keys: mx.array, mask: Mask, scoring: Scoring) -> mx.array:
    """How much each token attends to each, which `attend` does not tell: (B, H, T, C), (B, K, S, C) -> (B, H, T, S) float32."""
    groups = queries.shape[1] // keys.shape[1]
    scores = queries.astype(mx.float32) @ mx.repeat(keys, groups, axis=1).astype(mx.float32).swapaxes(-1, -2)
    return _shares(scores * scoring.scale, mask, scoring)


def _shares(scores: mx.array, mask: Mask, scoring: Scoring) -> mx.array:
    """Scaled products (B, H, T, S) as shares of the attention; with sinks they sum up to less than one."""
    scores, mask = soft_cap(scores, scoring.cap), _as_array(mask, *scores.shape[-2:])
    if mask is not None:
        scores = scores + mask.astype(scores.dtype) if _is_added(mask) else mx.where(mask, scores, -math.inf)
    if scoring.sinks is None:
        return cpu_math.softmax(scores)
    sinks = mx.broadcast_to(scoring.sinks.astype(scores.dtype)[:, None, None], (*scores.shape[:-1], 1))
    return cpu_math.softmax(mx.concatenate([scores, sinks], axis=-1))[..., :-1]


def soft_cap(x: mx.array, cap: float | None) -> mx.array:
    """`cap tanh(x / cap)`, any shape; x itself without a cap."""
    return x if cap is None else cap * mx.tanh(x / cap)


def causal_mask(length: int, offset: int = 0, first: int = 0, window: int | None = None) -> Mask:
    """What tokens at `offset ... offset + length - 1` may look at, among keys from position `first` on.

    Returns:
        (T, S) bool, True where allowed; None where everything is; on a GPU "causal" without a window.
    """
    end = offset + length
    sees_all = window is None or end - first <= window
    if length == 1 and sees_all:
        return None
    if sees_all and not cpu_math.on_cpu():
        return "causal"
    return _allowed(length, end, first, None if sees_all else window)


def _allowed(length: int, end: int, first: int, window: int | None) -> mx.array:
    """(T, S) bool for the last T of the positions before `end`, among keys from `first` on."""
    queries = mx.arange(end - length, end)[:, None]
    keys = mx.arange(first, end)[None, :]
    allowed = keys <= queries
    return allowed if window is None else allowed & (keys > queries - window)


def _as_array(mask: Mask, length: int, num_keys: int) -> mx.array | None:
    return _allowed(length, num_keys, 0, None) if isinstance(mask, str) else mask


def added_to_scores(mask: Mask, length: int, dtype: mx.Dtype) -> mx.array | None:
    """A mask of `length` tokens that look at one another as what is added to their scores, in `dtype`: 0 or its lowest number."""
    return None if mask is None else mx.where(_as_array(mask, length, length), 0.0, mx.finfo(dtype).min).astype(dtype)


def _is_added(mask: Mask) -> bool:
    return isinstance(mask, mx.array) and mask.dtype != mx.bool_


def within_segments(mask: Mask, segments: mx.array | None) -> Mask:
    """The mask (T, T), but tokens look only at those of their own segment: with segments (B, T), (B, 1, T, T) bool."""
    if mask is None or segments is None:
        return mask
    length = segments.shape[1]
    return (segments[:, None, :, None] == segments[:, None, None, :]) & _as_array(mask, length, length)
