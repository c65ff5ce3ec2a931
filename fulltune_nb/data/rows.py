"""Rows as they were read: the three formats, all that can be wrong with a line or a row, and counts for the notes.

    chat         {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}     tools may be left out
    completions  {"prompt": ..., "completion": ...}
    text         {"text": ...}

The key names can be changed by the `*_feature` settings; a key whose value is null counts as absent. A message's content is a string or
a list of text parts. What comes in other forms is turned into these by `conform`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fulltune_nb.data.settings import DataSettings
from fulltune_nb.errors import DataError, closest, listed
from fulltune_nb.files import KeyTwice, no_key_twice
from fulltune_nb.html import counted

# ---- counts for a split's notes


class Tally:
    """What was done to how many rows, and which keys nothing reads; each counts once a row."""

    def __init__(self) -> None:
        self.source = ""
        """The row that is counted now."""
        self._done: dict[str, list] = {}  # what -> rows, first source, last source
        self._unread: dict[str, list] = {}

    def add(self, what: str) -> None:
        """Counts the row as one that ... ("120 rows " and what)."""
        self._count(self._done, what)

    def unread(self, key: str) -> None:
        """Counts the row as one with a key that nothing reads."""
        self._count(self._unread, key)

    def _count(self, counts: dict[str, list], name: str) -> None:
        entry = counts.setdefault(name, [0, self.source, None])
        if entry[2] != self.source:
            entry[0], entry[2] = entry[0] + 1, self.source

    def notes(self, split: str) -> list[str]:
        """A line for each thing done, and one for all keys that nothing reads."""
        lines = [f"{split}: {counted(rows, 'row')} {what} (the first: {first})." for what, (rows, first, _) in self._done.items()]
        keys = [f"{key[:40]!r} ({counted(rows, 'row')}, the first: {first})" for key, (rows, first, _) in self._unread.items()]
        return [*lines, f"{split}: nothing reads {', '.join(keys)}."] if keys else lines


# ---- the rows of a split

SPLITS = ("train", "valid", "test")
OTHER_NAMES = {"train": ("training",), "valid": ("validation", "val", "dev", "eval"), "test": ("testing", "tests")}
"""What splits are called elsewhere; each is taken for the name it stands beside, as a key, as a file's name and on the hub."""

_NO_ROWS = "no rows; leave the split out or give it rows"


@dataclass
class RawSplit:
    """The rows of one split as read."""

    name: str
    label: str
    """What stands before the row number: `"train.jsonl"`, or `"train"` for rows in memory."""
    rows: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """(source, row), the source being label and 1-based line."""
    problems: list[str] = field(default_factory=list)
    blank_lines: int = 0
    notes: list[str] = field(default_factory=list)
    """What is to be announced of the rows."""

    def or_problem(self, reason: str = _NO_ROWS) -> RawSplit:
        """The split itself; where it has neither rows nor problems, `reason` becomes its problem."""
        if not self.rows and not self.problems:
            self.problems.append(f"{self.label}: {reason}")
        return self


def split_named(name: str) -> str | None:
    """The split that is called so, here or elsewhere."""
    return next((split for split in SPLITS if name.lower() in (split, *OTHER_NAMES[split])), None)


def split_meant(name: str) -> str | None:
    """The split that a file or key of this name probably is."""
    stem = name.lower().split(".")[0]
    return split_named(stem) or next((split for split in SPLITS if closest(stem, [split], cutoff=0.75)), None)


# ---- rows of tables


def read_table(name: str, label: str, rows: Iterable[Any]) -> RawSplit:
    """The rows of an Arrow table, without the nulls that it has put into them.

    A table gives all its rows the same keys, at every depth: what one row's tool has beside another's comes back as null. Written
    into a text, such a null would be trained on. A null that was meant (an argument that is null) cannot be told from it.
    """
    split, dropped = RawSplit(name, label), 0
    for number, row in enumerate(rows, 1):
        source = f"{label}:{number}"
        if not isinstance(row, Mapping):
            split.problems.append(f"{source}: not an object (dict) but of type {type(row).__name__}")
            continue
        row = _listed(dict(row))
        whole = {key: without_nulls(value) for key, value in row.items()}
        dropped += _tools_and_calls(whole) != _tools_and_calls(row)
        split.rows.append((source, whole))
    if dropped:
        split.notes.append(
            f"{name}: {counted(dropped, 'row')} of a table had nulls inside tools or tool calls, which tables put where other rows have a"
            " key. They are left out, and with them a null that was meant, such as a call's argument: JSON Lines keep it."
        )
    return split.or_problem()


def without_nulls(value: Any) -> Any:
    """A value of a table without the keys whose value is null, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def is_padded(tools: Any) -> bool:
    """Whether tools come from a table, though not read from one: a property that is null means nothing in a schema."""
    if isinstance(tools, Mapping):
        properties = tools.get("properties")
        return (isinstance(properties, Mapping) and None in properties.values()) or any(is_padded(inner) for inner in tools.values())
    return isinstance(tools, (list, tuple)) and any(is_padded(inner) for inner in tools)


def _listed(value: Any) -> Any:
    """A value of a table with lists for numpy's arrays, at every depth."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list) else value


def _tools_and_calls(row: Mapping[str, Any]) -> list[Any]:
    """What a row has of tools, and its messages of tool calls."""
    messages = [message for value in row.values() if isinstance(value, list) for message in value if isinstance(message, Mapping)]
    return [row.get("tools"), *(message.get("tool_calls") for message in messages)]


# ---- the three formats

PROBLEMS_SHOWN = 20
FORMATS = {
    "chat": ("chat_feature",),
    "completions": ("prompt_feature", "completion_feature"),
    "text": ("text_feature",),
}
"""Format -> the settings that name its keys; a row that fits several formats has the first."""
OTHER_KEYS = {
    "prompt_feature": ("question", "instruction", "query", "input", "problem", "request", "source"),
    "completion_feature": ("response", "answer", "output", "target", "reply", "solution", "label"),
    "text_feature": ("content", "document", "body", "article", "passage"),
    "chat_feature": ("conversations", "conversation", "chat", "dialogue", "dialog", "turns"),
}
"""What other data sets call these things, the likeliest first."""

_PASS_ROWS = 'Read it with json.load and pass the rows, load_data({"train": rows}), or write one json.dumps(row) a line'
_KINDS = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}


class RowError(Exception):
    """One row cannot be used; the text is the reason, to which the caller adds file and line."""


def template_unusable(source: str, limit: Exception) -> DataError:
    """The error where the chat template takes far too much time or memory with a row; none of the others is tried after it."""
    problem = f"{source}: the chat template cannot be used for this row: {limit}"
    return DataError(f"{problem}. Look at tokenizer.chat_template, and use another one.", [problem])


def bad_rows_error(problems: list[str], where: str, remedy: str = "Correct or remove these rows") -> DataError:
    """The error that lists bad rows: the first 20 in the message, equal reasons once; all in `.problems`."""
    groups: dict[str, list[str]] = {}
    for problem in problems[:PROBLEMS_SHOWN]:
        source, _, reason = problem.partition(": ")
        groups.setdefault(reason or problem, []).append(source)
    lines = []
    for reason, (first, *others) in groups.items():
        lines.append(f"  {first}: {reason}" if first != reason else f"  {reason}")
        if others:
            lines.append(f"    the same in {', '.join(others)}")
    more = len(problems) - PROBLEMS_SHOWN
    if more > 0:
        lines.append(f"  ... and {more:,} more (all of them are in the error's .problems)")
    rows = "1 problem" if len(problems) == 1 else f"{len(problems):,} problems"
    return DataError("\n".join([f"{rows} in {where}; nothing was loaded. {remedy}:", *lines]), problems)


# ---- files and lines


def whole_file_problem(first: bytes, last: bytes) -> str | None:
    """What a file is in place of JSON Lines, by its first and last line that are not blank; None if nothing is told by them."""
    first, last = first.strip(), last.strip()
    if first.startswith(b"[") and last.endswith(b"]") and not _is_json(first):
        return f"the file is one JSON array, expected one JSON object per line. {_PASS_ROWS}"
    if first == b"{" and last == b"}":
        return "an object is spread over several lines, expected one JSON object per line. Write each row by json.dumps(row)"
    return None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def parse_line(line: bytes) -> dict[str, Any]:
    """The object on one line of JSON Lines.

    Raises:
        RowError: it is not UTF-8, not JSON, not an object, or gives a key twice.
    """
    try:
        text = line.decode("utf-8")
        row = json.loads(text, object_pairs_hook=no_key_twice)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise RowError(f"not UTF-8 (byte 0x{byte:02x} at byte {error.start + 1} of the line); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 10) : error.pos + 20].rstrip("\r\n")
        what = error.msg.removesuffix(" at")
        raise RowError(f"not JSON: {what} at character {error.pos + 1}, near {near!r}{_json_hint(text, error)}") from None
    except KeyTwice as error:
        raise RowError(f"{error}; keep one") from None
    except (RecursionError, ValueError) as error:
        raise RowError(f"not readable as JSON: {str(error)[:200]}") from None
    if not isinstance(row, dict):
        raise RowError(f"not an object but {kind(row)}" + (f". {_PASS_ROWS}" if isinstance(row, list) else ""))
    return row


def _json_hint(text: str, error: json.JSONDecodeError) -> str:
    """What to do about a line that is not JSON, in brackets behind a space; empty where nothing is known."""
    before, after = text[: error.pos].rstrip(), text[error.pos :].strip()
    if text.strip() in ("[", "{", "],", "}", "},", "]"):
        return " (JSON Lines needs each object on one line of its own)"
    if error.msg == "Extra data" and after == ",":
        return " (remove the comma at the end of the line)"
    if error.msg == "Extra data" and after.lstrip(", ").startswith("{"):
        return " (there is more than one object on this line; put each on a line of its own)"
    if text.lstrip().startswith(("{'", "['")):
        return " (strings in JSON have double quotes; write rows with json.dumps)"
    if (before.endswith(",") and after.startswith(("}", "]"))) or "trailing comma" in error.msg:
        return " (remove the comma before the closing bracket)"
    if after.startswith(("None", "True", "False")):
        return " (JSON has null, true and false; write rows with json.dumps)"
    return ""


# ---- formats


def keys_of(format: str, settings: DataSettings) -> tuple[str, ...]:
    """The keys that a row of a format must have."""
    return tuple(getattr(settings, feature) for feature in FORMATS[format])


def row_format(row: Mapping[str, Any], settings: DataSettings) -> str | None:
    """The first format all of whose keys the row has, or None."""
    return _first_format(row, {format: keys_of(format, settings) for format in FORMATS})


def _first_format(row: Mapping[str, Any], keys: Mapping[str, tuple[str, ...]]) -> str | None:
    for format, wanted in keys.items():
        if all([row.get(key) is not None for key in wanted]):
            return format
    return None


def detect_format(rows: Iterable[Mapping[str, Any]], settings: DataSettings) -> str | None:
    """The format most rows have (the earliest seen where two are equally common), or None if no row has any.

    It is the most common one and not the first row's, so that one bad first row is what gets reported, not all the others.
    """
    keys = {format: keys_of(format, settings) for format in FORMATS}
    counts = Counter(_first_format(row, keys) for row in rows)
    counts.pop(None, None)
    return max(counts, key=counts.get) if counts else None


# ---- rows


def row_problem(row: Mapping[str, Any], format: str | None, settings: DataSettings) -> str | None:
    """What is wrong with a row of a split whose format is `format`, or that has none; None if nothing."""
    if format is None:
        return _no_format(row, settings)
    keys = keys_of(format, settings)
    missing = [key for key in keys if row.get(key) is None]
    if missing:
        return _missing_keys(row, format, missing, settings)
    if format == "chat":
        problem = messages_problem(row[settings.chat_feature], settings.chat_feature)
    else:
        problem = next((f"{key!r} is {kind(row[key])}, expected a string" for key in keys if not isinstance(row[key], str)), None)
    tools = row.get("tools")
    if problem is None and format != "text" and tools is not None and not isinstance(tools, (list, tuple)):
        problem = f"'tools' is {kind(tools)}, expected a list of tool descriptions"
    return problem


def _no_format(row: Mapping[str, Any], settings: DataSettings) -> str:
    hint = feature_hint(row, settings) or "Other names: prompt_feature=, completion_feature=, text_feature=, chat_feature=."
    expected = "; ".join(f"{format}: {' and '.join(map(repr, keys_of(format, settings)))}" for format in FORMATS)
    return f"no known format: has the keys {_quoted(row) or '(none)'}, expected {expected}. {hint}"


def feature_hint(row: Mapping[str, Any], settings: DataSettings) -> str:
    """Which settings would give a row of no known format one, as a sentence; empty where its keys tell nothing.

    Keys that are usual elsewhere are known, and those of this package where they are misspelt.
    """
    for format in ("completions", "chat", "text"):
        found = {feature: _key_meant(row, feature, getattr(settings, feature)) for feature in FORMATS[format]}
        changed = [f"{feature}={key!r}" for feature, key in found.items() if key != getattr(settings, feature)]
        if changed and all(found.values()):
            unused = [key for feature in found for key in _other_keys(row, feature) if key not in found.values()]
            rest = f" ({', '.join(map(repr, unused))} is not used then)" if unused else ""
            return f"Try {', '.join(changed)}{rest}."
    return ""


def _key_meant(row: Mapping[str, Any], feature: str, key: str) -> str | None:
    if row.get(key) is not None:
        return key
    present = [str(name) for name in row if row[name] is not None]
    return next(iter(_other_keys(row, feature) or closest(key, present, most=1, cutoff=0.75)), None)


def _other_keys(row: Mapping[str, Any], feature: str) -> list[str]:
    return [key for key in OTHER_KEYS[feature] if row.get(key) is not None]


def _missing_keys(row: Mapping[str, Any], format: str, missing: list[str], settings: DataSettings) -> str:
    other = row_format(row, settings)
    if other is not None:
        return f"mixed formats: this row is {other}, most rows of the split are {format} (without {_quoted(missing)} here)"
    null = [key for key in missing if key in row]
    text = f"{_quoted(null)} is null" if null else f"missing key {_quoted(missing)}"
    close = [name for key in missing for name in closest(key, map(str, row), most=1) if name not in missing]
    hint = f". Is {_quoted(close)} misspelt?" if close else ""
    return f"{text} ({format} format); the row has {_quoted(row) or 'no keys'}{hint}"


def messages_problem(messages: Any, key: str) -> str | None:
    """What is wrong with a list of messages, which stands under `key`; None if nothing."""
    if not isinstance(messages, (list, tuple)):
        return f"{key!r} is {kind(messages)}, expected a list of messages"
    if not messages:
        return f"{key!r} is an empty list, expected at least one message"
    for i, message in enumerate(messages):
        if problem := _message_problem(message):
            return f"{key}[{i}]{problem}"
    return None


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f" is {kind(message)}, expected an object with 'role' and 'content'"
    if "role" not in message:
        return ": missing key 'role'"
    if not isinstance(message["role"], str):
        return f": 'role' is {kind(message['role'])}, expected a string"
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        return f": 'content' is {'null' if 'content' in message else 'missing'}, expected a string"
    if content is not None and not isinstance(content, str) and not _is_text_parts(content):
        return f": 'content' is {kind(content)}, expected a string or a list of text parts"
    return None


def _is_text_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content)


def content_text(content: Any) -> str | None:
    """A message's content as one text, be it a string or text parts; None where it is neither."""
    if _is_text_parts(content):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else None


def kind(value: Any) -> str:
    """The JSON name of a value's type; for values that are not from JSON, Python's."""
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def _quoted(keys: Iterable[Any]) -> str:
    names: Sequence[str] = [repr(str(key)[:40]) for key in keys]
    return listed(names, most=8)
