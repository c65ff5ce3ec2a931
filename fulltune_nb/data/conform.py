"""Rows as people have them, turned into the formats that are encoded. What is turned is counted and told in the notes.

    {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}           ShareGPT -> chat
    {"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[q, a], ...]}       Alpaca -> chat
    {"prompt": [message, ...], "completion": [message, ...], "tools": ...}                           TRL -> chat

A row that has the keys of a format keeps it, so that the `*_feature` settings come before all that is recognized here. Messages and
tools are turned by `messages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from fulltune_nb.chat_template import LimitReached
from fulltune_nb.data.messages import LOOKS_LIKE_DATA, MessageConformer, holds_messages, parsed
from fulltune_nb.data.rows import RawSplit, RowError, Tally, is_padded, keys_of, kind, messages_problem, template_unusable, without_nulls
from fulltune_nb.data.settings import DataSettings

CONVERSATIONS = ("conversations", "conversation")
ALPACA = ("instruction", "input", "output", "system")
Row = Mapping[str, Any]


def conform(raw: RawSplit, name: str, tokenizer, settings: DataSettings) -> None:
    """Turns the rows of a split into the formats, in place. `raw.notes` grows by what was done, `raw.problems` by what cannot be.

    Args:
        name: stands before the notes.

    Raises:
        DataError: the chat template takes far too much time or memory.
    """
    conformer, rows = _RowConformer(tokenizer, settings), []
    for pair in raw.rows:
        source, row = pair
        try:
            turned = conformer.row(source, row)
        except RowError as error:
            raw.problems.append(f"{source}: {error}")
        except RecursionError:
            raw.problems.append(f"{source}: objects and lists stand within each other too deeply to be looked at")
        except LimitReached as error:
            raise template_unusable(source, error) from None
        else:
            rows.append(pair if turned is row else (source, turned))
    raw.rows = rows
    raw.notes += conformer.tally.notes(name)


class _Plan(NamedTuple):
    """What becomes of rows that have the same keys."""

    turn: Callable[[Row], Row] | None
    """None: they stay as they are."""
    unread: tuple[str, ...]
    """Keys that look like data and that nothing reads."""


class _RowConformer:
    def __init__(self, tokenizer, settings: DataSettings):
        self.tally = Tally()
        self._settings = settings
        self._messages = MessageConformer(tokenizer, self.tally)
        self._plans: dict[tuple, _Plan] = {}

    def row(self, source: str, row: Row) -> Row:
        """The row in one of the formats; the row itself where nothing is to be done, or nothing is recognized.

        Raises:
            RowError: a form is recognized, and something in it is wrong.
        """
        keys = tuple([key for key, value in row.items() if value is not None])
        plan = self._plans.get(keys)
        if plan is None:
            plan = self._plans[keys] = self._plan(keys)
        turn, unread = plan
        if turn is None and not unread:
            return row
        self.tally.source = source
        if "tools" in keys and is_padded(row["tools"]):
            row = {key: without_nulls(value) for key, value in row.items()}
            self.tally.add("with null for properties of tools, as tables write them: all nulls inside the row are left out")
        for key in unread:
            if not _is_empty(row[key]):
                self.tally.unread(key)
        return row if turn is None else turn(row)

    def _plan(self, keys: tuple) -> _Plan:
        settings, tools = self._settings, ("tools", "functions")
        formats = [format for format in ("chat", "completions", "text") if set(keys_of(format, settings)) <= set(keys)]
        if formats:
            turn = {"chat": self._chat, "completions": self._pair, "text": None}[formats[0]]
            read = (*keys_of(formats[0], settings), *(tools if turn else ()))
        elif "chosen" in keys and "rejected" in keys:
            turn, read = _refuse_preferences, keys
        elif under := next((key for key in CONVERSATIONS if key in keys), None):
            turn, read = lambda row: self._conversation(row, under), (under, "system", *tools)
        elif "instruction" in keys and "output" in keys:
            turn, read = self._alpaca, (*ALPACA, "history", *tools)
        else:
            return _Plan(_refuse_null, ())  # of the others it is told that they have no known format
        names = LOOKS_LIKE_DATA | ({"label"} if formats[:1] == ["completions"] else set())  # of TRL's KTO: whether the answer is a good one
        return _Plan(turn, tuple(key for key in keys if key in names and key not in read))

    # ---- one row

    def _chat(self, row: Row) -> Row:
        key, tools = self._settings.chat_feature, self._messages.tools(row)
        messages = self._messages.messages(row[key], key, bool(tools))
        return row if messages is row[key] and tools is row.get("tools") else self._as_chat(row, messages, tools, ())

    def _as_chat(self, row: Row, messages: Any, tools: Any, read: Iterable[str]) -> Row:
        """The row with these messages and tools in place of the keys that they were made from."""
        rest = {key: value for key, value in row.items() if key not in (*read, "tools", "functions")}
        return {**rest, self._settings.chat_feature: messages, **({} if tools is None else {"tools": tools})}

    def _pair(self, row: Row) -> Row:
        prompt, completion = keys_of("completions", self._settings)
        tools = self._messages.tools(row)
        if all(holds_messages(row[key]) for key in (prompt, completion)):
            row = {**row, **{key: parsed(row[key], key, "a list of messages") for key in (prompt, completion)}}
            self.tally.add(f"with {prompt!r} and {completion!r} as JSON text of messages: parsed")
        if not isinstance(row[prompt], list) or not isinstance(row[completion], list):
            if not self._messages.takes_text() and isinstance(row[prompt], str) and isinstance(row[completion], str):
                pair = [{"role": "user", "content": row[prompt]}, {"role": "assistant", "content": row[completion]}]
                return self._as_chat(row, self._messages.messages(pair, prompt, bool(tools)), tools, (prompt, completion))
            return row if tools is row.get("tools") else {**row, "tools": tools}
        before, behind = (self._checked_messages(row[key], key, tools) for key in (prompt, completion))
        if self._settings.mask_prompt:  # else all of a row is trained on
            before = [_untrained(message) if message["role"] == "assistant" else message for message in before]
        trained = ", of which only the completion's answers are trained on" if self._settings.mask_prompt else ""
        self.tally.add(f"with lists of messages as {prompt!r} and {completion!r} (TRL's form): read as chat{trained}")
        return self._as_chat(row, [*before, *behind], tools, (prompt, completion))

    def _conversation(self, row: Row, under: str) -> Row:
        """A row whose messages stand under another name, be they ShareGPT's or not."""
        given, tools, read = parsed(row[under], under, "a list of messages"), self._messages.tools(row, are_bare=True), [under]
        messages = self._checked_messages(given, under, tools)
        is_sharegpt = any("from" in message for message in given)
        names = f"in ShareGPT's form ({under}: from, value)" if is_sharegpt else f"with their messages under {under!r}"
        self.tally.add(f"{names}: read as chat")
        if system := _strings(row, ("system",))["system"]:
            if messages[0]["role"] != "system":
                read.append("system")
                messages = [*self._messages.messages([{"role": "system", "content": system}], "system", bool(tools)), *messages]
            elif messages[0].get("content") != system:
                self.tally.unread("system")
        return self._as_chat(row, messages, tools, read)

    def _alpaca(self, row: Row) -> Row:
        """A row of Alpaca's form, with LLaMA-Factory's `system` and `history`; `input` follows the instruction on a line of its own."""
        texts, tools, key = _strings(row, ALPACA), self._messages.tools(row, are_bare=True), self._settings.chat_feature
        question = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
        messages = [{"role": "system", "content": texts["system"]}] if texts["system"] else []
        for asked, answered in [*_pairs(row.get("history")), (question, texts["output"])]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        more = [key for key in ("system", "history") if row.get(key)]
        self.tally.add(f"in Alpaca's form ({', '.join(['instruction, input, output', *more])}): read as chat")
        return self._as_chat(row, self._messages.messages(messages, key, bool(tools)), tools, (*ALPACA, "history"))

    def _checked_messages(self, given: Any, key: str, tools: Any) -> list[Any]:
        messages = self._messages.messages(given, key, bool(tools))
        if problem := messages_problem(messages, key):
            raise RowError(problem)
        return messages


def _strings(row: Row, keys: Iterable[str]) -> dict[str, str | None]:
    for key in keys:
        if not isinstance(row.get(key), (str, type(None))):
            raise RowError(f"{key!r} is {kind(row[key])}, expected a string")
    return {key: row.get(key) for key in keys}


def _untrained(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return message if "train" in message or "weight" in message else {**message, "train": False}


def _pairs(history: Any) -> list[tuple[str, str]]:
    """Earlier questions and answers."""
    pairs = [] if history is None else parsed(history, "history", "a list of questions and answers")
    for number, pair in enumerate(pairs if isinstance(pairs, list) else [None]):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(f"history[{number}] is {kind(pair)}, expected a question and its answer, two strings in a list")
    return [tuple(pair) for pair in pairs]


def _refuse_preferences(row: Row) -> Row:
    raise RowError(
        "preference data ('chosen' and 'rejected'), from which nothing here learns. To train on the better answers, make rows of them:"
        ' {"prompt": row["prompt"], "completion": row["chosen"]}, or {"messages": row["chosen"]} where that is the whole conversation'
    )


def _refuse_null(row: Row) -> Row:
    """The row, where no form is to be seen in its keys."""
    for form in (("instruction", "output"), *((key,) for key in CONVERSATIONS)):
        if all(key in row for key in form):
            raise RowError(f"{', '.join(repr(key) for key in form if row[key] is None)} is null, which counts as absent")
    return row


def _is_empty(value: Any) -> bool:
    return isinstance(value, (str, list, tuple, dict)) and not value
