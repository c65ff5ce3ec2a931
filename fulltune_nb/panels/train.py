"""The training panel: run, pause, step and look, in a notebook."""

from __future__ import annotations

import math
import time
import weakref
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from fulltune_nb.errors import ConfigError, FulltuneError, TrainingError
from fulltune_nb.html import NO_MATH, cut, esc, human_bytes, table
from fulltune_nb.panels.live_plot import HEIGHT, WIDTH, LivePlot
from fulltune_nb.panels.loop import TrainLoop, hear, interruptible, loop_of
from fulltune_nb.panels.panel import styled
from fulltune_nb.panels.progress import PANEL_CLASS, PlainProgress, Record, clock, current_cell, progress, record_html
from fulltune_nb.panels.tabs import BatchTab, CallbacksTab, Looks, Sample, Samples, UpdatesTab, prompts_text, samples_of, scrolled
from fulltune_nb.training.history import EvalReport, Event, StepReport
from fulltune_nb.training.memory import machine_limit
from fulltune_nb.training.trainer import Trainer

# -- pace: How fast a run goes, from its latest steps

class Pace:
    """Loss, speed and time left over the last steps."""

    def __init__(self, steps: int, reports: Iterable[StepReport] = ()):
        """
        Args:
            steps: how many of the latest count.
            reports: those there are already.
        """
        self._reports: deque[StepReport] = deque(reports, maxlen=max(1, steps))
        self._moments: deque[float] = deque(maxlen=max(1, steps) + 1)

    def add(self, report: StepReport) -> None:
        """Takes in a step that has just ended."""
        self._reports.append(report)
        self._moments.append(time.monotonic())

    def rest(self) -> None:
        """The time from here to the next step does not count: the run begins or ends."""
        self._moments.clear()

    @property
    def last(self) -> StepReport | None:
        """The latest step."""
        return self._reports[-1] if self._reports else None

    @property
    def loss(self) -> float:
        """Mean over the trained tokens, in nats; NaN before the first step."""
        tokens = sum(report.tokens for report in self._reports)
        return sum(report.loss * report.tokens for report in self._reports) / tokens if tokens else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens a second, within steps."""
        seconds = sum(report.seconds for report in self._reports)
        return sum(report.tokens for report in self._reports) / seconds if seconds else math.nan

    def seconds_left(self, steps: int) -> float:
        """What so many more steps will take, evaluations and all that comes between steps included; NaN before the first step."""
        if len(self._moments) > 1:
            return steps * (self._moments[-1] - self._moments[0]) / (len(self._moments) - 1)
        return steps * self._reports[-1].seconds if self._reports else math.nan


# -- controls: The widgets of the training panel and how they stand. What they do is said in `train`

OWN_TABS = 2
_LABELS = {"description_width": "initial"}


def _button(description: str, tooltip: str, icon: str, style: str = "") -> widgets.Button:
    return widgets.Button(description=description, tooltip=tooltip, icon=icon, button_style=style, layout=widgets.Layout(width="auto"))


class TrainControls:
    """Every widget of a panel by name; `box` holds them all."""

    def __init__(self, splits: Sequence[str], can_save: bool, tabs: Sequence[tuple[str, widgets.Widget]] = ()):
        """
        Args:
            splits: names of what can be evaluated.
            can_save: whether the trainer has a place for checkpoints.
            tabs: titles and contents of further tabs, from number `OWN_TABS` on.
        """
        self._make_buttons(splits, can_save)
        self._make_fields()
        self._make_displays()
        row = widgets.Layout(flex_flow="row wrap", align_items="center", overflow="visible")
        self.tabs = self._make_tabs(row, tabs)
        self.box = widgets.VBox(
            [
                widgets.HBox([self.run, self.pause, self.step, self.step_count, self.step_n, self.stop], layout=row),
                widgets.HBox([self.split, self.evaluate, self.save, self.learning_rate], layout=row),
                self.progress,
                self.status,
                self.error,
                self.plot,
                self.tabs,
            ],
            layout=widgets.Layout(width="100%", max_width=f"{WIDTH + 20}px", overflow="visible"),
        )
        styled(self.box).add_class(PANEL_CLASS)

    def _make_buttons(self, splits: Sequence[str], can_save: bool) -> None:
        self.run = _button("Run", "Train to the end of the run", "play", "primary")
        self.pause = _button("Pause", "Pause after the step under way; Run goes on from there", "pause")
        self.step = _button("Step", "Take one optimizer step", "step-forward")
        self.step_n = _button("Step N", "Take the number of steps given beside", "fast-forward")
        self.evaluate = _button("Evaluate", "Loss and perplexity of the chosen split, all of it, now", "check")
        where = "Write a checkpoint into the run directory" if can_save else "Nowhere to save: make the trainer with run_dir='runs/a'"
        self.save = _button("Save", where, "save")
        self.save.disabled = not can_save
        more = ", and write a checkpoint" if can_save else ""
        self.stop = _button("Stop", f"End this run after the step under way{more}; Run would still go on from there", "stop")
        chosen = "valid" if "valid" in splits else splits[0]
        self.split = widgets.Dropdown(
            options=list(splits), value=chosen, description="split", tooltip="What Evaluate looks at", style=_LABELS,
            layout=widgets.Layout(width="130px"),
        )  # fmt: skip

    def _make_fields(self) -> None:
        self.step_count = widgets.BoundedIntText(
            value=10, min=1, max=10**9, description="N", tooltip="Steps that Step N takes", style=_LABELS,
            layout=widgets.Layout(width="110px"),
        )  # fmt: skip
        self.learning_rate = widgets.FloatText(
            description="learning rate", tooltip="Rate of the next step; can be changed while paused, and the schedule goes on from it",
            style=_LABELS, layout=widgets.Layout(width="220px"), step=None, continuous_update=False,
        )  # fmt: skip
        self.prompts = widgets.Textarea(
            description="prompts", placeholder="one prompt a line", continuous_update=False, rows=3, style=_LABELS,
            tooltip="Prompts the model answers while it learns, one a line", layout=widgets.Layout(width="60%", min_width="280px"),
        )  # fmt: skip
        self.sample_every = widgets.BoundedIntText(
            value=0, min=0, max=10**9, description="every", tooltip="Steps from one answer to the next; 0 for never", style=_LABELS,
            layout=widgets.Layout(width="130px"), continuous_update=False,
        )  # fmt: skip
        self.max_tokens = widgets.BoundedIntText(
            value=64, min=1, max=10**6, description="tokens", tooltip="Tokens of an answer at most", style=_LABELS,
            layout=widgets.Layout(width="130px"), continuous_update=False,
        )  # fmt: skip
        self.sample_now = _button("Sample now", "Have the prompts answered now", "comment")

    def _make_displays(self) -> None:
        self.progress = widgets.IntProgress(
            min=0, max=1, description="progress", tooltip="Steps taken of all", style=_LABELS, layout=widgets.Layout(width="100%")
        )
        self.status = widgets.HTML(tooltip="Where the run stands")
        self.error = widgets.HTML(tooltip="The last error", layout=widgets.Layout(display="none"))
        size = {"width": f"{WIDTH}px", "height": f"{HEIGHT}px", "min_height": f"{HEIGHT}px"}  # before there is a picture too
        # No tooltip here: with one, ipywidgets 8.1.9 fails to show an image at all. The line above says in words what it shows.
        self.plot = widgets.Image(format="png", layout=widgets.Layout(**size, max_width="100%", object_fit="contain"))
        self.log = widgets.HTML(tooltip="What happened, newest first")
        self.samples = widgets.HTML(tooltip="Answers while learning, newest first")

    def _make_tabs(self, row: widgets.Layout, more: Sequence[tuple[str, widgets.Widget]]) -> widgets.Tab:
        fields = widgets.HBox([self.prompts, self.sample_every, self.max_tokens, self.sample_now], layout=row)
        own = [("Log", scrolled(self.log, "220px"))]
        own.append(("Samples", widgets.VBox([fields, scrolled(self.samples, "220px")])))
        tabs = widgets.Tab([content for _, content in (*own, *more)])
        tabs.titles = [title for title, _ in (*own, *more)]
        return tabs

    def close(self) -> None:
        """Takes every widget away from the front end."""
        for widget in _all_below(self.box):
            widget.close()


def _all_below(widget: widgets.Widget) -> list[widgets.Widget]:
    found = [widget]
    for child in getattr(widget, "children", ()):
        found += _all_below(child)
    return found + [getattr(widget, name) for name in ("layout", "style") if hasattr(widget, name)]


# -- train_view: What the training panel shows: numbers, plot, log and samples, and the record that stays. It is told

REFRESH_SECONDS = 0.25  # numbers change no more often while steps are taken
_LOG_KEPT, _LOG_SHOWN = 1000, 60
_NOTE = "A picture and a table of the run will stand here when it pauses or ends. They stay in the notebook's file."
_CLOSE_LINES = '<div style="line-height:1.35">{}</div>'  # ipywidgets would set them 28 pixels apart
_OUT_OF_MEMORY = "Memory ran out. Make the trainer anew with a smaller batch_size or max_seq_length, or with grad_checkpoint=True."
_UNEXPECTED = (
    "panel.error holds the error with its traceback. If the model's state is in doubt, go back to the last checkpoint with Trainer.resume."
)

_plots: weakref.WeakKeyDictionary[TrainLoop, LivePlot] = weakref.WeakKeyDictionary()


class TrainView:
    """The showing side of one panel.

    Attributes:
        controls: the widgets.
        looks: the tabs that look inside.
        error: of a button, to be shown; the run's own is the loop's.
        shown: what was put into each field, to be told from what is typed.
    """

    def __init__(self, loop: TrainLoop, samples: Samples):
        trainer = loop.trainer
        splits = [name for name in ("valid", "test", "train") if getattr(trainer.data, name) is not None]
        looks = (UpdatesTab(loop), BatchTab(loop), CallbacksTab(loop))
        self.controls = TrainControls(splits, trainer.run_dir is not None, [(look.title, look.box) for look in looks])
        self.looks = Looks(loop, looks, OWN_TABS, self.fail)
        self.error: BaseException | None = None
        self.shown: dict[str, Any] = {}
        self._loop, self._trainer, self._samples = loop, trainer, samples
        if loop not in _plots:
            _plots[loop] = LivePlot(machine_limit())
        self._plot = _plots[loop]
        self._pace = Pace(trainer.config.steps_per_report, trainer.history.steps[-trainer.config.steps_per_report :])
        self._record = Record()
        self._log: deque[tuple[str, str, str]] = deque(maxlen=_LOG_KEPT)
        self._refreshed = -math.inf
        self._timer: Any = None
        self._samples_version = -1
        self._shown_picture = b""
        self._closed = self._in_cell = False
        for report in [*trainer.history.evals, *trainer.history.events][-_LOG_KEPT:]:
            self._note_report(report)
        trainer.listeners.append(self)
        self.settle()

    def close(self) -> None:
        """Hears no more and takes the widgets away."""
        self._closed = True
        self._stop_timer()
        self.looks.close()
        self._trainer.listeners.remove(self)
        self.controls.close()

    # -- what it is told ----------------------------------------------------------------------------------------------

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        """After a step, whoever took it."""
        self._pace.add(report)
        if time.monotonic() - self._refreshed >= REFRESH_SECONDS:
            self.refresh()
        if self._plot.seconds_to_wait() == 0:
            self._plot.draw(trainer.history)
        self._show_picture()
        self.looks.tell()

    def on_eval(self, trainer: Trainer, report: EvalReport) -> None:
        """After an evaluation."""
        self._note_report(report)
        self.settle()

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """After anything else worth a line."""
        self._note_report(event)
        self.settle()

    def on_save(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint."""
        self.note("saved", str(path))
        self.settle()

    def on_change(self, trainer: Trainer) -> None:
        """A run has begun or ended, or what all panels share has been changed."""
        self._pace.rest()
        self.settle()

    def on_start(self, trainer: Trainer, target: int) -> None:
        """A cell has called `trainer.run`."""
        self._in_cell = True
        self.refresh()

    def on_end(self, trainer: Trainer) -> None:
        """That call is over."""
        self._in_cell = False
        self._pace.rest()
        self.settle()

    def note(self, kind: str, text: str) -> None:
        """A line for the log."""
        self._log.append((f"{self._trainer.step_count:,}", kind, text))

    def _note_report(self, report: EvalReport | Event) -> None:
        if isinstance(report, EvalReport):
            text = f"{report.split} loss {report.loss:.4f}, perplexity {report.perplexity:.3f} ({report.tokens:,} tokens)"
            self._log.append((f"{report.step:,}", "evaluation", text))
        else:
            self._log.append((f"{report.step:,}", report.kind.replace("_", " "), report.message))

    # -- what it shows ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """How the run stands, in a word or two."""
        if self._loop.running or self._in_cell:
            return "running" if self._loop.running else "running in a cell"
        if self._loop.error is not None:
            return "stopped by an error"
        if self._trainer.done:
            return "stopped early" if self._trainer.stopped_early else "done"
        return "paused by an interrupt" if self._loop.interrupted else "paused"

    def status_line(self) -> str:
        """Step, epoch, loss, speed, memory and time left, in plain text."""
        trainer, last = self._trainer, self._pace.last
        parts = [f"step {trainer.step_count:,} of {trainer.total_steps:,}"]
        if last is not None:
            parts += [f"epoch {last.epoch:.2f}", f"loss {self._pace.loss:.4f}", f"{self._pace.tokens_per_second:,.0f} tokens/s"]
            parts.append(f"peak {human_bytes(last.peak_memory)}")
            if not trainer.done:
                parts.append(f"{clock(self._pace.seconds_left(trainer.total_steps - trainer.step_count))} left")
        return " · ".join(parts)

    def refresh(self) -> None:
        """Shows everything but the picture as it is now."""
        if self._closed:
            return
        self._refreshed = time.monotonic()
        controls, trainer, running = self.controls, self._trainer, self._loop.running
        line = self.status_line()
        # Texts have signs besides colours; role=status has a screen reader read changes when it is idle.
        mark = "▶" if running or self._in_cell else "❚❚"
        controls.status.value = f'<div role="status" class="{NO_MATH}"><b>{mark} {esc(self.state)}</b> · {esc(line)}</div>'
        controls.progress.max = max(1, trainer.total_steps)
        controls.progress.value = trainer.step_count
        controls.progress.bar_style = "success" if trainer.done else ""
        controls.learning_rate.disabled = running
        if not running:
            self._put("learning_rate", trainer.learning_rate)
        self._show_samples()
        controls.log.value = _CLOSE_LINES.format(self._log_html())
        self._show_error()

    def _put(self, field: str, value: Any) -> None:
        if self.shown.get(field) != value:  # else: it may be about to be changed by hand
            self.shown[field] = value
            getattr(self.controls, field).value = value

    def _show_samples(self) -> None:
        samples = self._samples
        text = prompts_text(samples.prompts)
        self.controls.prompts.disabled = text is None
        self._put("prompts", f"{len(samples.prompts)} prompts given in code" if text is None else text)
        self._put("sample_every", samples.every)
        self._put("max_tokens", samples.max_tokens)
        if samples.version != self._samples_version:  # making the table takes a while
            self._samples_version = samples.version
            self.controls.samples.value = _CLOSE_LINES.format(samples.to_html())

    def _log_html(self) -> str:
        if not self._log:
            return "<div>nothing yet</div>"
        latest = [(step, kind, cut(text)) for step, kind, text in list(self._log)[-_LOG_SHOWN:][::-1]]
        hidden = len(self._log) - len(latest)
        return table(("step", "event", ""), latest) + (f"<div>… and {hidden:,} before them</div>" if hidden else "")

    def _show_error(self) -> None:
        error, box = self._loop.error or self.error, self.controls.error
        box.value = "" if error is None else error_html(error)
        box.layout.display = "none" if error is None else ""

    def fail(self, error: Exception) -> None:
        """Shows an error that came while nobody had asked for anything."""
        self.error = error
        self._show_error()

    def settle(self) -> None:
        """Shows everything as it is now; the picture as soon as it may be drawn, and in the record too when the run is over."""
        if self._closed:
            return
        self.refresh()
        self.looks.tell(stands=not self._loop.running)
        self._stop_timer()
        wait = 0.0 if self._plot.is_current(self._trainer.history) else self._plot.seconds_to_wait(self._loop.running or self._in_cell)
        self._timer = self._loop.later(wait, self.finish) if wait else None
        if self._timer is None:
            self.finish()

    def finish(self) -> None:
        """Draws now, unless the picture is current, and renews the record when the run is over."""
        self._stop_timer()
        if self._closed:
            return
        if not self._plot.is_current(self._trainer.history):
            self._plot.draw(self._trainer.history)
        self._show_picture()
        if not self._loop.running and self._record.placed:
            self._record.renew(self._plot.png, self.record_html(), f"{self.state}: {self.status_line()}")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _show_picture(self) -> None:
        """Of several panels of one trainer, one draws."""
        if self._plot.png is not self._shown_picture:  # to compare some ten thousand bytes after every step would take longer
            self.controls.plot.value = self._shown_picture = self._plot.png

    def place_record(self) -> None:
        """From now on the record stands in the cell being executed."""
        self._record.place_here(_NOTE)
        if self._trainer.history:
            self.finish()

    def record_html(self) -> str:
        """The record's table."""
        error = self._loop.error
        return ("" if error is None else error_html(error)) + record_html(self._trainer, self.state, self._samples)

    @property
    def picture(self) -> bytes:
        """The last picture, as PNG."""
        return self._plot.png


def error_html(error: BaseException) -> str:
    """An error and what to do about it."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, FulltuneError):
        advice = ""  # these say so themselves
    elif isinstance(error, MemoryError) or any(words in text.lower() for words in ("out of memory", "malloc", "unable to allocate")):
        advice = _OUT_OF_MEMORY
    else:
        advice = _UNEXPECTED
    style = "border:1px solid #D55E00;border-left-width:6px;padding:6px 10px;margin:4px 0;white-space:pre-wrap;"
    style += "word-break:normal;overflow-wrap:anywhere;line-height:1.4"
    return f'<pre role="alert" class="{NO_MATH}" style="{style}">⚠ {esc(text, limit=4000)}{chr(10) if advice else ""}{esc(advice)}</pre>'


# -- train: The training panel: run, pause, step and look, in a notebook

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
            trainer.listeners.append(lines)
        try:
            await self.loop.wait()
        finally:
            if in_lines:
                trainer.listeners.remove(lines)
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
        trainer.event("stop", f"stopped after step {trainer.step_count} of {trainer.total_steps}")
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
        if not any(isinstance(listener, TrainView) for listener in self.loop.trainer.listeners):
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
