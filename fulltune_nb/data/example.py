"""An example: one row as the model sees it, how it is shown token by token, and whether its begin and end tokens are right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unicodedata import category

import numpy as np

from fulltune_nb.chat_template import answer_end
from fulltune_nb.html import PALETTE, counted, esc, printable
from fulltune_nb.tokenizer import BYTE_ALPHABET, special_ids


@dataclass(frozen=True, eq=False)
class Example:
    """One row as the model sees it."""

    tokens: np.ndarray
    """(T,) int32"""
    loss_mask: np.ndarray
    """(T,) bool: token i is trained on, as the target predicted from tokens[:i]. The first is never one."""
    text: str
    """The text that was tokenized: the row's own, or what the chat template made of it."""
    source: str
    """File and 1-based line, `"train.jsonl:12"`; for rows in memory the split and the row, `"train:12"`."""
    cut: int
    """Tokens cut off at the end by `max_seq_length`."""
    row: Mapping[str, Any]
    """The row as it was read; where it had another form than its split's format, what was made of it."""
    tokenizer: Any = field(default=None, repr=False)
    """For showing the tokens."""
    window: tuple[int, int] = field(default=(0, 0), repr=False)
    """Tokens of its row that stand before and behind it, in other windows; (0, 0) unless `long_rows="split"` made windows of the row."""

    def __repr__(self) -> str:
        cut = f", {self.cut} cut" if self.cut else ""
        return printable(f"Example({self.source}: {len(self.tokens)} tokens, {int(self.loss_mask.sum())} trained{cut})")

    def _repr_html_(self) -> str:
        """Token by token."""
        if self.tokenizer is None:
            return head_html(self) + runs_html(self)
        return Lens([self], self.tokenizer)._repr_html_()


def flat(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Examples as flat arrays; those of a split lie there so.

    Returns:
        tokens (tokens,) int32 and loss masks (tokens,) bool, one example behind the other; where each begins and the last ends,
        (examples + 1,) int64; and (3, examples) int64: tokens cut off at the end, tokens of the row before and behind a window.
    """
    examples = getattr(examples, "examples", examples)
    if hasattr(examples, "columns"):
        return examples.tokens, examples.loss_mask, examples.begins, examples.columns
    begins = np.cumsum([0, *(len(e.tokens) for e in examples)], dtype=np.int64)
    tokens = np.concatenate([np.empty(0, np.int32), *(e.tokens for e in examples)]).astype(np.int32)
    loss_mask = np.concatenate([np.empty(0, bool), *(e.loss_mask for e in examples)]).astype(bool)
    return tokens, loss_mask, begins, np.array([(e.cut, *e.window) for e in examples], dtype=np.int64).reshape(-1, 3).T


# ---- in a cell

TOKENS_SHOWN = 400
"""Tokens of an example shown in full; of a longer one the first and the last of them."""
CHARACTERS_SHOWN = 1200
CUT_TOKENS_SHOWN = 60
"""Of the tokens cut off at the end, the first so many are shown."""

_TAGS = {"trained": "u", "masked": "span", "cut": "s"}
_STYLES = {
    "trained": f"text-decoration:underline;text-decoration-thickness:2px;text-underline-offset:3px;background-color:{PALETTE[4]}55",
    "masked": "opacity:0.6",
    "special": f"border:1px dashed {PALETTE[5]};border-radius:3px",
    "cut": "text-decoration:line-through;opacity:0.6",
}
_PRE = "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;margin:2px 0 10px 0;line-height:1.9"
LEGEND_OF_RUNS = (
    f'<div style="margin-bottom:6px"><u style="{_STYLES["trained"]}">trained on</u> (underlined, tinted) &nbsp; '
    f'<span style="{_STYLES["masked"]}">masked</span> (plain, faint)'
)
_LEGEND = (
    f'{LEGEND_OF_RUNS} &nbsp; <span style="{_STYLES["special"]}">special token</span> (dashed box) &nbsp; '
    f'· space &nbsp; ⏎ line break &nbsp; <s style="{_STYLES["cut"]}">cut off</s> (struck through)</div>'
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
        return printable(f"Lens({counted(len(self.examples), 'example')}: {', '.join(e.source for e in self.examples[:3])}{more})")

    def __str__(self) -> str:
        return printable("\n\n".join(_as_text(example, self.tokenizer) for example in self.examples))

    def _repr_html_(self) -> str:
        return f"<div>{_LEGEND}{''.join(self._html(e) for e in self.examples)}</div>"

    def _html(self, example: Example) -> str:
        check = check_special_tokens([example], self.tokenizer)
        counts = f", {check.bos[0]} BOS, {check.eos[0]} EOS"
        warnings = "".join(f"<div>⚠ {esc(problem)}</div>" for problem in check.of(0))
        return head_html(example, counts) + warnings + _tokens_html(example, self.tokenizer)


def _window_text(example: Example) -> str:
    """Which tokens of its row an example has, where it is a window of it; else empty."""
    before, behind = example.window
    first, end = before + 1, before + len(example.tokens)
    return f", tokens {first:,} to {end:,} of {end + behind:,} in the row" if before or behind else ""


def head_html(example: Example, more: str = "") -> str:
    """Where an example comes from, and its numbers of tokens."""
    cut = f", {example.cut:,} cut off at the end" if example.cut else _window_text(example)
    counts = f"{len(example.tokens):,} tokens, {int(example.loss_mask.sum()):,} trained on{more}{cut}"
    return f"<div><b>{esc(example.source)}</b> &nbsp; {counts}</div>"


def _as_text(example: Example, tokenizer) -> str:
    size = f"{example.source}: {len(example.tokens):,} tokens, {int(example.loss_mask.sum()):,} trained on"
    cut = f", {example.cut:,} cut off" if example.cut else _window_text(example)
    texts = [(decode(tokenizer, ids), trained) for ids, trained in _shown_runs(example, tokenizer)]
    return f"{size}{cut}\n" + "".join(f"[[{text}]]" if trained else text for text, trained in texts)


def runs_html(example: Example) -> str:
    """The decoded tokens in runs of trained and masked ones; shorter than a box per token."""
    if example.tokenizer is None:
        return f'<pre style="{_PRE}">{esc(example.text, CHARACTERS_SHOWN)}</pre>'
    all_runs, left, parts = _shown_runs(example, example.tokenizer), CHARACTERS_SHOWN, []
    for number, (ids, trained) in enumerate(all_runs):
        if left <= 0:
            rest = sum(len(ids) for ids, _ in all_runs[number:]), sum(len(ids) for ids, trained in all_runs[number:] if trained)
            parts.append(f"<b> … {rest[0]:,} tokens more, {rest[1]:,} of them trained on</b>")
            break
        text = decode(example.tokenizer, ids)
        parts.append(_box(esc(text, left), "trained" if trained else "masked"))
        left -= len(text)
    return f'<pre style="{_PRE}">{"".join(parts)}</pre>'


def runs(example: Example) -> list[tuple[np.ndarray, bool]]:
    """The tokens in runs that are trained on, or not."""
    borders = np.flatnonzero(np.diff(example.loss_mask)) + 1
    parts = zip(np.split(example.tokens, borders), np.split(example.loss_mask, borders), strict=True)
    return [(ids, bool(mask[0])) for ids, mask in parts if len(ids)]


def _shown_runs(example: Example, tokenizer) -> list[tuple[np.ndarray, bool]]:
    """As `runs`, but none ends within a character: one of several tokens is trained on where one of them is."""
    mask = example.loss_mask.copy()
    for border in (np.flatnonzero(np.diff(mask)) + 1).tolist():
        start, stop = split_character(tokenizer, example.tokens, border)
        mask[start:stop] = mask[start:stop].any()
    return runs(replace(example, loss_mask=mask))


def decode(tokenizer, ids: Sequence[int] | np.ndarray) -> str:
    """The text of token ids, special tokens and spaces as they are."""
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _box(html: str, *kinds: str, title: str = "") -> str:
    style = ";".join(_STYLES[kind] for kind in kinds)
    hover = f';margin-right:2px" title="{title}' if title else ""
    return f'<{_TAGS[kinds[0]]} class="{" ".join(kinds)}" style="{style}{hover}">{html}</{_TAGS[kinds[0]]}>'


def _tokens_html(example: Example, tokenizer) -> str:
    """A box for each token; of a long example for those at both ends."""
    shown = np.arange(len(example.tokens))
    if len(shown) > TOKENS_SHOWN:
        ends = (TOKENS_SHOWN // 2, len(shown) - TOKENS_SHOWN // 2)
        first, last = (split_character(tokenizer, example.tokens, end) for end in ends)
        shown = np.concatenate([shown[: first[1]], shown[last[0] :]])
    special = special_ids(tokenizer)
    boxes, before = [], -1
    for piece in pieces(tokenizer, example.tokens[shown].tolist()):
        places = shown[piece.start : piece.stop].tolist()
        if places[0] != before + 1:
            hidden = example.loss_mask[before + 1 : places[0]]
            boxes.append(f"<b> … {len(hidden):,} tokens not shown, {int(hidden.sum()):,} of them trained on … </b>")
        kinds = ["trained" if example.loss_mask[places].any() else "masked"] + ["special"] * (piece.ids[0] in special)
        titles = (
            f"token {i}, id {token}: {', '.join(['trained' if example.loss_mask[i] else 'masked', *kinds[1:]])}"
            for i, token in zip(places, piece.ids, strict=True)
        )
        # The browser drops a line break that comes first in <pre>; the mark before it prevents that.
        boxes.append(_box(esc(visible(piece.text)), *kinds, title="\n".join(titles)))
        before = places[-1]
    if example.cut:
        cut = _cut_tokens(example, tokenizer)
        title = f"cut off by max_seq_length={len(example.tokens)}"
        boxes += [_box(esc(visible(piece.text)), "cut", title=title) for piece in pieces(tokenizer, cut)]
        boxes.append(f"<b> … {example.cut - len(cut):,} more cut off</b>" if example.cut > len(cut) else "")
    return f'<pre style="{_PRE}">{"".join(boxes)}</pre>'


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


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's own text. A token that is only part of a character is given by its bytes, such as `<E2 82>`."""
    known: dict[int, str] = {}
    for token_id in ids:
        if token_id not in known:
            known[token_id] = _token_text(tokenizer, int(token_id))
    return [known[token_id] for token_id in ids]


@dataclass(frozen=True)
class Piece:
    """What is shown as one of a text's tokens: one, or those that spell a character together."""

    start: int
    """Of its first token."""
    ids: list[int]
    text: str

    @property
    def stop(self) -> int:
        """Behind its last token."""
        return self.start + len(self.ids)


_MOST_TOKENS = 8
"""Of a character. It has at most 4 bytes, but where a token ends within the next one, what belongs together goes on."""
_NEAR = 32
"""Tokens before and behind a place in which the piece that it stands in is looked for."""


def pieces(tokenizer, ids: Sequence[int]) -> list[Piece]:
    """Successive tokens of a text, as they are shown: each with its text, those that are parts of a character together.

    A character is what a reader sees as one: a letter with its marks, an emoji of several. What spells no character, as where a text
    begins or is cut off within one, is given token by token, by its bytes as in `token_texts`.
    """
    texts, found, start, special = token_texts(tokenizer, ids), [], 0, special_ids(tokenizer)
    while start < len(ids):
        piece = Piece(start, list(ids[start : start + 1]), texts[start])
        for end in range(start + 2, min(start + _MOST_TOKENS, len(ids)) + 1):
            if not all(texts[i].startswith("<") and "\ufffd" in decode(tokenizer, [ids[i]]) for i in (end - 2, end - 1)):
                break  # one of the two is whole
            whole = decode(tokenizer, ids[start:end])
            if "\ufffd" not in whole:
                piece = Piece(start, list(ids[start:end]), whole)
                break
        if found and _goes_on(found[-1].text, piece.text) and special.isdisjoint((found[-1].ids[-1], piece.ids[0])):
            before = found.pop()
            piece = Piece(before.start, before.ids + piece.ids, before.text + piece.text)
        found.append(piece)
        start = piece.stop
    return found


_JOINER = "\u200d"
_COLOURS = ("\U0001f3fb", "\U0001f3ff")  # of an emoji's skin, the first and the last
_FLAGS = "".join(map(chr, range(0x1F1E6, 0x1F200)))  # a flag is spelled by two of them


def _goes_on(before: str, text: str) -> bool:
    """Whether a text begins within the character that the text before it ends with."""
    first = text[:1]
    if not first or first.isascii() and not before.endswith(_JOINER):
        return False
    half_a_flag = (len(before) - len(before.rstrip(_FLAGS))) % 2 == 1 and first in _FLAGS
    return before.endswith(_JOINER) or first == _JOINER or category(first)[0] == "M" or _COLOURS[0] <= first <= _COLOURS[1] or half_a_flag


def said_text(tokenizer, begun: Sequence[int], token_id: int) -> str:
    """A token's text behind the first tokens of a character: the character, where the token completes one."""
    found = pieces(tokenizer, [*begun, token_id])
    return found[0].text if len(found) == 1 else token_texts(tokenizer, [token_id])[0]


def split_character(tokenizer, tokens: np.ndarray, border: int) -> tuple[int, int]:
    """Where the piece begins and ends that has tokens before and behind a border; twice the border where there is none."""
    start = max(0, border - _NEAR)
    for piece in pieces(tokenizer, tokens[start : border + _NEAR].tolist()):
        if start + piece.start < border < start + piece.stop:
            return start + piece.start, start + piece.stop
    return border, border


def _token_text(tokenizer, token_id: int) -> str:
    raw = tokenizer.convert_ids_to_tokens(token_id)
    if raw is None:
        return f"<id {token_id}>"
    text = decode(tokenizer, [token_id])
    if "\ufffd" in text and raw != text:
        if re.fullmatch("<0x[0-9A-F]{2}>", raw):  # SentencePiece's
            return f"<{raw[3:5]}>"
        return "<" + " ".join(f"{BYTE_ALPHABET[c]:02X}" for c in raw) + ">" if all(c in BYTE_ALPHABET for c in raw) else raw
    if raw.startswith("▁") and not text.startswith(" "):  # SentencePiece decoders drop the space before a first word
        text = " " + text
    return text or raw


def visible(text: str) -> str:
    """A token's text with its spaces, line breaks and tabs to be seen."""
    return text.replace(" ", "·").replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "⇥\t")


# ---- begin and end tokens

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
END_MISSING = "is trained on, and has no end token"
END_NOT_TRAINED = "is trained on, but no end token in it is"
SPECIAL_IN_WORDS = "its own words contain special tokens"

ADVICE = {
    BOS_DOUBLED: "Remove the one in the rows: the tokenizer or the chat template puts its own.",
    BOS_MISSING: "The chat template leaves it out. A model that always saw it may do worse; its own template may write it.",
    EOS_DOUBLED: "Remove the one in the rows: another is put behind them.",
    END_MISSING: "The model does not learn a token to stop at: answers end at max_tokens, or at a text that stands for the end.",
    END_NOT_TRAINED: "The model does not learn to stop: the chat template writes the end behind what counts as the assistant's turn.",
    SPECIAL_IN_WORDS: "They are read as those tokens, not as letters. Where that is not meant, change them; a space within is enough.",
}
"""What each problem means and what to do."""


def check_special_tokens(examples: Sequence[Example], tokenizer) -> SpecialTokenCheck:
    """Counts and checks BOS, EOS and other special tokens. Where one token is BOS and EOS, only its uses as an end are checked.

    A row teaches to stop where a special token is trained among the last ones of a turn, or EOS or what the chat template ends answers
    with anywhere; an end of several tokens, which no special token is, is looked for in the text. An end that `max_seq_length` has cut
    off, or that may stand in another window of the row, is not missing here.

    Args:
        examples: some examples, or a split, of whose rows a million take some seconds.
    """
    bos, eos = (-1 if token is None else token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    adds_bos = bos >= 0 and list(tokenizer("a")["input_ids"])[:1] == [bos]
    specials, (template_ends, end_texts) = special_ids(tokenizer) - ({bos} if bos != eos else set()), answer_end(tokenizer)
    tokens, loss_mask, begins, (cut, before, behind) = flat(examples)
    first, last, filled = begins[:-1], begins[1:] - 1, np.diff(begins) > 0

    def per_row(places: np.ndarray) -> np.ndarray:
        """How many of `places`, (tokens,) bool, each example has."""
        return np.diff(np.concatenate([[0], np.cumsum(places, dtype=np.int64)])[begins])

    def doubled(places: np.ndarray) -> np.ndarray:
        pairs = places & np.concatenate([[False], places[:-1]])[: len(places)]
        pairs[first[filled]] = False  # its neighbour is the end of the example before
        return per_row(pairs) > 0

    def near(places: np.ndarray) -> np.ndarray:
        """The places, and those shortly before them."""
        return np.logical_or.reduce([np.concatenate([places[by:], np.zeros(by, bool)])[: len(places)] for by in range(_END_TOKENS)])

    is_bos, is_eos = tokens == bos, tokens == eos
    turn_ends = loss_mask & ~np.concatenate([loss_mask[1:], [False]])[: len(loss_mask)]  # the last trained token of each turn
    turn_ends[last[filled]] |= loss_mask[last[filled]]
    row_ends = np.zeros(len(tokens), dtype=bool)
    row_ends[last[filled]] = True
    is_end = np.isin(tokens, [eos, *template_ends]) | (np.isin(tokens, list(specials)) & near(turn_ends | row_ends))
    trained = filled & (cut == 0) & (before == 0) & (behind == 0) & (per_row(loss_mask) > 0)
    not_learned = trained & (per_row(is_end & loss_mask) == 0) & bool(specials)
    begins_with_bos = np.zeros(len(first), dtype=bool)
    begins_with_bos[filled] = is_bos[first[filled]]
    texts, rows = _column(examples, "text"), _column(examples, "row")
    for row in np.flatnonzero(not_learned) if end_texts else ():
        not_learned[row] = not any(end in texts[row] for end in end_texts)
    found = {
        BOS_DOUBLED: doubled(is_bos) & (bos != eos),
        BOS_MISSING: filled & (before == 0) & ~begins_with_bos & adds_bos,
        EOS_DOUBLED: doubled(is_eos),
        END_MISSING: not_learned & (per_row(is_end) == 0),
        END_NOT_TRAINED: not_learned & (per_row(is_end) > 0),
        SPECIAL_IN_WORDS: _specials_in_words(rows, texts, tokenizer) & (before == 0),
    }
    problems = {name: np.flatnonzero(wrong) for name, wrong in found.items() if wrong.any()}
    return SpecialTokenCheck(per_row(is_bos), per_row(is_eos), problems)


def _column(examples: Sequence[Example], name: str) -> Sequence[Any]:
    """One field of all examples; a split has it as a list."""
    table = getattr(examples, "examples", examples)
    return getattr(table, f"{name}s", None) or [getattr(example, name) for example in examples]


_AROUND = 12  # characters around a special token by which words of a row are found again in its text


def _specials_in_words(rows: Sequence[Mapping[str, Any]], texts: Sequence[str], tokenizer) -> np.ndarray:
    """(rows,) bool: whether special tokens stand in a row's own words. Those of BOS before a text and EOS behind it are others' subject."""
    names = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    names = [name for name in names if name]
    if not names or getattr(tokenizer, "split_special_tokens", False):
        return np.zeros(len(rows), dtype=bool)
    special = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    bos, eos = (re.escape(token or "") for token in (tokenizer.bos_token, tokenizer.eos_token))
    starts, ends = sorted({name[:3] for name in names}), re.compile(f"^(?:{bos})*|(?:{eos})*$")

    def stands_in(words: str, text: str) -> bool:
        for start in starts:  # in nearly all rows, none of them is there
            if start in words:
                break
        else:
            return False
        if words == text:
            words = ends.sub("", words)
        found = special.finditer(words)
        return any(len(at[0]) < len(words.strip()) and words[max(at.start() - _AROUND, 0) : at.end() + _AROUND] in text for at in found)

    return np.array([any(stands_in(words, text) for words in _words(row)) for row, text in zip(rows, texts, strict=True)], dtype=bool)


def _words(value: Any, depth: int = 10) -> Iterator[str]:
    """All texts in a row: a message's content is some levels down. Rows given in memory may refer to themselves."""
    if isinstance(value, str):
        yield value
    elif depth and isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _words(part, depth - 1)


def special_token_notes(split: Any, check: SpecialTokenCheck) -> list[str]:
    """A line for each problem of a split: how many rows have it, the first of them, and what to do."""
    total, sources = len(split), _column(split, "source")
    return [
        f"{split.name}: {len(rows):,} of {total:,} rows: {problem} (first: {sources[rows[0]]}). {ADVICE[problem]}"
        for problem, rows in check.problems.items()
    ]
