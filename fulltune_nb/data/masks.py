"""Where the turns of a conversation stand in its text, in characters.

A turn begins behind the conversation before it with the generation prompt, and ends behind the conversation that includes it, both
rendered by themselves. Where these are prefixes of the whole text, their lengths are the places. In general they are not (a
template drops thinking from earlier turns, or puts `<think>` into the generation prompt only), and for each of n turns they would
take n renderings. So the words of the messages are marked, and what the template writes between two messages' words
is taken from a rendering that ends there, once for all turns in the same situation, and looked for at its place. A template that
brings `{% generation %}` says itself what is trained. What is not found is reported, never guessed at.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from fulltune_nb.chat_template import ChatRenderer, TemplateRefused
from fulltune_nb.data.rows import RowError

# ---- words

# To find a message's words in the text, each of its strings gets a mark at its end, a character of Unicode's private planes of its own,
# and the marked conversation is rendered once more: without the marks it must be the same text, and then each mark stands where its
# string ends. A mark stands behind the string's last character that is no space, so that trimming templates trim as before.

TOOLS = -1  # in place of a message's index: the tools beside the messages

_FIRST_MARK, _LAST_MARK = 0xF0000, 0x10FFFD
_PRIVATE = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_LAST_MARK)}]")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_SILENT_KEYS = {"role", "content", "tool_calls", "name", "id", "type", "tool_call_id", "weight", "train", *_REASONING_KEYS}
_END_OF_THINKING = re.compile(r"(</(?:think|thinking|thought|reasoning|seed:think)>|\[/THINK\]|◁/think▷)")
_BEGIN_OF_THINKING = re.compile(r"\s*(?:<(?:think|thinking|thought|reasoning|seed:think)>|\[THINK\]|◁think▷)")
_THINKING_TAG = re.compile(f"{_BEGIN_OF_THINKING.pattern}|{_END_OF_THINKING.pattern}")
_SEVERAL_WORDS = re.compile(r"(?<![^\W\d_])[^\W\d_]{2,}\s+[^\W\d_]{2}")


class Word(NamedTuple):
    """One string of a conversation."""

    message: int  # index of its message, or `TOOLS`
    kind: str  # "content", "reasoning", "calls", "tools", or the message's key
    text: str  # without the spaces around it, not empty
    spaces: str = ""  # those around it, "\0" standing for the text; empty where there are none


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
            words.append(Word(message, kind, stripped, "" if len(stripped) == len(text) else text.replace(stripped, "\0", 1)))
        return text

    visited(messages, tools, visit)
    return words


def with_marks(messages: Sequence[Mapping[str, Any]], tools: Any, marks: range) -> tuple[list[dict[str, Any]], Any]:
    """A copy in which the n-th of `words_of` carries the n-th mark."""
    number = 0

    def visit(message: int, kind: str, text: str) -> str:
        nonlocal number
        core = text.rstrip()
        if not core:
            return text
        number += 1
        return f"{core}{chr(marks[number - 1])}{text[len(core) :]}"

    return visited(messages, tools, visit)


def free_marks(text: str, words: Sequence[Word]) -> range:
    """Marks that stand neither in the text nor in the words, at least one for each word; none where there are not so many."""
    used, first = {ord(mark) for part in (text, *(word.text for word in words)) for mark in _PRIVATE.findall(part)}, _FIRST_MARK
    for mark in (*sorted(used), _LAST_MARK + 1):
        if mark - first >= max(1, len(words)):
            return range(first, mark)
        first = mark + 1
    return range(0)


@dataclass
class Marked:
    """A rendered text, and where in it the words end."""

    text: str
    marks: list[tuple[int, int]]  # (position in the text, number of the word), ascending

    @classmethod
    def of(cls, rendered: str, marks: range) -> Marked:
        """A text that was rendered with marks, taken apart."""
        any_mark = re.compile(f"[{chr(marks[0])}-{chr(marks[-1])}]")
        found = list(any_mark.finditer(rendered))
        return cls(any_mark.sub("", rendered), [(mark.start() - n, ord(mark[0]) - marks[0]) for n, mark in enumerate(found)])

    @property
    def rest(self) -> str:
        """What follows the last mark; all where there is none."""
        return self.text[self.marks[-1][0] :] if self.marks else self.text


def is_written(word: str, text: str, start: int = 0, end: int | None = None) -> bool:
    """Whether the words stand in a part of a text: as they are, as JSON writes them, or one by one in their order.

    The last is for templates that set a message's parts anew, with other spaces or tags between them.
    """
    end = len(text) if end is None else end
    if text.find(word, start, end) >= 0:
        return True
    if any(text.find(json.dumps(word, ensure_ascii=ascii)[1:-1], start, end) >= 0 for ascii in (False, True)):
        return True
    for piece in re.findall(r"\w+|[^\w\s]", re.sub(r"</?[\w:|]+>", " ", word)):
        start = text.find(piece, start, end)
        if start < 0:
            return False
        start += len(piece)
    return True


# ---- turns

Span = tuple[int, int]  # [start, end)

_UNFINISHED_TAG = re.compile(r"<[^<>]*$")

WAYS_OUT = "Use mask_prompt=False, another chat template, or split or change the row"


class Conversation:
    """A row's `messages`, the `text` that the template makes of them, and their `words` (see `words_of`).

    Raises:
        RowError: the template refuses the messages.
    """

    def __init__(self, renderer: ChatRenderer, messages: Sequence[Mapping[str, Any]], tools: Any, words: Sequence[Word]):
        self._renderer, self.messages, self.tools, self.words = renderer, messages, tools, words
        try:
            self.text = renderer.render(messages, tools)
        except TemplateRefused as error:
            raise RowError(f"the chat template refuses this row: {error}") from error

    @cached_property
    def marked(self) -> Turns | None:
        """The turns as the marked words show them; None where the template writes another text with marks."""
        if not (marks := free_marks(self.text, self.words)):
            return None
        turns = Turns(self._renderer, *with_marks(self.messages, self.tools, marks), self.words, marks)
        return turns if turns.text == self.text else None

    def generated(self, turns: Sequence[int]) -> list[Span] | None:
        """Character places that the template itself says are the assistant's (`{% generation %}`) in these turns; None if it says nothing.

        Raises:
            RowError: they cannot be told for these turns alone.
        """
        found = self._generated(len(self.messages))
        if found is None or found[0] != self.text:
            return None
        spans, answers = found[1], [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if list(turns) == answers:
            return spans
        if len(spans) == len(answers):
            return [span for i, span in zip(answers, spans, strict=True) if i in turns]
        counts = []
        for i in (i for turn in turns for i in (turn, turn + 1)):
            part = self._generated(i)
            if part is None or part[1] != spans[: len(part[1])]:  # what it says of the part is not what it says of it within the whole
                own = self.spans(turns)
                return [(max(start, begin), min(end, stop)) for start, end in spans for begin, stop in own if begin < end and start < stop]
            counts.append(len(part[1]))
        return [span for start, end in zip(counts[::2], counts[1::2], strict=True) for span in spans[start:end]]

    def _generated(self, count: int) -> tuple[str, list[Span]] | None:
        try:
            return self._renderer.render_answers(self.messages[:count], self.tools)
        except TemplateRefused:
            return None

    def spans(self, turns: Sequence[int]) -> list[Span]:
        """Character places of messages: an assistant's without its header, another's with it.

        Raises:
            RowError: they cannot be told.
        """
        # The prefixes of the conversation first where they take one rendering, which is so for most rows, else last.
        ways = [self._by_marks, self._by_prefixes]
        ways = ways[::-1] if list(turns) == [len(self.messages) - 1] else ways
        errors = {}
        for way in ways:
            try:
                return way(turns)
            except RowError as error:
                errors[way] = error
        raise errors[self._by_prefixes if self.marked is None else self._by_marks] from None

    def _by_marks(self, turns: Sequence[int]) -> list[Span]:
        if (marked := self.marked) is None:
            raise RowError("mask_prompt: the chat template writes another text where the words carry marks")
        return [marked.span(i) for i in turns]

    def _by_prefixes(self, turns: Sequence[int]) -> list[Span]:
        plain = Turns(self._renderer, self.messages, self.tools, (), range(0), self.text)
        spans = [plain.span(i) for i in turns]
        for i, span in zip(turns, spans, strict=True):
            if any(not is_written(word.text, self.text, *span) for word in self.words if word.message == i):
                raise RowError(f"mask_prompt: the chat template does not write the words of message {i + 1} into its turn. {WAYS_OUT}")
        return spans


class Turns:
    """Finds turns in a text by its marks; without words there are none, and it is done by prefixes of the conversation alone."""

    def __init__(
        self, renderer: ChatRenderer, messages: Sequence[Mapping], tools: Any, words: Sequence[Word], marks: range, text: str | None = None
    ):
        self._renderer, self._messages, self._tools, self._words, self._characters = renderer, messages, tools, words, marks
        whole = self._render(len(messages), False) if text is None else Marked(text, [])
        self.text, self.marks = ("", []) if whole is None else (whole.text, whole.marks)
        self._positions = [position for position, _ in self.marks]
        self._word_at = {position: words[word].text for position, word in self.marks}
        self._first: dict[int, int] = {}  # word -> where it stands first
        self._own: dict[int, list[int]] = {}  # message -> where its words end
        for position, word in self.marks:
            if word not in self._first:
                self._first[word] = position
                self._own.setdefault(words[word].message, []).append(position)
        self._before: dict[tuple, list[str | None]] = {}  # what a template writes before a turn, with and without generation prompt
        self._after: dict[tuple, str] = {}  # what it writes between a turn and the words behind it
        self._prompts: list[str | None] = []

    def is_missing(self, word: int) -> bool:
        """Whether the template does not write this word, or not whole."""
        if (end := self._first.get(word)) is None:
            return True
        before = bisect_left(self._positions, end)
        start = self._positions[before - 1] if before else 0
        return self.start_of_word(end) is None and not is_written(self._words[word].text, self.text, start, end)

    def is_beside(self, word: int, spans: Sequence[Span]) -> bool:
        """Whether a word is written and ends within none of the spans."""
        end = self._first.get(word)
        if end is None:
            return False
        before = bisect_left(spans, (end,))  # spans that start before it
        return not before or spans[before - 1][1] < end

    def span(self, i: int) -> Span:
        """Where message `i` stands.

        Raises:
            RowError: it cannot be told.
        """
        own = self._own.get(i, [])
        at, holder = self._words_before(i, min(own, default=None))
        start = self._start(i, at, holder, self.start_of_word(min(own, default=None)))
        end = self._end(i, start, max(own, default=at))
        if not start <= end or any(not start < position <= end for position in own):
            raise RowError(f"mask_prompt: the words of {self._name(i)} do not stand together. {WAYS_OUT}")
        within = self.marks[bisect_left(self._positions, start + 1) : bisect_left(self._positions, end + 1)]
        if any(self._words[word].message != i and position == self._first[word] for position, word in within):
            raise RowError(f"mask_prompt: words of another message stand within {self._name(i)}. {WAYS_OUT}")
        return start, end

    # -- the start

    def _start(self, i: int, at: int, holder: int, words_start: int | None) -> int:
        """Behind what the template writes from `at`, where the words before message `i` end (those of `holder`), up to the turn."""
        is_answer = self._messages[i]["role"] == "assistant"
        situation = (holder < 0, is_answer, *(self._kind(j) for j in range(max(holder, 0), i)))
        rests = self._before.get(situation)  # as it was written before an earlier turn
        start = None if rests is None else self._behind(rests, i, at, words_start)
        if start is None:
            rests = self._before[situation] = [self._rest(i, is_answer)]
            start = self._behind(rests, i, at, words_start)
        if start is not None:
            return start
        if i == 0 and not is_answer:
            return 0
        if is_answer and words_start is not None:  # the template refuses such a beginning, often an empty one, or renders it otherwise
            if (start := self._behind_prompt(at, words_start)) is not None:
                return start
            if rests[0] is None and self._generation_prompt() == "":
                return words_start
        raise self._not_found(i, "start", rests[0], at)

    def _behind(self, rests: list[str | None], i: int, at: int, words_start: int | None) -> int | None:
        """Behind what the template writes up to message `i`, if that stands at `at`.

        Args:
            rests: that text, with the generation prompt before an answer; second, where it has been needed, the same without the prompt.
        """
        if rests[0] is None:
            return None
        if self.text.startswith(rests[0], at):
            return at + len(rests[0])
        if self._messages[i]["role"] != "assistant" or not self.marks:
            return None
        if len(rests) == 1:
            rests.append(self._rest(i, False))
        if rests[1] is None or not self.text.startswith(rests[1], at):
            return None
        # The turn goes on otherwise than the generation prompt, which may end with `<think>`: what both share is the prompt, but the `<`
        # by which two tags begin.
        shared = at + len(_UNFINISHED_TAG.sub("", os.path.commonprefix([rests[0], self.text[at : at + len(rests[0])]])))
        return max(at + len(rests[1]), shared if words_start is None else min(shared, words_start))

    def _behind_prompt(self, at: int, words_start: int) -> int | None:
        """Behind the generation prompt that stands between two places, or behind its first part with at most an empty thinking up to the
        words."""
        prompt = self._generation_prompt() or ""
        for size in range(len(prompt), 0, -1):
            found = self.text.rfind(prompt[:size], at, words_start) if prompt[:size].strip() else -1
            if found >= 0 and (size == len(prompt) or not _THINKING_TAG.sub("", self.text[found + size : words_start]).strip()):
                return found + size
        return None

    def _words_before(self, i: int, first: int | None) -> tuple[int, int]:
        """Where the last word ends that is written before the first of message `i`, and its message; (0, -1) if there is none."""
        if first is None:
            first = 1 + max((max(self._own[j]) for j in range(i) if j in self._own), default=-1)
        for number in range(bisect_left(self._positions, first) - 1, -1, -1):
            position, word = self.marks[number]
            if self._words[word].message != i:
                return position, self._words[word].message
        return 0, -1

    def start_of_word(self, end: int | None) -> int | None:
        """Where the word starts that ends there; None where the template has changed it."""
        if end is None:
            return None
        word = self._word_at[end]
        return end - len(word) if self.text.startswith(word, end - len(word)) else None

    # -- the end

    def _end(self, i: int, start: int, last: int) -> int:
        """Behind what the template writes after message `i`, whose last word (or the last before it) ends at `last`."""
        if i == len(self._messages) - 1:
            return len(self.text)
        words_start, holder = self._words_after(i, max(start, last))
        situation = tuple(self._kind(j) for j in range(i + 1, holder + 1))
        known = self._after.get(situation) if holder >= 0 else None
        if known is not None and words_start - len(known) >= max(start, last) and self.text.startswith(known, words_start - len(known)):
            return words_start - len(known)
        rest = self._rest(i + 1, False, i)
        if rest is None or not self.text.startswith(rest, last):  # the template ends a conversation otherwise than a turn within it
            inner = self._rest_within(i, rest, last)
            if inner is None or not self.text.startswith(inner, last):
                raise self._not_found(i, "end", rest, last)
            rest = inner
        if holder >= 0:
            self._after[situation] = self.text[last + len(rest) : words_start]
        return last + len(rest)

    def _words_after(self, i: int, last: int) -> tuple[int, int]:
        """Where the next word of a later message starts, and its message; (0, -1) where that cannot be told."""
        for number in range(bisect_left(self._positions, last + 1), len(self.marks)):
            position, word = self.marks[number]
            if self._words[word].message > i:
                start = self.start_of_word(position)
                return (0, -1) if start is None else (start, self._words[word].message)
        return 0, -1

    def _rest_within(self, i: int, at_end: str | None, last: int) -> str | None:
        """What the template writes behind the last words of message `i` where the conversation goes on.

        Args:
            at_end: what it writes there where the conversation ends.
            last: where these words end.
        """
        rest, prompt = self._rest(i + 1, True, i), self._generation_prompt()
        if rest is None or (prompt is not None and rest.endswith(prompt)):
            return None if rest is None else rest[: len(rest) - len(prompt)]
        if at_end is None or not self.marks:
            return None
        # Behind the turn come the next header, a generation prompt or an end of all. The three may begin alike, with a tag's `<|`.
        shared = os.path.commonprefix([rest, at_end, self.text[last : last + len(rest)]])
        return _UNFINISHED_TAG.sub("", shared) if shared.strip() else None

    # -- renderings

    def _generation_prompt(self) -> str | None:
        """The generation prompt behind a user's message; None where it cannot be told."""
        if not self._prompts:
            prompted, bare = (self._text_of([{"role": "user", "content": "?"}], None, prompt) for prompt in (True, False))
            is_told = prompted is not None and bare is not None and prompted.startswith(bare)
            self._prompts.append(prompted[len(bare) :] if is_told else None)
        return self._prompts[0]

    def _rest(self, count: int, prompt: bool, message: int | None = None) -> str | None:
        """What the template writes behind the last words of the first messages, or behind the words of one of them."""
        rendered = self._render(count, prompt)
        if rendered is None and message in self._own:  # many templates refuse a conversation in which nothing has been asked yet
            rendered = self._render(count, prompt, asked_before=message)
        if rendered is None:
            return None
        first: dict[int, int] = {}
        for position, word in rendered.marks:
            if message is None or self._words[word].message == message:
                first.setdefault(word, position)
        return rendered.rest if message is None or not first else rendered.text[max(first.values()) :]

    def _render(self, count: int, prompt: bool, asked_before: int | None = None) -> Marked | None:
        messages = list(self._messages[:count])
        if asked_before is not None:
            messages.insert(asked_before, {"role": "user", "content": "?"})
        text = self._text_of(messages, self._tools, prompt)
        return None if text is None else Marked.of(text, self._characters) if self._words else Marked(text, [])

    def _text_of(self, messages: Sequence[Mapping], tools: Any, prompt: bool) -> str | None:
        try:
            return self._renderer.render(messages, tools, prompt)
        except TemplateRefused:
            return None

    def _kind(self, i: int) -> tuple:
        """What of a message can make a template write something else around it."""
        message = self._messages[i]
        return message["role"], bool(message.get("content")), bool(message.get("tool_calls"))

    def _name(self, i: int) -> str:
        role = self._messages[i]["role"]
        return f"{role} turn {sum(message['role'] == role for message in self._messages[: i + 1])}"

    def _not_found(self, i: int, place: str, expected: str | None, at: int) -> RowError:
        if expected is None:
            return RowError(
                f"mask_prompt: the chat template cannot render the part of this row {'before' if place == 'start' else 'up to'} "
                f"{self._name(i)} by itself. {WAYS_OUT}"
            )
        shared = len(os.path.commonprefix([self.text[at : at + len(expected)], expected]))
        return RowError(
            f"mask_prompt: the {place} of {self._name(i)} cannot be found: the chat template renders the conversation up to there as "
            f"{expected[shared : shared + 30]!r} by itself and as {self.text[at + shared : at + shared + 30]!r} within the whole row "
            f"(character {at + shared}). {WAYS_OUT}"
        )
