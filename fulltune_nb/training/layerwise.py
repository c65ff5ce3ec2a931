"""The gradients of a step piece by piece, from the last block to the first, none living longer than its piece.

The forward pass keeps only each block's input (Chen et al. 2016). The backward pass computes one block again at a time and hands
out its gradients; whoever takes them, adds them up or updates the weights with them, before the next block's are computed (Lv et
al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources"). Micro-batches of a step go through each
block one after the other, so that their gradients are summed block by block.

Dimension letters: B rows, T tokens, M = B * T positions, D hidden_size, N trained positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from fulltune_nb.data.batching import Batch
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.kernels import compute_dtype
from fulltune_nb.training import vocabulary
from fulltune_nb.training.block_passes import BlockPasses, Context
from fulltune_nb.training.expert_gradients import ExpertWork, expert_gradients
from fulltune_nb.training.native import Kernels
from fulltune_nb.training.piecewise import Arrays, add, vjp
from fulltune_nb.training.selection import lowest_trained_block
from fulltune_nb.training.vocabulary import HeadInput


@dataclass(frozen=True)
class GradientPiece:
    """Gradients of some tensors, or of some rows of one."""

    gradients: Arrays
    """Module path -> gradient, summed over the step's micro-batches; evaluated."""
    rows: slice | None = None
    """The rows of the one tensor that these are; None: whole tensors."""


BeforeRows = Callable[[str, Callable[[], Iterator[GradientPiece]]], None]


@dataclass
class _Stream:
    """One micro-batch on its way through the blocks."""

    ids: np.ndarray
    """(M,)"""
    context: tuple[Any, list[mx.array | None]]
    """Rotation table and masks."""
    inputs: list[mx.array]
    """Each block's input (B, T, D), and last the final norm's; taken away as the backward pass comes down."""
    positions: mx.array
    """(N,) trained ones among the M."""
    head: HeadInput | None = None
    cotangent: mx.array | None = None
    """Gradient with respect to the output of the block that is next (B, T, D)."""

    def block_context(self, index: int) -> Context:
        """The rotation table and the block's mask."""
        return self.context[0], self.context[1][index]


class LayerwiseBackward:
    """One step's loss and gradients, in pieces.

        backward = LayerwiseBackward(model, batches)
        backward.loss
        for piece in backward.pieces():
            ...                               # may change the weights the piece belongs to

    Args:
        model: its trainable parameters get gradients.
        batches: the micro-batches; each is weighted by its trained tokens.
        passes: of each block; None: not compiled.
        kernels: for the loss; None: MLX computes it.

    Attributes:
        loss: mean over all trained tokens of the step.
        last_gradient_norm: norm of the gradient with respect to the last block's output; known before the first piece.
    """

    def __init__(
        self, model: Decoder, batches: Sequence[Batch], passes: Sequence[BlockPasses] | None = None, kernels: Kernels | None = None
    ):
        self._model, self._passes = model, passes or [BlockPasses(block) for block in model.layers]
        self._trained = {name for name, _ in tree_flatten(model.trainable_parameters())}  # names only: who holds an array keeps its memory
        self._ranges = vocabulary.ranges(model.config.vocab_size, model.config.hidden_size)
        tokens = sum(batch.num_tokens for batch in batches)
        self._streams = [_forward(model, self._passes, batch, tokens) for batch in batches]
        inputs = [stream.head for stream in self._streams]
        self.loss, gradients = vocabulary.head_loss(model.head_weights(), inputs, kernels)
        self._norm_gradients = self._through_final_norm(gradients)
        squares = sum(mx.square(stream.cotangent.astype(mx.float32)).sum() for stream in self._streams)
        self.last_gradient_norm = mx.sqrt(squares).item()

    def pieces(self, before_rows: BeforeRows | None = None) -> Iterator[GradientPiece]:
        """All gradients, each once: the final norm's, the blocks' from the last to the first, then the vocabulary's.

        The weights of a piece may be changed as soon as it is handed out: what comes later does not need them any more.

        Args:
            before_rows: is called before the first piece of a matrix that comes by rows, with its name and a function that gives
                these pieces; it may go through them any number of times.
        """
        if self._norm_gradients:
            yield GradientPiece(self._norm_gradients)
        del self._norm_gradients
        lowest = lowest_trained_block(self._trained, len(self._model.layers))
        for i in reversed(range(lowest, len(self._model.layers))):
            yield from self._block_pieces(i, to_input=i > lowest or "embed_tokens.weight" in self._trained)
        bias = self._head_bias_gradient()  # computed from the head's old weight, handed out after the weight's own
        for name in ("lm_head.weight", "embed_tokens.weight"):
            if name in self._trained:
                if before_rows is not None and len(self._ranges) > 1:
                    before_rows(name, partial(self._row_pieces, name))
                yield from self._row_pieces(name)
        if bias is not None:
            yield GradientPiece({"lm_head.bias": bias})

    def _through_final_norm(self, head_gradients: list[mx.array]) -> Arrays:
        """Takes each stream's cotangent from the head's input to the last block's output; the norm's own gradients."""
        norm, sums = self._model.norm, {}
        for stream, gradient in zip(self._streams, head_gradients, strict=True):
            x = stream.inputs.pop()

            def trained_positions(x: mx.array, positions: mx.array = stream.positions) -> mx.array:
                return norm(x).reshape(-1, x.shape[-1])[positions]

            (stream.cotangent,) = vjp({"norm": norm}, trained_positions, [x], gradient, sums)
        return sums

    def _block_pieces(self, index: int, to_input: bool) -> Iterator[GradientPiece]:
        passes, name = self._passes[index], f"layers.{index}"
        if self._model.config.num_experts:
            work = [ExpertWork(stream.inputs.pop(), stream.cotangent, *stream.block_context(index)) for stream in self._streams]
            yield from (GradientPiece(found) for found in expert_gradients(passes.block, name, work, to_input))
            for stream, done in zip(self._streams, work, strict=True):
                stream.cotangent = done.cotangent
            return
        sums: Arrays = {}
        for stream in self._streams:
            x, context = stream.inputs.pop(), stream.block_context(index)
            stream.cotangent, gradients = passes.backward(x, stream.cotangent, context)
            if not to_input:
                stream.cotangent = None  # it would keep what it is computed from
            add(sums, {f"{name}.{path}": gradient for path, gradient in gradients.items()})
            del x, gradients
            mx.eval(sums, stream.cotangent)
        if sums:
            yield GradientPiece(sums)

    def _row_pieces(self, name: str) -> Iterator[GradientPiece]:
        """The gradient of the head's or the embedding's matrix, which may be one and the same."""
        embedding = name == "embed_tokens.weight"
        head = not embedding or self._model.config.tie_word_embeddings
        for rows in self._ranges:
            gradient = self._head_gradients(rows)["weight"] if head else 0.0
            if embedding:  # no name for the summands: the sum is written over one of them
                gradient = self._embedding_gradient(rows) + gradient
            mx.eval(gradient)
            yield GradientPiece({name: gradient}, rows if len(self._ranges) > 1 else None)
            del gradient

    def _head_bias_gradient(self) -> mx.array | None:
        if "lm_head.bias" not in self._trained:
            return None
        gradient = mx.concatenate([self._head_gradients(rows)["bias"] for rows in self._ranges])
        mx.eval(gradient)
        return gradient

    def _head_gradients(self, rows: slice) -> Arrays:
        return vocabulary.head_gradients(self._model.head_weights(), [stream.head for stream in self._streams], rows)

    def _embedding_gradient(self, rows: slice) -> mx.array:
        config = self._model.config
        scale = 1.0 if config.embed_scale is None else config.embed_scale
        total = None
        for stream in self._streams:
            ids = stream.ids if config.padding_id is None else np.where(stream.ids == config.padding_id, -1, stream.ids)
            gradient = vocabulary.embedding_gradient(ids, stream.cotangent.reshape(ids.size, -1) * scale, rows)
            total = gradient if total is None else total + gradient
            del gradient
            mx.eval(total)  # one stream's at a time
        return total


def _forward(model: Decoder, passes: Sequence[BlockPasses], batch: Batch, step_tokens: int) -> _Stream:
    dtype = compute_dtype(model.embed_tokens.weight.dtype)
    ids = mx.array(batch.inputs)
    segments = None if batch.segments is None else mx.array(batch.segments)
    rotation, masks = model.context(ids.shape[1], segments=segments)
    x, inputs = model.embed(ids, dtype), []
    for block, mask in zip(passes, masks, strict=True):
        mx.eval(x)
        inputs.append(x)
        x = block.forward(x, (rotation, mask))
    inputs.append(x)
    positions = mx.array(batch.target_positions)
    hidden = model.norm(x).reshape(-1, x.shape[-1])[positions]  # (B, T, D) -> (N, D)
    mx.eval(x, hidden)
    head = HeadInput(hidden, batch.targets, mx.array(batch.weights / step_tokens))
    return _Stream(batch.inputs.reshape(-1), (rotation, masks), inputs, positions, head)
