"""Rows to tokens and loss masks.

chat and completions go through the tokenizer's chat template, which alone decides about special tokens. With `mask_prompt`
every assistant turn is trained on: turn i reaches from the end of the conversation before it, rendered with the generation
prompt, to the end of the conversation that includes it. Each of the two is a prefix of the whole conversation, and that is
checked, on the text and on the tokens; where it does not hold the row is reported, never guessed at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fulltune_nb.chat_template import ChatRenderer, LimitReached, TemplateRefused
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
    unshown_tools: int = 0
    """Rows whose `tools` the chat template does not write into the text."""


@dataclass
class _Rendered:
    """A row's text and, for each assistant turn that is to be found in it, the text before the turn and the text up to its end."""

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
    rows, writer, renderer = list(rows), TableWriter(settings, tokenizer), ChatRenderer(tokenizer, settings.template_date)
    problems, unshown_tools = [], 0
    for start in range(0, len(rows), CHUNK_ROWS):
        rendered = _render_chunk(rows[start : start + CHUNK_ROWS], format, renderer, settings, problems)
        unshown_tools += _tokenize_chunk(rendered, format, tokenizer, settings, writer, problems)
    return Encoded(writer.table(), problems, unshown_tools)


def _render_chunk(
    rows: Sequence[tuple[str, Mapping]], format: str, renderer: ChatRenderer, settings: DataSettings, problems: list[str]
) -> list[tuple[str, Mapping, _Rendered]]:
    """The texts of the rows that have one; `problems` grows by a line for each other row."""
    rendered = []
    with renderer.limits():
        for source, row in rows:
            try:
                item = _Rendered(row[settings.text_feature]) if format == "text" else _render_chat(row, format, renderer, settings)
                _check_encodable(item.text)
                rendered.append((source, row, item))
            except RowError as error:
                problems.append(f"{source}: {error}")
            except LimitReached as error:  # at once: with each further row it could take as long
                problem = f"{source}: the chat template cannot be used for this row: {error}"
                raise DataError(f"{problem}. Look at tokenizer.chat_template, and use another one.", [problem]) from None
    return rendered


def _tokenize_chunk(
    rendered: list[tuple[str, Mapping, _Rendered]], format: str, tokenizer, settings: DataSettings, into: TableWriter, problems: list[str]
) -> int:
    """Adds the rows to the table, and to `problems` those that have none; returns how many of them do not show their tools."""
    # All texts, prefixes included, are tokenized in one call, each once: a last turn's end is often the whole text.
    texts = list(dict.fromkeys(text for _, _, item in rendered for text in (item.text, *(part for turn in item.turns for part in turn))))
    ids = dict(zip(texts, _tokenize(tokenizer, texts, add_special_tokens=format == "text"), strict=True))
    eos, unshown_tools = tokenizer.eos_token_id if format == "text" else None, 0
    for source, row, item in rendered:
        tokens = ids[item.text]
        if eos is not None and tokens[-1:] != [eos]:
            tokens = [*tokens, eos]
        try:
            spans = _token_spans(tokens, [(ids[a], ids[b]) for a, b in item.turns]) if settings.mask_prompt else [(0, len(tokens))]
        except RowError as error:
            problems.append(f"{source}: {error}")
            continue
        unshown_tools += item.unshown_tools
        into.add(tokens, spans, item.text, source, row)
    return unshown_tools


def _tokenize(tokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Ids of many texts in one call, the same as one by one. Rendered chats have their special tokens already."""
    if not texts:
        return []
    options = {"padding": False, "truncation": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=add_special_tokens, **options)["input_ids"]


# ---- conversations to texts


def messages_of(row: Mapping[str, Any], format: str, settings: DataSettings) -> list[Mapping[str, Any]]:
    """The conversation of a chat or completions row; a completion is a user/assistant pair."""
    if format == "chat":
        return list(row[settings.chat_feature])
    return [
        {"role": "user", "content": row[settings.prompt_feature]},
        {"role": "assistant", "content": row[settings.completion_feature]},
    ]


def _render_chat(row: Mapping[str, Any], format: str, renderer: ChatRenderer, settings: DataSettings) -> _Rendered:
    """The row's text and, where prompts are masked, its assistant turns; a `RowError` says why there are none."""
    messages, tools = messages_of(row, format, settings), row.get("tools")
    text = _render(renderer, messages, tools, "the chat template refuses this row")
    if any(message.get("tool_calls") for message in messages):
        bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        if _renders_as(text, renderer, bare, tools):  # it would train on nothing in the calls' place
            raise RowError("the chat template leaves out this row's tool calls: use a template that writes them, or remove the calls")
    wanted = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = wanted[-1:] if settings.mask_prompt == "last" else wanted
    turns = _turns(text, renderer, messages, tools, wanted) if settings.mask_prompt else []
    return _Rendered(text, turns, unshown_tools=bool(tools) and _renders_as(text, renderer, messages, None))


def _turns(text: str, renderer: ChatRenderer, messages: list, tools: Any, wanted: list[int]) -> list[tuple[str, str]]:
    """For each assistant turn, the text before it (generation prompt included) and the text up to its end: prefixes of the whole."""
    turns = []
    for i in wanted:
        message = messages[i]
        number = len(turns) + 1
        what = f"mask_prompt: the chat template cannot render the part of this row before assistant turn {number} by itself"
        before = _render(renderer, messages[:i], tools, what, add_generation_prompt=True)
        what = f"mask_prompt: the chat template cannot render this row up to assistant turn {number} by itself"
        after = text if i == len(messages) - 1 else _render(renderer, messages[: i + 1], tools, what)
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


def _token_spans(tokens: list[int], turns: list[tuple[list[int], list[int]]]) -> list[tuple[int, int]]:
    """Token positions [start, end) of each assistant turn, from the tokens before it and up to its end: prefixes of the whole."""
    for number, turn in enumerate(turns, 1):
        for prefix, place in zip(turn, ("start", "end"), strict=True):
            if tokens[: len(prefix)] != prefix:
                raise RowError(
                    f"mask_prompt: the {place} of assistant turn {number} is no token border: the tokenizer joins the characters on "
                    f"both sides of it. Often the turn begins with a space or line break that can be removed. {_WAYS_OUT}"
                )
    return [(len(before), len(after)) for before, after in turns]


def _render(renderer: ChatRenderer, messages: list, tools: Any, failure: str, add_generation_prompt: bool = False) -> str:
    try:
        return renderer.render(messages, tools, add_generation_prompt)
    except TemplateRefused as error:
        raise RowError(f"{failure}: {error}") from error


def _renders_as(text: str, renderer: ChatRenderer, messages: list, tools: Any) -> bool:
    """Whether the template makes `text` of these messages; where it refuses them, it does not."""
    try:
        return renderer.render(messages, tools) == text
    except TemplateRefused:
        return False


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can write and UTF-8 cannot
        half = f"{text[error.start]!r} at character {error.start}"
        raise RowError(f"the text has half of a surrogate pair ({half}), which is no character: remove it") from None
