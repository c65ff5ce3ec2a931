"""The training panel: run, pause, step and look, in a notebook.

`TrainPanel` does what its controls ask for, `TrainView` shows what the trainer tells. The steps are driven by `loop`, the widgets stand
in `controls`, and the tabs that look inside the model in `tabs`.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fulltune_nb.chart import LossChart
from fulltune_nb.device import machine_limit
from fulltune_nb.errors import ConfigError, TrainingError
from fulltune_nb.html import NO_MATH, cut, esc, human_bytes, image, table
from fulltune_nb.insight import comparison
from fulltune_nb.panels.controls import TrainControls
from fulltune_nb.panels.loop import hear, interruptible, loop_of
from fulltune_nb.panels.panel import Panel, close_all, error_html
from fulltune_nb.panels.progress import PlainProgress, clock, due_again, may_be_missing, progress
from fulltune_nb.panels.run_record import record_html
from fulltune_nb.panels.samples import Sample, Samples, prompts_of
from fulltune_nb.panels.tabs import TABS, OpenTab, Tab
from fulltune_nb.panels.ways_on import fork_to_go_on, how_to_go_on, reasons_against
from fulltune_nb.plots import PNG_WIDTH, loss_png
from fulltune_nb.training.history import EvalReport, Event, StepReport
from fulltune_nb.training.trainer import Trainer

RECORD_SECONDS = 20.0  # from record to record while a run goes on
SETTLED_SECONDS = 1.0  # from the last news of a run that rests to its record, whose picture takes longer to draw
REFRESH_SECONDS = 0.25  # numbers change no more often while steps are taken
_LOG_KEPT, _LOG_SHOWN = 1000, 60
_CLOSE_LINES = '<div style="line-height:1.35">{}</div>'  # ipywidgets would set them 28 pixels apart


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
        """Trains on from the end of the run, twice as long or without the `patience` that ended it: `panel.trainer` is a fork then.

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
        self._end()
        self._take(more)
        self.samples.set(samples.prompts, samples.every, samples.max_tokens)
        box, self.controls.box = self.controls.box, self.widget
        self.widget.children = (*box.children, self.widget.children[-1])
        box.children = ()
        for old in (*before, box):
            close_all(old)
        self._show()
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


class TrainView:
    """The showing side of one panel: a listener of the trainer, whoever takes the steps."""

    def __init__(self, panel: TrainPanel):
        trainer, loop = panel.trainer, panel.loop
        self._panel, self._controls = panel, panel.controls
        self._trainer, self._loop, self._samples = trainer, loop, panel.samples
        self._open_tab = OpenTab(loop, panel._fail)
        self._pace = loop.pace
        self._record = panel._record
        self._log: deque[tuple[str, str, str]] = deque(maxlen=_LOG_KEPT)
        self._refreshed = -math.inf
        self._record_due = -math.inf
        self._timer: Any = None
        self._samples_version = -1
        self._picture: tuple[Any, bytes] = (None, b"")  # what it is of, PNG
        for report in [*trainer.history.evals, *trainer.history.events][-_LOG_KEPT:]:
            self._note_report(report)
        trainer.listeners.append(self)
        self.settle()

    def close(self) -> None:
        self._stop_timer()
        self._open_tab.choose(None)
        self._trainer.listeners.remove(self)

    # -- what the trainer and the loop tell -----------------------------------------------------------------------

    def on_start(self, trainer: Trainer, target: int) -> None:
        """A cell has called `trainer.run`: the first step shows it at once."""
        self._refreshed = -math.inf

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        by_itself = trainer.state != "running"  # nothing comes behind it that would show it
        if by_itself or time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self.refresh()
        if time.monotonic() >= self._record_due:
            self.write_record()
        if self._open_tab.tab is not None:
            self._open_tab.tell()

    def on_eval(self, trainer: Trainer, report: EvalReport) -> None:
        self._note_report(report)
        self.settle()

    def on_event(self, trainer: Trainer, event: Event) -> None:
        self._note_report(event)
        self.settle()

    def on_save(self, trainer: Trainer, path: Path) -> None:
        self.note("saved", str(path))
        self.settle()

    def on_change(self, trainer: Trainer) -> None:
        """A run has begun or ended, a cell's too, or what all panels share has been changed."""
        self.settle()

    on_end = on_change

    def on_doing(self, trainer: Trainer) -> None:
        """What is done beside steps has begun, gone on or ended."""
        if not self._panel.closed:
            self.show_status()

    def note(self, kind: str, text: str) -> None:
        """A line for the log."""
        self._log.append((f"{self._trainer.step_count:,}", kind, text))

    def _note_report(self, report: EvalReport | Event) -> None:
        if isinstance(report, EvalReport):
            text = f"{report.split} loss {report.loss:.4f}, perplexity {report.perplexity:.3f} ({report.tokens:,} tokens)"
            self._log.append((f"{report.step:,}", "evaluation", text))
        else:
            self._log.append((f"{report.step:,}", report.kind.replace("_", " "), report.message))

    def open_tab(self, number: int | None) -> None:
        """Another tab is on top. An error that is shown stays: to look around mends nothing."""
        title = "" if number is None else self._controls.tabs.titles[number]
        self._open_tab.choose(self._panel.tabs.get(title))

    # -- words and numbers ----------------------------------------------------------------------------------------

    @property
    def _training(self) -> bool:
        return self._loop.running or self._trainer.state == "running"

    def _state(self) -> str:
        """`trainer.status`, and what there is to add to it."""
        status = self._trainer.status
        if self._training and status in ("running", "ready", "paused"):  # a run of the loop is one before its first step begins, too
            return "running" if self._loop.busy else "running in a cell"
        return status

    def _status_line(self) -> str:
        """Step, epoch, loss, speed, memory and time left, in plain text."""
        trainer, last = self._trainer, self._pace.last
        parts = [f"step {trainer.step_count:,} of {trainer.total_steps:,}"]
        if not trainer.done:
            parts.append(f"learning rate {trainer.learning_rate:.3g}")
        if last is not None:
            parts += [f"epoch {last.epoch:.2f}", f"loss {self._pace.loss:.4f}", f"{self._pace.tokens_per_second:,.0f} tokens/s"]
            parts.append(f"peak {human_bytes(last.peak_memory)}")
            if not trainer.done:
                parts.append(f"{clock(self._pace.seconds_left(trainer.total_steps - trainer.step_count))} left")
        return " · ".join(parts)

    def refresh(self) -> None:
        """Shows everything but the chart, which hears the trainer itself, as it is now."""
        if self._panel.closed:
            return
        self._refreshed = time.monotonic()
        controls, trainer, running = self._controls, self._trainer, self._loop.running
        self.show_status()
        controls.allow(reasons_against(trainer, self._loop, self._samples))
        controls.train_on.layout.display = None if trainer.done and not self._training else "none"
        controls.progress.max = max(1, trainer.total_steps)
        controls.progress.value = trainer.step_count
        controls.progress.bar_style = "success" if trainer.done else ""
        controls.learning_rate.disabled = running
        if not running:
            self._panel.put(controls.learning_rate, float(f"{trainer.peak_learning_rate:.12g}"))  # as it was typed
        if self._samples.version != self._samples_version:  # making the table takes a while
            self._samples_version = self._samples.version
            self._show_samples()
        controls.log.value = _CLOSE_LINES.format(self._log_html())
        error = self._panel.error
        controls.error.value = "" if error is None else error_html(error)
        controls.error.layout.display = "none" if error is None else ""

    def show_status(self) -> None:
        """What happens now, in a line; from any thread."""
        why = f" ({esc(self._trainer.failure)})" if self._trainer.failure else ""
        # Texts have signs besides colours; role=status has a screen reader read changes when it is idle.
        line = f"<b>{'▶' if self._training else '❚❚'} {esc(self._state())}</b>{why} · {esc(self._status_line())}"
        more = f"<br>{esc(how_to_go_on(self._trainer))}" if self._trainer.done and not self._training else ""
        self._controls.status.value = f'<div role="status" class="{NO_MATH}">{line}{more}</div>'

    def _show_samples(self) -> None:
        controls, samples, put = self._controls, self._samples, self._panel.put
        text = samples.prompts_text
        controls.prompts.disabled = text is None
        put(controls.prompts, f"{len(samples.prompts)} prompts, too long to be edited here" if text is None else text)
        controls.prompts.rows = min(8, 2 + len(samples.prompts))
        put(controls.sample_every, samples.every)
        put(controls.max_tokens, samples.max_tokens)
        controls.samples.value = _CLOSE_LINES.format(samples.to_html())

    def _log_html(self) -> str:
        if not self._log:
            return "<div>nothing yet</div>"
        latest = [(step, kind, cut(text)) for step, kind, text in list(self._log)[-_LOG_SHOWN:][::-1]]
        hidden = len(self._log) - len(latest)
        return table(("step", "event", "what happened"), latest) + (f"<div>… and {hidden:,} before them</div>" if hidden else "")

    # -- picture and record ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Shows everything as it is now; a moment later in the record too, when the run is over."""
        if self._panel.closed:
            return
        self.refresh()
        if self._open_tab.tab is not None:
            self._open_tab.tell(rests=not self._loop.running)
        self._stop_timer()
        if self._record.placed and not self._training:
            self._timer = self._loop.later(SETTLED_SECONDS, self.write_record)
            if self._timer is None:
                self.write_record()

    def write_record(self) -> None:
        """Renews the record; its picture takes long to draw, so it is there when the run rests."""
        self._stop_timer()
        started = time.monotonic()
        if not self._panel.closed and self._record.placed:
            png = self._png() if self._trainer.history and not self._training else b""
            page, line, missing = self._record_texts()
            self._record.renew(page, line, png, PNG_WIDTH, missing)
        self._record_due = due_again(RECORD_SECONDS, started)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _png(self) -> bytes:
        """The picture of the record, drawn when there is something new."""
        history = self._trainer.history
        shown = (len(history), history[-1] if history else None)
        if self._picture[0] != shown:
            self._picture = (shown, loss_png([("", history)]))
        return self._picture[1]

    def place_record(self) -> None:
        """From now on the record stands in the cell being executed."""
        self._record.place(*self._record_texts())
        if self._trainer.history and not self._training:
            self.write_record()

    def page(self) -> str:
        """Picture and record as HTML."""
        return image(self._png(), self._status_line(), PNG_WIDTH) + self._record_texts()[0]

    def _record_texts(self) -> tuple[str, str, str]:
        """The record as HTML and in a line, and what may be missing in it."""
        error = self._loop.error
        title = f"{self._state().capitalize()} at step {self._trainer.step_count:,} of {self._trainer.total_steps:,}"
        page = ("" if error is None else error_html(error)) + record_html(self._trainer, title, self._samples, self._training)
        return page, f"{self._state()}: {self._status_line()}", may_be_missing(self._trainer)


def _tab_opened(here: weakref.ref[TrainPanel], change: Any) -> None:
    if (panel := here()) is not None and not panel.closed:
        panel.loop.post(partial(panel._view.open_tab, change.new))
