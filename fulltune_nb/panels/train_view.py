"""What the training panel shows: numbers, plot, log and samples, and the record that stays. It is told of all that happens."""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from pathlib import Path
from typing import Any

from fulltune_nb.errors import FulltuneError
from fulltune_nb.html import NO_MATH, cut, esc, human_bytes, table
from fulltune_nb.panels.batch_tab import BatchTab
from fulltune_nb.panels.callbacks_tab import CallbacksTab
from fulltune_nb.panels.controls import OWN_TABS, TrainControls
from fulltune_nb.panels.live_plot import LivePlot
from fulltune_nb.panels.looks import Looks
from fulltune_nb.panels.loop import TrainLoop
from fulltune_nb.panels.pace import Pace
from fulltune_nb.panels.progress import clock
from fulltune_nb.panels.record import Record, record_html
from fulltune_nb.panels.samples import Samples, prompts_text
from fulltune_nb.panels.updates_tab import UpdatesTab
from fulltune_nb.training.history import EvalReport, Event, StepReport
from fulltune_nb.training.machine import machine_limit
from fulltune_nb.training.trainer import Trainer

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
        trainer.journal.listeners.append(self)
        self.settle()

    def close(self) -> None:
        """Hears no more and takes the widgets away."""
        self._closed = True
        self._stop_timer()
        self.looks.close()
        self._trainer.journal.listeners.remove(self)
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
