"""How token losses show themselves in a cell.

The more a token costs, the stronger its colour *and* the thicker the line at it; the line is solid under tokens that are trained
on and dotted under those only read. With a base model, what became worse has its line below and what became better above. All
numbers stand in the hover text, in the table of the hardest tokens and in `to_frame`. All texts are escaped and stand in `<pre>`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fulltune_nb.data.lens import token_texts, visible
from fulltune_nb.html import NO_MATH, PALETTE, cut, esc, table

if TYPE_CHECKING:
    from fulltune_nb.insight.losses import ExampleLosses, TokenLosses, TopLosses

TOKENS_SHOWN = 6000
"""Boxes in one cell; what is beyond is counted. A browser lays out so many in a fraction of a second."""
_STRIP_FROM = 200  # tokens; a longer example gets an overview of its losses
_STRIP_BARS = 120
_TOKEN = 40  # characters of a token's text
_LOSS_LEVELS = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats
_DIFFERENCE_LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0)
_ALPHAS = ("00", "18", "2a", "40", "58", "70")
_WIDTHS = (0, 1, 2, 3, 4, 5)  # pixels of the line
_PRE = "white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0 10px 0;line-height:2.1;max-height:420px;overflow:auto"


def token_losses_html(shown: TokenLosses) -> str:
    """Legend, and each example: its losses as a strip where it is long, then token by token."""
    texts: dict[int, str] = {}
    left, parts, hidden = TOKENS_SHOWN, [], 0
    for row in shown.rows:
        if left <= 0:
            hidden += 1
            continue
        parts.append(_example(row, shown.tokenizer, texts, left))
        left -= len(row.losses)
    if hidden:
        parts.append(f"<div>… {hidden:,} more examples not shown; take some of them, as in losses[{len(shown) - hidden}:]</div>")
    against = f", {shown.difference:+.4f} against the base" if shown.compared else ""
    head = f"<div><b>Loss {shown.loss:.4f}</b> nats over {shown.tokens:,} trained tokens of {len(shown):,} examples{against}</div>"
    return f'<div class="{NO_MATH}">{head}{_legend(shown.compared)}{"".join(parts)}</div>'


def _legend(compared: bool) -> str:
    def sample(text: str, value: float) -> str:
        return f'<span style="{_style(value, True, compared)}">{text}</span>'

    read = f'<span style="{_style(1.5, False, compared)}">only read</span> (dotted line)'
    if compared:
        words = f"{sample('much worse', 9)} {sample('worse', 0.6)} than the base (line below) &nbsp; "
        words += f"{sample('much better', -9)} {sample('better', -0.6)} (line above)"
    else:
        names = ("below 0.1", "0.1 to 0.5", "0.5 to 1", "1 to 2", "2 to 4", "4 nats and more")
        words = " ".join(sample(name, value) for name, value in zip(names, (0.0, 0.3, 0.7, 1.5, 3.0, 5.0), strict=True))
    return f'<div style="margin:4px 0;line-height:2">{words} &nbsp; {read} &nbsp; hover over a token for its numbers</div>'


def _style(value: float, trained: bool, compared: bool) -> str:
    if not np.isfinite(value):
        return "outline:2px dashed" if np.isposinf(value) else ""
    level = int(np.searchsorted(_DIFFERENCE_LEVELS if compared else _LOSS_LEVELS, abs(value), side="right"))
    if level == 0:
        return "margin-right:1px"
    better = value < 0
    colour, side = (PALETTE[0], "top") if better else (PALETTE[5], "bottom")
    line = f"{_WIDTHS[level]}px {'solid' if trained else 'dotted'} {colour}"
    return f"margin-right:1px;background:{colour}{_ALPHAS[level]};border-{side}:{line}"


def _example(row: ExampleLosses, tokenizer, texts: dict[int, str], left: int) -> str:
    tokens, trained, values = row.example.tokens[:left], row.trained, row.shown
    top = row.found.top_ids[:left]
    _learn(texts, tokenizer, np.concatenate([tokens, top.ravel()]))
    boxes = []
    for i, token in enumerate(tokens.tolist()):
        style = _style(float(values[i]), bool(trained[i]), row.base is not None)
        boxes.append(f'<span style="{style}" title="{esc(_title(row, i, texts))}">{esc(visible(texts[token]))}</span>')
    more = f"<b> … {len(row.losses) - len(tokens):,} tokens not shown</b>" if len(row.losses) > len(tokens) else ""
    difference = f", {np.mean(row.difference[trained]):+.4f} against the base" if row.base is not None and trained.any() else ""
    counts = f"loss {row.loss:.4f}{difference}, {len(row.losses):,} tokens, {int(trained.sum()):,} trained on"
    strip = _strip(values, row.base is not None) if len(values) > _STRIP_FROM else ""
    # The browser drops a line break that comes first in <pre>; the span before it prevents that.
    return f'<div><b>{esc(row.example.source)}</b> &nbsp; {counts}</div>{strip}<pre style="{_PRE}">{"".join(boxes)}{more}</pre>'


def _learn(texts: dict[int, str], tokenizer, ids: np.ndarray) -> None:
    new = [token for token in np.unique(ids).tolist() if token not in texts]
    texts.update((token, text) for token, text in zip(new, token_texts(tokenizer, new), strict=True))


def _title(row: ExampleLosses, i: int, texts: dict[int, str]) -> str:
    if i == 0:
        return f"token 0, id {row.example.tokens[0]}: nothing stands before it"
    lines = [
        f"token {i}, id {row.example.tokens[i]}{'' if row.trained[i] else ', not trained on'}",
        f"loss {row.losses[i]:.3f}, probability {row.found.probabilities[i]:.2%}, rank {row.found.ranks[i]}",
    ]
    if row.base is not None:
        lines.append(f"base: loss {row.base.losses[i]:.3f}, rank {row.base.ranks[i]}; difference {row.difference[i]:+.3f}")
    pairs = zip(row.found.top_ids[i].tolist(), row.found.top_probabilities[i].tolist(), strict=True)
    lines += [f"{place}. {share:.2%} {_short(visible(texts[token]))}" for place, (token, share) in enumerate(pairs, 1)]
    return "\n".join(lines)


def _short(text: str) -> str:
    text = text.replace("\n", "")
    return text if len(text) <= _TOKEN else f"{text[:_TOKEN]}…"


def _strip(values: np.ndarray, compared: bool, width: int = 720, height: int = 40) -> str:
    """Means of equally long stretches of an example, as bars from left to right; below the middle where it became better."""
    parts = np.array_split(values[1:], min(_STRIP_BARS, len(values) - 1))
    means = np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else 0.0 for part in parts])
    largest = max(float(np.abs(means).max()), 1e-9)
    zero = height / 2 if compared else height
    step, bars, place = width / len(parts), [], 1
    for i, (mean, part) in enumerate(zip(means, parts, strict=True)):
        size = abs(mean) / largest * zero
        colour, y = (PALETTE[5], zero - size) if mean >= 0 else (PALETTE[0], zero)
        title = f"tokens {place} to {place + len(part) - 1}: {'difference' if compared else 'loss'} {mean:.3f}"
        place_and_size = f'x="{i * step:.1f}" y="{y:.1f}" width="{step - 0.8:.1f}" height="{size:.1f}"'
        bars.append(f'<rect {place_and_size} fill="{colour}"><title>{title}</title></rect>')
        place += len(part)
    what = "difference to the base" if compared else "loss"
    label = f"mean {what} of {len(parts)} stretches from the first token to the last; the largest {largest:.3f}"
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{label}">{"".join(bars)}</svg><div>{label}</div>'


def top_losses_html(top: TopLosses, lines: list[dict], by: str) -> str:
    """The worst rows as a table, and the first page token by token."""
    rows = [(line["index"], line["source"], f"{line[by]:.4f}", cut(line["text"], 160)) for line in lines]
    caption = f"The worst {len(rows):,} of {len(top.order):,} rows; .page(1) to .page({top.pages}) show them token by token"
    return f"<div>{table(('index', 'row', f'{by} (nats)', 'text'), rows, caption)}{top.page(1)._repr_html_() if rows else ''}</div>"
