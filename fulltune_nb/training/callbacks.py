"""Callbacks that every `Trainer.run` gets besides its own, and those that can be attached. Apart from the trainer: this imports no MLX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

default_callbacks: list[Callable[[], Any]] = []
"""Makers of callbacks, called once for each `run`; the package's top registers the progress display here."""


class Attachable:
    """A callback for `trainer.run(callbacks=[...])` that can also be attached, for single steps, panels and notebooks."""

    _trainer: Any = None

    def attach(self, trainer: Any) -> Self:
        """Hears of every step, evaluation and checkpoint of this trainer from now on; until `detach`."""
        if self._trainer is not trainer:
            self.detach()
            self._trainer = trainer
            trainer.listeners.append(self)
        return self

    def detach(self) -> None:
        """Hears no more; what was seen stays."""
        if self._trainer is not None:
            self._trainer.listeners.remove(self)
        self._trainer = None
