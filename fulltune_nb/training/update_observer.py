"""Watching what an optimizer step does to each tensor, without keeping the old weights.

Whoever wants to see updates puts an `UpdateObserver` into `Optimizers.observers`. Parameters are updated in their own memory as
long as nobody holds the old arrays: an observer takes down what it needs in `before` (a sample of rows, norms), evaluates it, and
lets go of the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx


class UpdateObserver(Protocol):
    """Is told of each tensor before and after its update."""

    def before(self, update: PendingUpdate) -> None:
        """The update is about to be made. Nothing of it may be held on to that has not been evaluated."""

    def after(self, name: str, new: mx.array) -> None:
        """The tensor as it is now, evaluated."""


@dataclass(frozen=True, eq=False)
class PendingUpdate:
    """One tensor, and what is about to be done to it."""

    name: str
    """Module path."""
    step: int
    """Of the optimizer, from 1."""
    weight: mx.array
    gradient: mx.array
    """Before clipping."""
    rule: Any
    state: dict[str, mx.array]
    scalars: Any

    def change(self, every: int = 1) -> tuple[mx.array, mx.array]:
        """The weight and the update before any rounding to the weight's dtype, both float32, of each `every`-th row; lazy.

        A rule that works element by element computes just these rows; another (Adafactor, Muon) the whole tensor, in float32, so that
        there an update too small for a float32 weight counts as none.
        """
        rows = slice(None, None, every)
        sliced = self.by_element and all(array.shape == self.weight.shape for array in self.state.values())
        pick = rows if sliced else slice(None)
        weight = self.weight[pick].astype(mx.float32)
        state = {name: array[pick] for name, array in self.state.items()} if sliced else dict(self.state)
        if hasattr(self.rule, "change"):
            change = self.rule.change(weight, self.gradient[pick], state, self.scalars)
        else:
            change = self.rule.apply(weight, self.gradient, state, self.scalars)[0].astype(mx.float32) - weight
        return (weight, change) if sliced else (weight[rows], change[rows])

    @property
    def by_element(self) -> bool:
        """Whether the rule treats every element by itself."""
        return hasattr(self.rule, "change")
