"""What a number depends on, drawn: against each parameter, and over all of them as parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune_nb.html import PALETTE
from fulltune_nb.plots import drawing, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[Mapping[str, Any], float]
"""The parameters of a run and its number."""
_DECADE = 10.0  # of values that lie further apart than this, the axis is logarithmic
_COLUMNS = 4
_TICKS = 12  # words at an axis at most
_GREY = "#666666"


def plot_parameters(points: Sequence[Point], names: Sequence[str], metric: str) -> Figure:
    """The number against each parameter, in a figure of its own: a point for each run, and a line through the means."""
    with drawing(None) as ax:
        figure = ax.figure
        if not points:
            _say_there_are_none(ax)
            return figure
        ax.remove()
        figure.set_size_inches(max(4.0, 3.2 * min(_COLUMNS, len(names))), 2.9 * math.ceil(max(1, len(names)) / _COLUMNS))
        draw_parameters(figure, points, names, metric)
        return figure


def draw_parameters(figure: Figure, points: Sequence[Point], names: Sequence[str], metric: str) -> None:
    """The same on a figure that is there."""
    figure.set_layout_engine("constrained")
    columns = min(_COLUMNS, max(1, len(names)))
    for number, name in enumerate(names):
        ax = figure.add_subplot(math.ceil(len(names) / columns), columns, number + 1)
        axis = _Scale([parameters.get(name) for parameters, _ in points])
        x, y = axis.places, np.array([value for _, value in points])
        means = [(place, y[x == place].mean()) for place in np.unique(x)]
        ax.plot(*zip(*means, strict=True), color=PALETTE[0], linewidth=1.2, zorder=2)
        ax.plot(x, y, "o", color=PALETTE[5], markersize=4, zorder=3)
        axis.label(ax.xaxis)
        ax.set_xlabel(one_line(name), parse_math=False)
        if number % columns == 0:
            ax.set_ylabel(one_line(metric), parse_math=False)
        ax.grid(True, linewidth=0.6, alpha=0.5)


def plot_parallel(points: Sequence[Point], names: Sequence[str], metric: str, maximize: bool = False, ax: Axes | None = None) -> Axes:
    """Parallel coordinates: an upright axis for each parameter, the number on the last; the darker the line, the better the run."""
    with drawing(ax) as ax:
        if not points:
            _say_there_are_none(ax)
            return ax
        values = np.array([value for _, value in points])
        scales = [_Scale([parameters.get(name) for parameters, _ in points]) for name in names] + [_Scale(values.tolist())]
        heights = np.stack([scale.heights() for scale in scales], axis=1)  # (runs, axes)
        order = np.argsort(values if maximize else -values)  # the best is drawn last, on top
        for rank, run in enumerate(order, 1):
            share = rank / len(order)
            best = {"color": PALETTE[5], "linewidth": 2.2, "zorder": 4} if rank == len(order) else {"color": PALETTE[0], "linewidth": 1.0}
            ax.plot(heights[run], **{"alpha": 0.15 + 0.7 * share, **best})
        for place, scale in enumerate(scales):
            ax.axvline(place, color=_GREY, linewidth=0.8, zorder=1)
            for height, text in scale.marks():
                ax.annotate(text, (place, height), (3, 0), textcoords="offset points", fontsize="x-small", va="center", parse_math=False)
        ax.set_xticks(range(len(scales)), [one_line(name, 24) for name in (*names, metric)], parse_math=False)
        ax.set_yticks([])
        ax.set_xlim(-0.2, len(scales) - 0.4)
        return ax


def _say_there_are_none(ax: Axes) -> None:
    ax.text(0.5, 0.5, "no run has a value yet", transform=ax.transAxes, ha="center", va="center")


class _Scale:
    """Values of one parameter on an axis: numbers where they lie, by their logarithm where far apart; anything else side by side.

    Attributes:
        places: (runs,) float64, where each value stands.
    """

    def __init__(self, values: Sequence[Any]):
        self._words: list[str] | None = None
        numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) for value in values)
        if not numeric:
            self._words = sorted({str(value) for value in values})
            self.places = np.array([self._words.index(str(value)) for value in values], dtype=np.float64)
            self.log = False
            return
        self.places = np.array(values, dtype=np.float64)
        self.log = bool(self.places.min() > 0 and self.places.max() >= _DECADE * self.places.min())

    def label(self, axis: Any) -> None:
        """Gives a matplotlib axis the scale and the words of these values."""
        if self._words is not None:
            every = max(1, math.ceil(len(self._words) / _TICKS))
            axis.set_ticks(range(0, len(self._words), every), [one_line(word, 16) for word in self._words[::every]], parse_math=False)
        elif self.log:
            axis.axes.set_xscale("log")

    def heights(self) -> np.ndarray:
        """(runs,), the places from 0 to 1."""
        places = np.log(self.places) if self.log else self.places
        low, high = places.min(), places.max()
        return (places - low) / (high - low) if high > low else np.full_like(places, 0.5)

    def marks(self) -> list[tuple[float, str]]:
        """(height, text) of what is written at an upright axis: all words, or the least and the greatest number."""
        heights = self.heights()
        texts = [self._words[int(place)] if self._words is not None else f"{place:.4g}" for place in self.places]
        known = dict(sorted(zip(heights.tolist(), texts, strict=True)))
        shown = list(known.items())
        return [(h, one_line(t, 16)) for h, t in (shown if self._words is not None and len(shown) <= _TICKS else [shown[0], shown[-1]])]
