"""The three row formats: which one a split has, and whether a row fits it.

    chat         {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}     tools may be left out
    completions  {"prompt": ..., "completion": ...}
    text         {"text": ...}

The key names can be changed by the `*_feature` settings. Other keys are ignored; a key whose value is null counts as absent.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fulltune_nb.data.settings import DataSettings
from fulltune_nb.errors import DataError

# -- bad_rows: What is said of rows that cannot be used: the error that lists them, and hints for the mistakes that

PROBLEMS_SHOWN = 20
PASS_ROWS = 'Read it with json.load and pass the rows, load_data({"train": rows}), or write one json.dumps(row) a line'

OTHER_KEYS = {
    "prompt_feature": ("question", "instruction", "query", "input", "problem", "request", "source"),
    "completion_feature": ("response", "answer", "output", "target", "reply", "solution", "label"),
    "text_feature": ("content", "document", "body", "article", "passage"),
    "chat_feature": ("conversations", "conversation", "chat", "dialogue", "dialog", "turns"),
}
"""What other data sets call these things, the likeliest first."""
_FORMATS = (("prompt_feature", "completion_feature"), ("chat_feature",), ("text_feature",))


def bad_rows_error(problems: list[str], where: str) -> DataError:
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
    return DataError("\n".join([f"{rows} in {where}; nothing was loaded. Correct or remove these rows:", *lines]), problems)


# ---------------------------------------------------------------- lines


def whole_file_problem(first: bytes, last: bytes) -> str | None:
    """What a file is in place of JSON Lines, by its first and last line that are not blank; None if nothing is told by them."""
    first, last = first.strip(), last.strip()
    if first.startswith(b"[") and last.endswith(b"]") and not _is_json(first):
        return f"the file is one JSON array, expected one JSON object per line. {PASS_ROWS}"
    if first == b"{" and last == b"}":
        return (
            "an object is spread over several lines, expected one JSON object per line. Write each row by json.dumps(row)"
        )
    return None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def json_hint(text: str, error: json.JSONDecodeError) -> str:
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


# ---------------------------------------------------------------- keys


def feature_hint(row: Mapping[str, Any], settings: DataSettings) -> str:
    """Which settings would give a row of no known format one, as a sentence; empty where its keys tell nothing.

    Keys that are usual elsewhere are known, and those of this package where they are misspelt.
    """
    for features in _FORMATS:
        found = {feature: _key_meant(row, feature, getattr(settings, feature)) for feature in features}
        changed = [f"{feature}={key!r}" for feature, key in found.items() if key != getattr(settings, feature)]
        if changed and all(found.values()):
            unused = [key for feature in features for key in _other_keys(row, feature) if key not in found.values()]
            rest = f" ({', '.join(map(repr, unused))} is not used then)" if unused else ""
            return f" Try {', '.join(changed)}{rest}."
    return ""


def _key_meant(row: Mapping[str, Any], feature: str, key: str) -> str | None:
    if row.get(key) is not None:
        return key
    usual = _other_keys(row, feature)
    return usual[0] if usual else _nearest(key, [str(k) for k in row if row[k] is not None])


def _other_keys(row: Mapping[str, Any], feature: str) -> list[str]:
    return [key for key in OTHER_KEYS[feature] if row.get(key) is not None]


def _nearest(key: str, names: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(key, list(names), n=1, cutoff=0.75)
    return close[0] if close else None


def names_of(keys: Iterable[Any], limit: int = 8, empty: str = "no keys") -> str:
    """Keys as quoted text, those behind the first `limit` counted."""
    names: Sequence[str] = [repr(str(k)[:40]) for k in keys]
    return (", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")) or empty


# -- formats: The three row formats: which one a split has, and whether a row fits it

FORMATS = ("chat", "completions", "text")
"""In the order in which a row that fits several is taken."""


def keys_of(name: str, settings: DataSettings) -> tuple[str, ...]:
    """The keys that a row of format `name` must have."""
    return {
        "chat": (settings.chat_feature,),
        "completions": (settings.prompt_feature, settings.completion_feature),
        "text": (settings.text_feature,),
    }[name]


def row_format(row: Mapping[str, Any], settings: DataSettings) -> str | None:
    """The first format all of whose keys the row has, or None."""
    for name in FORMATS:
        if all(row.get(key) is not None for key in keys_of(name, settings)):
            return name
    return None


def detect_format(rows: Sequence[Mapping[str, Any]], settings: DataSettings) -> str | None:
    """The format most rows have (the earliest seen where two are equally common), or None if no row has any.

    It is the most common one and not the first row's, so that one bad first row is what gets reported, not all the others.
    """
    counts = Counter(row_format(row, settings) for row in rows)
    counts.pop(None, None)
    return max(counts, key=counts.get) if counts else None


def expected_keys(settings: DataSettings) -> str:
    """The three formats' keys as text for messages."""
    return "; ".join(f"{name}: {' and '.join(repr(k) for k in keys_of(name, settings))}" for name in FORMATS)


def row_problem(row: Mapping[str, Any], format: str, settings: DataSettings) -> str | None:
    """What is wrong with a row of a split whose format is `format`; None if nothing."""
    missing = [key for key in keys_of(format, settings) if row.get(key) is None]
    if missing:
        return _missing_keys(row, format, missing, settings)
    if format == "chat":
        return _messages_problem(row[settings.chat_feature], settings.chat_feature) or _tools_problem(row)
    for key in keys_of(format, settings):
        if not isinstance(row[key], str):
            return f"{key!r} is {_kind(row[key])}, expected a string"
    return _tools_problem(row) if format == "completions" else None


def _missing_keys(row: Mapping[str, Any], format: str, missing: list[str], settings: DataSettings) -> str:
    other = row_format(row, settings)
    if other is not None:
        return f"mixed formats: this row is {other}, most rows of the split are {format} (without {names_of(missing)} here)"
    null = [key for key in missing if key in row]
    text = f"missing key {names_of(missing)}" if not null else f"{names_of(null)} is null"
    close = [c for key in missing for c in difflib.get_close_matches(key, [str(k) for k in row], n=1) if c not in missing]
    return f"{text} ({format} format); the row has {names_of(row)}" + (f". Is {names_of(close)} misspelt?" if close else "")


def _messages_problem(messages: Any, key: str) -> str | None:
    if not isinstance(messages, (list, tuple)):
        return f"{key!r} is {_kind(messages)}, expected a list of messages"
    if not messages:
        return f"{key!r} is an empty list, expected at least one message"
    for i, message in enumerate(messages):
        at = f"{key}[{i}]"
        if not isinstance(message, Mapping):
            return f"{at} is {_kind(message)}, expected an object with 'role' and 'content'"
        if not isinstance(message.get("role"), str):
            return f"{at}: 'role' is {_kind(message['role'])}, expected a string" if "role" in message else f"{at}: {_no_role(message)}"
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            return f"{at}: 'content' is {'null' if 'content' in message else 'missing'}, expected a string"
        if content is not None and not isinstance(content, str):
            parts = " (join the text parts to one string)" if isinstance(content, list) else ""
            return f"{at}: 'content' is {_kind(content)}, expected a string{parts}"
    return None


def _no_role(message: Mapping[str, Any]) -> str:
    if "from" in message and "value" in message:
        return "'from' and 'value' are ShareGPT's names, expected 'role' (user for human, assistant for gpt) and 'content'"
    return "missing key 'role'"


def _tools_problem(row: Mapping[str, Any]) -> str | None:
    tools = row.get("tools")
    if tools is None or isinstance(tools, (list, tuple)):
        return None
    return f"'tools' is {_kind(tools)}, expected a list of tool descriptions"


def messages_of(row: Mapping[str, Any], format: str, settings: DataSettings) -> list[Mapping[str, Any]]:
    """The conversation of a chat or completions row; a completion is a user/assistant pair."""
    if format == "chat":
        return list(row[settings.chat_feature])
    return [
        {"role": "user", "content": row[settings.prompt_feature]},
        {"role": "assistant", "content": row[settings.completion_feature]},
    ]


_KINDS = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}


def _kind(value: Any) -> str:
    """The JSON name of a value's type; for values that are not from JSON, Python's."""
    return _KINDS.get(type(value), f"of type {type(value).__name__}")
