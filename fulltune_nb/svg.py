"""Small pictures as SVG text: curves, bars, heat maps. For cells and Markdown; plots for papers are `plots`.

Every picture has a text alternative, and every text is escaped. Colours are those of `html.PALETTE`; words take the notebook theme's
own colour, so light and dark themes both read well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fulltune_nb.html import NO_MATH, PALETTE, esc, hundredths

BLUE, VERMILLION = PALETTE[0], PALETTE[5]
_POINTS = 200  # of a curve

Points = Sequence[tuple[float, float]]


def curve(points: Points, what: str, width: int = 560, height: int = 60) -> str:
    """A curve through (x, y) points with its range below it; `""` where fewer than two are finite.

    Args:
        points: of many, each stretch is shown by its mean.
        what: begins the text below, such as `"loss over 1,200 steps"`.
        width, height: pixels.
    """
    line = _thinned(points)
    if len(line) < 2:
        return ""
    (left, right), (low, high) = _range(x for x, _ in line), _range(y for _, y in line)
    shapes = _polyline(line, (left, right, low, high), (0, 4, width, height - 8), BLUE)
    label = f"{what}, from {high:.3f} (top) to {low:.3f} (bottom)"
    return _svg(f"{shapes}<title>{esc(label)}</title>", width, height, label) + f"<div>{esc(label)}</div>"


def curves_file(lines: Mapping[str, Points], width: int = 640, height: int = 240) -> str:
    """Curves as a file of its own, on white, from x = 0, with the range written at the edges: name -> (step, y) points."""
    shown = {name: _thinned(points) for name, points in lines.items()}
    everything = [point for line in shown.values() for point in line] or [(0, 0.0)]
    last, (low, high) = max(1, *(x for x, _ in everything)), _range(y for _, y in everything)
    shapes, names = [], []
    for number, (name, line) in enumerate(shown.items()):
        colour, dashes, look = ((BLUE, "none", "solid"), (VERMILLION, "5 3", "dashed"))[number % 2]
        shapes.append(_polyline(line, (0, last, low, high), (50, 15, width - 60, height - 50), colour, dashes))
        names.append(f"{name} ({look})")
    texts = [(48, 18, "end", f"{high:.3g}"), (48, height - 32, "end", f"{low:.3g}"), (50, height - 18, "start", "0")]
    texts += [(width - 10, height - 18, "end", f"step {last:,}"), (width / 2, height - 4, "middle", ", ".join(names))]
    shapes += [f'<text x="{x}" y="{y}" text-anchor="{anchor}">{esc(text)}</text>' for x, y, anchor, text in texts]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
    return f'{head}<rect width="100%" height="100%" fill="white"/>{"".join(shapes)}</svg>\n'


def bars(
    values: Sequence[float],
    titles: Sequence[str],
    label: str,
    signed: bool = False,
    colours: tuple[str, str] = (BLUE, VERMILLION),
    width: int = 560,
    height: int = 60,
) -> str:
    """A bar for each value from left to right, and a label below them; `signed` puts zero in the middle.

    Args:
        values: finite.
        titles: shown where the mouse rests on a bar.
        label: says what is to be seen.
        signed: whether values below zero occur; they hang down.
        colours: of values above zero and below.
        width, height: pixels.
    """
    step, largest = width / max(len(values), 1), max((abs(value) for value in values), default=0) or 1
    zero = height / 2 if signed else height
    shapes = []
    for i, (value, title) in enumerate(zip(values, titles, strict=True)):
        size = abs(value) / largest * zero
        place = f'x="{i * step:.1f}" y="{zero - size if value >= 0 else zero:.1f}" width="{max(step - 0.8, 0.5):.1f}" height="{size:.1f}"'
        shapes.append(f'<rect {place} fill="{colours[1 if value < 0 else 0]}"><title>{esc(title)}</title></rect>')
    return _svg("".join(shapes), width, height, label) + f"<div>{esc(label)}</div>"


def named_bars(values: Mapping[str, float], title: str, width: int = 240) -> str:
    """A table of names, bars that lie, and numbers."""
    largest = max((value for value in values.values() if math.isfinite(value)), default=0) or 1
    lines = []
    for name, value in values.items():
        size = value / largest * width if math.isfinite(value) else 0
        bar = f'<svg width="{width}" height="9" aria-hidden="true"><rect width="{size:.1f}" height="9" fill="{BLUE}"/></svg>'
        cells = (f'<td style="padding:0 8px;text-align:left">{esc(name)}</td>', f'<td style="padding:0">{bar}</td>')
        lines.append(f'<tr>{"".join(cells)}<td style="padding:0 8px">{value:.3g}</td></tr>')
    return f"<div><b>{esc(title)}</b></div><table>{''.join(lines)}</table>"


def stacked_bar(
    parts: Mapping[str, float], limit: float | None = None, width: int = 560, unit: str = "", beside: Mapping[str, float] | None = None
) -> str:
    """One lying bar of several parts, with a legend; an upright line marks `limit` where given.

    Args:
        parts: name -> size, all in one unit; a part of size 0 is not shown, and leaves its colour to no other.
        limit: where the line is drawn, in the same unit.
        width: pixels.
        unit: written behind each size in the legend.
        beside: what is no part of the whole, as outlines behind it; as `parts`.
    """
    beside = beside or {}
    scale = width / max(sum(parts.values()) + sum(beside.values()), limit or 0.0, 1e-12)
    x, shapes, legend, labels = 0.0, [], [], []
    for i, (name, size) in enumerate([*parts.items(), *beside.items()]):
        if not size:
            continue
        colour = PALETTE[i % len(PALETTE)] + ("" if i < len(PALETTE) else "77")  # paler the second time
        label, sign, look = f"{name} {hundredths(size)} {unit}".strip(), "■", f'fill="{colour}"'
        if i >= len(parts):
            sign, look = "□", f'fill="{colour}" fill-opacity="0.15" stroke="{colour}" stroke-dasharray="3 2"'
        shapes.append(f'<rect x="{x:.1f}" y="4" width="{size * scale:.1f}" height="22" {look}><title>{esc(label)}</title></rect>')
        labels.append(label)
        legend.append(f'<span style="margin-right:12px;white-space:nowrap"><span style="color:{colour}">{sign}</span> {esc(label)}</span>')
        x += size * scale
    if limit is not None:
        at = min(limit * scale, width - 1)
        line = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="30" stroke="{VERMILLION}" stroke-width="2" stroke-dasharray="4 2"/>'
        shapes.append(line)
        labels.append(f"limit {limit:,.2f} {unit}".strip())
        legend.append(f'<span style="white-space:nowrap">┆ {esc(labels[-1])}</span>')
    # The spaces between are where a narrow page may break the line.
    return _svg("".join(shapes), width, 30, ", ".join(labels)) + f'<div class="{NO_MATH}">{" ".join(legend)}</div>'


def heat_map(
    values: np.ndarray,
    what: str,
    names: Sequence[str] = (),
    title: Callable[[int, int], str] | None = None,
    shares: bool = False,
    hidden: str = "",
) -> str:
    """Numbers (R, C) as shades, the first row on top, below a label that says what they mean; what is not finite stays blank.

    Args:
        values: (R, C); shown by their logarithm, from the least to the greatest.
        what: begins the label.
        names: of the rows, where they are to stand at the left.
        title: of row and column -> shown where the mouse rests.
        shares: values are from 0 to 1, and shown as they are.
        hidden: ends the label: says what there is no room for.
    """
    shades, scale = (values, "faint is none, solid is all") if shares else _log_shades(values)
    cell, left, shapes = 11, 110 if names else 0, []
    for row, line in enumerate(shades.tolist()):
        if names:
            shapes.append(f'<text x="0" y="{row * cell + 9}" font-size="10" fill="currentColor">{esc(names[row], 18)}</text>')
        for column, shade in enumerate(line):
            if not math.isfinite(shade):
                continue
            place = f'x="{left + column * cell}" y="{row * cell}" width="{cell - 1}" height="{cell - 1}"'
            text = f"<title>{esc(title(row, column))}</title>" if title else ""
            shapes.append(f'<rect {place} fill="{BLUE}" fill-opacity="{0.06 + 0.94 * shade:.2f}">{text}</rect>')
    label = f"{what}: {scale}"
    rows, columns = values.shape
    return f"<div>{esc(label + hidden)}</div>" + _svg("".join(shapes), left + columns * cell, rows * cell, label)


def _svg(shapes: str, width: int, height: int, label: str) -> str:
    place = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" style="max-width:100%;height:auto"'
    return f'<svg {place} role="img" aria-label="{esc(label)}">{shapes}</svg>'


def _thinned(points: Points) -> list[tuple[float, float]]:
    """At most `_POINTS`: the mean of each stretch at its end; what is not finite is left out."""
    size = max(1, math.ceil(len(points) / _POINTS))
    stretches = ([(x, y) for x, y in points[i : i + size] if math.isfinite(y)] for i in range(0, len(points), size))
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in stretches if part]


def _range(values) -> tuple[float, float]:
    values = list(values)
    return min(values), max(values)


def _polyline(points: Points, data: tuple[float, ...], box: tuple[float, ...], colour: str, dashes: str = "none") -> str:
    """Points within `data` (x from, x to, y from, y to) drawn into `box` (left, top, width, height)."""
    (x0, x1, y0, y1), (left, top, width, height) = data, box
    across, up = width / ((x1 - x0) or 1), height / ((y1 - y0) or 1)
    places = " ".join(f"{left + (x - x0) * across:.1f},{top + (y1 - y) * up:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dashes}"/>'


def _log_shades(values: np.ndarray) -> tuple[np.ndarray, str]:
    """(R, C) from 0 to 1, NaN for what is zero or not finite; and what they mean."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(np.isfinite(values) & (values > 0), np.log(values), np.nan)
    if not np.isfinite(logs).any():
        return logs, "nothing above zero"
    low, high = np.nanmin(logs), np.nanmax(logs)
    return (logs - low) / max(high - low, 1e-9), f"faint is {math.exp(low):.3g}, solid is {math.exp(high):.3g}, by its logarithm"
