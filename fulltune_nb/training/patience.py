"""Keeping count of validation losses: which is the best, and when to stop."""

from __future__ import annotations

import math
from typing import Any


class Patience:
    """The best validation loss so far, and how many evaluations have passed without a better one.

    Attributes:
        limit: evaluations without improvement after which training stops; None for never.
        best_loss: in nats; inf before the first evaluation.
        waited: evaluations since the best one.
        last_step: the step evaluated last, so that none is evaluated twice; -1 before the first.
    """

    def __init__(self, limit: int | None):
        self.limit = limit
        self.best_loss = math.inf
        self.waited = 0
        self.last_step = -1

    def improved(self, step: int, loss: float) -> bool:
        """Counts an evaluation; True where it is the best so far."""
        self.last_step = step
        if loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            return True
        self.waited += 1
        return False

    @property
    def at_end(self) -> bool:
        """Whether training should stop."""
        return self.limit is not None and self.waited >= self.limit

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `load` takes them back."""
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"best_loss": best, "waited": self.waited, "last_step": self.last_step}

    def load(self, values: dict[str, Any]) -> None:
        """Takes back what `to_dict` gave."""
        self.best_loss = math.inf if values["best_loss"] is None else values["best_loss"]
        self.waited, self.last_step = values["waited"], values["last_step"]
