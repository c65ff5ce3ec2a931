"""The plot that moves while training goes on: loss on the left, memory on the right, as one PNG of fixed size.

One figure and its curves are made once and only given new data; matplotlib draws nothing but these. Axes and legends stand behind
them as pixels that are kept until they have to change, which is seldom: limits leave room to grow. Thousands of steps are drawn as
the least and the greatest loss of some hundred stretches, so that no spike is lost and drawing takes no longer.
"""

from __future__ import annotations

import gc
import io
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import ScalarFormatter, StrMethodFormatter

from fulltune_nb.html import PALETTE, SHOWN_IN_MB
from fulltune_nb.panels.curves import MOST_POINTS, Columns, envelope, thinned
from fulltune_nb.panels.lettering import Lettering, paste
from fulltune_nb.plots import moving_mean
from fulltune_nb.training.history import History

WIDTH, HEIGHT = 880, 300  # pixels
DPI = 100
_LEGEND_FROM = 264  # pixels from below: what is above belongs to legends, what is under it to axes
MIN_SECONDS = 1.0  # between two pictures
MAX_SHARE = 0.02  # of the time that drawing may take
_SMOOTHED_FROM = 20  # steps; fewer need no second line
_BLUE, _GREEN, _PINK, _VERMILLION, _GREY = PALETTE[0], PALETTE[2], PALETTE[3], PALETTE[5], "#666666"
_INK, _GRID = (0x22, 0x22, 0x22, 255), (0xDD, 0xDD, 0xDD, 255)


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
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        self._pixels = np.asarray(FigureCanvasAgg(figure).get_renderer().buffer_rgba())  # (H, W, 4) uint8: what matplotlib draws on
        letters = _Letters()
        loss = _LossPart(figure.add_axes((0.065, 0.16, 0.495, 0.7)), (0, 520), letters)
        memory = _MemoryPart(figure.add_axes((0.665, 0.16, 0.32, 0.7)), (520, WIDTH), letters, limit)
        self._parts = (loss, memory)
        self._background: np.ndarray | None = None  # as _pixels, without curves

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
        with _collector_waits():
            self._columns.take(history)
            for part in self._parts:
                part.update(self._columns)
            self._draw_background()
            for part in self._parts:
                part.draw_curves()
            self.png = _encode(self._pixels)
        self.seconds = time.monotonic() - started
        self._started = started
        return self.png

    def _draw_background(self) -> None:
        if self._background is None:
            self._background = np.full_like(self._pixels, 255)
            for part in self._parts:
                part.stale = {"axes", "legend"}
        self._pixels[:] = self._background
        if any(part.stale for part in self._parts):
            for part in self._parts:
                part.draw_background(self._pixels)
            self._background = self._pixels.copy()


@contextmanager
def _collector_waits() -> Iterator[None]:
    """Python's garbage collector looks at everything in the kernel now and then, for some 100 ms: not in the middle of a picture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _encode(pixels: np.ndarray) -> bytes:
    from PIL import Image  # comes with matplotlib

    file = io.BytesIO()
    Image.frombuffer("RGBA", (WIDTH, HEIGHT), pixels, "raw", "RGBA", 0, 1).convert("RGB").save(file, "png", compress_level=1)
    return file.getvalue()


# -- the two parts ----------------------------------------------------------------------------------------------------


class _Letters:
    """The sizes of text on a live plot."""

    def __init__(self) -> None:
        self.axes = Lettering(9, DPI)  # points
        self.legend = Lettering(7.5, DPI)
        self.axes.number("0123456789.,+−e")  # before the first step


class _Part:
    """One half of the picture: axes with curves that are given new data.

    Attributes:
        axes: matplotlib's; it places the curves, and is not drawn itself.
        label: what the upright axis shows, with its unit.
        stale: of "axes" and "legend", those whose background is out of date.
    """

    def __init__(self, axes: Axes, label: str, sides: tuple[int, int], letters: _Letters):
        self.axes = axes
        self.label = label
        self.stale: set[str] = set()
        self._letters = letters
        self._curves: list[Line2D] = []
        self._handles: dict[Line2D, Line2D] = {}
        self._labels: list[str] = []
        self._note = ""
        self._is_empty = False
        self._left, self._right = sides  # pixels
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.get_major_locator().set_params(nbins=5)
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        axes.set(xlim=(0, 10), ylim=(0, 1))
        look = {"color": _GREY, "linestyle": ":", "linewidth": 1.2, "zorder": 1}
        self._events = axes.plot([], [], animated=True, visible=False, transform=axes.get_xaxis_transform(), **look)[0]

    def _curve(self, label: str, **look: Any) -> Line2D:
        """A line that is not part of the background."""
        line = self.axes.plot([], [], label=label, animated=True, visible=False, **look)[0]
        self._curves.append(line)
        look.pop("transform", None)
        self._handles[line] = Line2D([], [], **look)
        self._handles[line].set_figure(self.axes.figure)
        self._letters.legend.word(label)  # before the first step
        return line

    def _show_events(self, steps: list[int]) -> None:
        """A dotted upright line at each: from the bottom (0) to the top (1), then a break."""
        marked = np.unique(steps[-MOST_POINTS:])
        self._events.set_data(np.repeat(marked, 3), np.tile([0.0, 1.0, np.nan], len(marked)))
        self._events.set_visible(len(marked) > 0)

    def _fit(self, last: float, low: float, high: float) -> None:
        """Makes room for steps up to `last` and values from `low` to `high`."""
        labels = [self._note, *(line.get_label() for line in self._curves if line.get_visible())]
        if labels != self._labels:
            self._labels = labels
            self.stale.add("legend")
        if self._is_empty != (last < 0):
            self._is_empty = last < 0
            self.stale.add("axes")
        right, (bottom, top) = self.axes.get_xlim()[1], self.axes.get_ylim()
        if last > right or (last < right / 3 and right > 10):
            self.axes.set_xlim(0, max(10.0, last * 1.3))
            self.stale.add("axes")
        span, edge = (high - low) or abs(high) or 1.0, 0.03 * (top - bottom)  # a marker is drawn whole
        if (low and low < bottom + edge) or low < bottom or high > top - edge or span < (top - bottom) / 3:
            self.axes.set_ylim(low - 0.15 * span if low else 0.0, high + 0.15 * span)
            self.stale.add("axes")

    def draw_background(self, pixels: np.ndarray) -> None:
        """Draws what is stale, anew, into a picture (H, W, 4)."""
        half = pixels[:, self._left : self._right]
        if "axes" in self.stale:
            half[HEIGHT - _LEGEND_FROM :] = 255
            self._draw_axes(pixels)
        if "legend" in self.stale:
            half[: HEIGHT - _LEGEND_FROM] = 255
            self._draw_legend(pixels)
        self.stale.clear()

    def _draw_axes(self, pixels: np.ndarray) -> None:
        left, bottom, right, top = (round(edge) for edge in self.axes.bbox.extents)
        rows = slice(HEIGHT - top, HEIGHT - bottom)
        letters = self._letters.axes
        for x, label in _ticks(self.axes.xaxis, left, right):
            pixels[rows, x] = _GRID
            pixels[HEIGHT - bottom : HEIGHT - bottom + 4, x] = _INK
            paste(pixels, letters.number(label), x, bottom - 5, align=(0.5, 1.0))
        for y, label in _ticks(self.axes.yaxis, bottom, top):
            pixels[HEIGHT - 1 - y, left:right] = _GRID
            pixels[HEIGHT - 1 - y, left - 4 : left] = _INK
            paste(pixels, letters.number(label), left - 6, y, align=(1.0, 0.5))
        pixels[HEIGHT - bottom - 1, left:right] = _INK
        pixels[rows, left] = _INK
        factor = self.axes.yaxis.get_major_formatter().get_offset()  # such as 1e-6
        if factor:
            paste(pixels, letters.number(factor), left + 5, top - 1, align=(0.0, 1.0))
        if self._is_empty:
            paste(pixels, letters.word("nothing recorded yet"), (left + right) / 2, (bottom + top) / 2, align=(0.5, 0.5))
        paste(pixels, letters.word("optimizer step"), (left + right) / 2, 12, align=(0.5, 0.5))
        paste(pixels, np.rot90(letters.word(self.label)), self._left + 11, (bottom + top) / 2, align=(0.5, 0.5))

    def _draw_legend(self, pixels: np.ndarray) -> None:
        """In one row above the axes, or in two."""
        renderer, letters = self.axes.figure.canvas.get_renderer(), self._letters.legend
        left = round(self.axes.bbox.x0) - 4
        x, y = left, _LEGEND_FROM + 8
        for line, handle in self._handles.items():
            if line.get_visible():
                word = letters.word(line.get_label())
                width = 22 + word.shape[1]
                if x + width > self._right:
                    x, y = left, y + 15
                handle.set_data([x, x + 8, x + 16], [y, y, y])
                handle.set(markevery=[1], linewidth=line.get_linewidth())
                handle.draw(renderer)
                paste(pixels, word, x + 22, y)
                x += width + 9
        if self._note:
            paste(pixels, letters.word(self._note), left + 2, _LEGEND_FROM + 24)

    def draw_curves(self) -> None:
        """On top of the background."""
        for line in sorted([self._events, *self._curves], key=Line2D.get_zorder):
            self.axes.draw_artist(line)


def _ticks(axis: Axis, first: int, last: int) -> list[tuple[int, str]]:
    """Where an axis that goes from pixel `first` to `last` is marked, and with what."""
    low, high = axis.get_view_interval()
    marked = [value for value in axis.get_majorticklocs() if low <= value <= high]
    labels = axis.get_major_formatter().format_ticks(marked)
    return [(round(first + (last - first) * (value - low) / (high - low)), label) for value, label in zip(marked, labels, strict=True)]


class _LossPart(_Part):
    def __init__(self, axes: Axes, sides: tuple[int, int], letters: _Letters):
        super().__init__(axes, "loss (nats per token)", sides, letters)
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
    def __init__(self, axes: Axes, sides: tuple[int, int], letters: _Letters, limit: int | None):
        super().__init__(axes, "memory (GB)", sides, letters)
        self._limit = limit
        self._limit_note = f"far below this machine's limit of {limit / 1e9:.1f} GB" if limit else ""
        for text, lettering in (("memory (MB)", letters.axes), (self._limit_note, letters.legend)):
            lettering.word(text)  # before the first step
        self._peak = self._curve("peak", color=_VERMILLION, linewidth=1.8)
        self._all = self._curve("with cache", color=_GREY, linestyle=":", linewidth=1.8)
        self._active = self._curve("active", color=_BLUE, linestyle="--", linewidth=1.5)
        self._at_limit = self._curve("limit", color="black", linewidth=1.2, linestyle="-.", transform=axes.get_yaxis_transform())

    def update(self, columns: Columns) -> None:
        x, peak, active = columns["step"], columns["peak_memory"], columns["active_memory"]
        both = active + columns["cache_memory"]
        highest = float(max(peak.max(), both.max())) if len(x) else 0.0
        near = bool(self._limit and len(x) and highest > self._limit / 4)  # a limit far above would press the curves to the ground
        self._note = self._limit_note if len(x) and not near else ""
        highest = max(highest, self._limit) if near else highest
        scale, label = (1e6, "memory (MB)") if 0 < highest < SHOWN_IN_MB else (1e9, "memory (GB)")
        if label != self.label:
            self.label = label
            self.stale.add("axes")
        for line, values in ((self._peak, peak), (self._all, both), (self._active, active)):
            line.set_data(*envelope(x, values / scale))
            line.set_visible(len(x) > 0)
        self._at_limit.set_data([0, 1], [(self._limit or 0) / scale] * 2)
        self._at_limit.set_visible(near)
        self._show_events(columns.events)
        self._fit(x[-1] if len(x) else -1, 0.0, highest / scale or 1.0)
