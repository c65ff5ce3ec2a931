"""The showing side of the training panel: status, log, samples, and the record that stays."""

from __future__ import annotations

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

from fulltune_nb.html import NO_MATH, cut, esc, human_bytes, image, table
from fulltune_nb.panels.panel import error_html
from fulltune_nb.panels.progress import clock, due_again, may_be_missing
from fulltune_nb.panels.run_record import record_html
from fulltune_nb.panels.tabs import OpenTab
from fulltune_nb.panels.ways_on import how_to_go_on, reasons_against
from fulltune_nb.plots import PNG_WIDTH, loss_png
from fulltune_nb.training.history import EvalReport, Event, StepReport
from fulltune_nb.training.trainer import Trainer

RECORD_SECONDS = 20.0  # from record to record while a run goes on
SETTLED_SECONDS = 1.0  # from the last news of a run that rests to its record, whose picture takes longer to draw
REFRESH_SECONDS = 0.25  # numbers change no more often while steps are taken
_LOG_KEPT, _LOG_SHOWN = 1000, 60
_CLOSE_LINES = '<div style="line-height:1.35">{}</div>'  # ipywidgets would set them 28 pixels apart


class TrainView:
    """The showing side of one `TrainPanel`: a listener of the trainer, whoever takes the steps."""

    def __init__(self, panel: Any):
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
            figures = f"loss {report.loss:.4f}, perplexity {report.perplexity:.3f}{report.accuracy_text}"
            self._log.append((f"{report.step:,}", "evaluation", f"{report.split} {figures} ({report.tokens:,} tokens)"))
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
            parts += [f"epoch {last.epoch:.2f}", self._pace.loss_words, f"{self._pace.tokens_per_second:,.0f} tokens/s"]
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
        sign = "▶" if self._training or self._trainer.doing else "✓" if self._trainer.done else "⚠" if why else "❚❚"
        line = f"<b>{sign} {esc(self._state())}</b>{why} · {esc(self._status_line())}"
        more = f"<br>{esc(how_to_go_on(self._trainer))}" if self._trainer.done and not self._training else ""
        self._controls.status.value = f'<div role="status" class="{NO_MATH}" style="line-height:1.5">{line}{more}</div>'

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
