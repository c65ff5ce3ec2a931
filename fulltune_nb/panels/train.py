"""The training panel: run, pause, step and look, in a notebook."""

from __future__ import annotations

import weakref
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fulltune_nb.errors import ConfigError, TrainingError
from fulltune_nb.html import esc
from fulltune_nb.panels.interrupts import hear, interruptible
from fulltune_nb.panels.loop import loop_of
from fulltune_nb.panels.progress import PlainProgress, progress
from fulltune_nb.panels.record import current_cell
from fulltune_nb.panels.samples import Sample, samples_of
from fulltune_nb.panels.train_view import TrainView
from fulltune_nb.training.history import EvalReport, StepReport
from fulltune_nb.training.trainer import Trainer

_shown: dict[str, tuple[str, list[weakref.ref[TrainPanel]]]] = {}  # id of a cell -> its execution, the panels shown by that


class TrainPanel:
    """Buttons, a live plot and a log for one trainer. `panel.start()`, `panel.pause()` and `await panel.wait()` do the same from code.

    In a notebook the run goes on behind the cells, one whole step after the other on the main thread: other cells can look at the
    history and at the weights meanwhile. Several panels of one trainer show and do the same. Everything but `start` works
    without a notebook too.

    Attributes:
        trainer: what is driven.
        loop: drives it; shared by all panels of the trainer.
        samples: the prompts and the answers; shared likewise.
        controls: the widgets by name.
        widget: all of them in a box.
    """

    def __init__(self, trainer: Trainer, prompts: Sequence[str] = (), sample_every: int | None = None, max_tokens: int | None = None):
        """
        Args:
            trainer: may have taken steps already.
            prompts: texts the model answers every `sample_every` steps, greedily.
            sample_every: 0 for only when asked.
            max_tokens: of an answer at most.

        Raises:
            ConfigError: prompts or numbers that cannot be used.
        """
        self.trainer = trainer
        self.loop = loop_of(trainer)
        self.samples = samples_of(self.loop)
        self.samples.set(prompts or None, sample_every, max_tokens)
        self._view = TrainView(self.loop, self.samples)
        self.controls = self._view.controls
        self.widget = self.controls.box
        self.closed = False
        self._connect()
        self.loop.tell_change()  # older panels show these prompts too

    # -- what can be done -----------------------------------------------------------------------------------------

    def start(self, n: int | None = None) -> None:
        """Trains in the background, to the end of the run or `n` more steps. Returns at once; `await panel.wait()` waits for the end.

        Raises:
            TrainingError: there is no event loop here, as in a plain script; or the model is being trained by another trainer.
        """
        self._check_open()
        self.loop.start(n)

    def pause(self) -> None:
        """Ends the run after the step under way; `start` goes on from there."""
        self.loop.pause()
        self._view.refresh()

    async def wait(self) -> None:
        """Returns when the run is paused, done or interrupted; the cell then shows a picture and a table that stay.

        Raises:
            Exception: the run's own error.
        """
        if self.loop is None:
            self._check_open()
        trainer, lines = self.loop.trainer, progress()
        in_lines = isinstance(lines, PlainProgress) and self.loop.running and not self.closed
        if in_lines:  # a log shall show that something moves
            lines.on_start(trainer, self.loop.goal)
            trainer.journal.listeners.append(lines)
        try:
            await self.loop.wait()
        finally:
            if in_lines:
                trainer.journal.listeners.remove(lines)
                lines.on_end(trainer)
            if not self.closed:
                self._view.place_record()

    def step(self, n: int = 1) -> StepReport | None:
        """Takes `n` steps here and now, with evaluations and checkpoints when due, and returns the last report; None when done.

        Raises:
            TrainingError: a run goes on.
        """
        self._check_open()
        return self.loop.step(n)

    def evaluate(self, split: str | None = None) -> EvalReport:
        """Loss and perplexity of a whole split: the one chosen in the panel where left out."""
        return self.trainer.evaluate(split or self.controls.split.value)

    def save(self) -> Path:
        """Writes a checkpoint into the trainer's run directory and returns its folder."""
        return self.trainer.save()

    def stop(self) -> None:
        """Ends the run after the step under way, says so in the history, and writes a checkpoint where there is a run directory."""
        self.loop.pause()
        trainer = self.trainer
        trainer.journal.event(trainer.step_count, "stop", f"stopped after step {trainer.step_count} of {trainer.total_steps}")
        if trainer.run_dir:
            trainer.save()

    def sample(self) -> list[Sample]:
        """Has the prompts answered here and now."""
        try:
            return self.samples.take()
        finally:
            self._view.settle()

    @property
    def error(self) -> BaseException | None:
        """What the panel shows as an error: of the last run, or of a button."""
        return self.loop.error or self._view.error

    def close(self) -> None:
        """Takes the panel away. If it is the trainer's last one, a run that goes on is paused: nothing is left running."""
        if self.closed:
            return
        self.closed = True
        self._view.close()
        if not any(isinstance(listener, TrainView) for listener in self.loop.trainer.journal.listeners):
            self.loop.pause()

    def _check_open(self) -> None:
        if self.closed:
            raise TrainingError("This panel is closed. Make a new one: TrainPanel(trainer).")

    # -- buttons and fields: their callbacks may come on another thread, and only post -------------------------------

    def _connect(self) -> None:
        here, controls = weakref.ref(self), self.controls  # widgets live until closed: they must not keep the panel, and its trainer
        buttons: dict[str, Callable[[TrainPanel], Any]] = {
            "run": lambda panel: panel._run_pressed(None),
            "pause": lambda panel: panel.pause(),
            "step": lambda panel: panel._run_pressed(1),
            "step_n": lambda panel: panel._run_pressed(controls.step_count.value),
            "evaluate": lambda panel: panel.evaluate(),
            "save": lambda panel: panel.save(),
            "stop": lambda panel: panel.stop(),
            "sample_now": lambda panel: panel._sample_pressed(),
        }
        for name, action in buttons.items():
            getattr(controls, name).on_click(lambda _, action=action: _post(here, action))
        fields: dict[str, Callable[[TrainPanel, Any], Any]] = {
            "learning_rate": TrainPanel._rate_entered,
            "prompts": lambda panel, value: panel._set_samples(prompts=value.split("\n")),
            "sample_every": lambda panel, value: panel._set_samples(every=value),
            "max_tokens": lambda panel, value: panel._set_samples(max_tokens=value),
        }
        for name, entered in fields.items():
            getattr(controls, name).observe(partial(_entered, here, name, entered), "value")
        controls.tabs.observe(partial(_tab_opened, here), "selected_index")
        self._view.looks.connect(lambda action: _post(here, lambda panel: action()))

    def _act(self, action: Callable[[TrainPanel], Any]) -> None:
        """Does what a button asks for, on the main thread; errors are shown in the panel."""
        if self.closed:
            return
        self._view.error = None
        try:
            with interruptible():
                action(self)
        except KeyboardInterrupt:
            self._view.note("interrupt", "interrupted")
            if self.loop.running:
                hear()  # the run is meant too
        except Exception as error:
            self._view.error = error
        self._view.refresh()

    def _run_pressed(self, n: int | None) -> None:
        running = self.loop.running
        if running and n is not None:
            if self.loop.goal == self.trainer.total_steps:
                return  # a run to the end goes on: a step would be lost in it
            n += self.loop.goal - self.trainer.step_count  # pressed twice: twice as many
        try:
            self.start(n)
        except TrainingError:
            if n is None or self.loop.in_event_loop:
                raise
            self.step(n)  # no event loop, but steps can be taken here

    def _sample_pressed(self) -> None:
        self.samples.wanted = True
        if not self.loop.running:
            if self.loop.in_event_loop:
                self.loop.start(0)
            else:
                self.sample()

    def _set_samples(self, **settings: Any) -> None:
        self.samples.set(**settings)
        self.loop.tell_change()

    def _rate_entered(self, rate: float) -> None:
        self._view.shown["learning_rate"] = None  # whatever comes of it, the field shall show what holds
        if self.loop.running:
            raise TrainingError("The learning rate can be changed while the run is paused. Press Pause first.")
        if not rate > 0:  # what is too large to be a number does not arrive as it was typed, so the value is not repeated
            now = f"{self.trainer.learning_rate:.6g}"
            raise ConfigError(f"The learning rate must be a finite number larger than 0, such as 1e-4; it stays at {now}.")
        self.trainer.set_learning_rate(rate)

    # -- how it looks ----------------------------------------------------------------------------------------------------

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self._check_open()
        self._replace_older()
        display({**self.widget._repr_mimebundle_(), "text/plain": repr(self)}, raw=True)
        self._view.place_record()

    def _replace_older(self) -> None:
        """A cell that is run again has replaced what it showed: panels shown by its last execution are closed."""
        cell = current_cell()
        if cell is None or not cell[0]:
            return
        execution, panels = _shown.get(cell[0], ("", []))
        if execution != cell[1]:
            for panel in panels:
                if (older := panel()) is not None and older is not self:
                    older.close()
                    older._let_go()
            panels = []
        _shown[cell[0]] = (cell[1], [*panels, weakref.ref(self)])

    def _let_go(self) -> None:
        """The notebook's list of outputs holds panels for ever; it must not hold trainers, with their optimizer's arrays."""
        self.trainer = self.loop = self._view = None

    def __repr__(self) -> str:
        if self.closed:
            return "TrainPanel(closed)"
        return f"TrainPanel({self._view.state}, step {self.trainer.step_count} of {self.trainer.total_steps})"

    def _repr_html_(self) -> str:
        self._check_open()
        picture = b64encode(self._view.picture).decode()
        return f'<img alt="{esc(self._view.status_line())}" src="data:image/png;base64,{picture}"/>{self._view.record_html()}'


def _post(reference: weakref.ref[TrainPanel], action: Callable[[TrainPanel], Any]) -> None:
    """Has a panel act on the main thread, between two steps."""
    panel = reference()
    if panel is not None:
        panel.loop.post(partial(panel._act, action))


def _entered(reference: weakref.ref[TrainPanel], name: str, action: Callable[[TrainPanel, Any], Any], change: Any) -> None:
    """Something new stands in a field: was it typed, or put there by the panel itself?"""
    panel = reference()
    if panel is not None and not panel.closed and change.new != panel._view.shown.get(name):
        _post(reference, lambda panel: action(panel, change.new))


def _tab_opened(reference: weakref.ref[TrainPanel], change: Any) -> None:
    """Another tab is on top. An error that is shown stays: to look around mends nothing."""
    panel = reference()
    if panel is not None and not panel.closed:
        panel.loop.post(partial(panel._view.looks.choose, change.new))
