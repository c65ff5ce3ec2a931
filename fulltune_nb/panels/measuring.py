"""The update meter of the panels of one trainer: it measures while somebody looks, and is put away with the last of them."""

from __future__ import annotations

from fulltune_nb.insight.survival import UpdateMeter
from fulltune_nb.panels.loop import TrainLoop

KEPT = 120
"""Measured steps that are kept at least: twice what the picture shows."""


def measuring_of(loop: TrainLoop) -> Measuring:
    """That of a trainer, which all its panels share; it lives and goes with the trainer's loop."""
    if Measuring not in loop.shared:
        loop.shared[Measuring] = Measuring(loop)
    return loop.shared[Measuring]


class Measuring:
    """Whether and how the updates of one trainer are measured. Use `measuring_of`.

    Attributes:
        always: measure while no tab is open too, as long as there is a panel.
    """

    def __init__(self, loop: TrainLoop):
        self._trainer = loop.trainer
        self._own = UpdateMeter(keep=KEPT)
        self._panels: dict[object, bool] = {}  # each panel's look -> whether its tab is open
        self.always = False

    @property
    def meter(self) -> UpdateMeter:
        """What measures: one attached in code where there is one, else the panels' own."""
        listeners = self._trainer.journal.listeners
        given = [listener for listener in listeners if isinstance(listener, UpdateMeter) and listener is not self._own]
        return given[0] if given else self._own

    @property
    def is_own(self) -> bool:
        """Whether it is the panels' own."""
        return self.meter is self._own

    @property
    def on(self) -> bool:
        """Whether steps are measured now."""
        return not self.is_own or self._own in self._trainer.journal.listeners

    @property
    def next_step(self) -> int:
        """The step that is measured next, as in its report."""
        return self._trainer.step_count + 1 + -self._trainer.optimizers.step % self.meter.every

    def look(self, panel: object, is_open: bool) -> None:
        """A panel's tab was opened or closed."""
        self._panels[panel] = is_open
        self.settle()

    def leave(self, panel: object) -> None:
        """A panel was closed."""
        self._panels.pop(panel, None)
        self.settle()

    def set(self, every: int | None = None, always: bool | None = None) -> None:
        """Changes what is given."""
        self._own.every = self._own.every if every is None else every
        self.always = self.always if always is None else always
        self.settle()

    def settle(self) -> None:
        """Attaches the panels' own meter or puts it away, as is wanted."""
        wanted = self.is_own and (any(self._panels.values()) or (self.always and bool(self._panels)))
        if wanted:
            self._own.attach(self._trainer)
        else:
            self._own.detach()
