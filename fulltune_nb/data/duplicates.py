"""Rows that occur more than once: within a split, and in two splits at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from fulltune_nb.data.encoding import Example


@dataclass(frozen=True)
class Duplicates:
    """Rows that become the very same text."""

    within: dict[str, int]
    """Split -> rows whose text stood in it before."""
    across: dict[tuple[str, str], list[tuple[int, int]]]
    """(split, other split), either way round -> a pair for each row of the split that stands in the other: its index, and where in
    the other it stands first."""

    def rows(self, split: str) -> list[int]:
        """Indices of the rows of a split that stand in another one too, ascending."""
        return sorted({row for (name, _), pairs in self.across.items() if name == split for row, _ in pairs})


def find_duplicates(splits: Mapping[str, Sequence[Example]]) -> Duplicates:
    """Compares the rendered texts by their hashes: what the model reads counts, not other keys of the rows.

    A held-out row that was trained on says little about what the model has learned.
    """
    first: dict[str, dict[bytes, int]] = {}
    hashes: dict[str, list[bytes]] = {}
    for name, examples in splits.items():
        hashes[name] = [hashlib.blake2b(example.text.encode(), digest_size=16).digest() for example in examples]
        first[name] = {}
        for row, digest in enumerate(hashes[name]):
            first[name].setdefault(digest, row)
    within = {name: len(hashes[name]) - len(first[name]) for name in splits}
    across = {
        (a, b): [(row, first[b][digest]) for row, digest in enumerate(hashes[a]) if digest in first[b]] for a, b in permutations(splits, 2)
    }
    return Duplicates(within, across)
