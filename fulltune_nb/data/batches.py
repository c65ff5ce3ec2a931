"""From the examples of a split to the batches of every step: which stand together, in what shape, and the arrays.

B rows, T input positions, N target positions. What stands where is a function of (seed, epoch) and the split alone, so that a resumed
run goes on with the very batches that it would have had. Batches take few shapes, since `mx.compile` makes a program for each and
MLX keeps freed memory for each.

With packing a row holds several examples, so that hardly anything is padding. Attention keeps them apart by `Batch.segments`;
positions need no reset, since rotary positions are relative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fulltune_nb.data.dataset import Split
from fulltune_nb.data.example import Example
from fulltune_nb.data.mixture import rows_of_epoch
from fulltune_nb.data.shapes import choose_buckets, choose_shapes, smallest
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.settings import whole_number

Row = int | tuple[int, ...]
"""What a row of a batch holds: an example of the split, by its index, or several that are packed."""

WINDOW_BATCHES = 64
"""Rows are sorted by length within windows of this many batches. Larger windows pad less and mix less; see `StepBatches`."""

MAX_SHAPES = 16
"""Different (B, T, N) at most of all training batches of a split, over all epochs; and of all batches of an evaluation."""

_PARTIAL_SHAPES = 3  # of MAX_SHAPES, for batches of fewer rows

# ---- a batch's arrays


@dataclass(frozen=True, eq=False)
class Batch:
    """The arrays of one batch. Rows are padded on the right, where causal attention never looks from the left."""

    inputs: np.ndarray
    """(B, T) int32; inputs[b, t] is a token of row b, from which the next one of its example is predicted."""
    target_positions: np.ndarray
    """(N,) int32, indices into the flattened (B*T,) positions that have a target to train on; 0 where N is padded."""
    targets: np.ndarray
    """(N,) int32, the token to be predicted there."""
    weights: np.ndarray
    """(N,) float32, 1 for a target, 0 where N is padded."""
    num_tokens: int
    """Trained tokens, the sum of the weights."""
    rows: tuple[int, ...]
    """Indices into the split of all examples, row by row."""
    sources: tuple[str, ...]
    """File and line of each example."""
    padded_tokens: int
    """B * T"""
    real_tokens: int
    """Input positions that hold an example's token."""
    segments: np.ndarray | None = None
    """(B, T) int32 where rows are packed: the number of the example within its row, from 0, and -1 where padded."""
    row_lengths: np.ndarray | None = None
    """(B,) int32, input positions of each row that hold an example's token; None: all T."""

    def __repr__(self) -> str:
        return f"Batch(inputs {self.inputs.shape}, {self.num_tokens} trained tokens, {self.padded_tokens - self.real_tokens} padding)"


def collate(split: Split, rows: Sequence[Row], shape: tuple[int, int] | None = None) -> Batch:
    """The arrays of a batch.

    Args:
        split: where the examples are.
        rows: what each row holds.
        shape: (T, N), large enough; None takes the smallest.

    Raises:
        DataError: none of the examples has a token to train on.
    """
    packed = any(isinstance(row, tuple) for row in rows)
    groups = [row if isinstance(row, tuple) else (row,) for row in rows]
    table, indices = split.examples, np.array([index for group in groups for index in group], dtype=np.int64)
    sources = tuple(table.sources[index] for index in indices.tolist())
    used = np.maximum(split.lengths[indices] - 1, 0)  # (examples,) input positions of each: its last token is a target only
    row_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    in_row = np.bincount(row_of, used, len(groups)).astype(np.int64)
    width = shape[0] if shape else int(in_row.max(initial=0))
    # (positions,) of all examples: where the token stands in the split, and where in the batch.
    begins = np.cumsum(used) - used  # of each example, were the rows of the batch one behind the other without padding
    along = np.arange(used.sum()) - np.repeat(begins, used)
    here = np.repeat(table.begins[indices], used) + along
    place = np.repeat(row_of * width + begins - (np.cumsum(in_row) - in_row)[row_of], used) + along
    inputs = np.zeros((len(groups), width), dtype=np.int32)  # any id will do for padding: no real position sees it
    inputs.flat[place] = table.tokens[here]
    segments = np.full_like(inputs, -1) if packed else None
    if packed:
        segments.flat[place] = np.repeat([number for group in groups for number in range(len(group))], used)
    trained = table.loss_mask[here + 1]
    count = int(np.count_nonzero(trained))
    if not count:
        raise DataError(f"A batch without a token to train on: rows {', '.join(sources[:8]) or '(none)'}. Batch only split.trainable rows.")
    fill = np.zeros((shape[1] if shape else count) - count, dtype=np.int32)
    return Batch(
        inputs=inputs,
        target_positions=np.concatenate([place[trained], fill]).astype(np.int32),
        targets=np.concatenate([table.tokens[here[trained] + 1], fill]),
        weights=np.concatenate([np.ones(count, dtype=np.float32), fill.astype(np.float32)]),
        num_tokens=count,
        rows=tuple(indices.tolist()),
        sources=sources,
        padded_tokens=inputs.size,
        real_tokens=int(used.sum()),
        segments=segments,
        row_lengths=in_row.astype(np.int32),
    )


# ---- which rows stand in which batch


class _Rows:
    """What the batches' rows hold of one data set, pass after pass: each trainable example once a pass.

    Attributes:
        widths: (rows,) input positions of each row of a pass; the same in every pass.
        most_targets: (rows,) the most targets that each can have.
    """

    def __init__(self, split: Split, examples: np.ndarray, packing: bool, max_seq_length: int):
        self._examples, self._lengths = examples, split.lengths[examples]
        self.widths, self.most_targets = self._lengths - 1, split.trained_lengths[examples]
        self._packed: list[list[int]] | None = None
        if packing:
            self._pack(split, max_seq_length)

    def _pack(self, split: Split, max_seq_length: int) -> None:
        """Fixes which lengths share a row, by rank: place k is that of the k-th longest example."""
        lengths = self._lengths
        if lengths.max(initial=0) > max_seq_length:
            example = split[int(self._examples[lengths.argmax()])]
            raise ConfigError(
                f"max_seq_length={max_seq_length}: {example.source} has {len(example.tokens):,} tokens and fits into no row."
                " Load the data with this max_seq_length, which cuts it, or raise it."
            )
        by_place = np.sort(lengths)[::-1]
        most = np.zeros(int(lengths.max(initial=0)) + 1, dtype=np.int64)  # targets that an example of each length has at most
        np.maximum.at(most, lengths, self.most_targets)
        self._packed = best_fit(by_place, max_seq_length)
        self.widths = np.array([(by_place[places] - 1).sum() for places in self._packed], dtype=np.int64)
        self.most_targets = np.array([most[by_place[places]].sum() for places in self._packed], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.widths)

    def of_pass(self, random: np.random.RandomState) -> list[Row]:
        """The rows of a pass; with packing, which of the examples of a length stands where is drawn."""
        rows: list[Row] = self._examples.tolist()
        if self._packed is None:
            return rows
        drawn = random.permutation(len(rows))
        drawn = drawn[np.argsort(-self._lengths[drawn], kind="stable")]  # those of one length stay in the order drawn
        return [tuple(rows[drawn[place]] for place in places) for places in self._packed]


class StepBatches:
    """The micro-batches of every optimizer step: every trainable example exactly once per epoch, as a function of (seed, epoch) only.

    An epoch's rows are shuffled, cut into windows of 64 batches, sorted by length within each, cut into batches, and the
    batches are shuffled. A batch with fewer rows than `batch_size` comes at most once per epoch, as the last; which rows it
    holds is drawn too, so that it isn't always the longest ones.

    With packing, a row holds the examples that `best_fit` puts there. The lengths that share a row are the same in every epoch, and so
    is the number of rows and of steps; which of the examples of a length stands where is drawn for each epoch.

    Where several data sets with weights make up the split (`Split.parts`), an epoch has as many rows as they have together, shared out
    by the weights. Each data set is gone through in passes of its own, shuffled anew for each: an epoch takes the rows that follow
    those of the epoch before, so that no example comes again before all of its data set have come. With packing the weights count packed
    rows, and examples of different data sets share none.

    Args:
        split: the training split.
        batch_size: rows of a micro-batch; with packing, packed rows.
        seed: a whole number of at least 0.
        grad_accumulation_steps: micro-batches of a step; the last step of an epoch may have fewer.
        packing: whether a row holds several examples.
        max_seq_length: tokens of a packed row at most.
        rows_together: so many rows that follow each other in the split stand in one micro-batch, in their order, such as the two of a pair.
        multiple_of: T is padded to a multiple of this, which may be more than `max_seq_length`. What stands in which batch does not
            depend on it.

    Raises:
        ConfigError: a number is out of range, an example has more tokens than a packed row, or rows cannot stay together.
    """

    def __init__(
        self, split: Split, *, batch_size: int, seed: int, grad_accumulation_steps: int = 1,
        packing: bool = False, max_seq_length: int = 2048, multiple_of: int = 1, rows_together: int = 1,
    ):  # fmt: skip
        self.batch_size = whole_number("batch_size", batch_size, low=1)
        self.seed = whole_number("seed", seed, low=0)
        self.grad_accumulation_steps = whole_number("grad_accumulation_steps", grad_accumulation_steps, low=1)
        self.max_seq_length = whole_number("max_seq_length", max_seq_length, low=2)
        self._multiple_of = whole_number("multiple_of", multiple_of, low=1)
        self._split, self.rows_together = split, whole_number("rows_together", rows_together, low=1)
        if rows_together > 1:
            _check_together(split, rows_together, batch_size, packing)
        # As lists, because single elements of an array take ten times as long to read.
        self._width_of, self._targets_of = (split.lengths - 1).tolist(), split.trained_lengths.tolist()
        self._parts = [_Rows(split, examples, packing, self.max_seq_length) for examples in split.trainable_parts()]
        sizes = [len(part) for part in self._parts]
        self._taken = rows_of_epoch([part.weight for part in split.parts], sizes) if split.parts else sizes
        # Of every row that an epoch may have, as often as it may: input positions, and the most targets.
        often = [1 if not split.parts else (taken + size - 2) // size + 1 for taken, size in zip(self._taken, sizes, strict=True)]
        self._widths = np.concatenate([np.tile(part.widths, times) for part, times in zip(self._parts, often, strict=True)])
        self._most_targets = np.concatenate([np.tile(part.most_targets, times) for part, times in zip(self._parts, often, strict=True)])
        self._epoch, self._steps = -1, []  # the epoch that `of_step` was in last

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all batches of an epoch; with packing, packed ones."""
        return sum(self._taken)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every example is trained on once; with weights, as many as if it were so."""
        return -(-self.batches_per_epoch // self.grad_accumulation_steps)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a step's rows in the mean, without padding."""
        lengths = np.minimum(self._split.lengths, self.max_seq_length)
        tokens = [int(lengths[examples].sum()) for examples in self._split.trainable_parts()]
        parts = zip(tokens, self._taken, self._parts, strict=True)
        return sum(count * taken / len(part) for count, taken, part in parts) / self.steps_per_epoch

    @property
    def packing_note(self) -> str:
        """What packing makes of the rows, in a sentence."""
        return (
            f"{len(self._split.trainable):,} rows are packed into {sum(map(len, self._parts)):,} of at most {self.max_seq_length:,} tokens;"
            f" batch_size={self.batch_size} counts these, and an epoch is {self.steps_per_epoch:,} steps"
        )

    def of_step(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`, counted from 0."""
        epoch, cursor = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self.epoch(epoch)
        return [collate(self._split, rows, self.shape(rows)) for rows in self._steps[cursor]]

    def widest_step(self) -> int:
        """The step of the first epoch, counted from 0, that has the largest micro-batch."""
        return int(np.argmax([max(len(rows) * self.shape(rows)[0] for rows in step) for step in self.epoch(0)]))

    def examples_of(self, step: int) -> list[Example]:
        """The examples of step `step`, counted from 1 as in its report, in the order of the micro-batches.

        Raises:
            ConfigError: no whole number of at least 1.
        """
        return [self._split.examples[row] for batch in self.of_step(whole_number("step", step, low=1) - 1) for row in batch.rows]

    def epoch(self, epoch: int) -> list[list[tuple[Row, ...]]]:
        """The steps of epoch `epoch` (from 0): each a list of micro-batches, each a tuple of what its rows hold."""
        rows, _, batches = self._rows_and_batches(epoch)
        named = [tuple(rows[i] for i in batch) for batch in batches]
        n = self.grad_accumulation_steps
        return [named[i : i + n] for i in range(0, len(named), n)]

    def _random(self, *position: int) -> np.random.RandomState:
        # RandomState because numpy promises that its streams stay the same in later versions; a run must resume exactly.
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self.seed, *position))))

    def _rows_and_batches(self, epoch: int) -> tuple[list[Row], np.ndarray, list[np.ndarray]]:
        """The rows of an epoch, their widths, and its batches as indices into them."""
        random = self._random(whole_number("epoch", epoch, low=0))
        if not self._split.parts:
            rows, widths = self._parts[0].of_pass(random), self._widths
        else:
            drawn = [self._drawn(number, epoch) for number in range(len(self._parts))]
            rows, widths = [row for rows, _ in drawn for row in rows], np.concatenate([widths for _, widths in drawn])
        if (together := self.rows_together) == 1:
            return rows, widths, _draw_batches(random, widths, self.batch_size)
        drawn_groups = _draw_batches(random, widths.reshape(-1, together).max(axis=1), self.batch_size // together)
        return rows, widths, [(together * groups[:, None] + np.arange(together)).reshape(-1) for groups in drawn_groups]

    def _drawn(self, number: int, epoch: int) -> tuple[list[Row], np.ndarray]:
        """The rows that an epoch takes of a data set, and their widths: a piece of its passes, one behind the other."""
        part, taken = self._parts[number], self._taken[number]
        rows: list[Row] = []
        widths: list[np.ndarray] = []
        at, end = epoch * taken, (epoch + 1) * taken
        while at < end:
            number_of_pass, begin = divmod(at, len(part))
            random = self._random(number_of_pass, number + 1)
            all_rows, order = part.of_pass(random), random.permutation(len(part))
            order = order[begin : begin + end - at]
            rows += [all_rows[i] for i in order.tolist()]
            widths.append(part.widths[order])
            at += len(order)
        return rows, np.concatenate(widths)

    def shape(self, rows: Sequence[Row]) -> tuple[int, int]:
        """(T, N) for a batch of an epoch; with B they are at most 16 different ones, over all epochs."""
        needs = [self._need(row) for row in rows]
        return smallest(self._shapes[len(rows)], len(rows), max(width for width, _ in needs), sum(count for _, count in needs))

    def _need(self, row: Row) -> tuple[int, int]:
        """Input positions and targets of a row."""
        examples = row if isinstance(row, tuple) else (row,)
        return sum(self._width_of[i] for i in examples), sum(self._targets_of[i] for i in examples)

    @cached_property
    def _shapes(self) -> dict[int, np.ndarray]:
        """B -> (k, 2), the (T, N) that batches of B rows may have, chosen by those of the first epoch."""
        rows, widths, batches = self._rows_and_batches(0)
        padded, padded_of = padded_to(self._widths, self._multiple_of), padded_to(widths, self._multiple_of)
        needed = np.array([self._need(row)[1] for row in rows])
        shapes: dict[int, np.ndarray] = {}
        for size in {len(batch) for batch in batches}:
            if size == self.batch_size:
                full = [batch for batch in batches if len(batch) == size]
                widths, counts = np.array([[padded_of[batch].max(), needed[batch].sum()] for batch in full]).T
                chosen = choose_shapes(widths, counts, size, MAX_SHAPES - _PARTIAL_SHAPES - 1)
                # One that is enough for every batch there could be: other epochs bring other batches.
                shapes[size] = np.vstack([chosen, [padded.max(), _largest_sum(self._most_targets, size)]])
            else:
                edges = choose_buckets(padded, _PARTIAL_SHAPES)
                shapes[size] = np.array([[edge, _largest_sum(self._most_targets[padded <= edge], size)] for edge in edges])
        return shapes

    def __repr__(self) -> str:
        return (
            f"StepBatches({self.rows_per_epoch:,} rows, batch_size={self.batch_size}, seed={self.seed}, "
            f"grad_accumulation_steps={self.grad_accumulation_steps}, {self.steps_per_epoch:,} steps per epoch)"
        )


def _check_together(split: Split, together: int, batch_size: int, packing: bool) -> None:
    """
    Raises:
        ConfigError: rows of a split cannot stay together.
    """
    problem = None
    if packing or split.parts:
        problem = "packing" if packing else "a mixture of data sets"
        problem = f"{problem} puts rows together otherwise. Leave it out"
    elif batch_size % together:
        problem = f"batch_size={batch_size} is no multiple of it"
    elif len(split.trainable) != len(split):
        lost = np.setdiff1d(np.arange(len(split)), split.trainable)[0]
        problem = f"{split[int(lost)].source} has no token to train on, so the rows that belong together are not whole"
    elif len(split) % together:
        problem = f"the split has {len(split):,} rows, no multiple of it"
    if problem:
        raise ConfigError(f"rows_together={together}: {problem}.")


def padded_to(widths: Any, multiple: int) -> Any:
    """A width, or an array of them, rounded up to a multiple."""
    return -(-widths // multiple) * multiple


def _largest_sum(counts: np.ndarray, rows: int) -> int:
    """The most targets that so many rows can have together."""
    return int(np.sort(counts)[-rows:].sum())


def _draw_batches(random: np.random.RandomState, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches of rows of about one length, in random order, as indices into `lengths`; a partial one comes last."""
    order = random.permutation(len(lengths))
    window = batch_size * WINDOW_BATCHES
    batches: list[np.ndarray] = []
    partial: list[np.ndarray] = []
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        left_over = len(rows) % batch_size
        if left_over:  # only in the last window
            at = batch_size * random.randint(len(rows) // batch_size + 1)
            partial.append(rows[at : at + left_over])
            rows = np.delete(rows, np.s_[at : at + left_over])
        batches.extend(rows.reshape(-1, batch_size))
    return [batches[i] for i in random.permutation(len(batches))] + partial


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the fullest row that still has room for it.

    Args:
        lengths: (examples,) tokens of each, none more than `capacity`.
        capacity: tokens of a row.

    Returns:
        The examples of each row, as indices into `lengths`, the longest first. How many examples of which length share a row
        depends on the counts of lengths only, not on the order of `lengths`.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> rows
    free = 0  # bit r: some row has r tokens free
    for index in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[index])
        if large_enough := free >> length:
            room = length + (large_enough & -large_enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        free |= 1 << (room - length)
    return rows


def row_widths(split: Split, max_seq_length: int, packing: bool) -> np.ndarray:
    """(rows,) input positions of every row that the batches of a training split have."""
    lengths = np.minimum(split.lengths, max_seq_length)
    if not packing:
        return lengths[split.trainable] - 1
    packed = [(lengths[examples], best_fit(lengths[examples], max_seq_length)) for examples in split.trainable_parts()]
    return np.array([(own[row] - 1).sum() for own, rows in packed for row in rows])


# ---- evaluation


def evaluation_batches(split: Split, batch_size: int, max_batches: int | None = None) -> list[tuple[int, ...]]:
    """Batches of row indices for an evaluation, always the same for the same arguments, sorted by length.

    Args:
        split: a `Split`.
        batch_size: rows of a batch; the last may have fewer.
        max_batches: None or -1 for the whole split. Where it has more batches, `max_batches * batch_size` rows spread
            evenly over the split stand for it.

    Raises:
        ConfigError: a number is out of range.
    """
    batch_size = whole_number("batch_size", batch_size, low=1)
    rows = split.trainable
    if max_batches is not None and max_batches != -1:
        wanted = whole_number("max_batches (None or -1 for all)", max_batches, low=1) * batch_size
        if wanted < len(rows):
            rows = rows[np.arange(wanted) * len(rows) // wanted]
    rows = rows[np.argsort(split.lengths[rows], kind="stable")]
    return [tuple(rows[i : i + batch_size].tolist()) for i in range(0, len(rows), batch_size)]


def evaluation_shapes(split: Split, batches: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(T, N) of each of the batches that `evaluation_batches` gave; with B they are at most 16 different ones."""
    widths = np.array([max(split.lengths[list(rows)].max() - 1, 1) for rows in batches])
    counts = np.array([split.trained_lengths[list(rows)].sum() for rows in batches])
    sizes = np.array([len(rows) for rows in batches])
    found = np.zeros((len(batches), 2), dtype=np.int64)
    different = np.unique(sizes)
    for size in different.tolist():
        own = sizes == size
        shapes = choose_shapes(widths[own], counts[own], size, MAX_SHAPES - len(different) + 1 if size == different[-1] else 1)
        found[own] = [smallest(shapes, size, width, count) for width, count in zip(widths[own], counts[own], strict=True)]
    return [(width, count) for width, count in found.tolist()]
