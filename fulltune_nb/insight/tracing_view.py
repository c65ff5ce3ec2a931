"""How a trace shows itself in a cell: the logit lens as a table, and the residual stream as a small heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fulltune_nb.data.lens import token_texts, visible
from fulltune_nb.html import NO_MATH, PALETTE, cut, esc, facts

if TYPE_CHECKING:
    from fulltune_nb.insight.tracing import Trace

_POSITIONS = 16  # columns of the lens
_LAYERS = 34  # lines of the lens; of deeper models some, evenly spread
_COLUMNS = 64  # of the heat map
_TOKEN = 14  # characters


def trace_html(trace: Trace, tokenizer) -> str:
    """Legend, lens and heat map; what there is no room for is counted."""
    title = f"{len(trace.example.tokens):,} tokens through {trace.num_layers} blocks"
    pairs: list[tuple[str, object]] = [("text", cut(trace.example.text, 400))]
    gradient = ""
    if hasattr(trace, "loss"):
        pairs.append(("loss", f"{trace.loss:.4f} nats"))
        gradient = _bars(trace.block_gradient_norms)
    return f'<div class="{NO_MATH}">{facts(title, pairs)}{gradient}{_lens(trace, tokenizer)}{_residual(trace)}</div>'


def _lens(trace: Trace, tokenizer) -> str:
    length, layers = len(trace.example.tokens), trace.num_layers + 1
    first = max(0, length - _POSITIONS)
    lines = np.unique(np.linspace(0, layers - 1, min(layers, _LAYERS)).round().astype(int))
    columns = range(first, length)
    cells = [f'<th style="text-align:left;padding:1px 6px">{esc(_short(visible(trace.tokens[i])))}</th>' for i in columns]
    rows = [f'<tr><th style="padding:1px 6px">after</th>{"".join(cells)}</tr>']
    for layer in lines[::-1].tolist():  # the last layer, which really speaks, on top
        said = token_texts(tokenizer, trace.top_ids[layer, first:, 0].tolist())
        name = f"block {layer}" if layer else "embedding"
        cells = [_cell(trace, tokenizer, layer, i, text) for i, text in zip(columns, said, strict=True)]
        rows.append(f'<tr><th style="text-align:left;padding:1px 6px">{name}</th>{"".join(cells)}</tr>')
    hidden = f"; {first:,} tokens before these are not shown" if first else ""
    skipped = f"; {layers - len(lines)} of {layers} layers are not shown" if len(lines) < layers else ""
    caption = f"Logit lens: what each layer would say next, ✓ where that is what follows{hidden}{skipped}"
    head = f'<caption style="text-align:left;font-weight:bold">{caption}</caption>'
    return f'<div style="overflow:auto"><table style="border-collapse:collapse">{head}{"".join(rows)}</table></div>'


def _cell(trace: Trace, tokenizer, layer: int, i: int, text: str) -> str:
    share = float(trace.top_probabilities[layer, i, 0])
    tokens = trace.example.tokens
    right = i + 1 < len(tokens) and trace.top_ids[layer, i, 0] == tokens[i + 1]
    others = token_texts(tokenizer, trace.top_ids[layer, i].tolist())
    shares = trace.top_probabilities[layer, i].tolist()
    title = "\n".join(f"{n}. {p:.2%} {_short(visible(t))}" for n, (t, p) in enumerate(zip(others, shares, strict=True), 1))
    alpha = f"{round(110 * min(1.0, share)) if np.isfinite(share) else 0:02x}"
    style = f"padding:1px 6px;white-space:pre;background:{PALETTE[0]}{alpha};text-align:left"
    percent = f"{share:.0%}" if np.isfinite(share) else "nan"
    return f'<td style="{style}" title="{esc(title)}">{esc(_short(visible(text)))}{" ✓" if right else ""} <small>{percent}</small></td>'


def _residual(trace: Trace, cell: tuple[int, int] = (11, 9)) -> str:
    values = trace.residual_norms
    starts = np.arange(0, values.shape[1], -(-values.shape[1] // _COLUMNS))
    means = np.add.reduceat(values, starts, axis=1) / np.diff([*starts, values.shape[1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.log(np.maximum(means, 1e-12))
    finite = scaled[np.isfinite(scaled)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    rects = []
    for layer, line in enumerate(scaled):
        for column, value in enumerate(line):
            strength = (value - low) / max(high - low, 1e-9) if np.isfinite(value) else 0.0
            x, y = column * cell[0], (len(scaled) - 1 - layer) * cell[1]
            look = f'fill="{PALETTE[0]}" fill-opacity="{0.08 + 0.92 * strength:.2f}"'
            rects.append(f'<rect x="{x}" y="{y}" width="{cell[0]}" height="{cell[1]}" {look}/>')
    span = f"{np.nanmin(means):.3g} (faint) to {np.nanmax(means):.3g} (dark)" if len(finite) else "not finite"
    label = f"Norm of the residual stream, {span}; embedding at the bottom, first token at the left; .plot() has the scale"
    width, height = len(starts) * cell[0], len(scaled) * cell[1]
    return f'<div>{label}</div><svg width="{width}" height="{height}" role="img" aria-label="{label}">{"".join(rects)}</svg>'


def _bars(norms: dict[str, float], width: int = 240) -> str:
    largest = max((n for n in norms.values() if np.isfinite(n)), default=1.0) or 1.0
    lines = []
    for name, norm in norms.items():
        size = norm / largest * width if np.isfinite(norm) else 0
        bar = f'<svg width="{width}" height="9" aria-hidden="true"><rect width="{size:.1f}" height="9" fill="{PALETTE[0]}"/></svg>'
        lines.append(f'<tr><td style="padding:0 8px;text-align:left">{esc(name)}</td><td style="padding:0">{bar}</td>'
                     f'<td style="padding:0 8px">{norm:.3g}</td></tr>')
    return f"<div><b>Norm of the gradient, by block</b></div><table>{''.join(lines)}</table>"


def _short(text: str) -> str:
    text = text.replace("\n", "")
    return text if len(text) <= _TOKEN else f"{text[: _TOKEN - 1]}…"
