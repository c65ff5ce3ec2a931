"""Histories and other numbers as matplotlib plots: loss, memory, curves, heat maps.

Made for a notebook and for a paper alike: a figure made here is white with dark text in any theme, curves differ in line
style and marker besides colour, and axes given by the caller keep the caller's style.
"""

from __future__ import annotations

import io
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fulltune_nb.errors import ConfigError, optional_import
from fulltune_nb.html import PALETTE, SHOWN_IN_MB, image
from fulltune_nb.training.history import EvalReport, Event, StepReport, moving_mean

with optional_import("A plot", "notebook"):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font
    from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the palette, the colours that stand out from white (contrast 3:1 and more).
_BLUE, _GREEN, _PINK, _VERMILLION = PALETTE[0], PALETTE[2], PALETTE[3], PALETTE[5]
_GREY, _LIGHT_GREY = "#666666", "#bbbbbb"
_COLOURS = (_BLUE, _VERMILLION, _GREEN, _PINK, "#222222")
_DASHES = ("-", "--", ":")
_MARKERS = "osD^v"
_EVAL_STYLES = {"valid": (_VERMILLION, "o", "--"), "test": (_GREEN, "s", "none"), "train": (_PINK, "D", ":")}
_OWN_STYLE = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), "white"),
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), "#222222"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "legend.edgecolor": "#cccccc",
    "grid.color": _LIGHT_GREY,
    "axes.axisbelow": True,
    "font.size": 10.0,
}
_LOSS = "loss (nats per token)"
_SMOOTHED_FROM = 20  # steps; fewer need no second line
_MARKED_UP_TO = 40  # steps; more would make a row of dots of the line
_LABELLED_EVENTS = 12  # more labels would cover each other
_OPEN_FIGURES = 10
_POINTS = 2000  # of a run's training curve; of more steps, each stretch shows its least and its greatest loss
_RUNS = 12  # with looks of their own; more cannot be told apart
_TICKS = 32  # labels on an axis at most
PNG_WIDTH = 880
"""Pixels of a page that a picture for it is wide."""
_own_figures: deque = deque()  # weak references to the figures made here that pyplot may still hold


def plot_loss(history: Iterable[Any], ax: Axes | None = None, log: bool = False) -> Axes:
    """Training loss of every step, its moving mean beside it, evaluations as points, and events as dotted lines.

    Args:
        history: `trainer.history`, or any list of its reports; it may be empty.
        ax: where to draw; a new figure where left out.
        log: whether the losses lie on a logarithmic scale, on which a loss of 0 cannot be shown.

    Raises:
        ConfigError: `history` is not a list of reports.
    """
    steps, evals, events = _sorted_out(history, "plot_loss")
    with drawing(ax) as ax:
        if steps:
            _draw_training_loss(ax, steps)
        for split in dict.fromkeys(report.split for report in evals):
            colour, marker, line = _EVAL_STYLES.get(split, (_GREY, "^", "--"))
            size = 8 if line == "none" else 5  # larger, so as to show around a point of a curve at the same place
            style = {"color": colour, "marker": marker, "markersize": size, "linestyle": line, "linewidth": 1.5}
            ax.plot(*_series([report for report in evals if report.split == split], "loss"), label=split, zorder=4, **style)
        _draw_events(ax, events, steps)
        if log:
            ax.set_yscale("log")
        return _over_steps(ax, _LOSS, empty=not steps and not evals)


def plot_memory(history: Iterable[Any], ax: Axes | None = None) -> Axes:
    """Memory of every step: its peak, what is in use after it, and that with MLX's cache, in GB (10^9 bytes), or MB for a tiny model.

    Args:
        history: `trainer.history`, or any list of its reports; it may be empty.
        ax: where to draw; a new figure where left out.

    Raises:
        ConfigError: `history` is not a list of reports.
    """
    steps, _, events = _sorted_out(history, "plot_memory")
    scale, unit = 1e9, "GB"
    with drawing(ax) as ax:
        if steps:
            x, peak = _series(steps, "peak_memory")
            active, cache = _series(steps, "active_memory")[1], _series(steps, "cache_memory")[1]
            if np.nanmax([peak, active + cache], initial=0.0) < SHOWN_IN_MB:
                scale, unit = 1e6, "MB"
            sparse = {"markevery": _every(envelope(x, peak)[0]), "markersize": 4, "linewidth": 1.5}
            ax.plot(*envelope(x, peak / scale), color=_VERMILLION, marker="o", label="peak within the step", **sparse)
            both = envelope(x, (active + cache) / scale)
            ax.plot(*both, color=_GREY, marker="^", linestyle=":", label="after it, with MLX's cache", **sparse)
            ax.plot(*envelope(x, active / scale), color=_BLUE, marker="s", linestyle="--", label="after it, in use", **sparse)
            ax.set_ylim(0, 1.3 * ax.get_ylim()[1])  # room for the legend above the curves
        _draw_events(ax, events, steps)
        return _over_steps(ax, f"memory ({unit})", empty=not steps)


def plot_runs(
    runs: Mapping[str, Iterable[Any]] | Iterable[tuple[str, Iterable[Any]]], ax: Axes | None = None, training: bool = False
) -> Axes:
    """Several runs side by side: validation loss of each, or the moving mean of its training loss where it has none.

    Args:
        runs: a name for the legend -> the run's history; pairs of both where runs may have the same name. The first 12 have colours and
            marks of their own; further ones are drawn grey and counted.
        ax: where to draw; a new figure where left out.
        training: show the moving mean of the training loss beside the validation loss too.

    Raises:
        ConfigError: a history is not a list of reports.
    """
    pairs = runs.items() if isinstance(runs, Mapping) else runs
    drawn = [(name, curves) for name, history in pairs if (curves := _curves_of_run(history, training))]
    with drawing(ax) as ax:
        for number, (name, curves) in enumerate(drawn):
            for kind, x, loss in curves:
                if number >= _RUNS:
                    ax.plot(x, loss, color=_LIGHT_GREY, linewidth=0.8, zorder=1)
                    continue
                label = one_line(name).lstrip("_") or "run"  # a legend hides what begins with _
                label += f", {kind}" if len(curves) > 1 else ""
                ax.plot(x, loss, label=label, **_style(number, x, 1.5 if kind == "valid" else 0.9))
        if len(drawn) > _RUNS:
            ax.plot([], [], color=_LIGHT_GREY, label=f"{len(drawn) - _RUNS:,} more")
        return _over_steps(ax, _LOSS, empty=not drawn)


def loss_png(runs: Sequence[tuple[str, Iterable[Any]]]) -> bytes:
    """Loss and memory of a run, or the losses of several, (name, history) each, as a PNG with two pixels for each of `PNG_WIDTH`."""
    return png(partial(_draw_loss_and_memory, runs[0][1]) if len(runs) == 1 else lambda figure: plot_runs(runs, figure.add_subplot(), True))


def _draw_loss_and_memory(history: Iterable[Any], figure: Figure) -> None:
    loss, memory = figure.subplots(1, 2, width_ratios=(3, 2))
    plot_loss(history, loss), plot_memory(history, memory)


def png(draw: Callable[[Figure], Any]) -> bytes:
    """What is drawn on a figure of its own, as a PNG with two pixels for each of `PNG_WIDTH`."""
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_OWN_STYLE):
        figure = Figure(figsize=(PNG_WIDTH / 100, 3.2), dpi=200, facecolor="white")  # pyplot does not know of it
        figure.subplots_adjust(left=0.07, right=0.985, bottom=0.15, top=0.97, wspace=0.2)  # a layout that fits takes twice the time
        draw(figure)
        canvas, file = FigureCanvasAgg(figure), io.BytesIO()
        canvas.draw()
        Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(64).save(file, "png")  # a third of the bytes
    return file.getvalue()


def picture_html(plot: Callable[[Axes], Any], alt: str) -> str:
    """What `plot` draws on the axes that it is given, as an element of a page; `alt` tells it to those who cannot see it."""

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained")
        plot(figure.add_subplot())

    return image(png(draw), alt, PNG_WIDTH)


def _curves_of_run(history: Iterable[Any], training: bool) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """("training" or "valid", steps, losses) of what there is to draw."""
    steps, evals, _ = _sorted_out(history, "plot_runs")
    valid = [report for report in evals if report.split == "valid"]
    curves = []
    if steps and (training or not valid):
        x, loss = _series(steps, "loss")
        every = slice(None, None, -max(1, len(x) // _POINTS))  # from the end, which always shows
        curves.append(("training", x[every][::-1], moving_mean(loss, _window(loss))[every][::-1]))
    return curves + ([("valid", *_series(valid, "loss"))] if valid else [])


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
            ax.plot(np.asarray(x), np.where(np.isfinite(values), values, np.nan), label=one_line(name), **_style(number, values))
        if log_x:
            ax.set_xscale("log")
        return _finish(ax, x_label, y_label, title, empty=not any(len(y) for _, _, y in series), legend=len(series) > 1)


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
            shown = [one_line(name, 24) for name in names[::every]]
            axis.set_ticks(range(0, len(names), every), shown, fontsize="x-small", parse_math=False)
        ax.tick_params(axis="x", rotation=90 if sum(map(len, shown)) > 90 else 0)
        return _finish(ax, labels[1], labels[0], title, empty=not values.size, grid=False, legend=False)


def small_maps(maps: Sequence[np.ndarray], names: Sequence[str], title: str) -> Figure:
    """Many maps of one size in a grid, each with its own scale from 0."""
    columns = min(8, max(1, len(maps)))
    lines = math.ceil(len(maps) / columns)
    with drawing(None) as ax:
        figure = ax.figure
        ax.remove()
        figure.set_size_inches(1.3 * columns, 1.45 * lines + 0.4)
        for place, (values, name) in enumerate(zip(maps, names, strict=True), 1):
            own = figure.add_subplot(lines, columns, place, xticks=[], yticks=[])
            own.imshow(values, interpolation="nearest", cmap="viridis", vmin=0.0)
            own.set_title(one_line(name), fontsize="x-small", parse_math=False)
        figure.suptitle(one_line(title, 90), fontsize="medium", parse_math=False)
        return figure


def mark(ax: Axes, x: float, text: str) -> None:
    """A dotted upright line with a word at it; none where `text` is empty."""
    ax.axvline(x, color=_GREY, linestyle=":", linewidth=1.2, zorder=1)
    if text:
        place = {"xy": (x, 1.0), "xycoords": ax.get_xaxis_transform(), "xytext": (-2, -2), "textcoords": "offset points"}
        ax.annotate(text, rotation=90, ha="right", va="top", fontsize="x-small", color=_GREY, parse_math=False, **place)


def one_line(text: object, limit: int = 48) -> str:
    """Foreign text for a figure: one line, cut, with a box for each character that matplotlib's font has not.

    Where `$` would begin a formula, `parse_math` is turned off.
    """
    line = "".join(c if ord(c) in _glyphs() else "□" for c in " ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


@lru_cache(maxsize=1)
def _glyphs() -> frozenset[int]:
    """Code points that matplotlib's own font has; it warns at each drawing of another one."""
    return frozenset(FT2Font(findfont("DejaVu Sans")).get_charmap())


# -- reports to numbers -----------------------------------------------------------------------------------------------


def _sorted_out(history: Iterable[Any], function: str) -> tuple[list[StepReport], list[EvalReport], list[Event]]:
    if hasattr(history, "history") or not isinstance(history, Iterable):
        hint = " Pass its .history." if hasattr(history, "history") else ""
        raise ConfigError(f"{function}: expected a history, which is a list of reports, got {type(history).__name__}.{hint}")
    steps, evals, events = [], [], []
    places = {StepReport: steps, EvalReport: evals, Event: events}
    for report in history:
        if type(report) not in places:
            raise ConfigError(f"{function}: expected StepReport, EvalReport or Event in the history, got {type(report).__name__}.")
        places[type(report)].append(report)
    return steps, evals, events


def _series(reports: list, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Step numbers and values, both (n,) float64; what is not finite is NaN, where a line breaks."""
    values = np.array([getattr(report, field) for report in reports], dtype=np.float64)
    return np.array([report.step for report in reports], dtype=np.float64), np.where(np.isfinite(values), values, np.nan)


def stretches(values: np.ndarray, most: int) -> np.ndarray:
    """Values (n,) cut into at most `most` stretches of one length, (m, length); the last is filled up with its last value."""
    length = max(1, math.ceil(len(values) / most))
    missing = -len(values) % length
    return np.pad(values, (0, missing), mode="edge" if missing else "constant").reshape(-1, length)


def envelope(x: np.ndarray, y: np.ndarray, most: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
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


def _window(values: np.ndarray) -> int:
    """Of the moving mean; odd: as many steps before as after."""
    return max(5, len(values) // 40) // 2 * 2 + 1


# -- drawing ----------------------------------------------------------------------------------------------------------


@contextmanager
def drawing(ax: Axes | None) -> Iterator[Axes]:
    """The axes to draw on: those given as they are, or new ones, and then our style within the block."""
    if ax is not None:
        yield ax
        return
    # Outside our style: pyplot's first figure starts the notebook's backend, which changes settings that must outlast it.
    figure = _new_figure()
    with matplotlib.rc_context(_OWN_STYLE):
        yield figure.add_subplot()


def _new_figure() -> Figure:
    """A figure that pyplot knows of, so that a notebook shows it after the cell.

    A notebook closes figures then; a script never does. There, pyplot keeps the latest of ours only; the others live on for
    those who hold them.
    """
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(7.0, 4.0), layout="constrained", facecolor=_OWN_STYLE["figure.facecolor"])
    _own_figures.append(weakref.ref(figure))
    while len(_own_figures) > _OPEN_FIGURES:
        oldest = _own_figures.popleft()()
        if oldest is not None:
            plt.close(oldest)
    return figure


def _draw_training_loss(ax: Axes, steps: list[StepReport]) -> None:
    x, loss = _series(steps, "loss")
    smoothed = len(x) >= _SMOOTHED_FROM
    faint = {"linewidth": 0.7, "alpha": 0.45} if smoothed else {"linewidth": 1.5}
    marker = "." if len(x) <= _MARKED_UP_TO else "none"
    ax.plot(*envelope(x, loss), color=_BLUE, marker=marker, markersize=4, label="training", zorder=2, **faint)
    if smoothed:
        window = _window(loss)
        every, label = max(1, len(x) // _POINTS), f"training, mean of {window} steps"
        ax.plot(x[::every], moving_mean(loss, window)[::every], color=_BLUE, linewidth=2.0, label=label, zorder=3)
    broken = x[~np.isfinite(loss)]
    if len(broken):
        label = f"not finite ({len(broken):,})"
        bottom = ax.get_xaxis_transform()  # x in steps, y as a share of the axes' height
        ax.plot(broken, np.full_like(broken, 0.03), "x", color=_VERMILLION, transform=bottom, label=label, zorder=5)


def _draw_events(ax: Axes, events: list[Event], steps: list[StepReport]) -> None:
    """A dotted line and a word for each step at which something happened; step 0 is where every run begins."""
    labels: dict[int, dict[str, None]] = {}
    for event in events:
        if event.step > 0:
            labels.setdefault(event.step, {})[_event_label(event, steps)] = None
    for step, words in labels.items():
        mark(ax, step, ", ".join(words) if len(labels) <= _LABELLED_EVENTS else "")
    if len(labels) > _LABELLED_EVENTS:
        ax.plot([], [], color=_GREY, linestyle=":", label=f"{len(labels):,} events")


def _event_label(event: Event, steps: list[StepReport]) -> str:
    if event.kind == "learning_rate":
        after = next((report for report in steps if report.step > event.step), None)
        return f"learning rate {after.learning_rate:.3g}" if after else "learning rate"
    return event.kind.replace("_", " ")


def _style(number: int, values: Sequence, width: float = 1.5) -> dict[str, Any]:
    """Colour, dashes and marks of the `number`-th curve."""
    marks = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 4, "markevery": _every(values)}
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _DASHES[number % len(_DASHES)], "linewidth": width, **marks}


def _every(values: Sequence) -> int:
    """For a dozen marks on a curve."""
    return max(1, len(values) // 12)


def _over_steps(ax: Axes, label: str, empty: bool) -> Axes:
    ax.xaxis.get_major_locator().set_params(integer=True)
    return _finish(ax, "optimizer step", label, empty=empty)


def _finish(ax: Axes, x_label: str, y_label: str, title: str = "", *, empty: bool, grid: bool = True, legend: bool = True) -> Axes:
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    if title:
        ax.set_title(one_line(title, 90), fontsize="medium", parse_math=False)
    if grid:
        ax.grid(True, linewidth=0.6, alpha=0.5)
    if empty:
        ax.text(0.5, 0.5, "nothing recorded yet", transform=ax.transAxes, ha="center", va="center")
    elif legend and ax.get_legend_handles_labels()[0]:
        place = "best" if len(ax.lines) < 100 else "upper right"  # to look for the best one takes seconds with hundreds of events
        for text in ax.legend(fontsize="small", loc=place).get_texts():
            text.set_parse_math(False)
    return ax
