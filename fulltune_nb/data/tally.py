"""Counts what is done to the rows of a split, for its notes."""

from __future__ import annotations

from fulltune_nb.html import counted


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
