"""How examples, splits and data sets show themselves in a cell.

A token that is trained on is underlined and tinted, a masked one is plain and faint, a special one has a dashed box, one that was
cut off is struck through: each can be told without its colour. All texts are escaped and stand in `<pre>`, which the notebook does
not search for formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fulltune_nb.data.encoding import Example
from fulltune_nb.data.special_tokens import check_special_tokens, special_ids
from fulltune_nb.html import PALETTE, counted, esc, facts, table

TOKENS_SHOWN = 400
"""Tokens of an example shown in full; of a longer one the first and the last of them."""
CHARACTERS_SHOWN = 1200
CUT_TOKENS_SHOWN = 60
"""Of the tokens cut off at the end, the first so many are shown."""

_TRAINED = f"text-decoration:underline;text-decoration-thickness:2px;text-underline-offset:3px;background-color:{PALETTE[4]}55"
_MASKED = "opacity:0.6"
_SPECIAL = f"border:1px dashed {PALETTE[5]};border-radius:3px"
_CUT = "text-decoration:line-through;opacity:0.6"
_PRE = "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;margin:2px 0 10px 0;line-height:1.9"
_LEGEND = (
    f'<div style="margin-bottom:6px"><u style="{_TRAINED}">trained on</u> (underlined, tinted) &nbsp; '
    f'<span style="{_MASKED}">masked</span> (plain, faint) &nbsp; <span style="{_SPECIAL}">special token</span> (dashed box) &nbsp; '
    f'· space &nbsp; ⏎ line break &nbsp; <s style="{_CUT}">cut off</s> (struck through)</div>'
)


class Lens:
    """Examples token by token, as `DataSet.show` returns them; `_repr_html_` draws them, hovering over a token gives its id.

    `print` writes them as text, with `[[` and `]]` around what is trained on.
    """

    def __init__(self, examples: Sequence[Example], tokenizer):
        self.examples = list(examples)
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        more = " ..." if len(self.examples) > 3 else ""
        return f"Lens({counted(len(self.examples), 'example')}: {', '.join(e.source for e in self.examples[:3])}{more})"

    def __str__(self) -> str:
        return "\n\n".join(_as_text(example, self.tokenizer) for example in self.examples)

    def _repr_html_(self) -> str:
        return f"<div>{_LEGEND}{''.join(self._html(e) for e in self.examples)}</div>"

    def _html(self, example: Example) -> str:
        check = check_special_tokens([example], self.tokenizer)
        counts = f", {check.bos[0]} BOS, {check.eos[0]} EOS"
        warnings = "".join(f"<div>⚠ {esc(problem)}</div>" for problem in check.of(0))
        return _head(example, counts) + warnings + _tokens_html(example, self.tokenizer)


def _as_text(example: Example, tokenizer) -> str:
    size = f"{example.source}: {len(example.tokens):,} tokens, {int(example.loss_mask.sum()):,} trained on"
    cut = f", {example.cut:,} cut off" if example.cut else ""
    borders = np.flatnonzero(np.diff(example.loss_mask)) + 1  # where what is trained on begins or ends
    runs = zip(np.split(example.tokens, borders), np.split(example.loss_mask, borders), strict=True)
    texts = [(tokenizer.decode(ids.tolist()), mask[0]) for ids, mask in runs if len(ids)]
    return f"{size}{cut}\n" + "".join(f"[[{text}]]" if trained else text for text, trained in texts)


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's own text. A token that is only part of a character is given by its bytes, such as `<E2 82>`."""
    known: dict[int, str] = {}
    for token_id in ids:
        if token_id not in known:
            known[token_id] = _token_text(tokenizer, int(token_id))
    return [known[token_id] for token_id in ids]


def _token_text(tokenizer, token_id: int) -> str:
    raw = tokenizer.convert_ids_to_tokens(token_id)
    if raw is None:
        return f"<id {token_id}>"
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" in text and raw != text:
        return _byte_names(raw)
    if raw.startswith("▁") and not text.startswith(" "):  # SentencePiece decoders drop the space before a first word
        text = " " + text
    return text or raw


def _byte_names(raw: str) -> str:
    """The bytes behind a byte-level BPE token (GPT-2's alphabet of printable stand-ins); the token itself if it has another."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    if not all(c in byte_of for c in raw):
        return raw
    return "<" + " ".join(f"{byte_of[c]:02X}" for c in raw) + ">"


def visible(text: str) -> str:
    """A token's text with its spaces, line breaks and tabs to be seen."""
    return text.replace(" ", "·").replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "⇥\t")


def _head(example: Example, more: str = "") -> str:
    cut = f", {example.cut:,} cut off at the end" if example.cut else ""
    counts = f"{len(example.tokens):,} tokens, {int(example.loss_mask.sum()):,} trained on{more}{cut}"
    return f"<div><b>{esc(example.source)}</b> &nbsp; {counts}</div>"


def _tokens_html(example: Example, tokenizer) -> str:
    count = len(example.tokens)
    shown = np.arange(count)
    if count > TOKENS_SHOWN:
        shown = np.concatenate([shown[: TOKENS_SHOWN // 2], shown[-TOKENS_SHOWN // 2 :]])
    special = special_ids(tokenizer)
    texts = token_texts(tokenizer, [int(example.tokens[i]) for i in shown])
    boxes, before = [], -1
    for i, text in zip(shown, texts, strict=True):
        if i != before + 1:
            hidden = example.loss_mask[before + 1 : i]
            boxes.append(f"<b> … {len(hidden):,} tokens not shown, {int(hidden.sum()):,} of them trained on … </b>")
        boxes.append(_token_box(int(i), text, int(example.tokens[i]), bool(example.loss_mask[i]), int(example.tokens[i]) in special))
        before = i
    boxes.append(_cut_html(example, tokenizer))
    return f'<pre style="{_PRE}">{"".join(boxes)}</pre>'


def _cut_html(example: Example, tokenizer) -> str:
    """The first tokens that were cut off, and how many more there are."""
    if not example.cut:
        return ""
    cut = _cut_tokens(example, tokenizer)
    title = f"cut off by max_seq_length={len(example.tokens)}"
    boxes = [f'<s class="cut" style="{_CUT};margin-right:2px" title="{title}">{esc(visible(t))}</s>' for t in token_texts(tokenizer, cut)]
    more = example.cut - len(cut)
    return "".join(boxes) + (f"<b> … {more:,} more cut off</b>" if more else "")


def _cut_tokens(example: Example, tokenizer) -> list[int]:
    """The first of the tokens that are gone, found again in the text; none where it is tokenized differently now."""
    kept, wanted = example.tokens.tolist(), min(example.cut, CUT_TOKENS_SHOWN)
    # Not the whole of a very long text: hardly a token has more than a dozen characters.
    start = example.text[: 16 * (len(kept) + wanted)]
    for adds_special_tokens in (False, True):
        ids = list(tokenizer(start, add_special_tokens=adds_special_tokens, truncation=False, verbose=False)["input_ids"])
        if ids[: len(kept)] != kept:
            continue
        if len(start) < len(example.text):
            ids = ids[:-8]  # the last ones may be others where the text goes on
        elif len(ids) == len(kept) + example.cut - 1:
            ids.append(tokenizer.eos_token_id)  # which plain texts get behind them
        return ids[len(kept) : len(kept) + wanted]
    return []


def _token_box(position: int, text: str, token_id: int, trained: bool, is_special: bool) -> str:
    kinds = ["trained" if trained else "masked"] + (["special"] if is_special else [])
    style = ";".join([_TRAINED if trained else _MASKED] + ([_SPECIAL] if is_special else []) + ["margin-right:2px"])
    tag = "u" if trained else "span"
    title = f"token {position}, id {token_id}: {', '.join(kinds)}"
    # The browser drops a line break that comes first in <pre>; the mark before it prevents that.
    return f'<{tag} class="{" ".join(kinds)}" style="{style}" title="{title}">{esc(visible(text))}</{tag}>'


def _runs_html(example: Example) -> str:
    """The decoded tokens in runs of trained and masked ones; shorter than a box per token."""
    if example.tokenizer is None:
        return f'<pre style="{_PRE}">{esc(example.text, CHARACTERS_SHOWN)}</pre>'
    mask, left, parts = example.loss_mask, CHARACTERS_SHOWN, []
    borders = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(mask)]
    for start, end in zip(borders, borders[1:], strict=False):
        if start == end:
            continue
        if left <= 0:
            rest = mask[start:]
            parts.append(f"<b> … {len(rest):,} tokens more, {int(rest.sum()):,} of them trained on</b>")
            break
        ids = example.tokens[start:end].tolist()
        text = example.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        tag, style = ("u", _TRAINED) if mask[start] else ("span", _MASKED)
        parts.append(f'<{tag} class="{"trained" if mask[start] else "masked"}" style="{style}">{esc(text, left)}</{tag}>')
        left -= len(text)
    return f'<pre style="{_PRE}">{"".join(parts)}</pre>'


def example_html(example: Example) -> str:
    """An example in a cell: token by token."""
    if example.tokenizer is None:
        return _head(example) + _runs_html(example)
    return Lens([example], example.tokenizer)._repr_html_()


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}\u00a0%" if whole else "-"


def counts_table(splits: Sequence) -> str:
    """Rows, tokens, lengths and losses of splits, a line each."""
    headers = ("split", "format", "rows", "tokens", "trained on", "share", "median length", "longest")
    headers += ("rows cut", "tokens cut", "rows not trained on")
    rows = []
    for s in splits:
        median, longest = (int(np.median(s.lengths)), int(s.lengths.max())) if len(s) else (0, 0)
        numbers = (len(s), s.tokens, s.trained_tokens)
        share = _share(s.trained_tokens, s.tokens)
        last = (median, longest, s.truncated, s.tokens_cut, len(s.untrainable))
        rows.append((s.name, s.format, *(f"{n:,}" for n in numbers), share, *(f"{n:,}" for n in last)))
    return table(headers, rows)


def _lengths_svg(split, width: int = 560, height: int = 60, bins: int = 40) -> str:
    """A histogram of the examples' lengths in tokens."""
    counts, edges = np.histogram(split.lengths, bins=min(bins, max(1, int(np.ptp(split.lengths)) + 1)))
    step, top = width / len(counts), max(1, counts.max())
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - height * c / top:.1f}" width="{max(step - 1, 1):.1f}" height="{height * c / top:.1f}" '
        f'fill="{PALETTE[0]}"><title>{int(c):,} rows of {edges[i]:.0f} to {edges[i + 1]:.0f} tokens</title></rect>'
        for i, c in enumerate(counts)
    )
    label = f"Lengths of {split.name}: {edges[0]:.0f} to {edges[-1]:.0f} tokens, at most {int(top):,} rows in a bar"
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{esc(label)}">{bars}</svg><div>{esc(label)}</div>'


def split_html(split, examples: int = 2) -> str:
    """A split in a cell: its counts, its lengths and its first examples."""
    legend = _LEGEND.split(" &nbsp; · space")[0] + "</div>"
    shown = "".join(_head(e) + _runs_html(e) for e in split[:examples])
    return f"<div>{counts_table([split])}{_lengths_svg(split) if len(split) else ''}{legend}{shown}</div>"


def dataset_html(data) -> str:
    """A data set in a cell: counts of each split, settings, notes, lengths and a few examples."""
    splits = list(data.splits.values())
    settings = [("source", data.source or "rows in memory"), ("mask_prompt", data.settings.mask_prompt)]
    settings.append(("max_seq_length", f"{data.settings.max_seq_length:,} tokens"))
    notes = "".join(f"<li>{esc(note)}</li>" for note in data.notes)
    notes = f"<b>Notes</b><ul>{notes}</ul>" if notes else ""
    lead = splits[0]
    legend = _LEGEND.split(" &nbsp; · space")[0] + "</div>"
    shown = "".join(_head(e) + _runs_html(e) for e in lead[:2])
    return f"<div>{counts_table(splits)}{facts('', settings)}{notes}{_lengths_svg(lead)}{legend}{shown}</div>"
