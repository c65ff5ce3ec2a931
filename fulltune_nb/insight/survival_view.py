"""How the update-survival meter shows itself in a cell: the last measured step by block, and a heat map of blocks x steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fulltune_nb.html import NO_MATH, PALETTE, esc, table
from fulltune_nb.insight.survival import SUMMARIES, survival

if TYPE_CHECKING:
    from fulltune_nb.insight.survival import UpdateMeter

_COLUMNS = 60
_BLOCKS = 40  # lines


def survival_html(meter: UpdateMeter) -> str:
    """Nothing yet, or a table and a picture; what there is no room for is counted."""
    if not meter.records:
        return f'<div class="{NO_MATH}">Update survival: nothing measured yet.</div>'
    last = meter.steps[-1]
    blocks = meter.by_block()
    rows = []
    for name, by_step in list(blocks.items())[:_BLOCKS]:
        if last in by_step:
            found = {what: summary(by_step[last]) for what, summary in SUMMARIES.items()}
            numbers = (f"{found['update_ratio']:.2e}", f"{found['gradient_norm']:.3g}", f"{found['weight_norm']:.4g}")
            rows.append((name, _percent(found["survival"]), *numbers))
    headers = ("block", "updates that survive", "update / weight", "gradient norm", "weight norm")
    more = f"<div>… and {len(blocks) - _BLOCKS} blocks more</div>" if len(blocks) > _BLOCKS else ""
    share = survival(record for record in meter.records if record.step == last)
    caption = f"Step {last}: {_percent(share)} of the updates survive rounding; {len(meter.steps):,} steps measured"
    return f'<div class="{NO_MATH}">{table(headers, rows, caption)}{more}{_heat(meter)}</div>'


def _percent(share: float) -> str:
    return "nothing moves" if math.isnan(share) else f"{share:.1%}"


def _heat(meter: UpdateMeter, cell: tuple[int, int] = (11, 11)) -> str:
    blocks, steps, values = meter.heat()
    first = max(0, len(steps) - _COLUMNS)
    steps, values, blocks = steps[first:], values[:_BLOCKS, first:], blocks[:_BLOCKS]
    parts = []
    for line, name in enumerate(blocks):
        y = line * cell[1]
        parts.append(f'<text x="0" y="{y + 9}" font-size="10" fill="currentColor">{esc(name, 18)}</text>')
        for column, value in enumerate(values[line]):
            if np.isfinite(value):
                title = f"{esc(name)}, step {steps[column]}: {value:.1%}"
                place = f'x="{110 + column * cell[0]}" y="{y}" width="{cell[0] - 1}" height="{cell[1] - 1}"'
                look = f'fill="{PALETTE[0]}" fill-opacity="{0.06 + 0.94 * value:.2f}"'
                parts.append(f"<rect {place} {look}><title>{title}</title></rect>")
    label = f"Updates that survive, by block and step {steps[0]} to {steps[-1]}: faint is none, dark is all"
    hidden = f"; {first:,} earlier measurements not shown" if first else ""
    width, height = 110 + len(steps) * cell[0], len(blocks) * cell[1]
    return f'<div>{label}{hidden}</div><svg width="{width}" height="{height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
