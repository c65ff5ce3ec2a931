"""The plot that moves while training goes on: loss on the left, memory on the right, as one PNG of fixed size.

One figure and its curves are made once and only given new data. Most of a drawing's time goes into text, so axes and legends are
kept as a background, each in its own box, until it has to change, which is seldom: limits leave room to grow. Thousands of steps
are drawn as the least and the greatest loss of some hundred stretches, so that no spike is lost and drawing takes no longer.
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
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from fulltune_nb.html import PALETTE
from fulltune_nb.panels.curves import MOST_POINTS, Columns, envelope, thinned
from fulltune_nb.plots import moving_mean
from fulltune_nb.training.history import History

WIDTH, HEIGHT = 880, 300  # pixels
_LEGEND_FROM = 264  # pixels from below: what is above belongs to legends, what is under it to axes
MIN_SECONDS = 1.0  # between two pictures
MAX_SHARE = 0.02  # of the time that drawing may take
_SMOOTHED_FROM = 20  # steps; fewer need no second line
_BLUE, _GREEN, _PINK, _VERMILLION, _GREY = PALETTE[0], PALETTE[2], PALETTE[3], PALETTE[5], "#666666"
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
        self._columns = Columns()
        with matplotlib.rc_context(_STYLE):
            self._figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100)
            FigureCanvasAgg(self._figure)
            loss = _LossPart(self._figure.add_axes((0.065, 0.16, 0.52, 0.7)), (0, 520))
            memory = _MemoryPart(self._figure.add_axes((0.665, 0.16, 0.32, 0.7)), (520, WIDTH), limit)
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
        for part in self._parts:
            part.update(self._columns)
        if self._background is None:
            self._clear()
        canvas.restore_region(self._background)
        if any(part.stale for part in self._parts):
            with matplotlib.rc_context(_STYLE):  # ticks are made anew while drawing
                for part in self._parts:
                    part.draw_background()
            self._background = canvas.copy_from_bbox(self._figure.bbox)
        for part in self._parts:
            part.draw_curves()
        self.png = _encode(canvas.buffer_rgba())
        self.seconds = time.monotonic() - started
        self._started = started
        return self.png

    def _clear(self) -> None:
        renderer = self._figure.canvas.get_renderer()
        renderer.clear()
        self._figure.patch.draw(renderer)
        for part in self._parts:
            part.draw_axis_labels()
        self._background = self._figure.canvas.copy_from_bbox(self._figure.bbox)


def _encode(pixels: Any) -> bytes:
    from PIL import Image  # comes with matplotlib

    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels)[..., :3]).save(file, "png", compress_level=1)
    return file.getvalue()


# -- the two parts ----------------------------------------------------------------------------------------------------


class _Part:
    """One half of the picture: axes with curves that are given new data.

    Attributes:
        stale: of "axes" and "legend", those whose background is out of date.
    """

    def __init__(self, axes: Axes, label: str, sides: tuple[int, int]):
        self.axes = axes
        self.stale: set[str] = set()
        self._curves: list[Line2D] = []
        self._legend: dict[Line2D, tuple[Line2D, Text]] = {}
        self._labels: list[str] = []
        self._blank: dict[str, Any] = {}
        left, right = sides
        self._boxes = {"axes": Bbox([[left, 0], [right, _LEGEND_FROM]]), "legend": Bbox([[left, _LEGEND_FROM], [right, HEIGHT]])}
        middle = axes.bbox.get_points().mean(axis=0)
        self._axis_labels = (
            self._figure_text("optimizer step", x=middle[0], y=12, ha="center", fontsize="medium"),
            self._figure_text(label, x=left + 11, y=middle[1], ha="center", rotation=90, fontsize="medium"),
        )
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.yaxis.get_major_locator().set_params(nbins=5)
        axes.set(xlim=(0, 10), ylim=(0, 1))
        self._empty = axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", va="center")
        self._note = self._figure_text("")
        look = {"color": _GREY, "linestyle": ":", "linewidth": 1.2, "zorder": 1}
        self._events = axes.plot([], [], animated=True, visible=False, transform=axes.get_xaxis_transform(), **look)[0]

    def _figure_text(self, text: str, **look: Any) -> Text:
        """A text whose place is given in pixels of the whole picture."""
        made = Text(text=text, **{"fontsize": "small", "va": "center", **look})
        made.set_figure(self.axes.figure)
        return made

    def _curve(self, label: str, **look: Any) -> Line2D:
        """A line that is not part of the background."""
        line = self.axes.plot([], [], label=label, animated=True, visible=False, **look)[0]
        self._curves.append(line)
        look.pop("transform", None)
        handle = Line2D([], [], **look)
        handle.set_figure(self.axes.figure)
        self._legend[line] = handle, self._figure_text(label)
        return line

    def _show_events(self, steps: list[int]) -> None:
        """A dotted upright line at each: from the bottom (0) to the top (1), then a break."""
        marked = np.unique(steps[-MOST_POINTS:])
        self._events.set_data(np.repeat(marked, 3), np.tile([0.0, 1.0, np.nan], len(marked)))
        self._events.set_visible(len(marked) > 0)

    def _fit(self, last: float, low: float, high: float) -> None:
        """Makes room for steps up to `last` and values from `low` to `high`."""
        labels = [self._note.get_text(), *(line.get_label() for line in self._curves if line.get_visible())]
        if labels != self._labels:
            self._labels = labels
            self.stale.add("legend")
        if self._empty.get_visible() == (last >= 0):
            self._empty.set_visible(last < 0)
            self.stale.add("axes")
        right, (bottom, top) = self.axes.get_xlim()[1], self.axes.get_ylim()
        if last > right or (last < right / 3 and right > 10):
            self.axes.set_xlim(0, max(10.0, last * 1.3))
            self.stale.add("axes")
        span = (high - low) or abs(high) or 1.0
        if low < bottom or high > top or span < (top - bottom) / 3:
            self.axes.set_ylim(low - 0.15 * span if low else 0.0, high + 0.15 * span)
            self.stale.add("axes")

    def draw_axis_labels(self) -> None:
        """Onto the empty picture: what never changes."""
        canvas = self.axes.figure.canvas
        for text in self._axis_labels:
            text.draw(canvas.get_renderer())
        self._blank = {name: canvas.copy_from_bbox(box) for name, box in self._boxes.items()}
        self.stale = set(self._boxes)

    def draw_background(self) -> None:
        """Draws what is stale, anew."""
        canvas = self.axes.figure.canvas
        for name in self.stale:
            canvas.restore_region(self._blank[name])
            if name == "axes":
                self.axes.draw(canvas.get_renderer())
            else:
                self._draw_legend(canvas.get_renderer())
        self.stale.clear()

    def _draw_legend(self, renderer: Any) -> None:
        """In one row above the axes, or in two; matplotlib's own takes three times as long."""
        left, right = self.axes.bbox.x0 - 4, self._boxes["legend"].x1
        x, y = left, _LEGEND_FROM + 8
        for line in self._curves:
            if line.get_visible():
                handle, text = self._legend[line]
                width = 24 + text.get_window_extent(renderer).width
                if x + width > right:
                    x, y = left, y + 15
                handle.set_data([x, x + 8, x + 16], [y, y, y])
                handle.set(markevery=[1], linewidth=line.get_linewidth())
                text.set_position((x + 22, y - 1))
                handle.draw(renderer)
                text.draw(renderer)
                x += width + 9
        self._note.set_position((left + 2, _LEGEND_FROM + 24))
        self._note.draw(renderer)

    def draw_curves(self) -> None:
        """On top of the background."""
        for line in sorted([self._events, *self._curves], key=Line2D.get_zorder):
            self.axes.draw_artist(line)


class _LossPart(_Part):
    def __init__(self, axes: Axes, sides: tuple[int, int]):
        super().__init__(axes, "loss (nats per token)", sides)
        self._raw = self._curve("training", color=_BLUE, linewidth=1.5, zorder=2)
        self._smooth = self._curve("moving mean", color=_BLUE, linewidth=2.2, zorder=3)
        self._evals = {
            "valid": self._curve("validation", color=_VERMILLION, marker="o", markersize=4, linestyle="--", zorder=4),
            "test": self._curve("test", color=_GREEN, marker="s", markersize=5, linestyle="none", zorder=5),
            "train": self._curve("train split", color=_PINK, marker="D", markersize=4, linestyle=":", zorder=4),
        }
        bottom = axes.get_xaxis_transform()  # x in steps, y as a share of the axes' height
        self._broken = self._curve("not finite", color=_VERMILLION, marker="x", linestyle="none", transform=bottom, zorder=5)

    def update(self, columns: Columns) -> None:
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
        self._fit(columns.last_step, low, high)


class _MemoryPart(_Part):
    def __init__(self, axes: Axes, sides: tuple[int, int], limit: int | None):
        super().__init__(axes, "memory (GB)", sides)
        self._limit = limit / 1e9 if limit else None
        self._peak = self._curve("peak", color=_VERMILLION, linewidth=1.8)
        self._all = self._curve("with cache", color=_GREY, linestyle=":", linewidth=1.8)
        self._active = self._curve("active", color=_BLUE, linestyle="--", linewidth=1.5)
        self._at_limit = self._curve("limit", color="black", linewidth=1.2, linestyle="-.", transform=axes.get_yaxis_transform())

    def update(self, columns: Columns) -> None:
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
        self._fit(x[-1] if len(x) else -1, 0.0, highest or 1.0)
