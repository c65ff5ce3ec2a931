"""Watching what an optimizer step does to each tensor, without keeping the old weights.

Whoever wants to see updates puts an `UpdateObserver` into `Optimizers.observers`. Parameters are updated in their own memory as
long as nobody holds the old arrays: an observer takes down what it needs in `before` (a sample of rows, norms), evaluates it, and
lets go of the arrays. A tensor may come in pieces, each some rows of the matrix that it is seen as.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.training.pieces import Piece, Place, first_row, take


class UpdateObserver(Protocol):
    """Is told of each tensor, or piece of one, before and after its update."""

    def before(self, update: PendingUpdate) -> None:
        """The update is about to be made. Nothing of it may be held on to that has not been evaluated."""

    def after(self, name: str, first_row: int, new: mx.array) -> None:
        """The same tensor or piece as it is now, evaluated."""


@dataclass(frozen=True, eq=False)
class PendingUpdate:
    """One tensor or piece, and what is about to be done to it."""

    name: str
    """Module path of the tensor."""
    step: int
    """Of the optimizer, from 1."""
    first_row: int
    """Where the piece begins in the matrix of all rows; 0 for a tensor as it is."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    weight: mx.array
    gradient: mx.array
    """Before clipping."""
    state: dict[str, mx.array]
    rule: Any
    scalars: Any
    result: Callable[[], mx.array]
    """The weight after the step, float32 and not rounded; lazy, and computed apart from the step's own."""

    def change(self, every: int = 1) -> tuple[mx.array, mx.array]:
        """The weight and the update before any rounding, both float32, of each `every`-th row; lazy.

        Rules with a `change` method (AdamW, Adam, SGD, Lion) compute just these rows, as the update itself. For the others all rows
        of the piece are computed, and the update is a difference of float32 numbers: where it is too small for those, it counts as none.
        """
        rows = slice(None, None, every)
        weight = self.weight[rows].astype(mx.float32)
        if hasattr(self.rule, "change"):
            state = {name: array[rows] for name, array in self.state.items()}
            return weight, self.rule.change(weight, self.gradient[rows], state, self.scalars)
        return weight, self.result()[rows].astype(mx.float32) - weight


def tell_after(observers: Sequence[UpdateObserver], model: nn.Module, pieces: Sequence[Piece]) -> None:
    """Tell observers of pieces that have been updated."""
    for piece in pieces if observers else ():
        array = Place(model, piece.name).array
        new = array if piece.rows is None else take(array, array.ndim, piece.rows)
        for observer in observers:
            observer.after(piece.name, first_row(piece), new)
