"""The one transformer: every supported family is this decoder, built from a `ModelConfig`.

Dimension letters: B rows, T tokens, S keys (cached and new), D hidden_size, H heads, K key/value heads, G = H / K,
C head_dim, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fulltune_nb.cpu import fast_math as cpu_math
from fulltune_nb.models.families import ACTIVATIONS, GATED_ACTIVATIONS, ModelConfig
from fulltune_nb.models.kv_cache import KVCache
from fulltune_nb.models.parameters import swapped_in, trainable_of
from fulltune_nb.models.rope import inverse_frequencies, rotate, rotation_table

Rotation = tuple[mx.array, mx.array]


class Linear(nn.Linear):
    """`nn.Linear`, with gradients that lie row by row."""

    def __call__(self, x: mx.array) -> mx.array:
        return cpu_math.linear(x, self.weight, self.get("bias"))


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm, with the parameters the kind has; computed in float32."""

    def __init__(self, kind: str, size: int, eps: float):
        super().__init__()
        self._kind, self._eps = kind, eps
        if kind == "rms_plus_one":
            self.weight = mx.zeros((size,))
        elif kind != "layer_no_params":
            self.weight = mx.ones((size,))
        if kind == "layer":
            self.bias = mx.zeros((size,))

    def __call__(self, x: mx.array) -> mx.array:
        if self._kind == "rms":
            return mx.fast.rms_norm(x, self.weight, self._eps)
        if self._kind == "rms_plus_one":  # in bfloat16, 1 + weight would lose the weight's last bits
            scale = 1.0 + self.weight.astype(mx.float32)
            return mx.fast.rms_norm(x.astype(mx.float32), scale, self._eps).astype(x.dtype)
        return mx.fast.layer_norm(x, self.get("weight"), self.get("bias"), self._eps)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, bias="q_proj" in config.biases)
        self.k_proj = Linear(config.hidden_size, keys, bias="k_proj" in config.biases)
        self.v_proj = Linear(config.hidden_size, keys, bias="v_proj" in config.biases)
        self.o_proj = Linear(queries, config.hidden_size, bias="o_proj" in config.biases)
        if config.qk_norm:
            self.q_norm = Norm(config.norm, config.head_dim, config.norm_eps)
            self.k_norm = Norm(config.norm, config.head_dim, config.norm_eps)

    def __call__(self, x: mx.array, rotation: Rotation, mask: mx.array | None, cache: KVCache | None = None) -> mx.array:
        queries, keys, values = self.heads(x, rotation)
        if cache is not None:
            keys, values = cache.update(keys, values)  # (B, K, T, C) -> (B, K, S, C)
        mixed = attend(queries, keys, values, mask)
        rows, _, length, _ = mixed.shape
        return self.o_proj(mixed.transpose(0, 2, 1, 3).reshape(rows, length, -1))

    def heads(self, x: mx.array, rotation: Rotation) -> tuple[mx.array, mx.array, mx.array]:
        """Queries (B, H, T, C), keys and values (B, K, T, C) of inputs (B, T, D), as they meet each other."""
        config = self._config
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, heads * C)
        if config.clip_qkv is not None:
            queries, keys, values = (mx.clip(part, -config.clip_qkv, config.clip_qkv) for part in (queries, keys, values))
        queries, keys, values = self._split(queries), self._split(keys), self._split(values)  # -> (B, heads, T, C)
        if config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        return rotate(queries, rotation), rotate(keys, rotation), values

    def _split(self, x: mx.array) -> mx.array:
        rows, length, _ = x.shape
        return x.reshape(rows, length, -1, self._config.head_dim).transpose(0, 2, 1, 3)


class MLP(nn.Module):
    """Feed-forward: `down(act(gate(x)) * up(x))` when gated (Shazeer 2020), else `down(act(up(x)))`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._activation = config.activation
        if config.mlp != "plain":
            self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias="gate_proj" in config.biases)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias="up_proj" in config.biases)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias="down_proj" in config.biases)

    def __call__(self, x: mx.array) -> mx.array:
        activation = ACTIVATIONS[self._activation]
        if "gate_proj" not in self:
            return self.down_proj(activation(self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)  # (B, T, intermediate_size)
        gated = GATED_ACTIVATIONS.get(self._activation)
        return self.down_proj(gated(gate, up) if gated else activation(gate) * up)


@dataclass(frozen=True)
class Routing:
    """Which experts each of M tokens goes to."""

    chosen: mx.array
    """(M, chosen) indices of experts."""
    rows: tuple[mx.array, ...]
    """For each expert, the tokens it gets."""
    places: mx.array
    """(M * chosen,): where the output for each token's choice stands, when the experts' outputs follow one another."""


class MixtureOfExperts(nn.Module):
    """Each token goes to its best few experts (Jiang et al. 2024); only these are computed."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._num_chosen = config.num_experts_per_token
        self.router = Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = [MLP(config) for _ in range(config.num_experts)]

    def __call__(self, x: mx.array) -> mx.array:
        tokens = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (M, D)
        routing = self.route(tokens)
        outputs = [expert(tokens[rows]) for expert, rows in zip(self.experts, routing.rows, strict=True) if rows.size]
        return self.combine(tokens, mx.concatenate(outputs), routing).reshape(x.shape)

    def route(self, tokens: mx.array) -> Routing:
        """Which experts each token goes to. (M, D).

        How many tokens an expert gets depends on the data, so the choices are read here: one synchronisation a layer.
        """
        scores = mx.stop_gradient(self._scores(tokens))
        chosen = np.array(mx.argpartition(-scores, kth=self._num_chosen - 1, axis=-1)[:, : self._num_chosen])
        order = np.argsort(chosen, axis=None, kind="stable")
        borders = np.searchsorted(chosen.reshape(-1)[order], np.arange(len(self.experts) + 1))
        rows = tuple(mx.array(order[begin:end] // self._num_chosen) for begin, end in zip(borders, borders[1:], strict=False))
        return Routing(mx.array(chosen), rows, mx.array(np.argsort(order, kind="stable")))

    def combine(self, tokens: mx.array, outputs: mx.array, routing: Routing) -> mx.array:
        """Each token's mixture of its experts' outputs, which come one expert after the other: (M * chosen, D) -> (M, D)."""
        # Softmax over all experts, then normalised over the chosen, is the softmax over the chosen.
        shares = mx.softmax(mx.take_along_axis(self._scores(tokens), routing.chosen, axis=-1), axis=-1).astype(tokens.dtype)
        per_choice = outputs[routing.places].reshape(*shares.shape, -1)  # (M, chosen, D)
        return (per_choice * shares[..., None]).sum(axis=1)

    def _scores(self, tokens: mx.array) -> mx.array:
        return self.router(tokens).astype(mx.float32)


class Block(nn.Module):
    """One layer of the decoder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_norm = Norm(config.norm, config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        if config.block == "pre":
            self.post_attention_norm = Norm(config.norm, config.hidden_size, config.norm_eps)
        self.mlp = MixtureOfExperts(config) if config.mlp == "moe" else MLP(config)

    def __call__(self, x: mx.array, rotation: Rotation, mask: mx.array | None, cache: KVCache | None = None) -> mx.array:
        normed = self.input_norm(x)
        attended = self.attention(normed, rotation, mask, cache)
        if "post_attention_norm" not in self:  # parallel: attention and mlp read the same input
            return x + attended + self.mlp(normed)
        x = x + attended
        return x + self.mlp(self.post_attention_norm(x))


class HeadBias(nn.Module):
    """The head's bias alone, where its weight is the embedding's."""

    def __init__(self, size: int):
        super().__init__()
        self.bias = mx.zeros((size,))


class Decoder(nn.Module):
    """A decoder-only language model. Weights are random until loaded."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._config = config
        self._frequencies = mx.array(inverse_frequencies(config.rope))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_layers)]
        self.norm = Norm(config.norm, config.hidden_size, config.norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias="lm_head" in config.biases)
        elif "lm_head" in config.biases:
            self.lm_head = HeadBias(config.vocab_size)

    @property
    def config(self) -> ModelConfig:
        """Sizes and mechanisms of the model."""
        return self._config

    @property
    def compute_dtype(self) -> mx.Dtype:
        """Dtype that training computes in: float32 on the CPU, where only float32 products have a fast BLAS, else the weights' own."""
        return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else self.embed_tokens.weight.dtype

    def __call__(self, ids: mx.array, cache: Sequence[KVCache] | None = None) -> mx.array:
        """Logits (B, T, V) for token ids (B, T); with a cache, T are the new tokens only."""
        return self.head(self.hidden_states(ids, cache))

    def embed(self, ids: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
        """Token ids (B, T) -> the first block's input (B, T, D), in `dtype` or that of the weights."""
        x = lookup(self.embed_tokens.weight, ids, dtype)
        if self._config.padding_id is not None:  # as torch's Embedding(padding_idx=...): its row gets no gradient from here
            x = mx.where((ids == self._config.padding_id)[..., None], mx.stop_gradient(x), x)
        return x if self._config.embed_scale is None else x * mx.array(self._config.embed_scale, dtype=x.dtype)

    def hidden_states(
        self,
        ids: mx.array,
        cache: Sequence[KVCache] | None = None,
        checkpoint: bool = False,
        segments: mx.array | None = None,
        dtype: mx.Dtype | None = None,
    ) -> mx.array:
        """The last block's output after the final norm: (B, T) -> (B, T, D).

        Args:
            ids: token ids (B, T).
            cache: one `KVCache` a layer, updated in place.
            checkpoint: keep only each block's input for the backward pass and compute the rest again (Chen et al. 2016).
            segments: (B, T) int32, for rows that hold several examples: tokens look only at those with their own number. Not
                with a cache.
            dtype: of the activations; None: that of the weights.
        """
        x = self.embed(ids, dtype)
        rotation, masks = self.context(ids.shape[1], cache, segments)
        for i, block in enumerate(self.layers):
            if checkpoint:
                x = _checkpointed(block, x, rotation, masks[i])
            else:
                x = block(x, rotation, masks[i], cache[i] if cache else None)
        return self.norm(x)

    def context(
        self, length: int, cache: Sequence[KVCache] | None = None, segments: mx.array | None = None
    ) -> tuple[Rotation, list[mx.array | None]]:
        """What the blocks need besides their input for `length` tokens: the rotation table, and each block's mask."""
        return rotation_table(self._frequencies, cache[0].offset if cache else 0, length), self._masks(length, cache, segments)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states (..., D) -> logits (..., V)."""
        weights = self.head_weights()
        if "bias" in weights:
            return mx.addmm(weights["bias"], hidden, weights["weight"].T)
        return hidden @ weights["weight"].T

    def head_weights(self) -> dict[str, mx.array]:
        """The head's arrays: `weight` (V, D), the embedding's own where tied, and `bias` (V,) where the family has one."""
        own = dict(self.lm_head.items()) if "lm_head" in self else {}
        return {"weight": self.embed_tokens.weight, **own}

    def _masks(self, length: int, cache: Sequence[KVCache] | None, segments: mx.array | None = None) -> list[mx.array | None]:
        """For each layer, what each new token may look at: (T, S) bool, or None for everything. Equal ones are shared.

        With segments (B, T) it is another for each row: (B, 1, T, T).
        """
        made: dict[tuple[int, int | None], mx.array | None] = {}
        masks = []
        for i, window in enumerate(self._config.windows):
            offset = cache[i].offset if cache else 0
            first = cache[i].first_position(length) if cache else 0
            key = (first, window)
            if key not in made:
                made[key] = within_segments(causal_mask(length, offset, first, window), segments)
            masks.append(made[key])
        return masks


def lookup(weight: mx.array, ids: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
    """Rows of an embedding (V, D) for ids (B, T), in `dtype` or the weight's own: (B, T, D)."""
    if dtype is None or dtype == weight.dtype:
        return weight[ids]
    return _rows_in_float32(weight, ids) if dtype == mx.float32 else weight[ids].astype(dtype)


@mx.custom_function
def _rows_in_float32(weight: mx.array, ids: mx.array) -> mx.array:
    return weight[ids].astype(mx.float32)


@_rows_in_float32.vjp
def _rows_in_float32_vjp(primals, cotangent, _output):
    # Summed up in float32: in half precision a frequent token's gradient would lose what its later places add.
    weight, ids = primals
    return mx.zeros(weight.shape, dtype=mx.float32).at[ids].add(cotangent), mx.zeros_like(ids)


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    """Softmax attention: queries (B, H, T, C), keys and values (B, K, S, C) -> (B, H, T, C).

    The mask is (T, S) bool, True where a token may look, or (B, 1, T, S) where that differs by row; None: everywhere.
    """
    scale = 1.0 / math.sqrt(queries.shape[-1])
    if not cpu_math.applies(queries, keys, values):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    # The heads of a group share their keys, so they are one larger product instead of G small ones.
    rows, heads, length, head_dim = queries.shape
    kv_heads, num_keys = keys.shape[1:3]
    grouped = (queries * scale).reshape(rows, kv_heads, -1, head_dim)  # (B, H, T, C) -> (B, K, G*T, C)
    scores = (grouped @ keys.swapaxes(-1, -2)).reshape(rows, heads, length, num_keys)  # (B, K, G*T, S) -> (B, H, T, S)
    if mask is not None:
        scores = mx.where(mask, scores, -math.inf)
    shares = cpu_math.softmax(scores).reshape(rows, kv_heads, -1, num_keys)
    return (shares @ values).reshape(rows, heads, length, head_dim)


def attention_shares(queries: mx.array, keys: mx.array, mask: mx.array | None) -> mx.array:
    """How much each token attends to each, which `attend` never writes down: (B, H, T, C), (B, K, S, C) -> (B, H, T, S) float32."""
    groups = queries.shape[1] // keys.shape[1]
    scores = queries.astype(mx.float32) @ mx.repeat(keys, groups, axis=1).astype(mx.float32).swapaxes(-1, -2)
    scores = scores * (1.0 / math.sqrt(queries.shape[-1]))
    return cpu_math.softmax(scores if mask is None else mx.where(mask, scores, -math.inf))


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


def _checkpointed(block: Block, x: mx.array, rotation: Rotation, mask: mx.array | None) -> mx.array:
    """The block's output, its insides computed again in the backward pass, once the gradient of that output is there.

    `mx.checkpoint` only waits for the block's output: as MLX is given the whole graph at once, it then computes blocks again before
    their turn, and what they hold stands beside the loss.

    The block itself is not changed: nothing is patched, so making it twice does nothing twice.
    """
    own = trainable_of(block)

    def forward(x: mx.array, *values: mx.array) -> mx.array:
        with swapped_in(block, dict(zip(own, values, strict=True))):
            return block(x, rotation, mask)

    if "experts" in block.mlp:  # they read the routing while they are computed, and would have all gradients so far computed there
        return mx.checkpoint(forward)(x, *own.values())
    checkpointed = mx.custom_function(forward)

    @checkpointed.vjp
    def again(inputs: tuple[mx.array, ...], gradient: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        waiting = mx.depends(list(inputs), [gradient])
        return tuple(mx.vjp(forward, waiting, [gradient])[1])

    return checkpointed(x, *own.values())
