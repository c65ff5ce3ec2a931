"""The interactive chart of one or several runs, an anywidget that draws with uPlot (static/chart.js).

A run's numbers are sent as float64, so that the value under the cursor is the history's. Of many steps each stretch of one length is sent
as its least and its greatest value, each with its own step: no spike is lost, and a chart of 1,000,000 steps is as quick as one of 2,000.
When steps come, only stretches that they change are sent; when the page zooms in, it asks for the steps of that part.

Letters: n steps, s steps in a stretch, k stretches.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from fulltune_nb.errors import ConfigError, optional_import
from fulltune_nb.html import counted, cut, printable, table
from fulltune_nb.plots import PNG_WIDTH, loss_png
from fulltune_nb.record import Record, close_earlier, new_mark
from fulltune_nb.training.history import EvalReport, Event, RunSummary, StepReport

with optional_import("A chart", "notebook"):
    import anywidget
    import traitlets

SHOWN = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory", "active_memory", "cache_memory")
"""Fields of a `StepReport` that the chart has curves of."""
_FIELDS = ("step", *SHOWN)
_numbers_of = attrgetter(*_FIELDS)
_STRETCHES = 2048  # of a run at most; more than a wide screen has pixels
_FEWEST_STRETCHES = 256  # where many runs share one chart
_SECONDS = 0.25  # between two messages to the page
_NAME, _TEXT = 80, 200  # characters of a run's name, and of an event
_KEPT = {"evals": 5000, "events": 2000}  # of the latest; what came before is counted
_TOLD = 6  # runs in a line of text
_STATIC = Path(__file__).parent / "static"


class Columns:
    """A history's numbers, taken in as they come: of 20,000 reports only the new ones are looked at.

    Attributes:
        evals: (split, step, loss) of the latest evaluations; the loss is None where it is not finite.
        events: (step, kind, message) of the latest events behind step 0, where every run begins.
        counts: how many there are of both in all.
        taken: reports taken in.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._numbers = np.empty((len(_FIELDS), 1024))
        self._count = self.taken = 0
        self._last: Any = None
        self.evals: deque[tuple[str, int, float | None]] = deque(maxlen=_KEPT["evals"])
        self.events: deque[tuple[int, str, str]] = deque(maxlen=_KEPT["events"])
        self.counts = {"evals": 0, "events": 0}

    def take(self, history: Sequence[Any]) -> bool:
        """Takes in what has come since; False where more than the end has changed: another history, or one that was cut.

        Raises:
            ConfigError: it holds something else than reports.
        """
        same = len(history) >= self.taken and (not self.taken or history[self.taken - 1] is self._last)
        if not same:
            self._forget()
        steps = []
        for report in history[self.taken :]:
            if isinstance(report, StepReport):
                steps.append(_numbers_of(report))
            elif isinstance(report, EvalReport):
                self.evals.append((cut(printable(report.split), _NAME), report.step, report.loss if math.isfinite(report.loss) else None))
                self.counts["evals"] += 1
            elif not isinstance(report, Event):
                raise ConfigError(f"LossChart: expected StepReport, EvalReport or Event in the history, got {type(report).__name__}.")
            elif report.step > 0:
                self.events.append((report.step, cut(report.kind.replace("_", " "), _NAME), cut(report.message, _TEXT)))
                self.counts["events"] += 1
        in_order = self._add(steps)
        self.taken = len(history)
        self._last = history[-1] if self.taken else None
        return same and in_order

    def _add(self, rows: list[tuple[float, ...]]) -> bool:
        """Whether the new steps came behind the old ones; else all are put in order, as in a folder that two runs wrote into."""
        count = self._count + len(rows)
        while count > self._numbers.shape[1]:
            self._numbers = np.concatenate([self._numbers, np.empty_like(self._numbers)], axis=1)
        if rows:
            values = np.array(rows, np.float64).T
            self._numbers[:, self._count : count] = np.where(np.isfinite(values), values, np.nan)
        in_order = not (np.diff(self._numbers[0, max(0, self._count - 1) : count]) < 0).any()
        if not in_order:
            self._numbers[:, :count] = self._numbers[:, np.argsort(self._numbers[0, :count], kind="stable")]
        self._count = count
        return in_order

    def __len__(self) -> int:
        """The number of steps."""
        return self._count

    def __getitem__(self, name: str) -> np.ndarray:
        """The column of a field, (n,) float64, NaN where not finite."""
        return self._numbers[_FIELDS.index(name), : self._count]


def stretches(steps: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """What the page draws of a curve, float64: (n, 2) with step and value for `size` 1, else (k, 7).

    Those seven are of each stretch of `size` steps (the last may have fewer): step and value of its least and of its greatest value, the
    earlier one first, then its middle step, the mean of its finite values, and how many these are. Without any, the values are NaN.
    """
    if size == 1:
        return np.stack([steps, values], axis=1)
    missing = -len(values) % size
    x = np.pad(steps, (0, missing), mode="edge").reshape(-1, size)
    y = np.pad(values, (0, missing), constant_values=np.nan).reshape(-1, size)
    finite = ~np.isnan(y)
    least, greatest = np.where(finite, y, np.inf).argmin(1), np.where(finite, y, -np.inf).argmax(1)
    rows, first, second = np.arange(len(y)), np.minimum(least, greatest), np.maximum(least, greatest)
    weights = finite.sum(1)
    means = np.where(weights > 0, np.where(finite, y, 0.0).sum(1) / np.maximum(weights, 1), np.nan)
    middles = (x[:, 0] + x[:, -1]) / 2
    return np.stack([x[rows, first], y[rows, first], x[rows, second], y[rows, second], middles, means, weights], axis=1)


class _Run:
    """One run of a chart: where its history is found, and how much of it the page has."""

    def __init__(self, name: object, source: Any):
        self._trainer = weakref.ref(source) if hasattr(source, "history") else None  # widgets live until they are closed
        self._history = getattr(source, "history", source)
        self.name = cut(" ".join(printable(name).split()), _NAME)
        self.columns = Columns()
        self._size, self._whole = 0, 0  # of the stretches that were sent: their length, and how many of them are whole
        self._sent = dict.fromkeys(_KEPT, 0)

    @property
    def history(self) -> Sequence[Any]:
        """The reports, as they are now."""
        if self._trainer is not None and (trainer := self._trainer()) is not None:
            self._history = trainer.history
        return self._history

    def whole(self, most: int) -> dict[str, Any]:
        """All that the page shows of the run."""
        return self._message(self._length(most), 0, dict.fromkeys(_KEPT, 0))

    def news(self, most: int) -> dict[str, Any] | None:
        """What has come since the last news; None for nothing."""
        before = (len(self.columns), *self.columns.counts.values()) if self._size else None
        if not self.columns.take(self.history):
            self._size, self._sent = 0, dict.fromkeys(_KEPT, 0)
        elif before == (len(self.columns), *self.columns.counts.values()):
            return None
        size = self._length(most)
        start = self._whole if size == self._size else 0
        message = self._message(size, start, self._sent)
        self._size, self._whole, self._sent = size, len(self.columns) // size, dict(self.columns.counts)
        return message

    def figures(self) -> tuple[str, str, str]:
        """Steps, last training loss and best validation loss, to read."""
        summary = RunSummary.of(self.history)
        valid = summary.best_evals.get("valid")
        last = "-" if summary.last_loss is None else f"{summary.last_loss:.4f}"
        return f"{summary.steps:,}", last, "-" if valid is None else f"{valid.loss:.4f} at step {valid.step:,}"

    def line(self) -> str:
        """The same in a sentence."""
        steps, last, valid = self.figures()
        return f"{self.name}: step {steps}, training loss {last}, best validation loss {valid}"

    def part(self, low: float, high: float, most: int) -> dict[str, Any]:
        """The steps from `low` to `high`, and the next one on both sides."""
        steps = self.columns["step"]
        first = max(0, int(np.searchsorted(steps, low, "right")) - 1)
        end = int(np.searchsorted(steps, high, "left")) + 1
        size = _power(len(steps[first:end]), most)
        return {"size": size, "from": 0, "count": len(steps[first:end]), "fields": self._fields(size, first, end)}

    def _length(self, most: int) -> int:
        return _power(len(self.columns), most)

    def _fields(self, size: int, first: int, end: int | None = None) -> dict[str, bytes]:
        steps = self.columns["step"][first:end]
        return {name: stretches(steps, self.columns[name][first:end], size).tobytes() for name in SHOWN}

    def _message(self, size: int, start: int, sent: Mapping[str, int]) -> dict[str, Any]:
        columns = self.columns
        last = [_or_none(columns[name][-1]) for name in _FIELDS] if len(columns) else []
        message = {"size": size, "from": start, "count": len(columns), "fields": self._fields(size, start * size)}
        message |= {"first": float(columns["step"][0]) if len(columns) else None, "last": last}
        for name, there in (("evals", columns.evals), ("events", columns.events)):
            total = columns.counts[name]
            first = max(sent[name], total - len(there))
            message[name] = {"from": first, "rows": list(there)[len(there) - (total - first) :]}
        return message


def _power(count: int, most: int) -> int:
    """The length of a stretch, a power of two, with which `count` steps are at most `most` stretches."""
    return 1 << max(0, math.ceil(count / most) - 1).bit_length()


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# -- the widget -------------------------------------------------------------------------------------------------------


class LossChart(anywidget.AnyWidget):
    """Loss, validation, learning rate, gradient norm, speed and memory of one or several runs, to look around in.

    Values under the cursor, drag to zoom, double click back, a slider that smooths, a logarithmic scale, events with a legend. A trainer's
    chart moves while it trains. In the notebook's file a picture and a table stay; without a notebook it is an object like others.

        ft.LossChart(trainer)
        ft.LossChart({"low": trainer.history, "high": other})

    Raises `ConfigError` for what is neither a trainer nor a history, nor names with one each.
    """

    _esm = (_STATIC / "uPlot.iife.min.js").read_text("utf-8") + (_STATIC / "chart.js").read_text("utf-8")
    _css = (_STATIC / "uPlot.min.css").read_text("utf-8") + (_STATIC / "chart.css").read_text("utf-8")
    # Made when a page asks for it, as after a reload: nothing large is kept, and what it gets is always whole.
    _whole = traitlets.Dict().tag(sync=True, to_json=lambda _, chart: chart._everything())

    _trainers: Collection[Any] = ()  # closing one that was refused is harmless
    _timer: Any = None

    def __init__(self, runs: Any, limit: int | None = None):
        """
        Args:
            runs: a trainer, or a history (a list of its reports); or several under names of yours, as a dictionary or as pairs.
            limit: bytes of memory this machine has for training, shown with the memory.
        """
        self._limit = limit
        self._runs = [_Run(name, source) for name, source in _named(runs)]
        self._most = max(_FEWEST_STRETCHES, _STRETCHES // max(1, len(self._runs)))
        for run in self._runs:
            run.news(self._most)
        mark = new_mark()
        self._record = Record(mark, with_picture=True)
        self._due = self._told = -math.inf
        self._trainers = weakref.WeakSet(source for _, source in _named(runs) if hasattr(source, "listeners"))
        super().__init__(_whole={"runs": len(self._runs)})
        self.add_class(mark)
        self.on_msg(self._asked)
        for trainer in self._trainers:
            trainer.listeners.append(self)

    # -- what comes -------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Shows what has come into the histories since. A trainer's chart does so by itself."""
        self._due = time.monotonic() + _SECONDS
        news = [(number, run.news(self._most)) for number, run in enumerate(self._runs)]
        self._send_runs("news", [(number, message) for number, message in news if message is not None])

    def on_step(self, trainer: Any, report: Any = None) -> None:
        """The trainer tells of a step; the page is told at most every 0.25 seconds, and of the last one soon."""
        self._told = time.monotonic()
        if self._told >= self._due:
            self.update()
        if self._timer is None:
            try:
                self._timer = asyncio.get_running_loop().call_later(_SECONDS, self._rest)
            except RuntimeError:  # no event loop, so no later
                self.update()

    on_eval = on_event = on_change = on_step

    def on_end(self, trainer: Any) -> None:
        """A `trainer.run` is over."""
        self.update()
        self._renew_record()

    def _rest(self) -> None:
        """Some time after a step: shows the last one, and renews the record when no other follows."""
        self._timer = None
        if self.comm is None:  # closed
            return
        if time.monotonic() - self._told < 0.9 * _SECONDS or any(trainer.state == "running" for trainer in self._trainers):
            self._timer = asyncio.get_running_loop().call_later(_SECONDS, self._rest)
            return
        self.update()
        self._renew_record()

    def close(self) -> None:
        """Takes the chart away."""
        for trainer in self._trainers:
            trainer.listeners.remove(self)
        self._trainers = ()
        if self._timer is not None:
            self._timer.cancel()
        super().close()

    def _let_go(self) -> None:
        """The notebook's list of outputs holds the charts of cells that were run again for ever."""
        self._runs = []

    # -- what is sent -----------------------------------------------------------------------------------------------

    def _everything(self) -> dict[str, Any]:
        return {"limit": self._limit, "names": [run.name for run in self._runs], "runs": [run.whole(self._most) for run in self._runs]}

    def _asked(self, _: Any, content: Any, __: Any) -> None:
        """The page missed something, or looks at a part."""
        if content.get("kind") == "part":
            low, high = sorted(float(content[name]) for name in ("low", "high"))
            self._send_runs("part", [(number, run.part(low, high, self._most)) for number, run in enumerate(self._runs)], content["id"])
        elif content.get("kind") == "whole":
            self._send_runs("news", [(number, run.whole(self._most)) for number, run in enumerate(self._runs)])

    def _send_runs(self, kind: str, messages: list[tuple[int, dict[str, Any]]], answers: Any = None) -> None:
        if messages:
            buffers = [message["fields"][name] for _, message in messages for name in SHOWN]
            runs = [{**message, "run": number, "fields": SHOWN} for number, message in messages]
            self.send({"kind": kind, "id": answers, "runs": runs}, buffers)

    # -- in a cell --------------------------------------------------------------------------------------------------

    def _ipython_display_(self) -> None:
        show(self)

    def __repr__(self) -> str:
        steps = max((len(run.columns) for run in self._runs), default=0)
        return f"LossChart({counted(len(self._runs), 'run')}, {steps:,} steps)"

    def _line(self) -> str:
        more = [f"and {len(self._runs) - _TOLD:,} runs more"] if self._runs[_TOLD:] else []
        return "; ".join([run.line() for run in self._runs[:_TOLD]] + more)

    def _page(self) -> str:
        rows = [(run.name, *run.figures()) for run in self._runs]
        return table(("run", "steps", "last loss", "best validation loss"), rows, "Loss")

    def _renew_record(self) -> None:
        if self._record.placed:
            png = loss_png([(run.name, run.history) for run in self._runs])
            missing = "" if all(trainer.done for trainer in self._trainers) else "Runs may have gone on since."
            self._record.renew(self._page(), self._line(), png, PNG_WIDTH, missing)


def show(chart: LossChart, page: str = "", line: str = "") -> None:
    """Shows a chart in the cell being executed, with the record that stays, and what shall stand below it.

    Args:
        page: HTML, escaped.
        line: the same in a line of plain text.
    """
    from IPython.display import display

    close_earlier(chart)
    display({**chart._repr_mimebundle_()[0], "text/plain": "LossChart: a widget, which lives while its kernel does"}, raw=True)
    chart._record.place("", repr(chart))
    chart._renew_record()
    if page:
        display({"text/html": page, "text/plain": line}, raw=True)


def _named(runs: Any) -> list[tuple[object, Any]]:
    """(name, trainer or history) of each."""
    if hasattr(runs, "history") or _is_history(runs):
        pairs = [(getattr(getattr(runs, "run_dir", None), "name", "run"), runs)]
    elif isinstance(runs, Mapping):
        pairs = list(runs.items())
    else:
        pairs = list(runs) if isinstance(runs, Sequence) and all(isinstance(own, tuple) and len(own) == 2 for own in runs) else [("", None)]
    wrong = next((source for _, source in pairs if not (hasattr(source, "history") or _is_history(source))), pairs)
    if wrong is not pairs or not pairs:
        hint = " Of run folders, make one by ft.compare([...]).chart()."
        raise ConfigError(f"LossChart: expected a trainer, a history, or a dictionary of names with one each, got {runs!r:.80}.{hint}")
    return pairs


def _is_history(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(report, (StepReport, EvalReport, Event)) for report in value[:1])
