"""Rows to tokens and loss masks.

chat and completions go through the tokenizer's chat template, which alone decides about special tokens. What is trained on is found in
the text (see `chats` and `masks`); a token belongs to the turn that its last character belongs to. Where a template says itself
what is trained, `{% generation %}`, one character in it is enough, as in transformers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fulltune_nb.chat_template import ChatRenderer, LimitReached
from fulltune_nb.data.chats import ChatRows, Rendered, Span
from fulltune_nb.data.masks import WAYS_OUT
from fulltune_nb.data.rows import RowError
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.data.table import ExampleTable, TableWriter
from fulltune_nb.errors import DataError

CHUNK_ROWS = 512
"""Rows tokenized in one call: enough for the tokenizer to work in parallel, few enough to keep the extra memory small."""


@dataclass
class Encoded:
    """What `encode_rows` made of the rows of a split."""

    examples: ExampleTable
    problems: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """What the chat template does not write into the text -> the sources of the rows that have it."""


def encode_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], format: str, tokenizer, settings: DataSettings) -> Encoded:
    """Tokens and masks of rows that fit `format`.

    Args:
        rows: (source, row) pairs.
        format: "chat", "completions" or "text".

    Returns:
        The examples in the rows' order, and a line for each row that could not be encoded.

    Raises:
        DataError: the chat template takes far too much time or memory with a row.
    """
    rows, writer, renderer = list(rows), TableWriter(settings, tokenizer), ChatRenderer(tokenizer, settings.template_date)
    chats, problems, left_out = ChatRows(renderer, format, settings), [], {}
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS]
        if format == "text":
            rendered = _checked(_texts(chunk, settings, problems), problems)
        else:
            with renderer.limits():
                rendered = _checked(_render_chunk(chunk, chats, problems), problems)
        for source, item in _tokenize_chunk(rendered, format, tokenizer, writer, problems):
            for what in item.left_out:
                left_out.setdefault(what, []).append(source)
    return Encoded(writer.table(), problems, left_out)


_Item = tuple[str, Mapping[str, Any], Rendered]
"""File and line, the row, its text."""


def _render_chunk(rows: Sequence[tuple[str, Mapping]], chats: ChatRows, problems: list[str]) -> list[_Item]:
    """The texts of the rows that have one; `problems` grows by a line for each other row."""
    rendered = []
    for source, row in rows:
        try:
            rendered.append((source, row, chats.render(row)))
        except RowError as error:
            problems.append(f"{source}: {error}")
        except LimitReached as error:  # at once: with each further row it could take as long
            problem = f"{source}: the chat template cannot be used for this row: {error}"
            raise DataError(f"{problem}. Look at tokenizer.chat_template, and use another one.", [problem]) from None
    return rendered


def _texts(rows: Sequence[tuple[str, Mapping]], settings: DataSettings, problems: list[str]) -> list[_Item]:
    """Plain texts as they are; with `mask_until`, what follows the last marker is trained on, and a text without it is a problem."""
    feature, marker = settings.text_feature, settings.mask_until
    if marker is None:
        return [(source, row, Rendered(row[feature])) for source, row in rows]
    found = []
    for source, row in rows:
        text = row[feature]
        if (place := text.rfind(marker)) < 0:
            problems.append(f"{source}: mask_until: the text has no {marker!r}, behind which it would be trained on")
        else:
            found.append((source, row, Rendered(text, [(place + len(marker), len(text))])))
    return found


def _checked(items: list[_Item], problems: list[str]) -> list[_Item]:
    """The items whose text can be encoded; `problems` grows by a line for each other."""
    good = []
    for source, row, item in items:
        try:
            item.text.encode("utf-8")
            good.append((source, row, item))
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write and UTF-8 cannot
            half = f"{item.text[error.start]!r} at character {error.start}"
            problems.append(f"{source}: the text has half of a surrogate pair ({half}), which is no character: remove it")
    return good


def _tokenize_chunk(
    rendered: list[_Item], format: str, tokenizer, into: TableWriter, problems: list[str]
) -> Iterable[tuple[str, Rendered]]:
    """Adds the rows to the table, and to `problems` those that have none; yields what has been added."""
    encoding = _tokenize(tokenizer, [item.text for _, _, item in rendered], add_special_tokens=format == "text")
    eos = tokenizer.eos_token_id if format == "text" else None
    for number, (source, row, item) in enumerate(rendered):
        tokens = encoding["input_ids"][number]
        if eos is not None and tokens[-1:] != [eos]:
            tokens = [*tokens, eos]
        try:
            if item.spans is None:
                spans = [(0, len(tokens))]
            elif format == "text":
                spans = [(_tokens_before(item.spans[0][0], encoding, number, item.text, tokenizer), len(tokens))]
            elif encoding.encodings is not None:
                spans = _token_spans(encoding.encodings[number].offsets, item)
            else:
                spans = _token_spans_by_prefixes(tokens, item, tokenizer)
        except RowError as error:
            problems.append(f"{source}: {error}")
            continue
        into.add(tokens, spans, item.text, source, row)
        yield source, item


def _tokenize(tokenizer, texts: list[str], add_special_tokens: bool):
    """The encoding of many texts in one call, the same as one by one. Rendered chats have their special tokens already."""
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=add_special_tokens, **options) if texts else {"input_ids": []}


def _token_spans(offsets: Sequence[tuple[int, int]], item: Rendered) -> list[Span]:
    """Token positions [start, end) of the spans. Several tokens can make one character, and one token many."""
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    if item.is_marked_by_template:
        return [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in item.spans]
    return [(bisect_right(ends, start), bisect_right(ends, end)) for start, end in item.spans]


def _tokens_before(place: int, encoding, number: int, text: str, tokenizer) -> int:
    """How many tokens of a plain text, with the special ones before it, end at a character or before it."""
    if encoding.encodings is not None:  # special tokens have the place (0, 0), also behind the text
        offsets = encoding.encodings[number].offsets
        return next((i + 1 for i in range(len(offsets) - 1, -1, -1) if offsets[i][0] < offsets[i][1] <= place), 0)
    tokens, before = encoding["input_ids"][number], _tokenize(tokenizer, [text[:place]], add_special_tokens=True)["input_ids"][0]
    if before != tokens[: len(before)] and before[-1:] == [tokenizer.eos_token_id]:  # put behind every text
        before = before[:-1]
    if before != tokens[: len(before)]:
        raise RowError("mask_until: the marker's end is no token border: the tokenizer joins the characters on both sides of it")
    return len(before)


def _token_spans_by_prefixes(tokens: list[int], item: Rendered, tokenizer) -> list[Span]:
    """The same for tokenizers that do not tell places: the text up to a place must have the first of the tokens."""
    borders = list(dict.fromkeys(border for span in item.spans for border in span))
    counts = {}
    for border, prefix in zip(borders, _tokenize(tokenizer, [item.text[:b] for b in borders], False)["input_ids"], strict=True):
        if tokens[: len(prefix)] != prefix:
            where = f"character {border} of the text, where an assistant turn begins or ends,"
            raise RowError(
                f"mask_prompt: {where} is no token border: the tokenizer joins the characters on both sides of it. "
                f"Often the turn begins with a space or line break that can be removed. {WAYS_OUT}"
            )
        counts[border] = len(prefix)
    return [(counts[start], counts[end]) for start, end in item.spans]
