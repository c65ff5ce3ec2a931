"""Where reports and events go: the history, the run directory's metrics, and the callbacks of the moment."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fulltune_nb.errors import CheckpointError
from fulltune_nb.training.history import EvalReport, Event, History, StepReport
from fulltune_nb.training.run_directory import RunDirectory

_METHODS = {StepReport: "on_step", EvalReport: "on_eval", Event: "on_event"}


class Journal:
    """Keeps the history of one trainer and tells others of each entry.

    Attributes:
        history: every report and event, oldest first.
        directory: where metrics are written too, or None.
        listeners: callbacks that are told of every entry for as long as they stand here, within `calling` and outside.
    """

    def __init__(self, trainer: Any):
        self.history = History()
        self.directory: RunDirectory | None = None
        self.listeners: list[Any] = []
        self._trainer = trainer
        self._callbacks: tuple[Any, ...] = ()
        self._failing = False

    def attach(self, directory: RunDirectory) -> None:
        """Writes into a directory from now on, and what there is already first."""
        self.directory = directory
        for entry in self.history:
            directory.append(entry)
        for note in directory.notes:
            self.event(0, "run_dir", note)

    @contextmanager
    def calling(self, callbacks: Sequence[Any]) -> Iterator[None]:
        """Within the block, these callbacks are told of everything."""
        before, self._callbacks = self._callbacks, tuple(callbacks)
        try:
            yield
        finally:
            self._callbacks = before

    def record(self, report: StepReport | EvalReport | Event) -> None:
        """Adds an entry and tells of it."""
        self.history.append(report)
        if self.directory:
            self._write(report)
        self.tell(_METHODS[type(report)], report)

    def _write(self, report: StepReport | EvalReport | Event) -> None:
        """Into the directory; where `on_save_error` is "continue", one event tells that it cannot be."""
        try:
            self.directory.append(report)
            self._failing = False
        except CheckpointError as error:
            if self._trainer.config.on_save_error == "stop" or not self.directory.is_ours:
                raise
            if not self._failing:
                self._failing = True
                self.event(self._trainer.step_count, "save_failed", str(error))

    def event(self, step: int, kind: str, message: str) -> None:
        """Adds an event of now."""
        self.record(Event(step, kind, message, time.time()))

    def tell(self, method: str, *subject: Any) -> None:
        """Calls `method(trainer, *subject)` on every callback and listener that has it."""
        for callback in (*self._callbacks, *self.listeners):
            if (function := getattr(callback, method, None)) is not None:
                function(self._trainer, *subject)
