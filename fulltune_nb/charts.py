"""Curves and heat maps of any numbers as matplotlib Axes, in the style of `plots`: what the insight objects draw themselves with.

Curves differ in line style and marker besides colour, and colour maps are those whose lightness rises evenly: both read in grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune_nb.html import PALETTE
from fulltune_nb.plots import drawing, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (PALETTE[0], PALETTE[5], PALETTE[2], PALETTE[3], "#666666", PALETTE[1])
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "x")
_TICKS = 32  # labels on an axis at most: more would cover each other
_NAME = 48  # characters of a label


def plain(text: object, limit: int = _NAME) -> str:
    """`one_line`, without the `$` between which matplotlib reads formulas."""
    return one_line(text, limit).replace("$", r"\$")


def curves(
    series: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """A line for each (name, x, y); what is not finite leaves a gap."""
    with drawing(ax) as ax:
        for number, (name, x, y) in enumerate(series):
            values = np.asarray(y, dtype=np.float64)
            looks = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _LINES[number % len(_LINES)], "linewidth": 1.5}
            markers = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 4, "markevery": max(1, len(values) // 12)}
            ax.plot(np.asarray(x), np.where(np.isfinite(values), values, np.nan), label=plain(name), **looks, **markers)
        if log_x:
            ax.set_xscale("log")
        if len(series) > 1:
            ax.legend(fontsize="small")
        ax.grid(True, linewidth=0.6, alpha=0.5)
        return _labelled(ax, x_label, y_label, title, empty=not any(len(y) for _, _, y in series))


def mark(ax: Axes, x: float, text: str) -> None:
    """A dotted upright line with a word at it."""
    ax.axvline(x, color="#666666", linestyle=":", linewidth=1.2, zorder=1)
    place = {"xy": (x, 1.0), "xycoords": ax.get_xaxis_transform(), "xytext": (-2, -2), "textcoords": "offset points"}
    ax.annotate(plain(text), rotation=90, ha="right", va="top", fontsize="x-small", **place)


def heat_map(
    values: np.ndarray,
    rows: Sequence[object],
    columns: Sequence[object],
    labels: tuple[str, str, str],
    title: str = "",
    limits: tuple[float | None, float | None] = (None, None),
    ax: Axes | None = None,
) -> Axes:
    """Numbers (R, C) as a picture, the first row on top, with a scale beside it; NaN stays white.

    Args:
        values: (R, C).
        rows, columns: what stands at the ticks; of many, some evenly spread.
        labels: of the upright axis, the lying one, and the scale.
        title: above.
        limits: of the scale; None: the smallest and largest value.
        ax: where to draw; a new figure where left out.
    """
    with drawing(ax) as ax:
        values = np.asarray(values, dtype=np.float64)
        if values.size:
            image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis", vmin=limits[0], vmax=limits[1])
            ax.figure.colorbar(image, ax=ax, label=labels[2])
        for axis, names in ((ax.yaxis, rows), (ax.xaxis, columns)):
            every = max(1, math.ceil(len(names) / _TICKS))
            axis.set_ticks(range(0, len(names), every), [plain(name, 24) for name in names[::every]], fontsize="x-small")
        wide = sum(len(plain(name, 24)) for name in columns[:: max(1, math.ceil(len(columns) / _TICKS))]) > 90
        ax.tick_params(axis="x", rotation=90 if wide else 0)
        return _labelled(ax, labels[1], labels[0], title, empty=not values.size)


def _labelled(ax: Any, x_label: str, y_label: str, title: str, empty: bool) -> Any:
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    if title:
        ax.set_title(plain(title, 90), fontsize="medium")
    if empty:
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", va="center")
    return ax


def small_maps(maps: Sequence[np.ndarray], names: Sequence[str], title: str) -> Any:
    """Many maps of one size in a grid, each with its own scale from 0: a figure."""
    columns = min(8, max(1, len(maps)))
    lines = math.ceil(len(maps) / columns)
    with drawing(None) as ax:
        figure = ax.figure
        ax.remove()
        figure.set_size_inches(1.3 * columns, 1.45 * lines + 0.4)
        for place, (values, name) in enumerate(zip(maps, names, strict=True)):
            own = figure.add_subplot(lines, columns, place + 1)
            own.imshow(values, interpolation="nearest", cmap="viridis", vmin=0.0)
            own.set_title(plain(name), fontsize="x-small")
            own.set_xticks([])
            own.set_yticks([])
        figure.suptitle(plain(title, 90), fontsize="medium")
        return figure
