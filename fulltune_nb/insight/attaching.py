"""Callbacks that can stand among a trainer's listeners, where they hear of everything, whoever takes the steps."""

from __future__ import annotations

from typing import Any, Self


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
