"""Rows to tokens and loss masks.

chat and completions go through the tokenizer's chat template, which alone decides about special tokens. With `mask_prompt`
every assistant turn is trained on: turn i reaches from the end of the conversation before it, rendered with the generation
prompt, to the end of the conversation that includes it. Each of the two is a prefix of the whole conversation, and that is
checked, on the text and on the tokens; where it does not hold the row is reported, never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fulltune_nb.chat_template import LimitReached, bounded
from fulltune_nb.data.rows import messages_of
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.errors import DataError

CHUNK_ROWS = 512
"""Rows tokenized in one call: enough for the tokenizer to work in parallel, few enough to keep the extra memory small."""


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
    """The row as it was read."""
    tokenizer: Any = field(default=None, repr=False)
    """For showing the tokens."""

    def __repr__(self) -> str:
        cut = f", {self.cut} cut" if self.cut else ""
        return f"Example({self.source}: {len(self.tokens)} tokens, {int(self.loss_mask.sum())} trained{cut})"

    def _repr_html_(self) -> str:
        from fulltune_nb.data.look import example_html

        return example_html(self)


class RowError(Exception):
    """One row cannot be encoded; the text is the reason, to which the caller adds file and line."""


@dataclass
class Encoded:
    """What `encode_rows` made of the rows of a split."""

    examples: list[Example] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unshown_tools: int = 0
    """Rows whose `tools` the chat template does not write into the text."""


@dataclass
class _Rendered:
    """A row's text, and the pairs of prefixes (before the turn, with it) of each assistant turn that is to be found in it."""

    text: str
    turns: list[tuple[str, str]] = field(default_factory=list)
    unshown_tools: bool = False


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
    rows = list(rows)
    encoded = Encoded()
    for start in range(0, len(rows), CHUNK_ROWS):
        _encode_chunk(rows[start : start + CHUNK_ROWS], format, tokenizer, settings, encoded)
    return encoded


def _encode_chunk(rows: Sequence[tuple[str, Mapping]], format: str, tokenizer, settings: DataSettings, into: Encoded) -> None:
    rendered: list[_Rendered | RowError] = []
    for source, row in rows:
        try:
            rendered.append(_render_row(row, format, tokenizer, settings))
        except RowError as error:
            rendered.append(error)
        except LimitReached as error:  # at once: with each further row it could take as long
            problem = f"{source}: the chat template cannot be used for this row: {error}"
            raise DataError(f"{problem}. Look at tokenizer.chat_template, and use another one.", [problem]) from None
    # All texts of the chunk, prefixes included, are tokenized in one call, each once: a last turn's end is often the whole text.
    texts = {t: None for r in rendered if isinstance(r, _Rendered) for t in (r.text, *(p for turn in r.turns for p in turn))}
    ids = dict(zip(texts, tokenize(tokenizer, list(texts), add_special_tokens=format == "text"), strict=True))
    for (source, row), item in zip(rows, rendered, strict=True):
        try:
            if isinstance(item, RowError):
                raise item
            tokens = ids[item.text]
            prefixes = [(ids[before], ids[after]) for before, after in item.turns]
            if format == "text":
                tokens = _with_eos(tokens, tokenizer)
            spans = _token_spans(tokens, prefixes) if settings.mask_prompt else [(0, len(tokens))]
        except RowError as error:
            into.problems.append(f"{source}: {error}")
            continue
        into.unshown_tools += item.unshown_tools
        into.examples.append(_example(tokens, spans, item.text, source, row, tokenizer, settings.max_seq_length))


def _example(tokens: list[int], spans, text: str, source: str, row: Mapping, tokenizer, max_seq_length: int) -> Example:
    mask = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        mask[start:end] = True
    mask[:1] = False  # nothing precedes the first token, so nothing predicts it
    kept = np.array(tokens[:max_seq_length], dtype=np.int32)
    mask = mask[:max_seq_length].copy()
    for array in (kept, mask):
        array.setflags(write=False)
    return Example(kept, mask, text, source, len(tokens) - len(kept), row, tokenizer)


def tokenize(tokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Ids of many texts in one call; the same ids as one by one.

    For rendered chats `add_special_tokens` is False, which is also what `apply_chat_template(tokenize=True)` does.
    """
    if not texts:
        return []
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]


def _with_eos(tokens: list[int], tokenizer) -> list[int]:
    eos = tokenizer.eos_token_id
    return tokens if eos is None or (tokens and tokens[-1] == eos) else [*tokens, eos]


def _render_row(row: Mapping[str, Any], format: str, tokenizer, settings: DataSettings) -> _Rendered:
    """The row's text and, where prompts are masked, the texts that lead up to the ends of its assistant turns.

    Raises:
        RowError: the template refuses the row or breaks the rule of prefixes, or the text cannot be encoded.
    """
    if format == "text":
        return _Rendered(_encodable(row[settings.text_feature]))
    messages = messages_of(row, format, settings)
    tools = row.get("tools")

    def render(part: list, add_generation_prompt: bool = False, tools=tools) -> str:
        # The conversation stands in a list because transformers refuses an empty one that does not.
        options = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        return bounded(lambda: tokenizer.apply_chat_template([part], **options))[0]

    text = _encodable(_refusable(lambda: render(messages), "the chat template refuses this row"))
    _check_tool_calls(messages, text, render)
    rendered = _Rendered(text, unshown_tools=bool(tools) and _try(lambda: render(messages, tools=None)) == text)
    if settings.mask_prompt:
        rendered.turns = _turns(messages, text, render)
    return rendered


def _turns(messages: list, text: str, render: Callable[..., str]) -> list[tuple[str, str]]:
    """For each assistant turn, the text before it (generation prompt included) and the text up to its end.

    Raises:
        RowError: one of them is not a prefix of the whole text.
    """
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        number = len(turns) + 1
        what = f"mask_prompt: the chat template cannot render the part of this row before assistant turn {number} by itself"
        before = _refusable(lambda i=i: render(messages[:i], add_generation_prompt=True), what)
        what = f"mask_prompt: the chat template cannot render this row up to assistant turn {number} by itself"
        after = text if i == len(messages) - 1 else _refusable(lambda i=i: render(messages[: i + 1]), what)
        for prefix, place in ((before, "start"), (after, "end")):
            if not text.startswith(prefix):
                raise RowError(_broken_prefix(text, prefix, number, place))
        if len(after) < len(before) or (len(after) == len(before) and (message.get("content") or "").strip()):
            raise RowError(f"mask_prompt: the chat template leaves out assistant turn {number}. {_WAYS_OUT}")
        turns.append((before, after))
    return turns


_WAYS_OUT = "Use mask_prompt=False, another chat template, or split or change the row"


def _broken_prefix(text: str, prefix: str, number: int, place: str) -> str:
    at = next((k for k, (a, b) in enumerate(zip(text, prefix, strict=False)) if a != b), min(len(text), len(prefix)))
    return (
        f"mask_prompt: the {place} of assistant turn {number} cannot be found: the chat template renders the conversation up to there "
        f"as {prefix[at : at + 30]!r} by itself and as {text[at : at + 30]!r} within the whole row (character {at}). {_WAYS_OUT}"
    )


def _token_spans(tokens: list[int], prefixes: list[tuple[list[int], list[int]]]) -> list[tuple[int, int]]:
    """Token positions [start, end) of each assistant turn, from the tokens before it and up to its end.

    Raises:
        RowError: they are not the first tokens of the whole.
    """
    for number, turn in enumerate(prefixes, 1):
        for prefix, place in zip(turn, ("start", "end"), strict=True):
            if tokens[: len(prefix)] != prefix:
                raise RowError(
                    f"mask_prompt: the {place} of assistant turn {number} is no token border: the tokenizer joins the characters on "
                    f"both sides of it. Often the turn begins with a space or line break that can be removed. {_WAYS_OUT}"
                )
    return [(len(before), len(after)) for before, after in prefixes]


def _check_tool_calls(messages: list, text: str, render: Callable[..., str]) -> None:
    """Refuse a row whose tool calls the template leaves out: it would train on nothing in their place.

    Raises:
        RowError: the text is the same without the calls.
    """
    if not any(message.get("tool_calls") for message in messages):
        return
    bare = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
    if _try(lambda: render(bare)) == text:
        raise RowError("the chat template leaves out this row's tool calls: use a template that writes them, or remove the calls")


def _refusable(render: Callable[[], str], what: str) -> str:
    try:
        return render()
    except LimitReached:
        raise
    except Exception as error:  # a template is code from outside: it can raise anything
        raise RowError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _try(render: Callable[[], str]) -> str | None:
    try:
        return render()
    except LimitReached:
        raise
    except Exception:  # as above; here a refusal only means that the two texts differ
        return None


def _encodable(text: str) -> str:
    """The text, if it can be tokenized.

    Raises:
        RowError: it has half a surrogate pair, which JSON can write and UTF-8 cannot.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at character {error.start}"
        raise RowError(f"the text has half of a surrogate pair ({half}), which is no character: remove it") from None
    return text
