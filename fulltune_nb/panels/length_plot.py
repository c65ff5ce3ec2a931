"""The lengths of a split's rows as a picture, with the cut at `max_seq_length`."""

from __future__ import annotations

import io
import threading

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fulltune_nb.data.dataset import Split
from fulltune_nb.html import PALETTE

WIDTH, HEIGHT = 640, 260  # pixels
_BINS = 40
_WIDE = 30  # a longest row so many times the median gets a logarithmic axis
_BLUE, _VERMILLION, _INK = PALETTE[0], PALETTE[5], "#222222"


def whole_lengths(split: Split) -> np.ndarray:
    """(rows,) int64, tokens of each row before anything was cut."""
    return split.lengths + np.array([example.cut for example in split.examples], dtype=np.int64)


class LengthPlot:
    """Draws histograms on one figure, which is cleared and used again. May be called from any thread."""

    def __init__(self) -> None:
        self._figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=100, facecolor="white")
        FigureCanvasAgg(self._figure)
        self._lock = threading.Lock()

    def draw(self, split: Split, max_seq_length: int) -> bytes:
        """The histogram of a split as PNG. What was cut off is hatched."""
        with self._lock:
            self._figure.clear()
            axes = self._figure.add_axes((0.105, 0.2, 0.845, 0.64))  # room for the last label
            self._fill(axes, split, max_seq_length)
            file = io.BytesIO()
            self._figure.savefig(file, format="png", dpi=100)
            return file.getvalue()

    def _fill(self, axes, split: Split, limit: int) -> None:
        lengths = whole_lengths(split)
        longest = int(lengths.max(initial=1))
        wide = longest > _WIDE * max(float(np.median(lengths)) if len(lengths) else 1.0, 1.0)
        edges = _edges(max(int(lengths.min(initial=longest)), 1), longest, wide)
        counts, _ = np.histogram(lengths, edges)
        cut_counts, _ = np.histogram(lengths[lengths > limit], edges)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_BLUE, edgecolor="white", linewidth=0.5, label="rows")
        if split.truncated:
            look = {"color": "white", "edgecolor": _VERMILLION, "hatch": "////", "linewidth": 0.8}
            label = f"rows cut ({split.truncated:,})"
            axes.bar(edges[:-1], cut_counts, np.diff(edges), align="edge", label=label, **look)
            axes.axvline(limit + 0.5, color=_VERMILLION, linestyle="--", linewidth=1.8, label=f"max_seq_length = {limit:,}")
        if wide:
            axes.set_xscale("log")
        self._style(axes, split, wide)

    def _style(self, axes, split: Split, wide: bool) -> None:
        # Every setting by hand: matplotlib's global ones belong to the notebook, and to other threads.
        axes.set_facecolor("white")
        axes.set_xlabel("tokens in a row" + (" (logarithmic)" if wide else ""), color=_INK, fontsize=9)
        axes.set_ylabel("rows", color=_INK, fontsize=9)
        axes.tick_params(colors=_INK, labelsize=8.5, which="both")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        whole = FuncFormatter(lambda value, _: f"{value:,.0f}")
        if not wide:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.xaxis.set_major_formatter(whole)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(whole)
        if split.truncated:
            legend = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 3, "frameon": False, "fontsize": 8.5}
            axes.legend(labelcolor=_INK, **legend)


def _edges(least: int, longest: int, wide: bool) -> np.ndarray:
    """Ascending borders of the bars; within them every length once."""
    if wide:
        return np.unique(np.geomspace(least, longest + 1, _BINS + 1).round())
    step = -(-(longest + 1 - least) // _BINS)
    return np.arange(least, longest + 1 + step, step) - 0.5  # lengths are whole numbers: each in the middle of its own


def lengths_text(split: Split) -> str:
    """The same in a sentence or two, for those who cannot see the picture."""
    lengths = whole_lengths(split)
    if not len(lengths):
        return f"{split.name} has no rows."
    text = f"{split.name}: rows of {lengths.min():,} to {lengths.max():,} tokens, half of them up to {int(np.median(lengths)):,}."
    if not split.truncated:
        return f"{text} None is cut."
    lost = 100 * split.tokens_cut / int(lengths.sum())
    are, tokens = "is" if split.truncated == 1 else "are", "token" if split.tokens_cut == 1 else "tokens"
    return f"{text} {split.truncated:,} of {len(split):,} rows {are} cut: {split.tokens_cut:,} {tokens} lost, {lost:.1f} % of all."
