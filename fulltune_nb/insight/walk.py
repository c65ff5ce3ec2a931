"""A row's way through a decoder, one block at a time: what each block takes in, attends to, and gives back as gradient.

Only one block's insides exist at a time. A pass forward can be made again at any time, so nothing large has to be kept.

Dimension letters: T tokens, D hidden_size, H heads, K key/value heads, V vocab_size, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.kernels import attention_shares, compute_dtype
from fulltune_nb.training.loss import cross_entropy


def residual_stream(model: Decoder, tokens: np.ndarray) -> Iterator[mx.array]:
    """The embedding, then the output of each block before any final norm: L + 1 arrays (1, T, D), evaluated."""
    rotation, masks = model.context(len(tokens))
    x = model.embed(mx.array(tokens.astype(np.int32))[None], compute_dtype(model.embed_tokens.weight.dtype))
    mx.eval(x)
    yield x
    for block, mask in zip(model.layers, masks, strict=True):
        x = block(x, rotation, mask)
        mx.eval(x)
        yield x


def attention_of_block(model: Decoder, layer: int, x: mx.array) -> Iterator[np.ndarray]:
    """The attention maps of block `layer` (from 0) for its input x (1, T, D): those of one key/value head at a time, (H / K, T, T)."""
    block = model.layers[layer]
    rotation, masks = model.context(x.shape[1])
    queries, keys, _ = block.attention.heads(block.input_norm(x), rotation)
    groups = queries.shape[1] // keys.shape[1]
    for head in range(keys.shape[1]):
        yield np.array(attention_shares(queries[:, head * groups : (head + 1) * groups], keys[:, head : head + 1], masks[layer])[0])


def pooled(maps: np.ndarray, size: int) -> np.ndarray:
    """Maps (heads, T, T) as (heads, s, s), s <= size: of each tile the largest value, so that no bright spot gets lost."""
    length = maps.shape[-1]
    tile = -(-length // size)
    if tile == 1:
        return maps
    starts = np.arange(0, length, tile)
    return np.maximum.reduceat(np.maximum.reduceat(maps, starts, axis=1), starts, axis=2)


def lens_logits(model: Decoder, x: mx.array) -> mx.array:
    """What the model would say if a block's output were the last: (..., D) -> (..., V) float32."""
    return model.head(model.norm(x)).astype(mx.float32)


Gradients = dict[str, float]


def gradients(
    model: Decoder, tokens: np.ndarray, trained: np.ndarray, stream: Sequence[mx.array]
) -> tuple[float, Gradients, np.ndarray]:
    """Loss over the trained tokens and its gradient, block by block from the last.

    Args:
        model: the decoder.
        tokens: (T,) ids.
        trained: (T,) bool, the tokens to be predicted; at least one, never the first.
        stream: what `residual_stream` gave, all of it.

    Returns:
        The mean loss in nats; the L2 norm of the gradient of every trainable tensor, by module path; and that of the residual
        stream (L + 1, T), by block and position.
    """
    rotation, masks = model.context(len(tokens))
    places = mx.array(np.flatnonzero(trained).astype(np.int32) - 1)
    targets = mx.array(tokens[trained].astype(np.int32))
    weights = mx.full(targets.shape, 1.0 / targets.size)

    def loss_of(x: mx.array) -> mx.array:
        return cross_entropy(model.norm(x)[0][places], model.head_weights(), targets, weights)

    norms, per_token = {}, []
    last = _Part(model, lambda path: path.split(".")[0] in ("norm", "lm_head", "embed_tokens"))
    loss, slope, head = last.back(loss_of, stream[-1], mx.array(1.0))
    norms |= {name: _norm(array) for name, array in head.items() if not name.startswith("embed_tokens")}
    per_token.append(slope)
    for layer in reversed(range(len(model.layers))):
        block, mask = model.layers[layer], masks[layer]
        part = _Part(block, lambda path: True)
        _, slope, own = part.back(lambda x, block=block, mask=mask: block(x, rotation, mask), stream[layer], slope)
        norms |= {f"layers.{layer}.{name}": _norm(array) for name, array in own.items()}
        per_token.append(slope)
    ids = mx.array(tokens.astype(np.int32))[None]
    first = _Part(model, lambda path: path.startswith("embed_tokens"))
    _, _, own = first.back(lambda _: model.embed(ids, compute_dtype(model.embed_tokens.weight.dtype)), mx.zeros((1,)), slope)
    for name, array in own.items():  # a tied embedding has a second gradient, from the head
        norms[name] = _norm(array + head[name] if name in head else array)
    by_position = np.stack([np.linalg.norm(np.array(one[0].astype(mx.float32)), axis=-1) for one in reversed(per_token)])
    return loss.item(), norms, by_position


class _Part:
    """The trainable tensors of a module whose path fits, to be differentiated by."""

    def __init__(self, module: Any, fits: Callable[[str], bool]):
        self._module = module
        self._tensors = {name: array for name, array in tree_flatten(module.trainable_parameters()) if fits(name)}

    def back(self, function: Callable, x: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """Value of `function(x)`, the gradient of x, and of each tensor, for the gradient of the value; all evaluated."""
        names = list(self._tensors)

        def with_tensors(x: mx.array, *arrays: mx.array) -> mx.array:
            self._module.update(tree_unflatten(list(zip(names, arrays, strict=True))))
            return function(x)

        try:
            values, slopes = mx.vjp(with_tensors, [x, *self._tensors.values()], [cotangent])
        finally:
            self._module.update(tree_unflatten(list(self._tensors.items())))
        mx.eval(values, slopes)
        return values[0], slopes[0], dict(zip(names, slopes[1:], strict=True))


def _norm(array: mx.array) -> float:
    return mx.sqrt(mx.square(array.astype(mx.float32)).sum()).item()
