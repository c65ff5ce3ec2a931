"""What there is to see in the rows: their tokens and masks, special tokens that are doubled or missing, texts found, and duplicates."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from fulltune_nb import svg
from fulltune_nb.data.example import LEGEND_OF_RUNS, Example, head_html, runs_html
from fulltune_nb.html import esc, facts, table

# ---- splits and data sets in a cell

def split_html(split) -> str:
    """A split in a cell: its counts, its lengths and its first examples."""
    return f"<div>{counts_table([split])}{_lengths_and_examples(split)}</div>"


def dataset_html(data) -> str:
    """A data set in a cell: counts of each split, settings, notes, lengths and a few examples."""
    splits = list(data.splits.values())
    settings = [("source", data.source or "rows in memory"), ("mask_prompt", data.settings.mask_prompt)]
    settings.append(("max_seq_length", f"{data.settings.max_seq_length:,} tokens"))
    notes = "".join(f"<li>{esc(note)}</li>" for note in data.notes)
    notes = f"<b>Notes</b><ul>{notes}</ul>" if notes else ""
    return f"<div>{counts_table(splits)}{facts('', settings)}{notes}{_lengths_and_examples(splits[0])}</div>"


def _lengths_and_examples(split) -> str:
    shown = "".join(head_html(example) + runs_html(example) for example in split[:2])
    return f"{_lengths_svg(split) if len(split) else ''}{LEGEND_OF_RUNS}</div>{shown}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}\u00a0%" if whole else "-"


def counts_table(splits: Sequence) -> str:
    """Rows, tokens, lengths and losses of splits, a line each."""
    headers = ("split", "format", "rows", "tokens", "trained on", "share", "median length", "longest")
    headers += ("rows cut", "tokens cut", "rows not trained on", "rows left out")
    rows = []
    for s in splits:
        median, longest = (int(np.median(s.lengths)), int(s.lengths.max())) if len(s) else (0, 0)
        numbers = (len(s), s.tokens, s.trained_tokens)
        share = _share(s.trained_tokens, s.tokens)
        last = (median, longest, s.truncated, s.tokens_cut, len(s.untrainable), len(s.skipped))
        rows.append((s.name, s.format, *(f"{n:,}" for n in numbers), share, *(f"{n:,}" for n in last)))
    return table(headers, rows)


def _lengths_svg(split, bins: int = 40) -> str:
    """A histogram of the examples' lengths in tokens."""
    counts, edges = np.histogram(split.lengths, bins=min(bins, max(1, int(np.ptp(split.lengths)) + 1)))
    titles = [f"{count:,} rows of {low:.0f} to {high:.0f} tokens" for count, low, high in zip(counts, edges, edges[1:], strict=False)]
    label = f"Lengths of {split.name}: {edges[0]:.0f} to {edges[-1]:.0f} tokens, at most {counts.max():,} rows in a bar"
    return svg.bars(counts, titles, label)


# ---- search

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


# ---- duplicates


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
