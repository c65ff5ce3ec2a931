"""The gradients of a step piece by piece, from the last block to the first, none living longer than its piece.

The forward pass keeps only each block's input (Chen et al. 2016). The backward pass computes one block again at a time and hands
out its gradients; whoever takes them, adds them up or updates the weights with them, before the next block's are computed (Lv et
al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources"). Micro-batches of a step go through each
block one after the other, so that their gradients are summed block by block.

Dimension letters: B rows, T tokens, M = B * T positions, D hidden_size, N trained positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from fulltune_nb.cpu import Kernels
from fulltune_nb.data.batches import Batch
from fulltune_nb.models.decoder import Block, Decoder, Rotation, Routing
from fulltune_nb.training import vocabulary
from fulltune_nb.training.parameters import lowest_trained_block
from fulltune_nb.training.vocabulary import HeadInput

# -- piecewise: The backward pass through a part of the model, evaluated at once

Arrays = dict[str, mx.array]


def vjp(
    modules: Mapping[str, nn.Module],
    function: Callable[..., mx.array],
    inputs: Sequence[mx.array],
    cotangent: mx.array,
    sums: Arrays,
    to_inputs: bool = True,
) -> list[mx.array | None]:
    """Gradients with respect to the inputs; those of the modules' trainable parameters are added to `sums`. All evaluated.

    Args:
        modules: by module path; `function` uses their parameters.
        function: of the inputs.
        inputs: arrays.
        cotangent: gradient with respect to the function's result.
        sums: module path of a parameter -> gradients so far.
        to_inputs: whether gradients with respect to the inputs are needed; where not, they are None.
    """
    found, of_parameters = gradients(modules, function, inputs, cotangent)
    found = found if to_inputs else [None] * len(inputs)
    add(sums, of_parameters)
    mx.eval(sums, found)
    return found


def add(sums: Arrays, gradients: Arrays) -> None:
    """Adds gradients to those so far; lazy."""
    for name, gradient in gradients.items():
        sums[name] = sums[name] + gradient if name in sums else gradient


def gradients(
    modules: Mapping[str, nn.Module], function: Callable[..., mx.array], inputs: Sequence[mx.array], cotangent: mx.array
) -> tuple[list[mx.array], Arrays]:
    """Gradients with respect to the inputs, and to the modules' trainable parameters by module path; lazy.

    Arguments as for `vjp`; a module of path "" gives its parameters by their names in it.
    """
    flat = {path: tree_flatten(module.trainable_parameters()) for path, module in modules.items()}
    names = [(path, name) for path, own in flat.items() for name, _ in own]
    arrays = [array for own in flat.values() for _, array in own]

    def of_parameters(*values: mx.array) -> mx.array:
        given = dict(zip(names, values[len(inputs) :], strict=True))
        for path, module in modules.items():
            _put(module, [(name, given[path, name]) for name, _ in flat[path]])
        return function(*values[: len(inputs)])

    try:
        _, found = mx.vjp(of_parameters, [*inputs, *arrays], [cotangent])
    finally:
        for path, module in modules.items():
            _put(module, flat[path])
    paths = [f"{path}.{name}" if path else name for path, name in names]
    return found[: len(inputs)], dict(zip(paths, found[len(inputs) :], strict=True))


def _put(module: nn.Module, arrays: list[tuple[str, mx.array]]) -> None:
    if arrays:
        module.update(tree_unflatten(arrays))


# -- block_passes: The passes through one block of the decoder by itself, which the layerwise engine is made of; compil

Context = tuple[Rotation, mx.array | None]
"""A block's rotation table and mask."""


class BlockPasses:
    """A block's forward pass, and its backward pass, which computes the forward pass again.

    Args:
        block: without experts if compiled: how many tokens an expert gets is known only when the batch is there.
        compiled: once for each shape of batch. All blocks of a model share what g++ makes of it on the CPU (see `compiled`).
    """

    def __init__(self, block: Block, compiled: bool = False):
        self.block = block
        self._forward = mx.compile(self._output) if compiled else self._output
        self._backward = mx.compile(self._gradients) if compiled else self._gradients

    def forward(self, x: mx.array, context: Context) -> mx.array:
        """The block's output (B, T, D); lazy."""
        return self._run(self._forward, x, context)

    def backward(self, x: mx.array, cotangent: mx.array, context: Context) -> tuple[mx.array, Arrays]:
        """Gradients with respect to x (B, T, D), and to the trainable parameters by their names in the block; lazy."""
        return self._run(self._backward, x, cotangent, context)

    def _run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        parameters = self.block.parameters()
        try:
            return function(parameters, *inputs)
        finally:
            self.block.update(parameters)  # tracing leaves stand-ins in the block

    def _output(self, parameters: dict[str, Any], x: mx.array, context: Context) -> mx.array:
        self.block.update(parameters)  # frozen ones too: what is not an input would be a constant of the program
        return self.block(x, *context)

    def _gradients(self, parameters: dict[str, Any], x: mx.array, cotangent: mx.array, context: Context) -> tuple[mx.array, Arrays]:
        self.block.update(parameters)
        (to_x,), own = gradients({"": self.block}, lambda x: self.block(x, *context), [x], cotangent)
        return to_x, own


# -- expert_gradients: The backward pass through a block with a mixture of experts, one expert at a time

@dataclass
class ExpertWork:
    """One micro-batch at a block."""

    x: mx.array
    """The block's input (B, T, D)."""
    cotangent: mx.array
    """Gradient with respect to the block's output (B, T, D); with respect to its input, when the block is done."""
    rotation: Rotation
    mask: mx.array | None


@dataclass
class _Routed:
    """What the backward pass through the experts needs of one micro-batch."""

    attended: mx.array
    """(B, T, D), input of the block's second half."""
    tokens: mx.array
    """(M, D), the same after the norm."""
    routing: Routing
    to_tokens: mx.array | None
    """Gradient with respect to `tokens`, growing; None, as the next, where nobody needs it."""
    to_outputs: mx.array | None
    """Gradient with respect to the experts' outputs, one expert after the other (M * k, D)."""


def expert_gradients(block: Block, name: str, work: Sequence[ExpertWork], to_input: bool = True) -> Iterator[Arrays]:
    """The block's gradients in pieces: the router's, each expert's, then the rest; updates `cotangent` of the work.

    Args:
        block: its mlp is a `MixtureOfExperts`.
        name: the block's module path.
        work: the micro-batches; their gradients are summed.
        to_input: whether gradients with respect to the block's input are needed; where not, `cotangent` is None at the end, and
            nothing is computed that no trained parameter of the block needs.
    """
    below = to_input or _is_trained(block.input_norm, block.attention, block.post_attention_norm)
    router: Arrays = {}
    routed = [_route(block, name, one, router, below or _is_trained(*block.mlp.experts)) for one in work]
    if router:
        yield router
    for e, expert in enumerate(block.mlp.experts):
        if not (below or _is_trained(expert)):
            continue
        sums: Arrays = {}
        for one in routed:
            _through_expert(block, name, e, one, sums, below)
        if not sums:  # no token went there; the optimizer takes a step all the same
            trained = tree_flatten(expert.trainable_parameters())
            sums = {f"{name}.mlp.experts.{e}.{path}": mx.zeros(array.shape) for path, array in trained}
        if sums:
            yield sums
        del sums  # before the next expert's, or attention's, are computed
    rest: Arrays = {}
    for one, done in zip(work, routed, strict=True):
        _through_attention(block, name, one, done if below else None, rest, to_input)
    if rest:
        yield rest


def _is_trained(*modules: nn.Module) -> bool:
    return any(tree_flatten(module.trainable_parameters()) for module in modules)


def _route(block: Block, name: str, one: ExpertWork, sums: Arrays, to_experts: bool) -> _Routed:
    """The block's forward pass up to the experts' outputs, and the backward pass through their mixture."""
    moe = block.mlp
    attended = one.x + block.attention(block.input_norm(one.x), one.rotation, one.mask)
    tokens = block.post_attention_norm(attended).reshape(-1, one.x.shape[-1])  # (B, T, D) -> (M, D)
    mx.eval(attended, tokens)
    routing, outputs = moe.route(tokens), []
    for expert, rows in zip(moe.experts, routing.rows, strict=True):
        if rows.size:
            outputs.append(expert(tokens[rows]))
            mx.eval(outputs)
    cotangent = one.cotangent.reshape(tokens.shape)
    # The router is the mixture's only parameter; the experts' are not used by `combine`.
    modules = {f"{name}.mlp.router": moe.router}
    inputs = [tokens, mx.concatenate(outputs)]
    to_tokens, to_outputs = vjp(modules, lambda t, o: moe.combine(t, o, routing), inputs, cotangent, sums, to_experts)
    return _Routed(attended, tokens, routing, to_tokens, to_outputs)


def _through_expert(block: Block, name: str, e: int, one: _Routed, sums: Arrays, to_tokens: bool) -> None:
    rows = one.routing.rows[e]
    if not rows.size:
        return
    begin = [0, *accumulate(part.size for part in one.routing.rows)][e]
    expert = block.mlp.experts[e]
    cotangent = one.to_outputs[begin : begin + rows.size]
    (to_rows,) = vjp({f"{name}.mlp.experts.{e}": expert}, expert, [one.tokens[rows]], cotangent, sums, to_tokens)
    if to_tokens:
        one.to_tokens = one.to_tokens.at[rows].add(to_rows)
        mx.eval(one.to_tokens)


def _through_attention(block: Block, name: str, one: ExpertWork, done: _Routed | None, sums: Arrays, to_input: bool) -> None:
    """From the experts' input to the block's. `done`: None where nothing below the experts needs a gradient."""
    cotangent, one.cotangent = one.cotangent, None
    if done is None:
        return
    norm = {f"{name}.post_attention_norm": block.post_attention_norm}
    to_tokens = done.to_tokens.reshape(one.x.shape)
    (to_attended,) = vjp(norm, block.post_attention_norm, [done.attended], to_tokens, sums)
    half = {f"{name}.input_norm": block.input_norm, f"{name}.attention": block.attention}
    if not (to_input or _is_trained(*half.values())):
        return

    def attend(x: mx.array) -> mx.array:
        return x + block.attention(block.input_norm(x), one.rotation, one.mask)

    (one.cotangent,) = vjp(half, attend, [one.x], cotangent + to_attended, sums, to_input)


# -- layerwise: The gradients of a step piece by piece, from the last block to the first, none living longer than it

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
    dtype = model.compute_dtype
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
