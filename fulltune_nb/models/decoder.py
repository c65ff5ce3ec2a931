"""The one transformer: every supported family is this decoder, built from a `ModelConfig`.

Dimension letters: B rows, T tokens, S keys (cached and new), D hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.cpu import on_cpu
from fulltune_nb.device import device_kind
from fulltune_nb.models.embedding import lookup
from fulltune_nb.models.experts import MixtureOfExperts, RouterBalance
from fulltune_nb.models.kv_cache import KVCache
from fulltune_nb.models.layers import (
    MLP,
    Attention,
    Linear,
    Mask,
    Norm,
    added_to_scores,
    causal_mask,
    soft_cap,
    within_segments,
)
from fulltune_nb.models.model_config import ModelConfig
from fulltune_nb.models.parameters import Buffers, apart, in_dtype, put_parameters, swapped_in, together, trainable_of
from fulltune_nb.models.rope import Rope, Rotation

Context = tuple[Rotation | None, Mask]
"""What a block needs besides its input: its rotation, None without positions, and its mask, None where everything is seen."""

BLOCK_NORMS = {
    "pre": ("input_norm", "post_attention_norm"),
    "post": ("attention_output_norm", "mlp_output_norm"),
    "both": ("input_norm", "attention_output_norm", "post_attention_norm", "mlp_output_norm"),
    "parallel": ("input_norm",),
}
"""`Family.block` -> its norms; `post_attention_norm` stands before the mlp."""


class Block(nn.Module):
    """One layer of the decoder.

    Args:
        config: of the model.
        layer: its number, from 0.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self._parallel, self._scale = config.block == "parallel", config.residual_scale
        first, *others = BLOCK_NORMS[config.block]
        self[first] = Norm(config.norm, config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        for name in others:
            self[name] = Norm(config.norm, config.hidden_size, config.norm_eps)
        self.mlp = MixtureOfExperts(config) if config.with_experts[layer] else MLP(config)

    def __call__(
        self,
        x: mx.array,
        rotation: Rotation | None,
        mask: Mask,
        cache: KVCache | None = None,
        balance: RouterBalance | None = None,
    ) -> mx.array:
        if self._parallel:  # attention and mlp read the same input
            normed = self.input_norm(x)
            return x + self.attention(normed, rotation, mask, cache) + self.mlp(normed)
        attended = self.attend(x, rotation, mask, cache)
        of_experts = {"balance": balance, "answering": cache is not None} if "experts" in self.mlp else {}
        return self.add(attended, self.mlp(self.mlp_input(attended), **of_experts))

    def attend(self, x: mx.array, rotation: Rotation | None, mask: Mask, cache: KVCache | None = None) -> mx.array:
        """The first half of a block that is not parallel: the input (B, T, D), and what attention adds to it."""
        attended = self.attention(self.attention_input(x), rotation, mask, cache)
        return x + self._scaled(self._normed("attention_output_norm", attended))

    def attention_input(self, x: mx.array) -> mx.array:
        """What attention reads of the block's input (B, T, D)."""
        return self._normed("input_norm", x)

    def mlp_input(self, attended: mx.array) -> mx.array:
        """What the mlp reads of the first half's output (B, T, D)."""
        return self._normed("post_attention_norm", attended)

    def add(self, attended: mx.array, output: mx.array) -> mx.array:
        """The block's output of the first half's and the mlp's (B, T, D)."""
        return attended + self._scaled(self._normed("mlp_output_norm", output))

    def _normed(self, name: str, x: mx.array) -> mx.array:
        return self[name](x) if name in self else x

    def _scaled(self, x: mx.array) -> mx.array:
        return x if self._scale is None else x * self._scale


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
        self._ropes = {rope: Rope(rope, config.qk_norm_after_rope) for rope in config.ropes if rope is not None}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config, layer) for layer in range(config.num_layers)]
        # The head is linear, so a scale of the logits is one of what it reads.
        self.norm = Norm(config.norm, config.hidden_size, config.norm_eps, config.logit_scale)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias="lm_head" in config.biases)
        elif "lm_head" in config.biases:
            self.lm_head = HeadBias(config.vocab_size)

    def unfreeze(self, **settings: Any) -> Decoder:
        """As MLX's, but buffers stay frozen."""
        super().unfreeze(**settings)
        for module in self.modules():
            if isinstance(module, Buffers):
                module.freeze()
        return self

    def set_dtype(self, dtype: mx.Dtype) -> None:
        """As MLX's, but buffers keep theirs."""
        put_parameters(self, in_dtype(self, dtype))

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

    def embed(
        self, ids: mx.array, dtype: mx.Dtype | None = None, rows: mx.array | None = None, noise: mx.array | None = None
    ) -> mx.array:
        """Token ids (B, T) -> the first block's input (B, T, D), in `dtype` or that of the weights. `rows`: of the embedding for the ids,
        where a gradient of theirs is wanted and not of the embedding's. `noise` (B, T, D): added to them, before a family scales them."""
        x = lookup(self.embed_tokens.weight, ids, dtype) if rows is None else rows
        if self._config.padding_id is not None:  # as torch's Embedding(padding_idx=...): its row gets no gradient from here
            x = mx.where((ids == self._config.padding_id)[..., None], mx.stop_gradient(x), x)
        if noise is not None:
            x = x + noise.astype(x.dtype)
        return x if self._config.embed_scale is None else x * mx.array(self._config.embed_scale, dtype=x.dtype)

    def hidden_states(
        self,
        ids: mx.array,
        cache: Sequence[KVCache] | None = None,
        grad_checkpoint: bool = False,
        segments: mx.array | None = None,
        dtype: mx.Dtype | None = None,
        balance: RouterBalance | None = None,
        lengths: mx.array | None = None,
        for_gradients: bool = False,
        rows: mx.array | None = None,
        noise: mx.array | None = None,
    ) -> mx.array:
        """The last block's output after the final norm: (B, T) -> (B, T, D).

        Args:
            ids: token ids (B, T).
            cache: one `KVCache` a layer, updated in place.
            grad_checkpoint: keep only each block's input for the backward pass and compute the rest again (Chen et al. 2016).
            segments: (B, T) int32, for rows that hold several examples: tokens look only at those with their own number. Not
                with a cache.
            dtype: of the activations; None: that of the weights.
            balance: takes part in the experts' routing; not with a cache.
            lengths: (B,) tokens of each row that are no padding, which a rotation `by_length` goes by; None: all.
            for_gradients: whether a backward pass follows; changes the kernels, not what they compute.
            rows, noise: as for `embed`.
        """
        x, contexts = self.embed(ids, dtype, rows, noise), self.context(ids.shape[1], cache, segments, lengths)
        if for_gradients:
            contexts = self.for_gradients(contexts, ids.shape[1])
        for i, (block, context) in enumerate(zip(self.layers, contexts, strict=True)):
            if grad_checkpoint:
                x = _checkpointed(block, x, *context, balance)
            else:
                x = block(x, *context, cache[i] if cache else None, balance)
        return self.norm(x)

    def context(
        self,
        length: int,
        cache: Sequence[KVCache] | None = None,
        segments: mx.array | None = None,
        lengths: mx.array | None = None,
    ) -> list[Context]:
        """What each block needs besides its input for `length` tokens; equal tables and masks are shared. Arguments: `hidden_states`."""
        offset = cache[0].offset if cache else 0
        lengths_of = {rope: lengths if rope.by_length else None for rope in self._ropes}
        rotations = {rope: made.rotation(offset, length, segments, lengths_of[rope]) for rope, made in self._ropes.items()}
        masks = self._masks(length, cache, segments)
        return [(rotations.get(rope), mask) for rope, mask in zip(self._config.ropes, masks, strict=True)]

    def for_gradients(self, contexts: Sequence[Context], length: int) -> list[Context]:
        """The contexts of `length` tokens as blocks that a backward pass follows want them: on a GPU masks are added to the scores, so that
        attention has a backward pass of its own, where MLX has no kernel for it. It has one on CUDA, in half precision, for plain scores of
        heads of up to 128 dimensions, a multiple of 8."""
        config, kind, dtype = self._config, device_kind(), self.compute_dtype
        plain = config.score_cap is None and not config.sinks
        by_mlx = kind == "cuda" and plain and dtype != mx.float32 and config.head_dim <= 128 and config.head_dim % 8 == 0
        if kind == "cpu" or by_mlx:
            return list(contexts)
        masks = {id(mask): mask for _, mask in contexts}  # equal ones are shared
        added = {key: added_to_scores(mask, length, dtype) for key, mask in masks.items()}
        return [(rotation, added[id(mask)]) for rotation, mask in contexts]

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states (..., D) -> logits (..., V)."""
        weights = self.head_weights()
        if "bias" in weights:
            return mx.addmm(weights["bias"], hidden, weights["weight"].T)
        return soft_cap(hidden @ weights["weight"].T, self._config.logit_cap)

    def head_weights(self) -> dict[str, mx.array]:
        """The head's arrays: `weight` (V, D), the embedding's own where tied, and `bias` (V,) where the family has one."""
        own = dict(self.lm_head.items()) if "lm_head" in self else {}
        return {"weight": self.embed_tokens.weight, **own}

    def _masks(self, length: int, cache: Sequence[KVCache] | None, segments: mx.array | None = None) -> list[Mask]:
        """For each layer, what each new token may look at: (T, S) bool, or None for everything. Equal ones are shared.

        With segments (B, T) it is another for each row: (B, 1, T, T).
        """
        made: dict[tuple[int, int | None], Mask] = {}
        masks = []
        for i, window in enumerate(self._config.windows):
            offset = cache[i].offset if cache else 0
            first = cache[i].first_position(length) if cache else 0
            key = (first, window)
            if key not in made:
                made[key] = within_segments(causal_mask(length, offset, first, window), segments)
            masks.append(made[key])
        return masks


def _checkpointed(
    block: Block, x: mx.array, rotation: Rotation | None, mask: Mask, balance: RouterBalance | None
) -> mx.array:
    """The block's output, its insides computed again in the backward pass, once the gradient of that output is there.

    `mx.checkpoint` only waits for the block's output: as MLX is given the whole graph at once, it then computes blocks again before
    their turn, and what they hold stands beside the loss.

    The block itself is not changed: nothing is patched, so making it twice does nothing twice.
    """
    own = together(trainable_of(block))

    def forward(x: mx.array, *values: mx.array) -> mx.array:
        with swapped_in(block, apart(dict(zip(own, values, strict=True)))):
            return block(x, rotation, mask, balance=balance)

    if "experts" in block.mlp and on_cpu():  # they read the routing while they are computed: all gradients so far would be computed there
        return mx.checkpoint(forward)(x, *own.values())
    checkpointed = mx.custom_function(forward)

    @checkpointed.vjp
    def again(inputs: tuple[mx.array, ...], gradient: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        waiting = mx.depends(list(inputs), [gradient])
        to_x, *of_parameters = mx.vjp(forward, waiting, [gradient])[1]
        if of_parameters and not on_cpu():  # else MLX may leave them for later, and keep of each block what they are computed from
            (to_x,) = mx.depends([to_x], of_parameters)
        return to_x, *of_parameters

    return checkpointed(x, *own.values())
