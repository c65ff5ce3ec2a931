"""Finding rows by what stands in their rendered texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fulltune_nb.data.encoding import Example

MOST_CHARACTERS = 100_000_000
"""Characters that one search looks at: about a second."""


@dataclass(frozen=True)
class Hits:
    """What a search has found."""

    rows: list[int]
    """Indices of the examples that have the text, in the order they were looked at."""
    looked_at: int
    """Examples looked at; fewer than there are where the search had to stop."""


def search(examples: Sequence[Example], rows: Iterable[int], text: str, most_characters: int = MOST_CHARACTERS) -> Hits:
    """Examples whose rendered text has `text` in it, upper and lower case being the same.

    Args:
        examples: a split.
        rows: indices of those to look at.
        text: what to look for, as it is: no pattern.
        most_characters: after which the search stops; the example in which that happens is looked at to its end.
    """
    wanted, found, looked_at, left = text.lower(), [], 0, most_characters
    for row in rows:
        if left <= 0:
            break
        whole = examples[row].text
        left -= len(whole)
        looked_at += 1
        if wanted in whole.lower():
            found.append(int(row))
    return Hits(found, looked_at)


def surroundings(whole: str, text: str, width: int = 60) -> tuple[str, str, str, int] | None:
    """What stands before the first occurrence, the occurrence, what stands behind, and how many there are; None for none."""
    pattern = re.compile(re.escape(text), re.IGNORECASE)
    first = pattern.search(whole) if text else None
    if first is None:
        return None
    before = ("… " if first.start() > width else "") + whole[max(0, first.start() - width) : first.start()]
    after = whole[first.end() : first.end() + width] + (" …" if len(whole) > first.end() + width else "")
    return before, first.group(), after, sum(1 for _ in pattern.finditer(whole))
