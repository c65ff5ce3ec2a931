"""Several examples in one row of a batch, so that hardly anything is padding.

Attention keeps the examples of a row apart by `Batch.segments`; positions need no reset, since rotary positions are relative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fulltune_nb.data.dataset import Split
from fulltune_nb.data.encode import Example
from fulltune_nb.data.shapes import BatchShapes, padded_count, shapes_of_all
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.settings import whole_number

# -- batching: Which rows stand in which batch, and a batch's arrays

Row = int | tuple[int, ...]
"""What a row of a batch holds: an example of the split, by its index, or several that are packed."""

WINDOW_BATCHES = 64
"""Rows are sorted by length within windows of this many batches. Larger windows pad less and mix less; see `BatchOrder`."""


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

    def __repr__(self) -> str:
        return f"Batch(inputs {self.inputs.shape}, {self.num_tokens} trained tokens, {self.padded_tokens - self.real_tokens} padding)"


def collate(split, rows: Sequence[Row], shape: tuple[int, int] | None = None) -> Batch:
    """The arrays of a batch.

    Args:
        split: a `Split`.
        rows: what each row holds.
        shape: (T, N), large enough; None rounds up as little as few shapes allow.

    Raises:
        DataError: none of the examples has a token to train on.
    """
    packed = any(isinstance(row, tuple) for row in rows)
    groups = [tuple(int(index) for index in row) if isinstance(row, tuple) else (int(row),) for row in rows]
    indices = tuple(index for group in groups for index in group)
    sources = tuple(split[index].source for index in indices)
    used = [sum(max(len(split[index].tokens) - 1, 0) for index in group) for group in groups]
    width = shape[0] if shape else _bucketed(split, max(used, default=0))
    inputs = np.zeros((len(groups), width), dtype=np.int32)  # any id will do for padding: no real position sees it
    segments = np.full_like(inputs, -1) if packed else None
    positions, targets = [], []
    for b, group in enumerate(groups):
        begin = 0
        for number, index in enumerate(group):
            example = split[index]
            end = begin + max(len(example.tokens) - 1, 0)
            inputs[b, begin:end] = example.tokens[:-1]
            if packed:
                segments[b, begin:end] = number
            trained = np.flatnonzero(example.loss_mask[1:])
            positions.append(b * width + begin + trained)
            targets.append(example.tokens[1:][trained])
            begin = end
    count = sum(len(t) for t in targets)
    if not count:
        raise DataError(f"A batch without a token to train on: rows {', '.join(sources[:8]) or '(none)'}. Batch only split.trainable rows.")
    padded = shape[1] if shape else padded_count(count, inputs.size)
    fill = np.zeros(padded - count, dtype=np.int32)
    weights = np.zeros(padded, dtype=np.float32)
    weights[:count] = 1
    return Batch(
        inputs=inputs,
        target_positions=np.concatenate([*positions, fill]).astype(np.int32),
        targets=np.concatenate([*targets, fill]).astype(np.int32),
        weights=weights,
        num_tokens=count,
        rows=indices,
        sources=sources,
        padded_tokens=inputs.size,
        real_tokens=sum(used),
        segments=segments,
    )


def _bucketed(split, longest: int) -> int:
    edges = split.bucket_lengths
    at = int(np.searchsorted(edges, longest))
    return int(edges[at]) if at < len(edges) else longest  # an untrainable row can be longer than every bucket


class BatchOrder:
    """Which rows each step of each epoch trains on: every trainable row exactly once per epoch.

    An epoch's rows are shuffled, cut into windows of 64 batches, sorted by length within each, cut into batches, and the
    batches are shuffled. A batch with fewer rows than `batch_size` comes at most once per epoch, as the last; which rows it
    holds is drawn too, so that it isn't always the longest ones. The order depends on (seed, epoch) only.

    Args:
        split: a `Split`.
        batch_size: rows of a micro-batch.
        seed: a whole number of at least 0.
        grad_accumulation_steps: micro-batches of a step; the last step of an epoch may have fewer.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, split, batch_size: int, seed: int, grad_accumulation_steps: int = 1):
        self.batch_size = whole_number("batch_size", batch_size, low=1)
        self.seed = whole_number("seed", seed, low=0)
        self.grad_accumulation_steps = whole_number("grad_accumulation_steps", grad_accumulation_steps, low=1)
        self._split = split

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all batches of an epoch; with packing, packed ones."""
        return len(self._widths)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.grad_accumulation_steps)

    def epoch(self, epoch: int) -> list[list[tuple[Row, ...]]]:
        """The steps of epoch `epoch` (from 0): each a list of micro-batches, each a tuple of what its rows hold."""
        rows, batches = self._deal(epoch)
        named = [tuple(rows[i] for i in batch) for batch in batches]
        n = self.grad_accumulation_steps
        return [named[i : i + n] for i in range(0, len(named), n)]

    def shape(self, rows: Sequence[Row]) -> tuple[int, int]:
        """(T, N) for a batch of an epoch; with B they are at most 16 different ones, over all epochs."""
        needs = [self._need(row) for row in rows]
        return self.shapes.of(len(rows), max(width for width, _ in needs), sum(count for _, count in needs))

    @cached_property
    def shapes(self) -> BatchShapes:
        """The shapes of all batches."""
        rows, batches = self._deal(0)
        needed = np.array([self._need(row)[1] for row in rows])
        return BatchShapes(self._widths, self._most_targets, batches, needed, self.batch_size)

    def _deal(self, epoch: int) -> tuple[list[Row], list[np.ndarray]]:
        """What can stand as a row in this epoch, and its batches, as indices into that."""
        # RandomState because numpy promises that its streams stay the same in later versions; a run must resume exactly.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self.seed, whole_number("epoch", epoch, low=0)))))
        rows = self._rows(random)
        return rows, deal(random, self._widths, self.batch_size)

    # What packing does otherwise.

    @property
    def _widths(self) -> np.ndarray:
        """(rows,) input positions of each row; the same in every epoch."""
        return self._split.lengths[self._split.trainable] - 1

    @property
    def _most_targets(self) -> np.ndarray:
        """(rows,) the most targets that each row has in any epoch."""
        return self._split.trained_lengths[self._split.trainable]

    def _rows(self, random: np.random.RandomState) -> list[Row]:
        return self._split.trainable.tolist()

    def _need(self, row: Row) -> tuple[int, int]:
        """Input positions and targets of a row."""
        lengths, trained = self._per_example
        examples = row if isinstance(row, tuple) else (row,)
        return sum(lengths[i] - 1 for i in examples), sum(trained[i] for i in examples)

    @cached_property
    def _per_example(self) -> tuple[list[int], list[int]]:
        """Tokens and trained tokens, as lists: single elements of an array take ten times as long to read."""
        return self._split.lengths.tolist(), self._split.trained_lengths.tolist()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.rows_per_epoch:,} rows, batch_size={self.batch_size}, seed={self.seed}, "
            f"grad_accumulation_steps={self.grad_accumulation_steps}, {self.steps_per_epoch:,} steps per epoch)"
        )


def deal(random: np.random.RandomState, lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
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


def evaluation_shapes(split, batches: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(T, N) of each of the batches that `evaluation_batches` gave; with B they are at most 16 different ones."""
    lengths, trained = split.lengths, split.trained_lengths
    widths = np.array([max(lengths[list(rows)].max() - 1, 1) for rows in batches])
    return shapes_of_all(widths, np.array([trained[list(rows)].sum() for rows in batches]), np.array([len(rows) for rows in batches]))


def evaluation_batches(split, batch_size: int, max_batches: int | None = None) -> list[tuple[int, ...]]:
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
        if isinstance(max_batches, bool) or max_batches == 0:
            raise ConfigError(f"max_batches: expected a whole number of at least 1, or -1 or None for all, got {max_batches!r}.")
        wanted = whole_number("max_batches", max_batches, low=1) * batch_size
        if wanted < len(rows):
            rows = rows[np.arange(wanted) * len(rows) // wanted]
    rows = rows[np.argsort(split.lengths[rows], kind="stable")]
    return [tuple(int(row) for row in rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


# -- packing: Several examples in one row of a batch, so that hardly anything is padding

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


class PackedOrder(BatchOrder):
    """Which examples each row of each step of each epoch holds: every trainable example exactly once per epoch.

    Examples are packed by best fit, decreasing. The lengths that share a row are the same in every epoch, and so is the number
    of rows and of steps; which of the examples of a length stands where, and the order of the rows, is drawn for each epoch,
    from (seed, epoch) only. Rows are then put into batches as `BatchOrder` puts examples.

    Args:
        split: a `Split`.
        batch_size: packed rows of a micro-batch.
        seed: a whole number of at least 0.
        grad_accumulation_steps: micro-batches of a step; the last step of an epoch may have fewer.
        max_seq_length: tokens of a row at most.

    Raises:
        ConfigError: a number is out of range, or an example has more tokens than a row.
    """

    def __init__(self, split, batch_size: int, seed: int, grad_accumulation_steps: int = 1, max_seq_length: int = 2048):
        super().__init__(split, batch_size, seed, grad_accumulation_steps)
        capacity = whole_number("max_seq_length", max_seq_length, low=2)
        self._lengths = split.lengths[split.trainable]
        if len(self._lengths) and self._lengths.max() > capacity:
            longest = split[int(split.trainable[self._lengths.argmax()])]
            raise ConfigError(
                f"max_seq_length={capacity}: {longest.source} has {len(longest.tokens):,} tokens and fits into no row."
                " Load the data with this max_seq_length, which cuts it, or raise it."
            )
        # In terms of places in the order of decreasing length; an epoch says which example stands at which place.
        self._descending = np.argsort(-self._lengths, kind="stable")
        self._packed = best_fit(self._lengths[self._descending], capacity)

    @cached_property
    def _widths(self) -> np.ndarray:
        lengths = self._lengths[self._descending]
        return np.array([(lengths[places] - 1).sum() for places in self._packed], dtype=np.int64)

    @cached_property
    def _most_targets(self) -> np.ndarray:
        lengths, trained = self._lengths, self._split.trained_lengths[self._split.trainable]
        most = np.zeros(int(lengths.max(initial=0)) + 1, dtype=np.int64)  # by length
        np.maximum.at(most, lengths, trained)
        at_place = most[lengths[self._descending]]
        return np.array([at_place[places].sum() for places in self._packed], dtype=np.int64)

    def _rows(self, random: np.random.RandomState) -> list[Row]:
        drawn = random.permutation(len(self._lengths))
        drawn = drawn[np.argsort(-self._lengths[drawn], kind="stable")]  # those of one length stay in the order drawn
        at_place = self._split.trainable[drawn].tolist()
        return [tuple(at_place[place] for place in places) for places in self._packed]


def row_widths(lengths: np.ndarray, max_seq_length: int, packing: bool) -> np.ndarray:
    """(rows,) input positions of every row that an epoch's batches have, from the tokens (examples,) of what they hold."""
    lengths = np.minimum(lengths, max_seq_length)
    if not packing:
        return lengths - 1
    return np.array([(lengths[row] - 1).sum() for row in best_fit(lengths, max_seq_length)])


class StepBatches:
    """The micro-batches of every optimizer step, as a function of the step's number alone.

    Args:
        split: the training split.
        batch_size: rows of a micro-batch; with packing, packed rows.
        seed: a whole number of at least 0.
        grad_accumulation_steps: micro-batches of a step; the last step of an epoch may have fewer.
        packing: whether a row holds several examples.
        max_seq_length: tokens of a packed row at most.

    Raises:
        ConfigError: a number is out of range, or an example has more tokens than a packed row.
    """

    def __init__(
        self, split: Split, *, batch_size: int, seed: int, grad_accumulation_steps: int = 1,
        packing: bool = False, max_seq_length: int = 2048,
    ):  # fmt: skip
        self._split, self._max_seq_length = split, max_seq_length
        numbers = batch_size, seed, grad_accumulation_steps
        self._order = PackedOrder(split, *numbers, max_seq_length) if packing else BatchOrder(split, *numbers)
        self._epoch = -1
        self._steps: list[list[tuple[Row, ...]]] = []  # of self._epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every row is trained on once."""
        return self._order.steps_per_epoch

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a step's rows in the mean, without padding."""
        lengths = self._split.lengths[self._split.trainable]
        return float(np.minimum(lengths, self._max_seq_length).sum() / self.steps_per_epoch)

    @property
    def packing_note(self) -> str:
        """What packing makes of the rows, in a sentence."""
        rows, order = len(self._split.trainable), self._order
        return (
            f"{rows:,} rows are packed into {order.rows_per_epoch:,} of at most {self._max_seq_length:,} tokens;"
            f" batch_size={order.batch_size} counts these, and an epoch is {order.steps_per_epoch:,} steps"
        )

    def of_step(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`, counted from 0."""
        epoch, cursor = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._order.epoch(epoch)
        return [collate(self._split, rows, self._order.shape(rows)) for rows in self._steps[cursor]]

    def examples_of(self, step: int) -> list[Example]:
        """The rows of step `step`, counted from 1 as in its report, in the order of the micro-batches.

        Raises:
            ConfigError: no whole number of at least 1.
        """
        return [self._split[row] for batch in self.of_step(whole_number("step", step, low=1) - 1) for row in batch.rows]
