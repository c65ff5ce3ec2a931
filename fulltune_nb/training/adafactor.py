"""Adafactor (Shazeer & Stern 2018): a second moment of a matrix kept as the means of its rows and columns.

The state of a matrix (R, C) is R + C numbers. But they are means over the whole gradient, so that a row cannot be updated before
all rows have been seen: once for the means, and once more for the size of the update where that is clipped (`clip_threshold`). A
`TensorUpdate` takes a gradient in pieces of rows, pass by pass, and then updates them in pieces; nothing of the matrix's size is held.

A stack of matrices (E, R, C), as of experts, is E parameters, each with means and clipping of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from fulltune_nb.errors import TrainingError
from fulltune_nb.training.rules import Shape, Slot, State, put, take

_compiled = partial(mx.compile, shapeless=True)
Scalars = dict[str, float]


class Adafactor:
    """The rule; what it computes is what `mlx.optimizers.Adafactor` does, without relative steps.

    With `beta_1` there is a first moment of the parameter's size too.
    """

    by_rows = False

    def __init__(self, settings: Mapping[str, Any]):
        self.eps, self.clip_threshold, self.decay_rate = settings["eps"], settings["clip_threshold"], settings["decay_rate"]
        self.beta_1, self.scale_parameter = settings["beta_1"], settings["scale_parameter"]
        self.passes = 1 if self.clip_threshold is None else 2

    def in_place(self, weight_decay: float) -> bool:
        return False

    def slots(self, shape: Shape) -> dict[str, Slot]:
        if len(shape) >= 2:
            own = {"exp_avg_sq_row": Slot(shape[:-1]), "exp_avg_sq_col": Slot((*shape[:-2], shape[-1]))}
        else:
            own = {"exp_avg_sq": Slot(shape)}
        return own if self.beta_1 is None else {**own, "exp_avg": Slot(shape)}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> Scalars:
        return {"beta_2": 1.0 - step**self.decay_rate, "rate": learning_rate, "decay": weight_decay, "scale": gradient_scale}

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: Scalars) -> tuple[mx.array, State]:
        """A vector; matrices go through `TensorUpdate`."""
        squares = _squares(g, mx.array(scalars["scale"]))
        mean = _moved(state["exp_avg_sq"], squares + self.eps[0], scalars["beta_2"])
        weights = mx.rsqrt(mean)
        rate = scalars["rate"] * self.parameter_scale(mx.square(p.astype(mx.float32)), p.size)
        factor = self.clip_factor(mx.square(weights) * squares, p.size)
        new, moment = self.step(p, g, weights, state.get("exp_avg"), rate, factor, scalars)
        return new, {"exp_avg_sq": mean} | ({} if moment is None else {"exp_avg": moment})

    def parameter_scale(self, squares: mx.array, size: int) -> Any:
        """Factor on the learning rate. `squares`: of the parameter, summed here."""
        return mx.maximum(self.eps[1], mx.sqrt(squares.sum() / size)) if self.scale_parameter else 1.0

    def clip_factor(self, squares: mx.array, size: int) -> Any:
        """Factor on the update that keeps its root mean square below the threshold. `squares`: of the update, summed here."""
        return 1.0 if self.clip_threshold is None else 1.0 / mx.maximum(1.0, mx.sqrt(squares.sum() / size) / self.clip_threshold)

    def step(self, p, g, weights, moment: mx.array | None, rate, factor, scalars: Scalars) -> tuple[mx.array, mx.array | None]:
        """The parameter (float32), and the first moment where there is one. `weights`: of the size of g, which they multiply."""
        kept = mx.array(1.0 - scalars["decay"] * rate, dtype=mx.float32)
        size = mx.array(rate * factor * scalars["scale"], dtype=mx.float32)
        if moment is None:
            return _descend(p, g, weights, kept, size), None
        moment = _first_moment(moment, g, weights, mx.array(self.beta_1), mx.array((1.0 - self.beta_1) * size))
        return kept * p.astype(mx.float32) - moment, moment


@dataclass
class _Matrix:
    """One matrix (R, C) in one step."""

    seen: int = 0
    """Rows of this pass."""
    passes: int = 0
    """Passes that are done."""
    row_sums: dict[int, mx.array] = field(default_factory=dict)
    """First row of a piece -> sums over its rows; so are the next two."""
    parameter_squares: dict[int, mx.array] = field(default_factory=dict)
    update_squares: dict[int, mx.array] = field(default_factory=dict)
    column_sums: Any = 0.0
    row_weights: mx.array | None = None
    """(R,): the update is gradient * row_weights * column_weights * factor."""
    column_weights: mx.array | None = None
    rate: Any = 0.0
    factor: Any = 1.0


class TensorUpdate:
    """The update of one tensor of matrices in one step.

    Rows are those of the matrix (R, C) that the tensor (..., C) is seen as; a piece of rows lies within one matrix of a stack.

    Args:
        rule: of the tensor.
        shape: of the tensor, two dimensions or more.
        state: of the tensor; the new means are put into it when the first pass over a matrix is done.
        scalars: of the step.
    """

    def __init__(self, rule: Adafactor, shape: Shape, state: State, scalars: Scalars):
        self._rule, self._state, self._scalars = rule, state, scalars
        self._rank, self._rows, self._columns = len(shape), shape[-2], shape[-1]
        self._matrices = [_Matrix() for _ in range(math.prod(shape[:-2]))]

    def passes_left(self, rows: slice) -> int:
        """How often the gradients of all rows of this matrix have still to be observed."""
        return self._rule.passes - self._matrices[rows.start // self._rows].passes

    @property
    def changed(self) -> bool:
        """Whether new means were put into the state."""
        return any(matrix.passes for matrix in self._matrices)

    def observe(self, p: mx.array, g: mx.array, rows: slice) -> None:
        """Take in some rows of parameter and gradient. Each row once in a pass, in any order; evaluated when it returns."""
        index = rows.start // self._rows
        matrix, first = self._matrices[index], rows.start - index * self._rows
        squares = _squares(g, mx.array(self._scalars["scale"]))
        if matrix.passes == 0:
            matrix.row_sums[first] = squares.sum(axis=1)
            matrix.column_sums = matrix.column_sums + squares.sum(axis=0)
            if self._rule.scale_parameter:
                matrix.parameter_squares[first] = mx.square(p.astype(mx.float32)).sum(axis=1)
            mx.eval(matrix.row_sums[first], matrix.column_sums, matrix.parameter_squares)
        else:
            in_row = (squares * mx.square(matrix.column_weights)).sum(axis=1)
            matrix.update_squares[first] = in_row * mx.square(matrix.row_weights[first : first + g.shape[0]])
            mx.eval(matrix.update_squares[first])
        matrix.seen += g.shape[0]
        if matrix.seen > self._rows:
            raise TrainingError(f"{matrix.seen} rows of a matrix with {self._rows} were observed in one pass: each must come once.")
        if matrix.seen == self._rows:
            self._end_pass(index, matrix)

    def apply(self, p: mx.array, g: mx.array, moment: mx.array | None, rows: slice) -> tuple[mx.array, mx.array | None]:
        """Some rows of the parameter (float32) after the step, and of the first moment; lazy."""
        index = rows.start // self._rows
        matrix, first = self._matrices[index], rows.start - index * self._rows
        weights = matrix.row_weights[first : first + g.shape[0], None] * matrix.column_weights
        return self._rule.step(p, g, weights, moment, matrix.rate, matrix.factor, self._scalars)

    def _end_pass(self, index: int, matrix: _Matrix) -> None:
        matrix.seen = 0
        matrix.passes += 1
        size = self._rows * self._columns
        if matrix.passes == 2:
            matrix.factor = self._rule.clip_factor(_joined(matrix.update_squares), size)
            mx.eval(matrix.factor)
            return
        eps, beta, state, rank = self._rule.eps[0], self._scalars["beta_2"], self._state, self._rank
        own, one = slice(index * self._rows, (index + 1) * self._rows), slice(index, index + 1)
        row = _moved(take(state["exp_avg_sq_row"], rank, own), _joined(matrix.row_sums) / self._columns + eps, beta)
        column = _moved(take(state["exp_avg_sq_col"], rank - 1, one)[0], matrix.column_sums / self._rows + eps, beta)
        matrix.row_weights, matrix.column_weights = mx.rsqrt(row / row.mean()), mx.rsqrt(column)
        matrix.rate = self._scalars["rate"] * self._rule.parameter_scale(_joined(matrix.parameter_squares), size)
        mx.eval(row, column, matrix.row_weights, matrix.column_weights, matrix.rate)
        state["exp_avg_sq_row"] = put(state["exp_avg_sq_row"], rank, own, row)
        state["exp_avg_sq_col"] = put(state["exp_avg_sq_col"], rank - 1, one, column[None])
        mx.eval(state["exp_avg_sq_row"], state["exp_avg_sq_col"])


def _joined(by_row: Mapping[int, mx.array]) -> mx.array:
    """Pieces by their first row -> (R,): in this order the sum does not hang on the order they came in."""
    return mx.concatenate([by_row[first] for first in sorted(by_row)]) if by_row else mx.array([0.0])


def _moved(old: mx.array, new: mx.array, beta: float) -> mx.array:
    return beta * old + (1.0 - beta) * new


@_compiled
def _squares(g: mx.array, scale: mx.array) -> mx.array:
    return mx.square(g.astype(mx.float32) * scale)


@_compiled
def _descend(p: mx.array, g: mx.array, weights: mx.array, kept: mx.array, size: mx.array) -> mx.array:
    return kept * p.astype(mx.float32) - size * (weights * g.astype(mx.float32))


@_compiled
def _first_moment(moment: mx.array, g: mx.array, weights: mx.array, keep: mx.array, take: mx.array) -> mx.array:
    return keep * moment + take * (weights * g.astype(mx.float32))
