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
from typing import Protocol

import mlx.core as mx

from fulltune_nb.data.batching import Batch
from fulltune_nb.errors import NonFiniteError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.training.backward import LossAndGradients, clip_scale, global_norm, step_gradients
from fulltune_nb.training.block_passes import BlockPasses
from fulltune_nb.training.compiled import CompiledGradients
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.finite import check_finite
from fulltune_nb.training.layerwise import GradientPiece, LayerwiseBackward
from fulltune_nb.training.optimizers import Optimizers
from fulltune_nb.training.staged import StagedGradients


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
