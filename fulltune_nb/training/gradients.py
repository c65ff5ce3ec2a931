"""The loss and gradients of one optimizer step, whichever engine computes them, and what is asked of them before an update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from fulltune_nb.cpu import Kernels, on_cpu, streams_for
from fulltune_nb.data.batches import Batch
from fulltune_nb.errors import NonFiniteError
from fulltune_nb.models.parameters import Arrays
from fulltune_nb.training.optimizers import Optimizers

FEW = 2**16
"""Elements of a gradient in half precision whose squares a GPU adds up in float32, as there may be few rows."""
MOST_ROWS = 2**16 - 1
"""Products that every GPU computes in one kernel."""


@dataclass(frozen=True)
class GradientPiece:
    """Gradients of some tensors, or of some rows of one."""

    gradients: Arrays
    """Module path -> gradient, summed over the step's micro-batches; evaluated."""
    rows: slice | None = None
    """The rows of the one tensor that these are; None: whole tensors."""


class StepGradients(Protocol):
    """The loss and gradients of one step.

        gradients = engine.gradients(number, batches)
        gradients.check_finite()
        for piece in gradients.pieces(optimizers):
            ...                               # may change the weights the piece belongs to
            del piece                         # before the next one is computed

    Attributes:
        loss: mean over all trained tokens of the step.
    """

    loss: float

    def norm(self) -> float:
        """Square root of the sum of all squared elements. Layer by layer it takes a backward pass of its own, unless all pieces
        were handed out before."""

    def check_finite(self) -> None:
        """To be called before anything is changed.

        Raises:
            NonFiniteError: the loss or the norm is NaN or inf; names the rows of the step.
        """

    def pieces(self, optimizers: Optimizers | None = None) -> Iterator[GradientPiece]:
        """Every gradient once; the weights of a piece may be changed as soon as it is handed out.

        Args:
            optimizers: before the first piece of a matrix that comes by rows, its `observe` is shown all rows, `passes` times.

        Raises:
            NonFiniteError: layer by layer only: a gradient further down is NaN or inf, when others have been handed out.
        """


class Engine(Protocol):
    """Computes the gradients of optimizer steps."""

    def gradients(self, number: int, batches: Sequence[Batch]) -> StepGradients:
        """Forward and backward.

        Args:
            number: of the step, from 1; for messages.
            batches: its micro-batches, each weighted by its trained tokens.
        """


def add(sums: Arrays, gradients: Mapping[str, mx.array]) -> None:
    """Adds gradients to those so far; lazy. A GPU's, which are in the weights' dtype, are added in float32."""
    as_they_are = on_cpu()  # nearly all are float32 there, and runs that began with the few others go on to the same bits
    for name, gradient in gradients.items():
        if name not in sums:
            sums[name] = gradient
        elif as_they_are:
            sums[name] = sums[name] + gradient
        else:
            sums[name] = sums[name].astype(mx.float32) + gradient.astype(mx.float32)


def global_norm(gradients: Mapping[str, mx.array], kernels: Kernels | None = None) -> float:
    """Square root of the sum of all squared elements, by kernels of our own or by MLX."""
    if kernels is not None:
        return math.sqrt(kernels.sum_of_squares([array.astype(mx.float32) for array in gradients.values()]))
    return norm_of(gradients).item()


def read(numbers: Sequence[float | mx.array]) -> list[float]:
    """The values of numbers, some of which may still be on a GPU; all are waited for at once."""
    arrays = [number for number in numbers if isinstance(number, mx.array)]
    values = iter(mx.stack(arrays).tolist() if arrays else ())
    return [next(values) if isinstance(number, mx.array) else number for number in numbers]


def norm_of(gradients: Mapping[str, mx.array]) -> mx.array:
    """`global_norm` by MLX; lazy, float32."""
    if not on_cpu():
        return _norm_by_products(list(gradients.values()))
    arrays, parts = [array.astype(mx.float32) for array in gradients.values()], []
    for array, stream in zip(arrays, streams_for([array.size for array in arrays]), strict=True):
        with mx.stream(stream):
            # Row sums by a product with ones: MLX's own sum takes twice the time on the CPU.
            squares = mx.square(array).reshape(-1, array.shape[-1])
            parts.append((squares @ mx.ones((array.shape[-1], 1))).sum())
    return mx.sqrt(sum(parts))


@mx.compile
def _norm_by_products(arrays: list[mx.array]) -> mx.array:
    # A row's product with itself reads the row and writes a number, where squares would be written and read again, in float32. In half
    # precision each number is rounded, up or down, which the sum over many rows evens out.
    sums = []
    for array in arrays:
        array = array.astype(mx.float32) if array.size < FEW else array
        count = array.size // array.shape[-1]
        if count > MOST_ROWS:
            count = max(most for most in range(1, MOST_ROWS + 1) if array.size % most == 0)
        rows = array.reshape(count, 1, -1)
        sums.append((rows @ rows.swapaxes(-1, -2)).astype(mx.float32).sum())
    return mx.sqrt(sum(sums))  # compiled, ten of these are added by one kernel


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients of this global norm are multiplied by, as in `torch.nn.utils.clip_grad_norm_`; at most 1."""
    return min(1.0, max_norm / (norm + 1e-6))


def check_finite(number: int, loss: float, norm: float, batches: Sequence[Batch]) -> None:
    """See `StepGradients.check_finite`."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    rows = ", ".join(source for batch in batches for source in batch.sources)
    raise NonFiniteError(
        f"step {number}: the loss is {loss} and the gradient's norm {norm}; nothing was updated. The batch's rows: {rows}."
        " Look at these rows, lower the learning rate, or set max_grad_norm."
    )
