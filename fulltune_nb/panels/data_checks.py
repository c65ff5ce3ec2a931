"""What a look over a whole data set brings to light, in HTML: counts, begin and end tokens, rows in several splits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from fulltune_nb.data.dataset import DataSet
from fulltune_nb.data.duplicates import Duplicates, find_duplicates
from fulltune_nb.data.lens import counts_table
from fulltune_nb.data.special_tokens import ADVICE, SpecialTokenCheck, check_special_tokens
from fulltune_nb.html import NO_MATH, esc, facts, table

_LISTED = 8  # rows named of each finding

FILTERS = ("all", "cut off", "not trained on", "BOS or EOS warning", "also in another split")
"""Which rows of a split there are to choose from."""


class DataChecks:
    """The findings about a data set; each is worked out when it is first asked for."""

    def __init__(self, data: DataSet):
        self._data = data

    @cached_property
    def duplicates(self) -> Duplicates:
        """Rows that become the same text."""
        return find_duplicates(self._data.splits)

    @cached_property
    def special_tokens(self) -> dict[str, SpecialTokenCheck]:
        """BOS and EOS of each split."""
        return {name: check_special_tokens(split.examples, self._data.tokenizer) for name, split in self._data.splits.items()}

    def rows(self, split: str, which: str) -> np.ndarray:
        """Ascending indices of the rows that one of `FILTERS` leaves."""
        examples = self._data.splits[split]
        if which == "cut off":
            return np.flatnonzero([example.cut > 0 for example in examples])
        if which == "not trained on":
            return examples.untrainable
        if which == "BOS or EOS warning":
            return self.special_tokens[split].rows
        if which == "also in another split":
            return np.array(self.duplicates.rows(split), dtype=np.int64)
        return np.arange(len(examples))

    def twins(self, split: str, row: int) -> list[str]:
        """Where else a row stands: its first occurrence in each other split."""
        found = []
        for (name, other), pairs in self.duplicates.across.items():
            if name == split:
                found += [self._data.splits[other][there].source for here, there in pairs if here == row]
        return found

    def to_html(self) -> str:
        """All findings, with what to do."""
        data = self._data
        notes = "".join(f"<li>{esc(note)}</li>" for note in data.notes)
        parts = [
            counts_table(list(data.splits.values())),
            f'<div class="{NO_MATH}"><b>Notes</b><ul style="margin:2px 0">{notes}</ul></div>' if notes else "",
            self._special_html(),
            self._duplicates_html(),
            facts("Settings", [("source", data.source or "rows in memory"), *((k, str(v)) for k, v in vars(data.settings).items())]),
        ]
        spaced = (f'<div style="margin-bottom:12px">{part}</div>' for part in parts if part)
        return f'<div style="line-height:1.5">{"".join(spaced)}</div>'

    def _special_html(self) -> str:
        rows = []
        for name, check in self.special_tokens.items():
            for problem, found in check.problems.items():
                where = _listed([self._data.splits[name][row].source for row in found[:_LISTED]], len(found))
                rows.append((name, f"{len(found):,} of {len(check.bos):,}", f"⚠ {problem}", where, ADVICE[problem]))
        counts = "; ".join(f"{name} {c.bos.sum():,} BOS, {c.eos.sum():,} EOS" for name, c in self.special_tokens.items())
        if not rows:
            return f"<b>Begin and end tokens</b><div>✓ nothing doubled, nothing missing ({esc(counts)})</div>"
        return table(("split", "rows", "warning", "which", "what to do"), rows, "Begin and end tokens") + f"<div>{esc(counts)}</div>"

    def _duplicates_html(self) -> str:
        rows, splits = [], self._data.splits
        for (name, other), pairs in self.duplicates.across.items():
            if pairs and list(splits).index(name) < list(splits).index(other):
                pairs_named = [f"{splits[name][a].source} = {splits[other][b].source}" for a, b in pairs[:_LISTED]]
                back = len(self.duplicates.across[other, name])
                rows.append((f"{name} in {other}", f"⚠ {_rows(len(pairs))}, {back:,} there", _listed(pairs_named, len(pairs))))
        for name, count in self.duplicates.within.items():
            if count:
                rows.append((f"{name} in itself", f"{_rows(count)} stood there before", ""))
        if not rows:
            return "<b>Duplicates</b><div>✓ no row stands in the data twice</div>"
        advice = "Held-out rows that are trained on say little about what was learned: take them out of one of the two."
        shown = any("⚠" in row[1] for row in rows)
        return table(("rows", "how many", "which"), rows, "Duplicates") + (f"<div>{advice}</div>" if shown else "")


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _listed(names: Sequence[str], count: int) -> str:
    names = [name if len(name) <= 80 else f"{name[:77]}…" for name in names]
    return ", ".join(names) + (f" and {count - len(names):,} more" if count > len(names) else "")
