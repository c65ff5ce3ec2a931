"""JSON objects of which nothing is lost in reading."""

from __future__ import annotations

from typing import Any

_KEY = 60  # characters of a key that a message shows


class KeyTwice(ValueError):
    """An object gives a key twice."""


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for `json.loads`: Python keeps the last of two equal keys without a word.

    Raises:
        KeyTwice: names the key.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise KeyTwice(f"the key {twice[:_KEY]!r} is given twice in one object")
    return found
