"""Adafactor (Shazeer & Stern 2018): a second moment of a matrix kept as the means of its rows and columns.

The state of a matrix (R, C) is R + C numbers. But they are means over the whole gradient, so that a row cannot be updated before
all rows have been seen: once for the means, and once more for the size of the update where that is clipped (`clip_threshold`). A
gradient is therefore observed in pieces of rows, pass by pass, and then updated in pieces; nothing of the matrix's size is held.

A stack of matrices (E, R, C), as of experts, is E parameters, each with means and clipping of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from fulltune_nb.cpu import evaluate
from fulltune_nb.errors import TrainingError
from fulltune_nb.training import rules
from fulltune_nb.training.rules import Piece, Rule, Shape, Slot, State, Tensor, at_a_time, cut, put, scalars_of, take

_compiled = partial(mx.compile, shapeless=True)


@dataclass
class _Matrix:
    """What was seen of one matrix (R, C) in one step."""

    first_row: int
    """Where it begins in a stack."""
    seen: int = 0
    """Rows of this pass."""
    passes: int = 0
    """Passes that are done."""
    row_sums: dict[int, mx.array] = field(default_factory=dict)
    """First row of a piece -> sums over its rows; so are the next two."""
    parameter_squares: dict[int, mx.array] = field(default_factory=dict)
    update_squares: dict[int, mx.array] = field(default_factory=dict)
    column_sums: Any = 0.0
    row_means: mx.array | None = None
    """(R,), the new ones, known after the first pass; so are the next three."""
    mean: mx.array | None = None
    """Of all elements."""
    column_means: mx.array | None = None
    """(C,)"""
    rate: Any = 0.0
    factor: Any = 1.0
    """Known after the second pass, if there is one."""
    is_stored: bool = False
    """Whether the new means are in the state."""

    def weights(self, rows: slice) -> tuple[mx.array, mx.array]:
        """Of some rows of the tensor, and of the columns (C,): the update is gradient * row weights * column weights * factor."""
        own = slice(rows.start - self.first_row, rows.stop - self.first_row)
        return mx.rsqrt(self.row_means[own] / self.mean), mx.rsqrt(self.column_means)


@dataclass
class _Step:
    """One step, for tensors of one group."""

    beta_2: float
    rate: float
    decay: float
    scale: float
    """Of the gradients."""
    matrices: dict[tuple[str, int], _Matrix] = field(default_factory=dict)
    """Those seen so far, by tensor and place in a stack."""
    numbers: tuple[mx.array, ...] = ()
    """For kernels of a GPU: `beta_2`, what it is below 1, rate, decay, scale."""

    def matrix(self, tensor: Tensor, rows: slice) -> _Matrix:
        """The matrix that some rows of a tensor lie in."""
        size = tensor.array.shape[-2]
        index = rows.start // size
        return self.matrices.setdefault((tensor.name, index), _Matrix(index * size))


class Adafactor(Rule):
    """What `mlx.optimizers.Adafactor` computes, without relative steps.

    With `beta_1` there is a first moment of the parameter's size too.
    """

    by_rows = False
    temporary_bytes = (3, 9)

    def __init__(self, settings: Mapping[str, Any]):
        self.eps, self.clip_threshold, self.decay_rate = settings["eps"], settings["clip_threshold"], settings["decay_rate"]
        self.beta_1, self.scale_parameter = settings["beta_1"], settings["scale_parameter"]
        self.passes = 1 if self.clip_threshold is None else 2

    def slots(self, shape: Shape) -> dict[str, Slot]:
        if len(shape) >= 2:
            own = {"exp_avg_sq_row": Slot(shape[:-1]), "exp_avg_sq_col": Slot((*shape[:-2], shape[-1]))}
        else:
            own = {"exp_avg_sq": Slot(shape)}
        return own if self.beta_1 is None else {**own, "exp_avg": Slot(shape)}

    def update_bytes(self, shapes: Sequence[Shape], dtype: mx.Dtype, weight_decay: float) -> int:
        """As every rule's, and the new means, which stand beside the old ones until the rows are updated."""
        return super().update_bytes(shapes, dtype, weight_decay) + self._means_bytes(shapes)

    def _means_bytes(self, shapes: Sequence[Shape]) -> int:
        slots = ((name, slot) for shape in shapes if len(shape) >= 2 for name, slot in self.slots(shape).items())
        return sum(slot.nbytes for name, slot in slots if name != "exp_avg")

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> _Step:
        return _Step(1.0 - step**self.decay_rate, learning_rate, weight_decay, gradient_scale)

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: _Step) -> tuple[mx.array, State]:
        """A vector after the step; of a matrix all rows have to be observed first."""
        squares = _squares(g, mx.array(scalars.scale))
        mean = _moved(state["exp_avg_sq"], squares + self.eps[0], scalars.beta_2)
        weights = mx.rsqrt(mean)
        rate = scalars.rate * self._parameter_scale(mx.square(p.astype(mx.float32)), p.size)
        factor = self._clip_factor(mx.square(weights) * squares, p.size)
        new, moment = self._descended(p, g, weights, state.get("exp_avg"), rate, factor, scalars)
        return new, {"exp_avg_sq": mean, **moment}

    def pieces(self, tensors: Sequence[Tensor], scalars: _Step) -> list[Piece]:
        found = super().pieces([tensor for tensor in tensors if tensor.array.ndim < 2], scalars)
        for tensor in (tensor for tensor in tensors if tensor.array.ndim >= 2):
            for own in self._cut(tensor, scalars):
                self._check_observed(own)
                found += own
        return found

    def observe(self, tensor: Tensor, scalars: _Step) -> None:
        for own in self._cut(tensor, scalars):
            for piece in own:
                self._observe(piece)

    def result(self, piece: Piece) -> tuple[mx.array, State]:
        if piece.rows is None:
            return super().result(piece)
        matrix, moment = piece.scalars.matrix(piece.tensor, piece.rows), piece.tensor.state.get("exp_avg")  # other slots are means
        moment = None if moment is None else take(moment, moment.ndim, piece.rows)
        row_weights, column_weights = matrix.weights(piece.rows)
        weights = row_weights[:, None] * column_weights
        return self._descended(piece.weight, piece.gradient, weights, moment, matrix.rate, matrix.factor, piece.scalars)

    def update(self, pieces: Sequence[Piece], before: Callable[[list[Piece]], None], after: Callable[[list[Piece]], None]) -> None:
        def observed(batch: list[Piece]) -> None:
            for piece in batch:
                if piece.rows is not None:
                    self._observe_rest(piece)
            before(batch)

        super().update(pieces, observed, after)

    def update_batch(self, batch: Sequence[Piece]) -> None:
        for piece in batch:
            if piece.rows is not None:
                self._store_means(piece)
        super().update_batch(batch)

    def _cut(self, tensor: Tensor, step: _Step) -> list[list[Piece]]:
        """For each matrix of a stack, the rows that the gradient is of in pieces."""
        rows, (*_, size, columns) = tensor.rows, tensor.array.shape
        matrices = (slice(row, min(row + size, rows.stop)) for row in range(rows.start, rows.stop, size))
        return [[Piece(tensor, part, self, step) for part in cut(own, columns)] for own in matrices]

    def _descended(self, p, g, weights, moment, rate, factor, step: _Step) -> tuple[mx.array, State]:
        """The parameter (float32), and the first moment where there is one. `weights`: of the size of g, which they multiply."""
        kept = mx.array(1.0 - step.decay * rate, dtype=mx.float32)
        size = mx.array(rate * factor * step.scale, dtype=mx.float32)
        if moment is None:
            return _descend(p, g, weights, kept, size), {}
        moment = _first_moment(moment, g, weights, mx.array(self.beta_1), mx.array((1.0 - self.beta_1) * size))
        return kept * p.astype(mx.float32) - moment, {"exp_avg": moment}

    def _parameter_scale(self, squares: mx.array, size: int) -> Any:
        """Factor on the learning rate. `squares`: of the parameter, summed here."""
        return mx.maximum(self.eps[1], mx.sqrt(squares.sum() / size)) if self.scale_parameter else 1.0

    def _clip_factor(self, squares: mx.array, size: int) -> Any:
        """Factor on the update that keeps its root mean square below the threshold. `squares`: of the update, summed here."""
        return 1.0 if self.clip_threshold is None else 1.0 / mx.maximum(1.0, mx.sqrt(squares.sum() / size) / self.clip_threshold)

    # -- the passes -----------------------------------------------------------------------------------------------

    def _check_observed(self, pieces: Sequence[Piece]) -> None:
        """Refuses pieces of a matrix that are not all of it, unless all rows were observed before."""
        tensor, rows = pieces[0].tensor, slice(pieces[0].rows.start, pieces[-1].rows.stop)
        matrix = pieces[0].scalars.matrix(tensor, rows)
        is_whole = matrix.seen == 0 and rows.stop - rows.start == tensor.array.shape[-2]
        if matrix.passes < self.passes and not is_whole:
            raise TrainingError(
                f"rows of {tensor.name}: adafactor has to observe the gradients of all rows, {self.passes} times, before some can be"
                " updated. Call observe(...) for all of them first, or give the whole gradient."
            )

    def _observe_rest(self, piece: Piece) -> None:
        """The passes that are left over the matrix that a piece is of."""
        matrix, (*_, rows, columns) = piece.scalars.matrix(piece.tensor, piece.rows), piece.shape
        while matrix.passes < self.passes:
            for part in cut(slice(matrix.first_row, matrix.first_row + rows), columns):
                self._observe(Piece(piece.tensor, part, self, piece.scalars))

    def _observe(self, piece: Piece) -> None:
        """Takes in some rows: each once in a pass, in any order."""
        matrix, g, (*_, rows, columns) = piece.scalars.matrix(piece.tensor, piece.rows), piece.gradient, piece.shape
        first, squares = piece.rows.start, _squares(g, mx.array(piece.scalars.scale))
        wait = evaluate if g.shape[0] == rows else mx.eval  # else a GPU would hold the squares of many pieces
        if matrix.passes == 0:
            matrix.row_sums[first] = squares.sum(axis=1)
            matrix.column_sums = matrix.column_sums + squares.sum(axis=0)
            if self.scale_parameter:
                matrix.parameter_squares[first] = mx.square(piece.weight.astype(mx.float32)).sum(axis=1)
            wait(matrix.row_sums[first], matrix.column_sums, matrix.parameter_squares)
        else:
            row_weights, column_weights = matrix.weights(piece.rows)
            matrix.update_squares[first] = (squares * mx.square(column_weights)).sum(axis=1) * mx.square(row_weights)
            wait(matrix.update_squares[first])
        matrix.seen += g.shape[0]
        if matrix.seen > rows:
            raise TrainingError(f"{matrix.seen} rows of a matrix with {rows} were observed in one pass: each must come once.")
        if matrix.seen == rows:
            matrix.seen, matrix.passes = 0, matrix.passes + 1
            if matrix.passes == 1:
                self._find_means(piece.tensor, matrix, piece.scalars)
            else:
                matrix.factor = self._clip_factor(_joined(matrix.update_squares), rows * columns)
                evaluate(matrix.factor)

    def _find_means(self, tensor: Tensor, matrix: _Matrix, step: _Step) -> None:
        """The end of the first pass."""
        (*_, rows, columns), rank, first = tensor.array.shape, tensor.array.ndim, matrix.first_row
        old_rows = take(tensor.state["exp_avg_sq_row"], rank, slice(first, first + rows))
        old_columns = take(tensor.state["exp_avg_sq_col"], rank - 1, slice(first // rows, first // rows + 1))[0]
        matrix.row_means = _moved(old_rows, _joined(matrix.row_sums) / columns + self.eps[0], step.beta_2)
        matrix.column_means = _moved(old_columns, matrix.column_sums / rows + self.eps[0], step.beta_2)
        matrix.mean = matrix.row_means.mean()
        matrix.rate = step.rate * self._parameter_scale(_joined(matrix.parameter_squares), rows * columns)
        evaluate(matrix.row_means, matrix.column_means, matrix.mean, matrix.rate)

    def _store_means(self, piece: Piece) -> None:
        """Puts new means into the state, when the first rows of a matrix are updated."""
        state, matrix, rank = piece.tensor.state, piece.scalars.matrix(piece.tensor, piece.rows), len(piece.shape)
        if not matrix.is_stored:
            first, rows = matrix.first_row, piece.shape[-2]
            place = slice(first // rows, first // rows + 1)
            state["exp_avg_sq_row"] = put(state["exp_avg_sq_row"], rank, slice(first, first + rows), matrix.row_means)
            state["exp_avg_sq_col"] = put(state["exp_avg_sq_col"], rank - 1, place, matrix.column_means[None])
            evaluate(state["exp_avg_sq_row"], state["exp_avg_sq_col"])
            matrix.is_stored = True


class GpuAdafactor(Adafactor):
    """`Adafactor` with few kernels for what is given whole, unless it is very large."""

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> _Step:
        found = super().begin(step, learning_rate, weight_decay, gradient_scale)
        found.numbers = scalars_of(found.beta_2, 1.0 - found.beta_2, found.rate, found.decay, found.scale)
        return found

    def pieces(self, tensors: Sequence[Tensor], scalars: _Step) -> list[Piece]:
        observed, whole, others = {name for name, _ in scalars.matrices}, [], []
        for tensor in tensors:
            is_whole = tensor.places is None and tensor.name not in observed and tensor.array.size <= most_at_once()
            (whole if is_whole else others).append(tensor)
        return [Piece(tensor, None, self, scalars) for tensor in whole] + super().pieces(others, scalars)

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: _Step) -> tuple[mx.array, State]:
        new, means = self._means(g, state, scalars)
        own = scalars.numbers, (self.clip_threshold, self.eps[1])
        of_update = None if self.clip_threshold is None else _sum(_update_squares(g, means, *own))
        of_parameter = _sum(_squares_of(p)) if self.scale_parameter else None
        if self.beta_1 is None:
            return _descend_at_once(p, g, means, of_update, of_parameter, *own), new
        new["exp_avg"] = _next_moment(state["exp_avg"], self.beta_1, g, means, of_update, of_parameter, *own)
        return _descend_by_moment(p, new["exp_avg"], of_parameter, *own), new

    def _means(self, g: mx.array, state: State, scalars: _Step) -> tuple[State, tuple[mx.array, ...]]:
        """The new ones as they are kept, and as kernels take them: see below."""
        *kept, _rate, _decay, scale = scalars.numbers
        if g.ndim == 1:
            mean = _next_squares(state["exp_avg_sq"], g, scale, self.eps[0], *kept)
            return {"exp_avg_sq": mean}, (mean,)
        squares, (size, columns) = _squares(g, scale), g.shape[-2:]
        of_rows = _next_means(state["exp_avg_sq_row"], squares.sum(axis=-1), columns, self.eps[0], *kept)
        of_columns = _next_means(state["exp_avg_sq_col"], squares.sum(axis=-2), size, self.eps[0], *kept)
        rows = of_rows[..., None]
        return {"exp_avg_sq_row": of_rows, "exp_avg_sq_col": of_columns}, (rows, rows.sum(axis=-2, keepdims=True), of_columns[..., None, :])

    def update_bytes(self, shapes: Sequence[Shape], dtype: mx.Dtype, weight_decay: float) -> int:
        # Squares of gradient, update and parameter; what a GPU may still have to read the latter for is not written over.
        of_element = 4 * (1 + (self.clip_threshold is not None) + self.scale_parameter)
        of_element += 6 if dtype != mx.float32 else 4 * self.scale_parameter
        whole = [shape for shape in shapes if math.prod(shape) <= most_at_once()]
        at_once = at_a_time([math.prod(shape) for shape in whole], whole=True) if whole else 0
        # Of rows and columns there are sums of squares and new means.
        return max(super().update_bytes(shapes, dtype, weight_decay), of_element * at_once + 4 * self._means_bytes(whole))


def most_at_once() -> int:
    """Elements of a tensor that a GPU updates at once; a larger one would take too much memory."""
    return 4 * rules.piece_size()


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


# -- on a GPU: each is one kernel, compiled for each shape ------------------------------------------------------------
# means: of a matrix those of rows (..., R, 1), their sum (..., 1, 1) and those of columns (..., 1, C); of a vector its second moment.
# of_update, of_parameter: sums of squares (..., 1, 1), or None. numbers: `_Step.numbers`. limits: the threshold and the second epsilon.


def _sum(squares: mx.array) -> mx.array:
    """Of each matrix, or of a vector: by rows first, whose sums are exact enough."""
    by_row = squares.sum(axis=-1, keepdims=True)
    return by_row.sum(axis=-2, keepdims=True) if squares.ndim > 1 else by_row


@mx.compile
def _next_means(old, sums, size, eps, keep, take) -> mx.array:
    return keep * old + take * (sums * (1.0 / size) + eps)


@mx.compile
def _next_squares(old, g, scale, eps, keep, take) -> mx.array:
    return keep * old + take * (mx.square(g.astype(mx.float32) * scale) + eps)


@mx.compile
def _squares_of(p) -> mx.array:
    return mx.square(p.astype(mx.float32))


@mx.compile
def _update_squares(g, means, numbers, limits) -> mx.array:
    return mx.square(_weighted(g, means) * numbers[4])


@mx.compile
def _descend_at_once(p, g, means, of_update, of_parameter, numbers, limits) -> mx.array:
    return _decayed(p, of_parameter, numbers, limits) - _size(g, of_update, of_parameter, numbers, limits) * _weighted(g, means)


@mx.compile
def _next_moment(moment, beta, g, means, of_update, of_parameter, numbers, limits) -> mx.array:
    return beta * moment + (1.0 - beta) * _size(g, of_update, of_parameter, numbers, limits) * _weighted(g, means)


@mx.compile
def _descend_by_moment(p, moment, of_parameter, numbers, limits) -> mx.array:
    return _decayed(p, of_parameter, numbers, limits) - moment


def _weighted(g, means) -> mx.array:
    """The update before clipping and rate."""
    if len(means) == 1:
        return mx.rsqrt(means[0]) * g.astype(mx.float32)
    rows, their_sum, columns = means
    return mx.rsqrt(rows / (their_sum * (1.0 / rows.shape[-2]))) * mx.rsqrt(columns) * g.astype(mx.float32)


def _root_mean(squares, like) -> mx.array:
    return mx.sqrt(squares * (1.0 / math.prod(like.shape[-2:])))


def _rate(like, of_parameter, numbers, limits) -> mx.array:
    rate = numbers[2]
    return rate if of_parameter is None else rate * mx.maximum(limits[1], _root_mean(of_parameter, like))


def _decayed(p, of_parameter, numbers, limits) -> mx.array:
    return (1.0 - numbers[3] * _rate(p, of_parameter, numbers, limits)) * p.astype(mx.float32)


def _size(g, of_update, of_parameter, numbers, limits) -> mx.array:
    size = _rate(g, of_parameter, numbers, limits) * numbers[4]
    return size if of_update is None else size / mx.maximum(1.0, _root_mean(of_update, g) / limits[0])
