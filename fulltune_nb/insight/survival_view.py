"""How the update-survival meter shows itself in a cell: the last measured step by block, and a heat map of blocks x steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fulltune_nb.html import NO_MATH, PALETTE, esc, table
from fulltune_nb.insight.survival import SUMMARIES, survival

if TYPE_CHECKING:
    from fulltune_nb.insight.survival import TensorUpdate, UpdateMeter

_COLUMNS = 60
_BLOCKS = 40  # lines


def survival_html(meter: UpdateMeter, what: str = "survival") -> str:
    """Nothing yet, or a table of the last measured step and a picture of the latest ones; what there is no room for is counted.

    Args:
        meter: what has measured.
        what: the picture is of; one of `SUMMARIES`.
    """
    if not meter.records:
        return f'<div class="{NO_MATH}">Update survival: nothing measured yet.</div>'
    recent = meter.latest(_COLUMNS)
    last = recent[-1].step
    blocks = meter.by_block(recent)
    rows = []
    for name, by_step in list(blocks.items())[:_BLOCKS]:
        if last in by_step:
            found = {what: summary(by_step[last]) for what, summary in SUMMARIES.items()}
            numbers = (f"{found['update_ratio']:.2e}", f"{found['gradient_norm']:.3g}", f"{found['weight_norm']:.4g}")
            rows.append((name, _percent(found["survival"]), *numbers))
    headers = ("block", "updates that survive", "update / weight", "gradient norm", "weight norm")
    more = f"<div>… and {len(blocks) - _BLOCKS} blocks more</div>" if len(blocks) > _BLOCKS else ""
    share, measured = survival(record for record in recent if record.step == last), len(meter.steps)
    caption = f"Step {last:,}: {_percent(share)} of the updates survive rounding; {measured:,} steps measured"
    heat = _heat({name: blocks[name] for name in list(blocks)[:_BLOCKS]}, what, measured)
    return f'<div class="{NO_MATH}">{table(headers, rows, caption)}{more}{heat}</div>'


def _percent(share: float) -> str:
    return "nothing moves" if math.isnan(share) else f"{share:.1%}"


def _heat(blocks: dict[str, dict[int, list[TensorUpdate]]], what: str, measured: int, cell: tuple[int, int] = (11, 11)) -> str:
    steps = sorted({step for by_step in blocks.values() for step in by_step})
    values = np.array([[SUMMARIES[what](by_step.get(step, [])) for step in steps] for by_step in blocks.values()], dtype=np.float64)
    shades, scale = _shades(values, what)
    parts = []
    for line, name in enumerate(blocks):
        y = line * cell[1]
        parts.append(f'<text x="0" y="{y + 9}" font-size="10" fill="currentColor">{esc(name, 18)}</text>')
        for column, value in enumerate(values[line]):
            if np.isfinite(shades[line, column]):
                number = f"{value:.1%}" if what == "survival" else f"{value:.3g}"
                place = f'x="{110 + column * cell[0]}" y="{y}" width="{cell[0] - 1}" height="{cell[1] - 1}"'
                look = f'fill="{PALETTE[0]}" fill-opacity="{0.06 + 0.94 * shades[line, column]:.2f}"'
                parts.append(f"<rect {place} {look}><title>{esc(name)}, step {steps[column]}: {number}</title></rect>")
    name = "Updates that survive" if what == "survival" else what.replace("_", " ").capitalize().replace("Update ratio", "Update / weight")
    label = f"{name}, by block and step {steps[0]:,} to {steps[-1]:,}: {scale}"
    hidden = f"; {measured - len(steps):,} earlier measurements not shown" if measured > len(steps) else ""
    width, height = 110 + len(steps) * cell[0], len(blocks) * cell[1]
    return f'<div>{label}{hidden}</div><svg width="{width}" height="{height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _shades(values: np.ndarray, what: str) -> tuple[np.ndarray, str]:
    """From 0 to 1, NaN for none, and what they mean: shares as they are, all else by its logarithm from the least to the greatest."""
    if what == "survival":
        return values, "faint is none, solid is all"
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(np.isfinite(values) & (values > 0), np.log(values), np.nan)
    if not np.isfinite(logs).any():
        return logs, "all zero"
    low, high = np.nanmin(logs), np.nanmax(logs)
    return (logs - low) / max(high - low, 1e-9), f"faint is {math.exp(low):.2g}, solid is {math.exp(high):.2g}, by its logarithm"
