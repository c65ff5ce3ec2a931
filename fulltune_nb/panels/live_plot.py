"""The plot that moves while training goes on: loss on the left, memory on the right, as one PNG of fixed size.

One figure and its curves are made once and only given new data. Most of a drawing's time goes into text, so axes and legend are
kept as a background until their limits have to change, which is seldom: limits leave room to grow. Thousands of steps are drawn
as the least and the greatest loss of some hundred stretches, so that no spike is lost and drawing takes no longer.
Letters: n reports, m points drawn.
"""

from __future__ import annotations

import io
import math
import time
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fulltune_nb.html import PALETTE
from fulltune_nb.plots import moving_mean
from fulltune_nb.training.history import History, StepReport

WIDTH, HEIGHT = 880, 300  # pixels
MOST_POINTS = 600
MIN_SECONDS = 1.0  # between two pictures
MAX_SHARE = 0.02  # of the time that drawing may take
_SMOOTHED_FROM = 20  # steps; fewer need no second line
_BLUE, _GREEN, _PINK, _VERMILLION, _GREY = PALETTE[0], PALETTE[2], PALETTE[3], PALETTE[5], "#666666"
_FIELDS = ("step", "loss", "peak_memory", "active_memory", "cache_memory")
_STYLE = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), "white"),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), "#222222"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "legend.edgecolor": "#cccccc",
    "grid.color": "#dddddd",
    "axes.grid": True,
    "axes.axisbelow": True,
    "font.size": 9.0,
    "font.family": "DejaVu Sans",
}


class LivePlot:
    """Draws a history again and again.

    Attributes:
        png: the last picture, or empty bytes.
        seconds: what the last drawing took.
    """

    def __init__(self, limit: int | None = None):
        """
        Args:
            limit: bytes of memory this machine has for training; a line marks it.
        """
        self.png = b""
        self.seconds = 0.0
        self._started = -math.inf
        self._columns = _Columns()
        with matplotlib.rc_context(_STYLE):
            self._figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
            FigureCanvasAgg(self._figure)
            loss = _LossPart(self._figure.add_axes((0.065, 0.16, 0.52, 0.7)))
            memory = _MemoryPart(self._figure.add_axes((0.665, 0.16, 0.32, 0.7)), limit)
        self._parts = (loss, memory)
        self._background: Any = None

    def seconds_to_wait(self, training: bool = True) -> float:
        """Until the next picture may be drawn: at most one a second, and while training never more than 2% of the time."""
        interval = max(MIN_SECONDS, self.seconds / MAX_SHARE) if training else MIN_SECONDS
        return max(0.0, self._started + interval - time.monotonic())

    def is_current(self, history: History) -> bool:
        """Whether the last picture shows all of the history."""
        return bool(self.png) and self._columns.taken == len(history)

    def draw(self, history: History) -> bytes:
        """A picture of all that is in the history, now, as PNG."""
        started = time.monotonic()
        self._columns.take(history)
        canvas = self._figure.canvas
        stale = [part.update(self._columns) for part in self._parts]
        if self._background is None or any(stale):
            with matplotlib.rc_context(_STYLE):  # ticks are made anew while drawing
                for part in self._parts:
                    part.make_legend()
                canvas.draw()
            self._background = canvas.copy_from_bbox(self._figure.bbox)
        canvas.restore_region(self._background)
        for part in self._parts:
            part.draw_curves()
        self.png = _encode(canvas.buffer_rgba())
        self.seconds = time.monotonic() - started
        self._started = started
        return self.png


def _encode(pixels: Any) -> bytes:
    from PIL import Image  # comes with matplotlib

    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)[..., :3]).save(file, "png", compress_level=1)
    return file.getvalue()


class _Columns:
    """A history's numbers, taken in as they come: of 20,000 reports only the new ones are looked at.

    Attributes:
        evals: for each split, the steps and the losses.
        events: steps at which something happened.
        taken: reports taken in.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._numbers = np.empty((len(_FIELDS), 1024))
        self._count = self.taken = 0
        self.evals: dict[str, tuple[list[float], list[float]]] = {}
        self.events: list[int] = []

    def take(self, history: History) -> None:
        """Takes in what has come since."""
        if len(history) < self.taken:  # another history, or one that was cut
            self._forget()
        for report in history[self.taken :]:
            if isinstance(report, StepReport):
                self._add(report)
            elif report.kind_of_report == "eval":
                steps, losses = self.evals.setdefault(report.split, ([], []))
                steps.append(report.step)
                losses.append(report.loss if math.isfinite(report.loss) else math.nan)
            elif report.step > 0:  # step 0 is where every run begins
                self.events.append(report.step)
        self.taken = len(history)

    def _add(self, report: StepReport) -> None:
        if self._count == self._numbers.shape[1]:
            self._numbers = np.concatenate([self._numbers, np.empty_like(self._numbers)], axis=1)
        values = [getattr(report, name) for name in _FIELDS]
        self._numbers[:, self._count] = [value if math.isfinite(value) else math.nan for value in values]
        self._count += 1

    @property
    def last_step(self) -> float:
        """The last step there is anything about, or -1."""
        return max([*self["step"][-1:], *(steps[-1] for steps, _ in self.evals.values())], default=-1)

    def __getitem__(self, name: str) -> np.ndarray:
        """The column of a field, (n,) float64, NaN where not finite."""
        return self._numbers[_FIELDS.index(name), : self._count]


# -- fewer points -----------------------------------------------------------------------------------------------------


def stretches(values: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Values (n,) cut into at most `most` stretches of one length, (m, length); the last is filled up with its last value."""
    length = max(1, math.ceil(len(values) / most))
    missing = -len(values) % length
    return np.pad(values, (0, missing), mode="edge" if missing else "constant").reshape(-1, length)


def envelope(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A curve with few points that keeps every spike and every break: each stretch's least and greatest value.

    Where a stretch holds a NaN, the curve breaks behind it. Both results are (k,), with k <= 3 * most; or (n,) as given when
    n <= most.
    """
    if len(y) <= most:
        return x, y
    xs, ys = stretches(x, most), stretches(y, most)
    with np.errstate(all="ignore"):
        low, high = np.fmin.reduce(ys, axis=1), np.fmax.reduce(ys, axis=1)  # NaN only where all of a stretch is
    breaks = np.where(np.isnan(ys).any(axis=1), np.nan, low)
    return np.repeat(xs[:, 0], 3), np.stack([low, high, breaks], axis=1).ravel()


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each stretch, NaN where it holds one; (m,) each."""
    return stretches(x, most).mean(axis=1), stretches(y, most).mean(axis=1)


# -- the two parts ----------------------------------------------------------------------------------------------------


class _Part:
    """One half of the picture: axes with curves that are given new data."""

    def __init__(self, axes: Axes, label: str):
        self.axes = axes
        self._curves: list[Line2D] = []
        self._labels: list[str] = []
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.yaxis.get_major_locator().set_params(nbins=5)
        axes.set(xlim=(0, 10), ylim=(0, 1))
        self._empty = axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", va="center")
        look = {"color": _GREY, "linestyle": ":", "linewidth": 1.2, "zorder": 1}
        self._events = axes.plot([], [], animated=True, visible=False, transform=axes.get_xaxis_transform(), **look)[0]

    def _curve(self, label: str, **look: Any) -> Line2D:
        """A line that is not part of the background."""
        line = self.axes.plot([], [], label=label, animated=True, visible=False, **look)[0]
        self._curves.append(line)
        return line

    def _show_events(self, steps: list[int]) -> None:
        """A dotted upright line at each: from the bottom (0) to the top (1), then a break."""
        marked = np.unique(steps[-MOST_POINTS:])
        self._events.set_data(np.repeat(marked, 3), np.tile([0.0, 1.0, np.nan], len(marked)))
        self._events.set_visible(len(marked) > 0)

    def _fit(self, last: float, low: float, high: float) -> bool:
        """Makes room for steps up to `last` and values from `low` to `high`; whether the background is out of date."""
        labels = [line.get_label() for line in self._curves if line.get_visible()]
        stale = labels != self._labels or self._empty.get_visible() == (last >= 0)
        self._labels = labels
        self._empty.set_visible(last < 0)
        right, (bottom, top) = self.axes.get_xlim()[1], self.axes.get_ylim()
        if last > right or (last < right / 3 and right > 10):
            self.axes.set_xlim(0, max(10.0, last * 1.3))
            stale = True
        span = (high - low) or abs(high) or 1.0
        if low < bottom or high > top or span < (top - bottom) / 3:
            self.axes.set_ylim(low - 0.15 * span if low else 0.0, high + 0.15 * span)
            stale = True
        return stale

    def make_legend(self) -> None:
        """Above the axes, where it covers nothing."""
        shown = [line for line in self._curves if line.get_visible()]
        legend = self.axes.legend(
            shown,
            self._labels,
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.99),
            ncols=5,
            frameon=False,
            fontsize="small",
            handlelength=1.6,
            columnspacing=1.0,
            borderaxespad=0,
        )
        for handle in legend.legend_handles:
            handle.set(animated=False, alpha=1.0)
        legend.set_visible(bool(shown))

    def draw_curves(self) -> None:
        """On top of the background."""
        for line in sorted([self._events, *self._curves], key=Line2D.get_zorder):
            self.axes.draw_artist(line)


class _LossPart(_Part):
    def __init__(self, axes: Axes):
        super().__init__(axes, "loss (nats per token)")
        self._raw = self._curve("training", color=_BLUE, linewidth=1.5, zorder=2)
        self._smooth = self._curve("moving mean", color=_BLUE, linewidth=2.2, zorder=3)
        self._evals = {
            "valid": self._curve("validation", color=_VERMILLION, marker="o", markersize=4, linestyle="--", zorder=4),
            "test": self._curve("test", color=_GREEN, marker="s", markersize=5, linestyle="none", zorder=5),
            "train": self._curve("train split", color=_PINK, marker="D", markersize=4, linestyle=":", zorder=4),
        }
        bottom = axes.get_xaxis_transform()  # x in steps, y as a share of the axes' height
        self._broken = self._curve("not finite", color=_VERMILLION, marker="x", linestyle="none", transform=bottom, zorder=5)

    def update(self, columns: _Columns) -> bool:
        x, loss = columns["step"], columns["loss"]
        smoothed = len(x) >= _SMOOTHED_FROM
        self._raw.set_data(*envelope(x, loss))
        self._raw.set(visible=len(x) > 0, alpha=0.45 if smoothed else 1.0, linewidth=0.8 if smoothed else 1.5)
        self._raw.set_marker("." if len(x) < _SMOOTHED_FROM else "none")
        self._smooth.set_visible(smoothed)
        if smoothed:
            window = max(5, len(x) // 40) // 2 * 2 + 1  # odd: as many steps before as after
            self._smooth.set_data(*thinned(x, moving_mean(loss, window)))
        for split, line in self._evals.items():
            steps, losses = columns.evals.get(split, ([], []))
            line.set_data(*envelope(np.array(steps), np.array(losses)))
            line.set_visible(bool(steps))
        broken = x[np.isnan(loss)][-MOST_POINTS:]
        self._broken.set_data(broken, np.full_like(broken, 0.03))
        self._broken.set_visible(len(broken) > 0)
        self._show_events(columns.events)
        values = np.concatenate([loss, *(losses for _, losses in columns.evals.values())])
        values = values[np.isfinite(values)]
        low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
        return self._fit(columns.last_step, low, high)


class _MemoryPart(_Part):
    def __init__(self, axes: Axes, limit: int | None):
        super().__init__(axes, "memory (GB)")
        self._limit = limit / 1e9 if limit else None
        self._peak = self._curve("peak", color=_VERMILLION, linewidth=1.8)
        self._all = self._curve("with cache", color=_GREY, linestyle=":", linewidth=1.8)
        self._active = self._curve("active", color=_BLUE, linestyle="--", linewidth=1.5)
        self._at_limit = self._curve("limit", color="black", linewidth=1.2, linestyle="-.", transform=axes.get_yaxis_transform())
        self._note = axes.text(0, 1.11, "", transform=axes.transAxes, fontsize="small", va="bottom")

    def update(self, columns: _Columns) -> bool:
        x, peak, active = columns["step"], columns["peak_memory"] / 1e9, columns["active_memory"] / 1e9
        both = active + columns["cache_memory"] / 1e9
        for line, values in ((self._peak, peak), (self._all, both), (self._active, active)):
            line.set_data(*envelope(x, values))
            line.set_visible(len(x) > 0)
        highest = float(max(peak.max(), both.max())) if len(x) else 0.0
        if self._limit and len(x):
            near = highest > self._limit / 4  # a limit far above would press the curves to the ground
            self._at_limit.set_data([0, 1], [self._limit, self._limit])
            self._at_limit.set_visible(near)
            self._note.set_text("" if near else f"far below this machine's limit of {self._limit:.1f} GB")
            highest = max(highest, self._limit) if near else highest
        self._show_events(columns.events)
        return self._fit(x[-1] if len(x) else -1, 0.0, highest or 1.0)
