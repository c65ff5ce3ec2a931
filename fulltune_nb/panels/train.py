"""The training panel: run, pause, step and look, in a notebook.

`TrainPanel` does what its controls ask for; what the trainer tells is shown by `train_view`. The steps are driven by `loop`, the widgets
stand in `controls`, and the tabs that look inside the model in `tabs`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fulltune_nb.chart import LossChart
from fulltune_nb.device import machine_limit
from fulltune_nb.errors import ConfigError, TrainingError
from fulltune_nb.insight import comparison
from fulltune_nb.panels.controls import TrainControls
from fulltune_nb.panels.loop import hear, interruptible, loop_of
from fulltune_nb.panels.panel import Panel, close_all
from fulltune_nb.panels.progress import PlainProgress, progress
from fulltune_nb.panels.samples import Sample, Samples, prompts_of
from fulltune_nb.panels.tabs import TABS, Tab
from fulltune_nb.panels.train_view import TrainView
from fulltune_nb.panels.ways_on import fork_to_go_on, reasons_against
from fulltune_nb.training.history import EvalReport, StepReport
from fulltune_nb.training.trainer import Trainer


class TrainPanel(Panel):
    """Buttons, a live chart and a log for one trainer. `panel.start()`, `panel.pause()` and `await panel.wait()` do the same from code.

    In a notebook the run goes on behind the cells, one whole step after the other on the main thread: other cells can look at the
    history and at the weights meanwhile. Several panels of one trainer show and do the same. Everything but `start` works
    without a notebook too.

    Attributes:
        trainer: what is driven.
        loop: drives it; shared by all panels of the trainer.
        samples: the prompts and the answers; shared likewise.
        controls: the widgets by name.
        tabs: title -> tab that looks inside the model; see `tabs.Tab`.
        widget: all of the widgets in a box.
        closed: whether the panel was taken away.
    """

    MADE_BY, ERROR, PICTURE = "TrainPanel(trainer)", TrainingError, True

    def __init__(
        self,
        trainer: Trainer,
        prompts: Sequence[str] = (),
        sample_every: int | None = None,
        max_tokens: int | None = None,
        compare: Any = (),
    ):
        """
        Args:
            trainer: may have taken steps already.
            prompts: texts the model answers every `sample_every` steps, greedily.
            sample_every: 0 for only when asked.
            max_tokens: of an answer at most.
            compare: other runs for the chart, as `ft.compare` takes them: `["runs/a"]`, or under names.

        Raises:
            ConfigError: prompts or numbers that cannot be used.
        """
        self._others = [(run.name, run.history) for run in comparison.compare(compare).runs] if len(compare) else []
        self._take(trainer)
        self.samples.set(prompts or None, sample_every, max_tokens)
        super().__init__(self.controls.box)
        self._show()

    def _take(self, trainer: Trainer) -> None:
        """The trainer that is driven from now on, and widgets for it."""
        self.trainer = trainer
        self.loop = loop_of(trainer)
        self.samples = self.loop.shared(Samples)
        splits = [name for name in ("valid", "test", "train") if getattr(trainer.data, name) is not None]
        chart = LossChart([("this run", trainer), *self._others], machine_limit())
        self.controls = TrainControls(splits, trainer.run_dir is not None, chart)

    def _show(self) -> None:
        """Shows the trainer in the widgets, and has them heard."""
        self.tabs: dict[str, Tab] = {kind.title: kind(self, self.loop) for kind in TABS}
        for tab in self.tabs.values():
            self.controls.add_tab(tab.title, tab.box)
        self._view = TrainView(self)
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
        """Ends the run after the step under way, also one of a cell; `start` goes on from there. From any thread."""
        self.loop.pause()
        self._view.show_status()
        self.controls.allow({"pause": reasons_against(self.trainer, self.loop, self.samples)["pause"]})

    async def wait(self) -> None:
        """Returns when the run is paused, done or interrupted. The cell shows a table, and then a picture, that stay.

        Raises:
            Exception: the run's own error.
        """
        if self.loop is None:
            self._check_open()
        trainer, lines = self.trainer, progress()
        in_lines = isinstance(lines, PlainProgress) and self.loop.running and not self.closed
        if in_lines:  # a log shall show that something moves
            lines.on_start(trainer, self.loop.goal)
            trainer.listeners.append(lines)
        if not self.closed:
            self._place_record()  # now: a page that is loaded anew meanwhile no longer takes a cell's outputs in
        try:
            await self.loop.wait()
        finally:
            if in_lines:
                trainer.listeners.remove(lines)
                lines.on_end(trainer)
            if not self.closed:
                self._view.write_record()

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
        self.trainer.event("stop", f"stopped after step {self.trainer.step_count} of {self.trainer.total_steps}")
        if self.trainer.run_dir:
            self.trainer.save()

    def train_on(self) -> Trainer:
        """Trains on from the end of the run, twice as long, without the `patience` that ended it, or both: `panel.trainer` is a fork then.

        The fork is a copy, in a run folder of its own where there was one; the model of before stays as it is. In a notebook it begins
        at once.

        Raises:
            TrainingError: the run is not done.
            CheckpointError: the new folder cannot be written.
        """
        self._check_open()
        if not self.trainer.done:
            raise TrainingError(f"The run is at step {self.trainer.step_count} of {self.trainer.total_steps}: start() goes on with it.")
        more, samples, before = fork_to_go_on(self.trainer), self.samples, self.widget.children[:-1]
        tab = self.controls.tabs.selected_index
        self._end()
        self._take(more)
        self.samples.go_on_from(samples)
        box, self.controls.box = self.controls.box, self.widget
        self.widget.children = (*box.children, self.widget.children[-1])
        box.children = ()
        for old in (*before, box):
            close_all(old)
        self._show()
        self.controls.tabs.selected_index = tab
        if self.loop.in_event_loop:
            self.start()
        return more

    def sample(self) -> list[Sample]:
        """Has the prompts answered here and now."""
        try:
            return self.samples.take()
        finally:
            self._view.settle()

    @property
    def error(self) -> BaseException | None:
        """What the panel shows as an error: of the last run, or of a button."""
        return (self.loop.error if self.loop else None) or self._control_error

    def _end(self) -> None:
        self._view.close()
        for tab in self.tabs.values():
            tab.closed()
        if not any(isinstance(listener, TrainView) for listener in self.trainer.listeners):
            self.loop.pause()

    def _let_go(self) -> None:
        self.controls.chart._let_go()
        self.trainer = self.loop = self.samples = self._view = None
        self.tabs = {}

    # -- buttons and fields ---------------------------------------------------------------------------------------

    def _connect(self) -> None:
        controls = self.controls
        self.connect(controls.run, self.start)
        self.connect(controls.pause, self._pause_pressed, at_once=True)
        self.connect(controls.step, self._step_pressed)
        self.connect(controls.step_n, self._step_n_pressed)
        self.connect(controls.evaluate, self.evaluate)
        self.connect(controls.save, self.save)
        self.connect(controls.stop, self._stop_pressed, at_once=True)
        self.connect(controls.train_on, self.train_on)
        self.connect(controls.sample_now, self._sample_pressed)
        self.connect(controls.learning_rate, self._rate_entered)
        self.connect(controls.prompts, self._set_samples, "prompts")
        self.connect(controls.sample_every, self._set_samples, "every")
        self.connect(controls.max_tokens, self._set_samples, "max_tokens")
        controls.tabs.observe(partial(_tab_opened, weakref.ref(self)), "selected_index")

    def _post(self, action: Callable[[], Any]) -> None:
        """MLX is for the main thread, and for between two steps."""
        self.loop.post(partial(self._act, action))

    def _fail(self, error: Exception) -> None:
        """Shows an error that came while nobody had asked for anything."""
        self._control_error = error
        self.refresh()

    def _act(self, action: Callable[[], Any]) -> None:
        try:
            with interruptible():
                super()._act(action)
        except KeyboardInterrupt:
            self._view.note("interrupt", "interrupted")
            if self.loop.running:
                hear()  # the run is meant too
            self.refresh()

    def refresh(self) -> None:
        """Shows everything but the chart, which hears the trainer itself, as it is now."""
        self._view.refresh()

    def _pause_pressed(self) -> None:
        self.pause()
        self._post(self.refresh)

    def _stop_pressed(self) -> None:
        self.pause()
        self._post(self.stop)

    def _step_pressed(self) -> None:
        self._steps_pressed(1)

    def _step_n_pressed(self) -> None:
        self._steps_pressed(self.controls.step_count.value)

    def _steps_pressed(self, n: int) -> None:
        if self.loop.running:
            if self.loop.goal == self.trainer.total_steps:
                return  # a run to the end goes on: a step would be lost in it
            n += self.loop.goal - self.trainer.step_count  # pressed twice: twice as many
        try:
            self.start(n)
        except TrainingError:
            if self.loop.in_event_loop:
                raise
            self.step(n)  # no event loop, but steps can be taken here

    def _sample_pressed(self) -> None:
        self.samples.wanted = True
        if not self.loop.running:
            if self.loop.in_event_loop:
                self.loop.start(0)
            else:
                self.sample()

    def _set_samples(self, name: str, value: Any) -> None:
        self.samples.set(**{name: prompts_of(value) if name == "prompts" else value})
        self.loop.tell_change()

    def _rate_entered(self, rate: float) -> None:
        if self.loop.running:
            raise TrainingError("The learning rate can be changed while the run is paused. Press Pause first.")
        if not rate > 0:  # what is too large to be a number does not arrive as it was typed, so the value is not repeated
            now = f"{self.trainer.peak_learning_rate:.6g}"
            raise ConfigError(f"The peak learning rate must be a finite number larger than 0, such as 1e-4; it stays at {now}.")
        self.trainer.set_learning_rate(rate)

    # -- in a cell ------------------------------------------------------------------------------------------------

    def _place_record(self) -> None:
        self._view.place_record()

    def __repr__(self) -> str:
        if self.closed:
            return "TrainPanel(closed)"
        return f"TrainPanel({self.trainer.state}, step {self.trainer.step_count} of {self.trainer.total_steps})"

    def _repr_html_(self) -> str:
        self._check_open()
        return self._view.page()


def _tab_opened(here: weakref.ref[TrainPanel], change: Any) -> None:
    if (panel := here()) is not None and not panel.closed:
        panel.loop.post(partial(panel._view.open_tab, change.new))
