"""The words of a conversation, and where the chat template writes them.

To find a message's words in the text, each of its strings gets a mark at its end, a character of Unicode's private planes of its own,
and the marked conversation is rendered once more: without the marks it must be the same text, and then each mark stands where
its string ends. A mark stands behind the string's last character that is no space, so that trimming templates trim as before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

TOOLS = -1
"""In place of a message's index: the tools beside the messages."""

_FIRST_MARK, _MOST_MARKS = 0xF0000, 0x20000 - 2
_ANY_MARK = re.compile("[\U000f0000-\U0010ffff]")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_SILENT_KEYS = {"role", "content", "tool_calls", "name", "id", "type", "tool_call_id", "weight", "train", *_REASONING_KEYS}
_END_OF_THINKING = re.compile(r"(</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]|◁/think▷)")
_BEGIN_OF_THINKING = re.compile(r"\s*(?:<(?:think|thinking|thought|reasoning|seed:think)>|\[THINK\]|◁think▷)")
_SEVERAL_WORDS = re.compile(r"(?<![^\W\d_])[^\W\d_]{2,}\s+[^\W\d_]{2}")


class Word(NamedTuple):
    """One string of a conversation."""

    message: int
    """Index of its message, or `TOOLS`."""
    kind: str
    """"content", "reasoning", "calls", "tools", or the message's key."""
    text: str
    """Without the spaces around it, not empty."""


Visit = Callable[[int, str, str], str]


def visited(messages: Sequence[Mapping[str, Any]], tools: Any, visit: Visit) -> tuple[list[dict[str, Any]], Any]:
    """A copy of messages and tools in which each string that must not vanish is replaced by `visit(message, kind, string)`."""
    found = [{key: _visited_key(i, key, value, message, visit) for key, value in message.items()} for i, message in enumerate(messages)]
    return found, _leaves(tools, lambda text: visit(TOOLS, "tools", text), ("name", "description"))


def _visited_key(i: int, key: str, value: Any, message: Mapping[str, Any], visit: Visit) -> Any:
    if key == "content" and isinstance(value, str):
        return _content(i, value, message, visit)
    if key == "content" and isinstance(value, (list, tuple)):
        return [
            {**part, "text": _content(i, part["text"], message, visit)} if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            else part for part in value
        ]  # fmt: skip
    if key == "tool_calls" and isinstance(value, (list, tuple)):
        return [_call(call, lambda text: visit(i, "calls", text)) for call in value]
    if isinstance(value, str) and key in _REASONING_KEYS:
        return visit(i, "reasoning", value)
    if isinstance(value, str) and key not in _SILENT_KEYS and _SEVERAL_WORDS.search(value):
        return visit(i, str(key), value)
    return value


def _content(i: int, text: str, message: Mapping[str, Any], visit: Visit) -> str:
    """The content visited; an assistant's thinking in it is reasoning."""
    parts = _END_OF_THINKING.split(text, maxsplit=1) if message.get("role") == "assistant" else [text]
    if len(parts) == 1:
        return visit(i, "content", text)
    thinking, tag, answer = parts
    begin = match.end() if (match := _BEGIN_OF_THINKING.match(thinking)) else 0
    return f"{thinking[:begin]}{visit(i, 'reasoning', thinking[begin:])}{tag}{visit(i, 'content', answer)}"


def _call(call: Any, visit: Callable[[str], str]) -> Any:
    """A tool call with its name and the strings of its arguments visited; ids and types are no words."""
    if not isinstance(call, Mapping):
        return call
    inner = {"function": lambda value: _call(value, visit), "arguments": lambda value: _leaves(value, visit), "parameters": None}
    inner |= {"parameters": inner["arguments"], "name": lambda value: visit(value) if isinstance(value, str) else value}
    return {key: inner[key](value) if key in inner else value for key, value in call.items()}


def _leaves(value: Any, visit: Callable[[str], str], keys: Sequence[str] | None = None, key: str | None = None) -> Any:
    """A copy of a JSON value with its strings visited: all, or those under `keys`."""
    if isinstance(value, Mapping):
        return {name: _leaves(item, visit, keys, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_leaves(item, visit, keys, key) for item in value]
    return visit(value) if isinstance(value, str) and (keys is None or key in keys) else value


def words_of(messages: Sequence[Mapping[str, Any]], tools: Any) -> list[Word]:
    """All words of a conversation, in its order."""
    words: list[Word] = []

    def visit(message: int, kind: str, text: str) -> str:
        if stripped := text.strip():
            words.append(Word(message, kind, stripped))
        return text

    visited(messages, tools, visit)
    return words


def with_marks(messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[list[dict[str, Any]], Any]:
    """A copy in which the n-th of `words_of` carries the n-th mark."""
    number = 0

    def visit(message: int, kind: str, text: str) -> str:
        nonlocal number
        core = text.rstrip()
        if not core:
            return text
        number += 1
        return f"{core}{chr(_FIRST_MARK + number - 1)}{text[len(core) :]}"

    return visited(messages, tools, visit)


def can_be_marked(text: str, words: Sequence[Word]) -> bool:
    """Whether there are marks enough, and none in the text already."""
    return len(words) <= _MOST_MARKS and not _ANY_MARK.search(text)


@dataclass
class Marked:
    """A rendered text, and where in it the words end."""

    text: str
    marks: list[tuple[int, int]]
    """(position in the text, number of the word), ascending."""

    @classmethod
    def of(cls, rendered: str) -> Marked:
        """A text that was rendered with marks, taken apart."""
        found = list(_ANY_MARK.finditer(rendered))
        return cls(_ANY_MARK.sub("", rendered), [(mark.start() - n, ord(mark[0]) - _FIRST_MARK) for n, mark in enumerate(found)])

    @property
    def rest(self) -> str:
        """What follows the last mark; all where there is none."""
        return self.text[self.marks[-1][0] :] if self.marks else self.text


def is_written(word: str, text: str, start: int = 0, end: int | None = None) -> bool:
    """Whether the words stand in a part of a text: as they are, as JSON writes them, or one by one in their order.

    The last is for templates that set a message's parts anew, with other spaces or tags between them.
    """
    end = len(text) if end is None else end
    if text.find(word, start, end) >= 0 or any(text.find(form, start, end) >= 0 for form in _json_forms(word)):
        return True
    for piece in re.findall(r"\w+|[^\w\s]", re.sub(r"</?[\w:|]+>", " ", word)):
        start = text.find(piece, start, end)
        if start < 0:
            return False
        start += len(piece)
    return True


def _json_forms(word: str) -> list[str]:
    return [json.dumps(word, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
