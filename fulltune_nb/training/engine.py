"""The two ways to take an optimizer step: over the whole graph, which is fast, and layer by layer, which is lean.

Both give the same step to rounding. What they differ in is what exists at once:

- `WholeGraph`: all blocks' activations in the forward pass, all gradients after the backward pass.
- `Layerwise`: each block's input; the gradients of one block, which is updated before the next one's are computed.

A step that fails between its first and its last update is torn; `training/torn.py` sees to that for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from fulltune_nb.cpu import Kernels, kernels_for, lacks_compiler, streams_for
from fulltune_nb.data.batches import Batch
from fulltune_nb.errors import NonFiniteError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.layerwise import BlockPasses, GradientPiece, LayerwiseBackward
from fulltune_nb.training.loss import Head, chunk_logits, chunks, cross_entropy
from fulltune_nb.training.optimizers import Optimizers

# -- finite: What a step must be before it may change anything: finite

def check_finite(step: int, loss: float, norm: float, batches: Sequence[Batch]) -> None:
    """Nothing where loss and gradient norm of step `step` (from 1) are finite.

    Raises:
        NonFiniteError: names the rows of the step.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    rows = ", ".join(source for batch in batches for source in batch.sources)
    raise NonFiniteError(
        f"step {step}: the loss is {loss} and the gradient's norm {norm}; nothing was updated. The batch's rows: {rows}."
        " Look at these rows, lower the learning rate, or set max_grad_norm."
    )


# -- backward: Loss and gradients of a step, with automatic differentiation over the whole model

Gradients = dict[str, Any]
"""A tree of arrays, shaped as `model.trainable_parameters()`."""


def loss_and_gradients(model: Decoder, batch: Batch, step_tokens: int, checkpoint: bool = False) -> tuple[mx.array, Gradients]:
    """One micro-batch's share of the step's mean loss, and its gradients.

    Args:
        model: the decoder.
        batch: rows and targets.
        step_tokens: trained tokens of the whole optimizer step; each micro-batch is weighted by its tokens, so that
            the shares of all micro-batches add up to the mean over all tokens (not a mean of means).
        checkpoint: keep only block inputs for the backward pass.

    Returns:
        The share (scalar, float32) and the gradients; nothing is evaluated yet.
    """
    arrays = batch_arrays(batch, step_tokens)
    return nn.value_and_grad(model, lambda model: share_of_loss(model, arrays, checkpoint))(model)


def batch_arrays(batch: Batch, step_tokens: int) -> dict[str, mx.array]:
    """A micro-batch as `share_of_loss` takes it."""
    arrays = {
        "inputs": mx.array(batch.inputs),  # (B, T)
        "positions": mx.array(batch.target_positions),  # (N,)
        "targets": mx.array(batch.targets),  # (N,)
        "weights": mx.array(batch.weights / step_tokens),  # (N,)
    }
    return arrays if batch.segments is None else {**arrays, "segments": mx.array(batch.segments)}  # (B, T)


def share_of_loss(model: Decoder, arrays: dict[str, mx.array], checkpoint: bool = False) -> mx.array:
    """A micro-batch's share of the step's mean loss: scalar, float32."""
    hidden = trained_hidden_states(model, arrays, checkpoint)
    return cross_entropy(hidden, model.head_weights(), arrays["targets"], arrays["weights"])


def trained_hidden_states(model: Decoder, arrays: dict[str, mx.array], checkpoint: bool = False) -> mx.array:
    """What the head sees of a micro-batch: (N, D), only positions with a trained target."""
    dtype = model.compute_dtype
    hidden = model.hidden_states(arrays["inputs"], checkpoint=checkpoint, segments=arrays.get("segments"), dtype=dtype)  # (B, T, D)
    return hidden.reshape(-1, hidden.shape[-1])[arrays["positions"]]


LossAndGradients = Callable[[Decoder, Batch, int], tuple[mx.array, Gradients]]


def step_gradients(
    model: Decoder, batches: Sequence[Batch], checkpoint: bool = False, compiled: LossAndGradients | None = None
) -> tuple[mx.array, Gradients]:
    """Mean loss over all trained tokens of a step, and its gradients; the last micro-batch's part is not evaluated yet.

    Args:
        model: the decoder.
        batches: the step's micro-batches.
        checkpoint: keep only block inputs for the backward pass.
        compiled: takes the place of `loss_and_gradients`.
    """
    step_tokens = sum(batch.num_tokens for batch in batches)
    total, gradients = mx.array(0.0), None
    compute = compiled or partial(loss_and_gradients, checkpoint=checkpoint)
    for batch in batches:
        mx.eval(total, gradients)  # one micro-batch's activations at a time
        loss, more = compute(model, batch, step_tokens)
        total = total + loss
        gradients = more if gradients is None else tree_map(mx.add, gradients, more)
    return total, gradients


def global_norm(gradients: Gradients, kernels: Kernels | None = None) -> float:
    """Square root of the sum of all squared elements, by kernels of our own or by MLX."""
    arrays = [array.astype(mx.float32) for _, array in tree_flatten(gradients)]
    if kernels is not None:
        return math.sqrt(kernels.sum_of_squares(arrays))
    parts = []
    for array, stream in zip(arrays, streams_for([array.size for array in arrays]), strict=True):
        with mx.stream(stream):
            parts.append(_sum_of_squares(array))
    return mx.sqrt(sum(parts)).item()


def _sum_of_squares(array: mx.array) -> mx.array:
    # Row sums by a product with ones: MLX's own sum takes twice the time on the CPU.
    squares = mx.square(array).reshape(-1, array.shape[-1])
    return (squares @ mx.ones((array.shape[-1], 1))).sum()


def clip_scale(norm: float, max_norm: float | None) -> float:
    """What gradients of this global norm are multiplied by, as in `torch.nn.utils.clip_grad_norm_`; at most 1."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


# -- compiled: Loss and gradients of the whole graph, compiled: the same numbers with fewer passes over memory. (La

PAYS_FROM = 3e13
"""Operations of a run, 6 a weight and token, from which on half a minute of compiling pays: some five minutes on two cores."""


def choose_compile(model: Decoder, config: TrainConfig, backward: str, tokens: float) -> tuple[bool, str | None]:
    """Whether a run is compiled, and what the user should hear about it.

    Args:
        model: the run's.
        config: the run's; `compile=None` means on a CPU where our own kernels could be compiled, if the run is long enough.
        backward: "whole" or "layerwise".
        tokens: of the whole run.
    """
    if config.compile is False:
        return False, None
    reason = why_not_compiled(model, config, backward)
    if config.compile:
        return reason is None, reason
    weights = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    if reason or kernels_for(weights) is None or 6 * weights * tokens < PAYS_FROM:
        return False, None
    return True, "a long run, so it is compiled: once a machine, the first steps take half a minute more (compile=False leaves that out)"


def why_not_compiled(model: Decoder, config: TrainConfig, backward: str) -> str | None:
    """Why a run cannot be compiled; None: it can.

    Args:
        model: the run's.
        config: the run's.
        backward: "whole" or "layerwise".
    """
    if config.grad_checkpoint and backward == "whole":
        return "compile=True has no effect: compiled, what grad_checkpoint computes again would be found to be there already, and kept"
    if model.config.num_experts:
        return "compile=True has no effect: how many tokens an expert gets is known only when the batch is there"
    if lacks_compiler():
        return "compile=True has no effect: MLX compiles with g++ here, and there is none. On Debian or Ubuntu: apt-get install g++"
    return None


class CompiledGradients:
    """`backward.loss_and_gradients` of one model without experts, compiled once for each shape of batch."""

    def __init__(self, model: Decoder):
        self._compiled = mx.compile(lambda parameters, arrays: _loss_and_gradients(model, parameters, arrays))

    def __call__(self, model: Decoder, batch: Batch, step_tokens: int) -> tuple[mx.array, Gradients]:
        """As `backward.loss_and_gradients`; nothing is evaluated yet."""
        parameters = model.parameters()
        try:
            return self._compiled(parameters, batch_arrays(batch, step_tokens))
        finally:
            model.update(parameters)  # tracing leaves stand-ins in the model


def _loss_and_gradients(model: Decoder, parameters: dict[str, Any], arrays: dict[str, mx.array]) -> tuple[mx.array, Gradients]:
    model.update(parameters)  # frozen ones too: what is not an input would be a constant of the program
    return nn.value_and_grad(model, lambda model: share_of_loss(model, arrays))(model)


# -- staged: Loss and gradients of the whole graph in three stages: the hidden states, the head by a kernel of ou

CHUNK_ELEMENTS = 2**23
"""Logits of a chunk: 32 MiB."""

Flat = dict[str, mx.array]  # module path -> array


class StagedGradients:
    """`backward.loss_and_gradients` of one model without experts (which read their routing while the graph is made).

    Args:
        model: whose trainable parameters get gradients.
        kernels: for the head.
        checkpoint: keep only block inputs for the backward pass.
        compiled: the blocks' passes, for each shape of batch once.
    """

    def __init__(self, model: Decoder, kernels: Kernels, checkpoint: bool = False, compiled: bool = False):
        def in_graph(parameters: dict[str, Any], arrays: Flat, hidden_gradient: mx.array) -> tuple[mx.array, Flat]:
            return _hidden_states_and_gradients(model, parameters, arrays, hidden_gradient, checkpoint)

        self._in_graph = mx.compile(in_graph) if compiled else in_graph
        self._kernels = kernels

    def __call__(self, model: Decoder, batch: Batch, step_tokens: int) -> tuple[mx.array, Gradients]:
        """As `backward.loss_and_gradients`; evaluated."""
        parameters = model.parameters()
        # NaN: whatever would be computed from it too early could not go unnoticed.
        awaited = mx.full((len(batch.targets), model.config.hidden_size), math.nan)
        mx.eval(awaited)
        try:
            hidden, gradients = self._in_graph(parameters, batch_arrays(batch, step_tokens), awaited)
        finally:
            model.update(parameters)  # tracing leaves stand-ins in the model
        mx.eval(hidden)
        trained = dict(tree_flatten(model.trainable_parameters()))
        loss, of_head = self._head(model, hidden, batch.targets, batch.weights / step_tokens, trained, np.asarray(awaited))
        del hidden
        mx.eval(gradients)
        for name, gradient in of_head.items():  # a tied one has both
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        del of_head
        mx.eval(gradients)
        return mx.array(loss), tree_unflatten(list(gradients.items()))

    def _head(
        self, model: Decoder, hidden: mx.array, targets: np.ndarray, weights: np.ndarray, trained: Flat, hidden_gradient: np.ndarray
    ) -> tuple[float, Flat]:
        """The loss, and the gradients of the head's trained arrays by module path; that of `hidden` (N, D) is written into
        `hidden_gradient`. Evaluated."""
        head: Head = {name: array.astype(mx.float32) for name, array in model.head_weights().items()}
        tied = "embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
        paths = {path: name for name, path in (("weight", tied), ("bias", "lm_head.bias")) if name in head and path in trained}
        loss, found = 0.0, {}
        for rows in chunks(len(targets), model.config.vocab_size, CHUNK_ELEMENTS):
            part = hidden[rows]
            logits = chunk_logits(part, head)
            mx.eval(logits)
            loss += self._kernels.cross_entropy(logits, targets[rows], weights[rows])
            back = logits @ head["weight"]
            for path, name in paths.items():
                more = logits.T @ part if name == "weight" else logits.sum(axis=0)
                found[path] = found[path] + more if path in found else more
                del more
            mx.eval(back, found)
            hidden_gradient[rows] = np.asarray(back)
        return loss, found


def _hidden_states_and_gradients(
    model: Decoder, parameters: dict[str, Any], arrays: Flat, hidden_gradient: mx.array, checkpoint: bool
) -> tuple[mx.array, Flat]:
    """The trained positions' hidden states (N, D), and all gradients but the head's, which depend on `hidden_gradient`; lazy."""
    model.update(parameters)  # compiled, what is not an input would be a constant of the program
    trained = {name: array for name, array in tree_flatten(model.trainable_parameters()) if not name.startswith("lm_head.")}

    def hidden_states(*values: mx.array) -> mx.array:
        model.update(tree_unflatten(list(zip(trained, values, strict=True))))
        return trained_hidden_states(model, arrays, checkpoint)

    if not trained:
        return hidden_states(), {}
    (hidden,), gradients = mx.vjp(hidden_states, list(trained.values()), [hidden_gradient])
    return hidden, dict(zip(trained, gradients, strict=True))


# -- engines: The two ways to take an optimizer step: over the whole graph, which is fast, and layer by layer, whi

@dataclass(frozen=True)
class StepResult:
    """What a step tells about itself."""

    loss: float
    """Mean over the step's trained tokens, before the update."""
    grad_norm: float
    """Of all gradients together, before clipping."""


class Engine(Protocol):
    """Takes optimizer steps."""

    def step(self, number: int, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Forward, backward, update; evaluated.

        Args:
            number: of the step, from 1; for messages.
            batches: its micro-batches.
            learning_rate: of this step.

        Raises:
            NonFiniteError: loss or gradient is NaN or inf.
        """


class WholeGraph:
    """Automatic differentiation over the whole model, then the update."""

    def __init__(self, model: Decoder, optimizers: Optimizers, config: TrainConfig, compiles: bool):
        self._model, self._optimizers, self._config = model, optimizers, config
        self._gradients: LossAndGradients | None = None  # MLX's own
        if optimizers.kernels and not model.config.num_experts:
            self._gradients = StagedGradients(model, optimizers.kernels, config.grad_checkpoint, compiles)
        elif compiles:
            self._gradients = CompiledGradients(model)

    def __repr__(self) -> str:
        return "WholeGraph()"

    def step(self, number: int, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        loss, gradients = step_gradients(self._model, batches, self._config.grad_checkpoint, self._gradients)
        mx.eval(loss, gradients)  # before the norm: in one graph with it, grad_checkpoint's peak doubles
        result = StepResult(loss.item(), global_norm(gradients, self._optimizers.kernels))
        check_finite(number, result.loss, result.grad_norm, batches)
        scale = clip_scale(result.grad_norm, self._config.max_grad_norm)
        self._optimizers.update(self._model, gradients, learning_rate, scale)
        return result


class Layerwise:
    """One block's backward pass after the other, each followed by its update.

    With `max_grad_norm` everything is computed twice: the gradient's norm has to be known before the first update.
    """

    def __init__(self, model: Decoder, optimizers: Optimizers, config: TrainConfig, compiles: bool):
        self._model, self._optimizers, self._config = model, optimizers, config
        self._passes = [BlockPasses(block, compiles) for block in model.layers]

    def __repr__(self) -> str:
        return "Layerwise()"

    def step(self, number: int, batches: Sequence[Batch], learning_rate: float) -> StepResult:
        scale = self._clip_scale(number, batches)
        backward = LayerwiseBackward(self._model, batches, self._passes, self._optimizers.kernels)
        check_finite(number, backward.loss, backward.last_gradient_norm, batches)
        return StepResult(backward.loss, self._update(number, backward, learning_rate, scale))

    def _clip_scale(self, number: int, batches: Sequence[Batch]) -> float:
        if self._config.max_grad_norm is None:
            return 1.0
        backward = LayerwiseBackward(self._model, batches, self._passes, self._optimizers.kernels)
        # A loop's variable would hold a piece while the next is computed.
        norm = math.sqrt(sum(map(self._sum_of_squares, backward.pieces())))
        check_finite(number, backward.loss, norm, batches)
        return clip_scale(norm, self._config.max_grad_norm)

    def _update(self, number: int, backward: LayerwiseBackward, learning_rate: float, scale: float) -> float:
        """Updates everything and returns the gradient's norm."""
        squares = 0.0
        self._optimizers.begin_step(learning_rate, scale)
        for piece in backward.pieces(before_rows=self._observe):
            squares += self._sum_of_squares(piece)
            if not math.isfinite(squares):
                raise NonFiniteError(
                    f"step {number}: a gradient of {', '.join(piece.gradients)} is NaN or inf. Lower the learning rate, or set"
                    " max_grad_norm: then all gradients are looked at before the first update."
                )
            self._optimizers.update_tensors(self._model, piece.gradients, rows=piece.rows)
            del piece  # before the next one is computed
        self._optimizers.end_step()
        return math.sqrt(squares)

    def _observe(self, name: str, rows: Callable[[], Iterator[GradientPiece]]) -> None:
        """Lets a rule that wants to see all rows of a matrix before it updates some of them see them."""
        for _ in range(self._optimizers.passes(name)):
            for piece in rows():
                self._optimizers.observe(self._model, piece.gradients, piece.rows)

    def _sum_of_squares(self, piece: GradientPiece) -> float:
        return global_norm(piece.gradients, self._optimizers.kernels) ** 2


ENGINES: dict[str, type[Engine]] = {"whole": WholeGraph, "layerwise": Layerwise}
