"""What is said of rows that cannot be used: the error that lists them, and hints for the mistakes that are made most."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fulltune_nb.data.settings import DataSettings
from fulltune_nb.errors import DataError

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
