"""Several examples in one row of a batch, so that hardly anything is padding.

Attention keeps the examples of a row apart by `Batch.segments`; positions need no reset, since rotary positions are relative.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from fulltune_nb.data.batching import BatchOrder, Row
from fulltune_nb.data.settings import whole
from fulltune_nb.errors import ConfigError


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
        capacity = whole("max_seq_length", max_seq_length, low=2)
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
