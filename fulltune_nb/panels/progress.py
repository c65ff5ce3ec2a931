"""What `Trainer.run` shows by default: a bar in a terminal, one changing output in a notebook, plain lines anywhere else.

The environment variable `FULLTUNE_PROGRESS` chooses: `auto` (the default), `terminal`, `notebook`, `plain` or `off`. A notebook
run by papermill is a notebook too; set `plain` there for lines that a log can hold.

Shown values: the loss is the mean over the trained tokens of the last `config.steps_per_report` steps, the speed is that of these
steps, the peak is the largest of the run, and the time left counts evaluations and saving too. What happens is said in the words of
`trainer.status`, and how a run ended in those of `trainer.state`.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from fulltune_nb import svg
from fulltune_nb.errors import ConfigError
from fulltune_nb.html import SHOWN_IN_MB, cut, esc, facts, human_bytes, printable, table
from fulltune_nb.record import Record, in_kernel
from fulltune_nb.training.history import EvalReport, Event, History, StepReport

VARIABLE = "FULLTUNE_PROGRESS"
REFRESH_SECONDS = 1.0  # a notebook's output changes no more often
CURVE_SECONDS = 10.0  # nor its curve, for which the whole history is read
SILENCE_SECONDS = 60.0  # with slow steps, a plain line comes at the latest after so long
LOADING_SECONDS = 3.0  # loading that takes no longer shows nothing
LOG_SECONDS = 15.0  # between two lines of a log about loading
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # fits into 80 columns
_SHOWN = 8  # evaluations, and events, that the notebook's record lists


def progress() -> Any:
    """The callback that suits the place this process runs in.

    Raises:
        ConfigError: `FULLTUNE_PROGRESS` is set to something unknown.
    """
    return _SHAPES[_shape()]()


def _shape() -> str:
    """The name of the shape that suits the place."""
    wanted = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if wanted == "auto":
        is_terminal = getattr(sys.stderr, "isatty", lambda: False)()
        wanted = "notebook" if in_kernel() else "terminal" if is_terminal else "plain"
    if wanted not in _SHAPES:
        raise ConfigError(f"{VARIABLE}: expected auto, {', '.join(_SHAPES)}, got {wanted!r}. Set it to one of these, or unset it.")
    return wanted


def clock(seconds: float) -> str:
    """Seconds as `3:20` or `1:02:03`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def memory_size(count: float) -> str:
    """Bytes as `0.52 GB`; of a tiny model as `21.50 MB`."""
    return f"{count / 1e9:.2f} GB" if count >= SHOWN_IN_MB else human_bytes(count)


# -- what records of runs have in common --------------------------------------------------------------------------------------


def evaluations_table(rows: Sequence[tuple[float, EvalReport]], total: int) -> str:
    """Training and validation loss side by side; "" for no rows.

    Args:
        rows: the latest evaluations, each behind the mean training loss of the steps before it.
        total: how many there were.
    """
    figures = [(f"{r.step:,}", f"{loss:.4f}" if r.step else "-", r) for loss, r in rows]
    measured = [(f"{r.loss:.4f}", f"{r.perplexity:.3f}", "-" if math.isnan(r.accuracy) else f"{r.accuracy:.1%}") for *_, r in figures]
    cells = [(step, loss, r.split, *own, f"{r.tokens:,}") for (step, loss, r), own in zip(figures, measured, strict=True)]
    headers = ("step", "training loss", "split", "its loss", "perplexity", "accuracy", "tokens")
    return table(headers, cells, _caption("Evaluations", total, len(cells))) if cells else ""


def events_table(events: Sequence[tuple[int, str, str]], total: int) -> str:
    """(step, kind, message) of the latest events, of so many in all; "" for none."""
    cells = [(f"{step:,}", kind.replace("_", " "), cut(message)) for step, kind, message in events]
    return table(("step", "event", ""), cells, _caption("Events", total, len(cells))) if cells else ""


def _caption(what: str, there: int, shown: int) -> str:
    return what if there == shown else f"{what}: the last {shown} of {there:,}"


def curve_of(history: History) -> str:
    """The training loss as a small curve; "" before the second step."""
    steps = history.steps
    return svg.curve([(report.step, report.loss) for report in steps], f"training loss over {len(steps):,} steps")


def due_again(seconds: float, started: float) -> float:
    """When what began at `started`, and has just been done, may be done again: after so many seconds, and with 1% of the time at most."""
    return time.monotonic() + max(seconds, 99 * (time.monotonic() - started))


def may_be_missing(trainer: Any) -> str:
    """What a record of a run that is written now may lack when it is read; "" when the run has come to its end."""
    if trainer.state in ("done", "stopped early"):
        return ""
    folder = trainer.run_dir
    where = f"{cut(str(folder))}/metrics.jsonl says how far" if folder else "trainer.step_count says how far, while this kernel lives"
    return f"The run may have gone on since: {where}."


def _one_line(text: object) -> str:
    return printable(" ".join(str(text).split()))


class Pace:
    """Loss and speed over the latest steps of a run, and the time it will still take.

    Args:
        steps: how many of the latest count.
        reports: those there are already.
    """

    def __init__(self, steps: int, reports: Iterable[StepReport] = ()):
        self.recent: deque[StepReport] = deque(reports, maxlen=max(1, steps))
        self._first: tuple[int, float] | None = None  # the number of a run's first step, and when it ended
        self._ended: tuple[int, float] | None = None  # the latest
        self._resting = False

    def add(self, report: StepReport) -> None:
        """Takes in a step that has just ended."""
        self.recent.append(report)
        self._ended = report.step, time.monotonic()
        if self._first is None or self._resting:
            self._first, self._resting = self._ended, False

    def rest(self) -> None:
        """The time from here to the next step does not count: the run begins or ends."""
        self._resting = True

    @property
    def last(self) -> StepReport | None:
        """The latest step."""
        return self.recent[-1] if self.recent else None

    @property
    def loss(self) -> float:
        """Mean over the trained tokens, in nats; NaN before the first step."""
        tokens = sum(report.tokens for report in self.recent)
        return sum(report.loss * report.tokens for report in self.recent) / tokens if tokens else math.nan

    @property
    def loss_words(self) -> str:
        """The same to read, with the number of steps that it is a mean of."""
        return f"loss {self.loss:.4f}" + (f" (mean of {len(self.recent)} steps)" if len(self.recent) > 1 else "")

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens a second, within steps; NaN before the first."""
        seconds = sum(report.seconds for report in self.recent)
        return sum(report.tokens for report in self.recent) / seconds if seconds else math.nan

    def seconds_left(self, steps: int) -> float:
        """Seconds that so many more steps will take, with all that comes between steps; NaN before the first step.

        The first step, which compiles, counts only while it is alone.
        """
        if self._ended is not None and self._ended[0] > self._first[0]:
            return steps * (self._ended[1] - self._first[1]) / (self._ended[0] - self._first[0])
        return steps * self.last.seconds if self.last else math.nan


class _Progress:
    """Takes the trainer's reports in; a subclass shows them.

    Attributes:
        target: the step count at which this run ends or pauses.
        pace: of its latest steps.
        peak: largest number of bytes in use so far.
    """

    def on_start(self, trainer: Any, target: int) -> None:
        """Before the first step of a `run`; `target` is the step count at which it will end."""
        self.target, self.peak = target, 0
        self.pace = Pace(trainer.config.steps_per_report)
        self._started = time.monotonic()
        self.begin(trainer)
        for event in _unseen_events(trainer):
            self.on_event(trainer, event)

    def on_step(self, trainer: Any, report: Any) -> None:
        self.pace.add(report)
        self.peak = max(self.peak, report.peak_memory)
        self.show_step(trainer, report)

    def on_eval(self, trainer: Any, report: Any) -> None:
        numbers = f"loss {report.loss:.3f}, perplexity {report.perplexity:.3f}{report.accuracy_text}"
        numbers += f" ({report.tokens:,} tokens, {report.seconds:.1f} s)"
        self.show_line(trainer, f"{report.split} {numbers}")

    def on_event(self, trainer: Any, event: Any) -> None:
        self.show_line(trainer, event.message)

    def ended(self, trainer: Any, with_peak: bool = True) -> str:
        """How the run ended, in a line."""
        peak = f", peak {memory_size(self.peak)}" if self.peak and with_peak else ""  # none where no step was taken
        return f"{trainer.state} after {self.elapsed()}{peak}" + (f": {trainer.failure}" if trainer.failure else "")

    def elapsed(self) -> str:
        """Time since the start of the run."""
        return clock(time.monotonic() - self._started)

    def left(self, trainer: Any) -> str:
        """Expected time to the target."""
        return clock(self.pace.seconds_left(self.target - trainer.step_count)) if self.pace.recent else "?"

    def numbers(self, report: Any) -> str:
        """Loss, rate and speed in a line."""
        return f"loss {self.pace.loss:.3f}, lr {report.learning_rate:.2e}, {self.pace.tokens_per_second:.0f} tokens/s"


def _unseen_events(trainer: Any) -> list:
    """Events since the last step, which came while nothing was there to show them: how the trainer was made or resumed."""
    found: list = []
    for report in reversed(trainer.history):
        if report.kind_of_report == "step":
            break
        shown = ("pause", "early_stop") + ("data",) * trainer.data.notes_shown
        if report.kind_of_report == "event" and report.kind not in shown:  # by the run before, or when the data was loaded
            found.insert(0, report)
    return found


class PlainProgress(_Progress):
    """Whole lines on standard output: for logs."""

    def begin(self, trainer: Any) -> None:
        self._last_line = time.monotonic()

    def show_line(self, trainer: Any, text: str) -> None:
        print(_one_line(f"step {trainer.step_count}/{trainer.total_steps}: {text}"), flush=True)
        self._last_line = time.monotonic()

    def show_step(self, trainer: Any, report: Any) -> None:
        due = report.step % trainer.config.steps_per_report == 0 or report.step == self.target
        if due or time.monotonic() - self._last_line >= SILENCE_SECONDS:
            self.show_line(trainer, f"{self.numbers(report)}, peak {memory_size(report.peak_memory)}, {self.left(trainer)} left")

    def on_save(self, trainer: Any, path: Any) -> None:
        self.show_line(trainer, f"saved {path}")

    def on_doing(self, trainer: Any) -> None:
        if trainer.doing and time.monotonic() - self._last_line >= SILENCE_SECONDS:
            self.show_line(trainer, trainer.status)

    def on_end(self, trainer: Any) -> None:
        self.show_line(trainer, self.ended(trainer))


class TerminalProgress(_Progress):
    """A tqdm bar on standard error; evaluations and events are lines above it. Saving has none: it would push them away."""

    def begin(self, trainer: Any) -> None:
        from tqdm import tqdm

        size = {"dynamic_ncols": True} if _has_size(sys.stderr) else {"ncols": 80, "nrows": 24}  # without one tqdm draws nothing
        self._bar = tqdm(total=self.target, initial=trainer.step_count, file=sys.stderr, bar_format=_BAR, **size)

    def show_line(self, trainer: Any, text: str) -> None:
        self._bar.write(_one_line(f"step {trainer.step_count}: {text}"), file=sys.stderr)

    def show_step(self, trainer: Any, report: Any) -> None:
        self._bar.set_postfix_str(self.numbers(report), refresh=False)  # tqdm itself decides when there is time to draw
        self._bar.update(report.step - self._bar.n)

    def on_doing(self, trainer: Any) -> None:
        last = self.pace.last
        self._bar.set_postfix_str(_one_line(trainer.status) if trainer.doing else self.numbers(last) if last else "")

    def on_end(self, trainer: Any) -> None:
        self._bar.refresh()
        self._bar.close()
        print(_one_line(f"step {trainer.step_count}: {self.ended(trainer)}"), file=sys.stderr)


def _has_size(stream: Any) -> bool:
    """Whether the terminal that a stream writes to tells its size; some say 0 lines of 0 columns."""
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return False


class NotebookProgress(_Progress):
    """One output that changes at most once a second and ends as a table that needs no kernel to be read."""

    def begin(self, trainer: Any) -> None:
        self._evals: deque[tuple[float, EvalReport]] = deque(maxlen=_SHOWN)
        self._events: deque[tuple[int, str, str]] = deque(maxlen=_SHOWN)
        self._counts = [0, 0]  # evaluations and events there were
        self._curve, self._curve_due = "", -math.inf
        self._drawn = time.monotonic()
        self._record = Record("", with_picture=False)
        self._record.place(*self._texts(trainer, "starting"), always=True)

    def show_step(self, trainer: Any, report: Any) -> None:
        self._refresh(trainer)

    def on_eval(self, trainer: Any, report: Any) -> None:
        self._evals.append((self.pace.loss, report))
        self._counts[0] += 1
        self._refresh(trainer)

    def on_save(self, trainer: Any, path: Any) -> None:
        self.on_event(trainer, Event(trainer.step_count, "saved", str(path), 0.0))

    def on_event(self, trainer: Any, event: Any) -> None:
        self._events.append((event.step, event.kind, event.message))
        self._counts[1] += 1
        self._refresh(trainer)

    def on_doing(self, trainer: Any) -> None:
        self._draw_now(trainer)

    def on_end(self, trainer: Any) -> None:
        self._curve_due = -math.inf
        self._draw(trainer, self.ended(trainer, with_peak=False))

    def _refresh(self, trainer: Any) -> None:
        if time.monotonic() - self._drawn >= REFRESH_SECONDS:
            self._draw_now(trainer)

    def _draw_now(self, trainer: Any) -> None:
        self._draw(trainer, f"{trainer.status}, {self.elapsed()} so far, {self.left(trainer)} left")

    def _draw(self, trainer: Any, state: str) -> None:
        self._drawn = time.monotonic()
        if self._drawn >= self._curve_due:
            self._curve = curve_of(trainer.history)
            self._curve_due = due_again(CURVE_SECONDS, self._drawn)
        page, line, missing = self._texts(trainer, state)
        self._record.renew(page, line, missing=missing)

    def _texts(self, trainer: Any, state: str) -> tuple[str, str, str]:
        """The output as HTML and in a line, and what may be missing in it."""
        step, total = trainer.step_count, trainer.total_steps
        title = f"step {step:,} of {total:,}: {state}"
        pairs = self._pairs()
        bar = f'<progress value="{step}" max="{max(total, 1)}" style="width:320px" aria-label="{esc(title)}"></progress> {esc(title)}'
        parts = [f"<div>{bar}</div>"]
        if pairs:
            parts.append(facts("", pairs))
        parts += [self._curve, evaluations_table(self._evals, self._counts[0]), events_table(self._events, self._counts[1])]
        line = ", ".join([title, *(f"{name} {value}" for name, value in pairs)])
        return "".join(parts), line, may_be_missing(trainer)

    def _pairs(self) -> list[tuple[str, str]]:
        report = self.pace.last
        if report is None:
            return []
        return [
            ("epoch", f"{report.epoch:.2f}"),
            ("loss", f"{self.pace.loss:.4f} (mean of the last {len(self.pace.recent)} steps)"),
            ("learning rate", f"{report.learning_rate:.2e}"),
            ("speed", f"{self.pace.tokens_per_second:,.0f} tokens/s"),
            ("peak memory", memory_size(self.peak)),
        ]


_SHAPES = {"terminal": TerminalProgress, "notebook": NotebookProgress, "plain": PlainProgress, "off": object}


class LoadingProgress:
    """How far rows are read or tokenized, and the time left: a line that changes, in a log one now and then. Short loading shows nothing.

    Args:
        what: is done.
        total: how much of it there is, in any unit.
    """

    def __init__(self, what: str, total: int):
        self._what, self._total, self._shown = _one_line(what), max(total, 1), False
        self._record = Record("", with_picture=False)
        self._started = time.monotonic()
        self._due = self._started + LOADING_SECONDS

    def update(self, done: int) -> None:
        """Tells how much is done."""
        if (now := time.monotonic()) < self._due:
            return
        shape, seconds = _shape(), now - self._started
        self._due = now + (LOG_SECONDS if shape == "plain" else REFRESH_SECONDS)
        left = clock(seconds / done * (self._total - done)) if done else "?"
        self._show(shape, f"{self._what}: {100 * done / self._total:.0f}%, {clock(seconds)} so far, {left} left")

    def end(self) -> None:
        """It is done, or has failed."""
        if self._shown:
            self._show(_shape(), f"{self._what}: {clock(time.monotonic() - self._started)}", is_last=True)

    def _show(self, shape: str, text: str, is_last: bool = False) -> None:
        if shape == "plain":
            print(printable(text), flush=True)
        elif shape == "terminal":  # the line goes when loading ends
            columns = shutil.get_terminal_size().columns - 1
            shown = "" if is_last else printable(text)[:columns]
            print("\r" + printable(shown.ljust(columns)), end="\r" if is_last else "", file=sys.stderr, flush=True)
        elif shape == "notebook":
            page, missing = f"<div>{esc(text)}</div>", "" if is_last else "It may have gone on since."
            if self._record.placed:
                self._record.renew(page, text, missing=missing)
            else:
                self._record.place(page, text, missing, always=True)
        self._shown = True
