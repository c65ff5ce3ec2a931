"""Rows that occur more than once: within a split, and in two splits at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from fulltune_nb import svg
from fulltune_nb.data.encode import Example
from fulltune_nb.html import PALETTE, counted, esc, facts, table
from fulltune_nb.tokenizer import BYTE_ALPHABET, special_ids

# -- special_tokens: Begin and end tokens in the rows: how many there are, and where one is doubled, missing or never tra

_CHUNK_ROWS = 4096  # looked at together: bounds the memory
_END_TOKENS = 3  # an end token stands among the last ones: templates often put a line break behind it


@dataclass(frozen=True)
class SpecialTokenCheck:
    """What stands at the beginnings and ends of some examples; all arrays go by example."""

    bos: np.ndarray
    """(rows,) int64, BOS tokens in each."""
    eos: np.ndarray
    """(rows,) int64, EOS tokens in each."""
    problems: dict[str, np.ndarray]
    """What is wrong -> the indices of the examples, ascending. Only what occurs."""

    @property
    def rows(self) -> np.ndarray:
        """Indices of all examples with a problem, ascending."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self.problems.values()]))

    def of(self, row: int) -> list[str]:
        """What is wrong with one example."""
        return [name for name, rows in self.problems.items() if row in rows]


BOS_DOUBLED = "BOS stands twice in a row"
BOS_MISSING = "does not begin with BOS, which the tokenizer puts before every text"
EOS_DOUBLED = "EOS stands twice in a row"
END_MISSING = "ends with neither EOS nor another special token"
END_NOT_TRAINED = "is trained on, but its end token is not"

ADVICE = {
    BOS_DOUBLED: "Remove the one in the rows: the tokenizer or the chat template puts its own.",
    BOS_MISSING: "The chat template leaves it out. A model that always saw it may do worse; its own template may write it.",
    EOS_DOUBLED: "Remove the one in the rows: another is put behind them.",
    END_MISSING: "The model does not learn a token to stop at: answers end at max_tokens, or at a text that stands for the end.",
    END_NOT_TRAINED: "The model does not learn to stop. Is the last turn the assistant's?",
}
"""What each problem means and what to do."""


def check_special_tokens(examples: Sequence[Example], tokenizer) -> SpecialTokenCheck:
    """Counts and checks BOS and EOS. Where one token is both, only its uses as an end are checked.

    An end that `max_seq_length` has cut off is not counted as missing here: cut rows are counted by the split.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    ends = np.array(sorted(special_ids(tokenizer) - ({bos} if bos != eos else set())), dtype=np.int64)
    chunks = []
    for start in range(0, len(examples), _CHUNK_ROWS):
        chunks.append(_check_chunk(_Flat(examples[start : start + _CHUNK_ROWS]), bos, eos, adds_bos, ends))
    counts = [np.concatenate([np.empty(0, np.int64), *(chunk[name] for chunk in chunks)]) for name in ("bos", "eos")]
    problems = {}
    for name in ADVICE:
        found = [np.flatnonzero(chunk[name]) + _CHUNK_ROWS * number for number, chunk in enumerate(chunks)]
        rows = np.concatenate([np.empty(0, np.int64), *found])
        if len(rows):
            problems[name] = rows
    return SpecialTokenCheck(*counts, problems)


class _Flat:
    """Examples one behind the other: N tokens of R rows."""

    def __init__(self, examples: Sequence[Example]):
        self.lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)  # (R,)
        self.cut = np.array([example.cut > 0 for example in examples], dtype=bool)  # (R,)
        self.tokens = np.concatenate([np.empty(0, np.int32), *(example.tokens for example in examples)])  # (N,)
        self.trained = np.concatenate([np.empty(0, bool), *(example.loss_mask for example in examples)])  # (N,)
        self.row = np.repeat(np.arange(len(examples), dtype=np.int32), self.lengths)  # (N,)
        starts = np.cumsum(self.lengths) - self.lengths
        self.from_start = np.arange(len(self.tokens)) - starts[self.row]  # (N,) 0 for a row's first token
        self.from_end = self.lengths[self.row] - 1 - self.from_start  # (N,) 0 for its last

    def count(self, mask: np.ndarray) -> np.ndarray:
        """(N,) bool -> (R,) how many of each row's tokens."""
        return np.bincount(self.row[mask], minlength=len(self.lengths)).astype(np.int64)

    def doubled(self, token: int | None) -> np.ndarray:
        """(R,) bool, rows in which the token follows itself."""
        same = (self.tokens[1:] == token) & (self.tokens[:-1] == token) & (self.row[1:] == self.row[:-1])
        return self.count(np.concatenate([np.zeros(min(1, len(self.tokens)), bool), same])) > 0


def _check_chunk(flat: _Flat, bos: int | None, eos: int | None, adds_bos: bool, ends: np.ndarray) -> dict[str, np.ndarray]:
    is_bos = flat.tokens == (-1 if bos is None else bos)
    is_eos = flat.tokens == (-1 if eos is None else eos)
    nothing = np.zeros(len(flat.lengths), dtype=bool)
    at_end = np.isin(flat.tokens, ends) & (flat.from_end < _END_TOKENS)
    has_end = flat.count(at_end) > 0
    whole = ~flat.cut & (flat.lengths > 0)
    is_trained, end_is_trained = flat.count(flat.trained) > 0, flat.count(at_end & flat.trained) > 0
    return {
        "bos": flat.count(is_bos),
        "eos": flat.count(is_eos),
        BOS_DOUBLED: flat.doubled(bos) if bos is not None and bos != eos else nothing,
        BOS_MISSING: (flat.lengths > 0) & (flat.count(is_bos & (flat.from_start == 0)) == 0) if adds_bos else nothing,
        EOS_DOUBLED: flat.doubled(eos) if eos is not None else nothing,
        END_MISSING: whole & ~has_end if len(ends) else nothing,
        END_NOT_TRAINED: whole & has_end & is_trained & ~end_is_trained,
    }


# -- lens: How examples, splits and data sets show themselves in a cell

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
    if not all(c in BYTE_ALPHABET for c in raw):
        return raw
    return "<" + " ".join(f"{BYTE_ALPHABET[c]:02X}" for c in raw) + ">"


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


def _lengths_svg(split, bins: int = 40) -> str:
    """A histogram of the examples' lengths in tokens."""
    counts, edges = np.histogram(split.lengths, bins=min(bins, max(1, int(np.ptp(split.lengths)) + 1)))
    titles = [f"{count:,} rows of {low:.0f} to {high:.0f} tokens" for count, low, high in zip(counts, edges, edges[1:], strict=False)]
    label = f"Lengths of {split.name}: {edges[0]:.0f} to {edges[-1]:.0f} tokens, at most {counts.max():,} rows in a bar"
    return svg.bars(counts, titles, label)


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


# -- search: Finding rows by what stands in their rendered texts

MOST_CHARACTERS = 100_000_000
"""Characters that one search looks at: about a second."""


@dataclass(frozen=True)
class Hits:
    """What a search has found."""

    rows: list[int]
    """Indices of the examples that have the text, in the order they were looked at."""
    looked_at: int
    """Examples looked at; fewer than there are where the search had to stop."""


def search(examples: Sequence[Example], rows: Iterable[int], text: str, most_characters: int = MOST_CHARACTERS) -> Hits:
    """Examples whose rendered text has `text` in it, upper and lower case being the same.

    Args:
        examples: a split.
        rows: indices of those to look at.
        text: what to look for, as it is: no pattern.
        most_characters: after which the search stops; the example in which that happens is looked at to its end.
    """
    wanted, found, looked_at, left = text.lower(), [], 0, most_characters
    for row in rows:
        if left <= 0:
            break
        whole = examples[row].text
        left -= len(whole)
        looked_at += 1
        if wanted in whole.lower():
            found.append(int(row))
    return Hits(found, looked_at)


def surroundings(whole: str, text: str, width: int = 60) -> tuple[str, str, str, int] | None:
    """What stands before the first occurrence, the occurrence, what stands behind, and how many there are; None for none."""
    pattern = re.compile(re.escape(text), re.IGNORECASE)
    first = pattern.search(whole) if text else None
    if first is None:
        return None
    before = ("… " if first.start() > width else "") + whole[max(0, first.start() - width) : first.start()]
    after = whole[first.end() : first.end() + width] + (" …" if len(whole) > first.end() + width else "")
    return before, first.group(), after, sum(1 for _ in pattern.finditer(whole))


# -- duplicates: Rows that occur more than once: within a split, and in two splits at a time

@dataclass(frozen=True)
class Duplicates:
    """Rows that become the very same text."""

    within: dict[str, int]
    """Split -> rows whose text stood in it before."""
    across: dict[tuple[str, str], list[tuple[int, int]]]
    """(split, other split), either way round -> a pair for each row of the split that stands in the other: its index, and where in
    the other it stands first."""

    def rows(self, split: str) -> list[int]:
        """Indices of the rows of a split that stand in another one too, ascending."""
        return sorted({row for (name, _), pairs in self.across.items() if name == split for row, _ in pairs})


def find_duplicates(splits: Mapping[str, Sequence[Example]]) -> Duplicates:
    """Compares the rendered texts by their hashes: what the model reads counts, not other keys of the rows.

    A held-out row that was trained on says little about what the model has learned.
    """
    first: dict[str, dict[bytes, int]] = {}
    hashes: dict[str, list[bytes]] = {}
    for name, examples in splits.items():
        hashes[name] = [hashlib.blake2b(example.text.encode(), digest_size=16).digest() for example in examples]
        first[name] = {}
        for row, digest in enumerate(hashes[name]):
            first[name].setdefault(digest, row)
    within = {name: len(hashes[name]) - len(first[name]) for name in splits}
    across = {
        (a, b): [(row, first[b][digest]) for row, digest in enumerate(hashes[a]) if digest in first[b]] for a, b in permutations(splits, 2)
    }
    return Duplicates(within, across)
