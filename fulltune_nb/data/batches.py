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

import numpy as np

from fulltune_nb.data.dataset import Split
from fulltune_nb.data.example import Example
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.settings import whole_number

Row = int | tuple[int, ...]
"""What a row of a batch holds: an example of the split, by its index, or several that are packed."""

WINDOW_BATCHES = 64
"""Rows are sorted by length within windows of this many batches. Larger windows pad less and mix less; see `StepBatches`."""

MAX_BUCKETS = 12
"""Values of T at most, before pairs (T, N) are formed."""

MAX_SHAPES = 16
"""Different (B, T, N) at most of all training batches of a split, over all epochs; and of all batches of an evaluation."""

_CANDIDATES = 256
_PARTIAL_SHAPES = 3  # of MAX_SHAPES, for batches of fewer rows
_COUNTS_PER_LENGTH = 6  # values of N that are candidates, for each T

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
    groups = [tuple(int(index) for index in row) if isinstance(row, tuple) else (int(row),) for row in rows]
    indices = tuple(index for group in groups for index in group)
    table = split.examples
    sources = tuple(table.sources[index] for index in indices)
    used = [sum(max(int(split.lengths[index]) - 1, 0) for index in group) for group in groups]
    width = shape[0] if shape else max(used, default=0)
    inputs = np.zeros((len(groups), width), dtype=np.int32)  # any id will do for padding: no real position sees it
    segments = np.full_like(inputs, -1) if packed else None
    positions, targets = [], []
    for b, group in enumerate(groups):
        begin = 0
        for number, index in enumerate(group):
            at = slice(table.begins[index], table.begins[index + 1])
            tokens, loss_mask = table.tokens[at], table.loss_mask[at]
            end = begin + max(len(tokens) - 1, 0)
            inputs[b, begin:end] = tokens[:-1]
            if packed:
                segments[b, begin:end] = number
            trained = np.flatnonzero(loss_mask[1:])
            positions.append(b * width + begin + trained)
            targets.append(tokens[1:][trained])
            begin = end
    count = sum(len(t) for t in targets)
    if not count:
        raise DataError(f"A batch without a token to train on: rows {', '.join(sources[:8]) or '(none)'}. Batch only split.trainable rows.")
    fill = np.zeros((shape[1] if shape else count) - count, dtype=np.int32)
    return Batch(
        inputs=inputs,
        target_positions=np.concatenate([*positions, fill]).astype(np.int32),
        targets=np.concatenate([*targets, fill]).astype(np.int32),
        weights=np.concatenate([np.ones(count, dtype=np.float32), fill.astype(np.float32)]),
        num_tokens=count,
        rows=indices,
        sources=sources,
        padded_tokens=inputs.size,
        real_tokens=sum(used),
        segments=segments,
    )


# ---- which rows stand in which batch


class StepBatches:
    """The micro-batches of every optimizer step: every trainable example exactly once per epoch, as a function of (seed, epoch) only.

    An epoch's rows are shuffled, cut into windows of 64 batches, sorted by length within each, cut into batches, and the
    batches are shuffled. A batch with fewer rows than `batch_size` comes at most once per epoch, as the last; which rows it
    holds is drawn too, so that it isn't always the longest ones.

    With packing, a row holds the examples that `best_fit` puts there. The lengths that share a row are the same in every epoch, and so
    is the number of rows and of steps; which of the examples of a length stands where is drawn for each epoch.

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
        self.batch_size = whole_number("batch_size", batch_size, low=1)
        self.seed = whole_number("seed", seed, low=0)
        self.grad_accumulation_steps = whole_number("grad_accumulation_steps", grad_accumulation_steps, low=1)
        self.max_seq_length = whole_number("max_seq_length", max_seq_length, low=2)
        self._split = split
        # As lists, because single elements of an array take ten times as long to read.
        self._width_of, self._targets_of = (split.lengths - 1).tolist(), split.trained_lengths.tolist()
        # The same in every epoch: (rows,) input positions of each row, and the most targets that it can have.
        self._widths = split.lengths[split.trainable] - 1
        self._most_targets = split.trained_lengths[split.trainable]
        self._packed: list[list[int]] | None = None
        if packing:
            self._pack(split.lengths[split.trainable])
        self._epoch, self._steps = -1, []  # the epoch that `of_step` was in last

    def _pack(self, lengths: np.ndarray) -> None:
        """Which places share a row, in the order of decreasing length; an epoch says which example stands at which place."""
        if len(lengths) and lengths.max() > self.max_seq_length:
            longest = self._split.examples[int(self._split.trainable[lengths.argmax()])]
            raise ConfigError(
                f"max_seq_length={self.max_seq_length}: {longest.source} has {len(longest.tokens):,} tokens and fits into no row."
                " Load the data with this max_seq_length, which cuts it, or raise it."
            )
        by_place = np.sort(lengths)[::-1]
        most = np.zeros(int(lengths.max(initial=0)) + 1, dtype=np.int64)  # targets that an example of each length has at most
        np.maximum.at(most, lengths, self._most_targets)
        self._packed = best_fit(by_place, self.max_seq_length)
        self._widths = np.array([(by_place[places] - 1).sum() for places in self._packed], dtype=np.int64)
        self._most_targets = np.array([most[by_place[places]].sum() for places in self._packed], dtype=np.int64)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all batches of an epoch; with packing, packed ones."""
        return len(self._widths)

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every example is trained on once."""
        return -(-self.batches_per_epoch // self.grad_accumulation_steps)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a step's rows in the mean, without padding."""
        lengths = self._split.lengths[self._split.trainable]
        return float(np.minimum(lengths, self.max_seq_length).sum() / self.steps_per_epoch)

    @property
    def packing_note(self) -> str:
        """What packing makes of the rows, in a sentence."""
        return (
            f"{len(self._split.trainable):,} rows are packed into {self.rows_per_epoch:,} of at most {self.max_seq_length:,} tokens;"
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
        rows, batches = self._rows_and_batches(epoch)
        named = [tuple(rows[i] for i in batch) for batch in batches]
        n = self.grad_accumulation_steps
        return [named[i : i + n] for i in range(0, len(named), n)]

    def _rows_and_batches(self, epoch: int) -> tuple[list[Row], list[np.ndarray]]:
        """The rows of an epoch, and its batches as indices into them."""
        # RandomState because numpy promises that its streams stay the same in later versions; a run must resume exactly.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self.seed, whole_number("epoch", epoch, low=0)))))
        rows: list[Row] = self._split.trainable.tolist()
        if self._packed is not None:
            lengths = self._split.lengths[self._split.trainable]
            drawn = random.permutation(len(lengths))
            drawn = drawn[np.argsort(-lengths[drawn], kind="stable")]  # those of one length stay in the order drawn
            rows = [tuple(rows[drawn[place]] for place in places) for places in self._packed]
        return rows, _draw_batches(random, self._widths, self.batch_size)

    def shape(self, rows: Sequence[Row]) -> tuple[int, int]:
        """(T, N) for a batch of an epoch; with B they are at most 16 different ones, over all epochs."""
        needs = [self._need(row) for row in rows]
        return _smallest(self._shapes[len(rows)], len(rows), max(width for width, _ in needs), sum(count for _, count in needs))

    def _need(self, row: Row) -> tuple[int, int]:
        """Input positions and targets of a row."""
        examples = row if isinstance(row, tuple) else (row,)
        return sum(self._width_of[i] for i in examples), sum(self._targets_of[i] for i in examples)

    @cached_property
    def _shapes(self) -> dict[int, np.ndarray]:
        """B -> (k, 2), the (T, N) that batches of B rows may have, chosen by those of the first epoch."""
        rows, batches = self._rows_and_batches(0)
        needed = np.array([self._need(row)[1] for row in rows])
        shapes: dict[int, np.ndarray] = {}
        for size in {len(batch) for batch in batches}:
            if size == self.batch_size:
                full = [batch for batch in batches if len(batch) == size]
                widths, counts = np.array([[self._widths[batch].max(), needed[batch].sum()] for batch in full]).T
                chosen = choose_shapes(widths, counts, size, MAX_SHAPES - _PARTIAL_SHAPES - 1)
                # One that is enough for every batch there could be: other epochs bring other batches.
                shapes[size] = np.vstack([chosen, [self._widths.max(), _largest_sum(self._most_targets, size)]])
            else:
                edges = choose_buckets(self._widths, _PARTIAL_SHAPES)
                shapes[size] = np.array([[edge, _largest_sum(self._most_targets[self._widths <= edge], size)] for edge in edges])
        return shapes

    def __repr__(self) -> str:
        return (
            f"StepBatches({self.rows_per_epoch:,} rows, batch_size={self.batch_size}, seed={self.seed}, "
            f"grad_accumulation_steps={self.grad_accumulation_steps}, {self.steps_per_epoch:,} steps per epoch)"
        )


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


def row_widths(lengths: np.ndarray, max_seq_length: int, packing: bool) -> np.ndarray:
    """(rows,) input positions of every row that an epoch's batches have, from the tokens (examples,) of what they hold."""
    lengths = np.minimum(lengths, max_seq_length)
    if not packing:
        return lengths - 1
    return np.array([(lengths[row] - 1).sum() for row in best_fit(lengths, max_seq_length)])


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
        found[own] = [_smallest(shapes, size, width, count) for width, count in zip(widths[own], counts[own], strict=True)]
    return [(width, count) for width, count in found.tolist()]


# ---- shapes


def choose_shapes(widths: np.ndarray, counts: np.ndarray, rows: int, limit: int) -> np.ndarray:
    """At most `limit` pairs (T, N) of which each batch finds one that is as large as it needs, with little padding.

    The batches are sorted into a grid of at most 12 by 6 pairs; then the two pairs whose union adds the least padding become
    one, until few enough are left. A position and a target count the same.

    Args:
        widths: (batches,) T that each needs.
        counts: (batches,) N that each needs.
        rows: B of all of them.

    Returns:
        (k, 2) int64.
    """
    edges = choose_buckets(widths)
    rounded = edges[np.searchsorted(edges, widths)]
    pairs: list[np.ndarray] = []
    for width in np.unique(rounded):
        needed = counts[rounded == width]
        levels = choose_buckets(needed, _COUNTS_PER_LENGTH)
        for level, number in zip(*np.unique(levels[np.searchsorted(levels, needed)], return_counts=True), strict=True):
            pairs.append(np.array([width, level, number]))
    found = np.array(pairs, dtype=np.int64)
    while len(found) > limit:
        width, count, number = found.T
        union = rows * np.maximum(width[:, None], width) + np.maximum(count[:, None], count)
        own = number * (rows * width + count)
        added = (number[:, None] + number) * union - own[:, None] - own
        np.fill_diagonal(added, np.iinfo(np.int64).max)
        i, j = np.unravel_index(added.argmin(), added.shape)
        found[i] = [max(width[i], width[j]), max(count[i], count[j]), number[i] + number[j]]
        found = np.delete(found, j, axis=0)
    return found[:, :2]


def _smallest(shapes: np.ndarray, rows: int, width: int, count: int) -> tuple[int, int]:
    """Of shapes (k, 2), the smallest (T, N) for a batch of `rows` rows that needs T of at least `width` and N of at least `count`."""
    enough = (shapes[:, 0] >= width) & (shapes[:, 1] >= count)
    size = np.where(enough, rows * shapes[:, 0] + shapes[:, 1], np.iinfo(np.int64).max)
    best = shapes[size.argmin()]
    return int(best[0]), int(best[1])


def choose_buckets(lengths: np.ndarray, max_buckets: int = MAX_BUCKETS) -> np.ndarray:
    """The values that T may take: those at most `max_buckets` lengths that, each row rounded up to the next, pad least.

    Args:
        lengths: (rows,) input lengths.

    Returns:
        Ascending int64; the last is the largest length. At least 1 each.
    """
    lengths = np.maximum(np.asarray(lengths, dtype=np.int64), 1)
    edges, counts = np.unique(lengths, return_counts=True)
    if len(edges) <= max_buckets:
        return edges
    if len(edges) > _CANDIDATES:  # so many different lengths that only some are tried as borders, spread evenly over the tokens
        kept = np.interp(np.linspace(0, 1, _CANDIDATES + 1)[1:], np.cumsum(edges * counts) / lengths.sum(), np.arange(len(edges)))
        kept = np.unique(edges[np.ceil(kept).astype(np.int64)])
        counts = np.bincount(np.searchsorted(kept, lengths), minlength=len(kept))
        edges = kept
    # cost[j]: positions needed for all rows up to edge j, when j is a border; from[k][j]: the border before it.
    below = np.concatenate([[0], np.cumsum(counts)])  # rows below edge i
    cost = edges * below[1:]
    steps = []
    for _ in range(max_buckets - 1):
        # (i, j): the border before j is i; needs i < j
        through = cost[:, None] + edges[None, :] * (below[None, 1:] - below[1:, None])
        through[np.tril_indices(len(edges))] = np.iinfo(np.int64).max
        best = through.argmin(axis=0)
        improved = through[best, np.arange(len(edges))] < cost
        steps.append(np.where(improved, best, -1))
        cost = np.where(improved, through[best, np.arange(len(edges))], cost)
    return edges[_borders(steps, len(edges) - 1)]


def _borders(steps: list[np.ndarray], last: int) -> list[int]:
    """Walk the choices back from the last edge; -1 means that no further border helped at that count."""
    j = last
    borders = [j]
    for before in reversed(steps):
        if before[j] >= 0:
            j = int(before[j])
            borders.append(j)
    return borders[::-1]
