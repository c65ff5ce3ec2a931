"""Draws the house from its imports: `python -m docs.draw_house` writes docs/images/house.svg. A test compares the two.

A floor is a layer of `nbs_tests/test_layers.py`; every module stands on it, with a number where `docs/architecture.md` reads it in
that order. An arc on the right leads from a floor down to one that a module on it imports from.
"""

from __future__ import annotations

import ast
import html
from pathlib import Path

from nbs_tests.test_layers import LAYERS, PACKAGE, ROOT

PICTURE = Path(__file__).parent / "images" / "house.svg"
READING = (
    "training.config", "models.families", "models.decoder", "data.encode", "data.batches", "training.loss", "training.engine",
    "training.rules", "training.optimizers", "training.trainer", "training.state", "training.run",
)  # fmt: skip
WIDTH, LEFT, LINE, CHARACTER, PADDING = 1180, 20, 24, 7.3, 12
ARCS = 130  # room for the arcs, right of the floors
STYLE = (
    "text{font:13px ui-monospace,Menlo,Consolas,monospace;fill:#222}.dim{fill:#767676;font-size:11px}.floor{fill:#f6f4ee;stroke:#b9b4a6}"
    ".disc{fill:#0b6e99}.number{fill:#fff;font-size:11px;text-anchor:middle}.arc{fill:none;stroke:#0b6e99;opacity:.6;stroke-width:1.2}"
)


def modules() -> dict[str, Path]:
    """Dotted name without the package's -> file; packages' own `__init__` and `__main__` files are left out."""
    paths = sorted(ROOT.rglob("*.py"))
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths if path.stem not in ("__init__", "__main__")
    }


def imports_between_floors(found: dict[str, Path]) -> set[tuple[int, int]]:
    """Pairs of a floor and another one that a module on it imports from."""
    floor_of = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}
    pairs = set()
    for name, path in found.items():
        here = floor_of[name.split(".")[0]]
        tree = ast.parse(path.read_text("utf-8"))
        imported = {
            floor_of[part]
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE
            for part in ([node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names])
            if part in floor_of
        }
        pairs.update((here, other) for other in imported if other != here)
    return pairs


def rows_of(floor: list[str], found: dict[str, Path]) -> list[list[str]]:
    """The floor's modules, room after room, in rows that fit the picture's width."""
    rows: list[list[str]] = [[]]
    used = 0.0
    for room in floor:
        for name in (name for name in found if name.split(".")[0] == room):
            width = width_of(name)
            if used + width > WIDTH - 2 * LEFT - ARCS and rows[-1]:
                rows.append([])
                used = 0.0
            rows[-1].append(name)
            used += width
    return rows


def width_of(name: str) -> float:
    """Of a module's name with its number and the gap behind it."""
    return CHARACTER * len(name) + 2 * PADDING + (18 if name in READING else 0)


def draw() -> str:
    """The picture as SVG."""
    found = modules()
    parts, top, middles = [], 20.0, {}
    for floor in reversed(range(len(LAYERS))):
        rows = rows_of(LAYERS[floor], found)
        height = LINE * len(rows) + PADDING
        parts.append(f'<rect class="floor" x="{LEFT}" y="{top}" width="{WIDTH - 2 * LEFT - ARCS}" height="{height}" rx="4"/>')
        for i, row in enumerate(rows):
            parts += draw_row(row, top + PADDING + LINE * i + 10)
        middles[floor] = top + height / 2
        top += height + 10
    edge = WIDTH - LEFT - ARCS
    for floor, other in sorted(imports_between_floors(found)):
        y, to, reach = middles[floor], middles[other], 12 + 11 * (floor - other)
        parts.append(f'<path class="arc" d="M{edge},{y:.0f} C{edge + reach},{y:.0f} {edge + reach},{to:.0f} {edge},{to:.0f}"/>')
    title = "Floors of the package: what stands higher imports from what stands lower"
    parts.append(f'<text class="dim" x="{LEFT}" y="{top + 10}">Arcs are imports, always downwards. Numbers: the order to read in.</text>')
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 24:.0f}" role="img" aria-label="{title}">'
    background = f'<title>{title}</title><style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([opening, background, *parts, "</svg>", ""])


def draw_row(row: list[str], y: float) -> list[str]:
    """The names of a row of modules, with their places in the reading order."""
    parts, x = [], float(LEFT + PADDING)
    for name in row:
        start = x
        if name in READING:
            parts.append(f'<circle class="disc" cx="{x + 5:.0f}" cy="{y - 5:.0f}" r="8"/>')
            parts.append(f'<text class="number" x="{x + 5:.0f}" y="{y - 1:.0f}">{READING.index(name) + 1}</text>')
            start += 18
        parts.append(f'<text x="{start:.0f}" y="{y:.0f}">{html.escape(name)}</text>')
        x += width_of(name)
    return parts


if __name__ == "__main__":
    PICTURE.write_text(draw(), "utf-8")
