"""A split: its examples, and what there is to count of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from fulltune_nb.data.example import Example
from fulltune_nb.data.look import split_html
from fulltune_nb.data.table import ExampleTable


@dataclass(frozen=True)
class Part:
    """The examples of one data set in a split that several make up."""

    name: str
    """What stands before the sources of its rows: the end of its folder's path, or its name on the hub."""
    weight: float
    """Its share of an epoch's rows; those of all parts make 1."""
    begin: int
    """Its first example's index in the split."""
    end: int
    """The index behind its last example."""


class Split(Sequence[Example]):
    """The examples of one split, in the order of the file; rows that occur twice occur twice.

    Attributes:
        name: "train", "valid" or "test".
        format: "chat", "completions" or "text".
        examples: all of them, the untrainable ones too.
        lengths: (rows,) int64, tokens of each example.
        trained_lengths: (rows,) int64, those of them that are trained on.
        trainable: (rows with a trained token,) int64, their indices; only these get into batches.
        untrainable: indices of the rows with no trained token.
        truncated: rows cut at the end by `max_seq_length`.
        tokens_cut: tokens lost that way.
        split_rows: rows that became several examples, windows of their tokens (`long_rows="split"`).
        windows: those examples.
        dropped: rows left out because they have more tokens than `max_seq_length` (`long_rows="drop"`).
        tokens_dropped: tokens lost that way.
        tokens: tokens of all examples.
        trained_tokens: tokens that are trained on.
        blank_lines: blank lines of the file, which are no rows.
        skipped: with `bad_rows="skip"` a line for each row that could not be used, `"train.jsonl:12: reason"`.
        parts: whose examples are which, where several data sets with weights make up the split; else empty.
    """

    def __init__(
        self, name: str, format: str, examples: Sequence[Example], blank_lines: int = 0, skipped: Sequence[str] = (),
        parts: Sequence[Part] = (),
    ):  # fmt: skip
        self.name = name
        self.format = format
        self.examples = table = ExampleTable.of(examples)
        self.blank_lines = blank_lines
        self.skipped = list(skipped)
        self.parts = tuple(parts)
        self.lengths = np.diff(table.begins)
        up_to = np.concatenate([[0], np.cumsum(table.loss_mask, dtype=np.int64)])  # trained tokens before each token
        self.trained_lengths = trained = np.diff(up_to[table.begins])
        self.trainable = np.flatnonzero(trained)
        self.untrainable = np.flatnonzero(trained == 0)
        self.truncated = int(np.count_nonzero(table.cut))
        self.tokens_cut = int(table.cut.sum())
        self.split_rows = int(np.count_nonzero((table.before == 0) & (table.behind > 0)))
        self.windows = int(np.count_nonzero(table.before + table.behind))
        self.dropped, self.tokens_dropped = table.dropped, table.tokens_dropped
        self.tokens = int(self.lengths.sum())
        self.trained_tokens = int(trained.sum())

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    @cached_property
    def largest_id(self) -> int:
        """The largest token id of any example; -1 where there are no tokens."""
        return int(self.examples.tokens.max(initial=-1))

    def trainable_parts(self) -> list[np.ndarray]:
        """`trainable`, for each of the parts; all of it where there are none."""
        if not self.parts:
            return [self.trainable]
        borders = np.searchsorted(self.trainable, [(part.begin, part.end) for part in self.parts])
        return [self.trainable[begin:end] for begin, end in borders]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over lengths, tokens, masks and weights: equal for splits that train alike."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for part in self.parts:
            digest.update(f"{part.weight.hex()} {part.begin} {part.end}\n".encode())
        tokens, loss_mask = memoryview(self.examples.tokens.astype("<i4").view(np.uint8)), memoryview(self.examples.loss_mask)
        begins = self.examples.begins.tolist()
        for begin, end in pairwise(begins):
            digest.update(tokens[4 * begin : 4 * end])
            digest.update(loss_mask[begin:end])
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Split({self.name}: {len(self):,} {self.format} rows, {self.tokens:,} tokens, {self.trained_tokens:,} trained)"

    def _repr_html_(self) -> str:
        return split_html(self)
