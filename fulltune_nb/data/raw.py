"""The rows of a split as they were read, whatever they were read from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fulltune_nb.errors import closest
from fulltune_nb.html import counted

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
        whole = {key: without_nulls(value) for key, value in row.items()}
        dropped += _tools_and_calls(whole) != _tools_and_calls({key: _listed(value) for key, value in row.items()})
        split.rows.append((source, whole))
    if dropped:
        split.notes.append(
            f"{name}: {counted(dropped, 'row')} of a table had nulls inside tools or tool calls, which tables put where other rows have a"
            " key. They are left out, and with them a null that was meant, such as a call's argument: JSON Lines keep it."
        )
    return split.or_problem()


def without_nulls(value: Any) -> Any:
    """A value of a table without the keys whose value is null, at every depth; numpy's arrays become lists."""
    value = _listed(value)
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
    return value.tolist() if hasattr(value, "tolist") else value


def _tools_and_calls(row: Mapping[str, Any]) -> list[Any]:
    """What a row has of tools, and its messages of tool calls."""
    messages = [message for value in row.values() if isinstance(value, list) for message in value if isinstance(message, Mapping)]
    return [row.get("tools"), *(message.get("tool_calls") for message in messages)]
