"""Which rows stand in which batch, and a batch's arrays.

B rows, T input positions, N target positions. Lengths are bucketed: rows of about one length share a batch (little padding),
and T takes at most 12 values per split, N a few per T (few shapes, which is what `mx.compile` wants).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fulltune_nb.data.settings import whole
from fulltune_nb.errors import ConfigError, DataError

MAX_BUCKETS = 12
WINDOW_BATCHES = 64
"""Rows are sorted by length within windows of this many batches. Larger windows pad less and mix less; see `BatchOrder`."""

_CANDIDATES = 256


@dataclass(frozen=True, eq=False)
class Batch:
    """The arrays of one batch. Rows are padded on the right, where causal attention never looks from the left."""

    inputs: np.ndarray
    """(B, T) int32; inputs[b, t] is token t of row b, from which token t + 1 is predicted."""
    target_positions: np.ndarray
    """(N,) int32, indices into the flattened (B*T,) positions that have a target to train on; 0 where N is padded."""
    targets: np.ndarray
    """(N,) int32, the token to be predicted there."""
    weights: np.ndarray
    """(N,) float32, 1 for a target, 0 where N is padded."""
    num_tokens: int
    """Trained tokens, the sum of the weights."""
    rows: tuple[int, ...]
    """Indices into the split."""
    sources: tuple[str, ...]
    """File and line of each row."""
    padded_tokens: int
    """B * T"""
    real_tokens: int
    """Input positions that hold a row's own token."""

    def __repr__(self) -> str:
        return f"Batch(inputs {self.inputs.shape}, {self.num_tokens} trained tokens, {self.padded_tokens - self.real_tokens} padding)"


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


def padded_count(count: int, limit: int) -> int:
    """`count` rounded up so that few different values occur: eight steps per doubling, steps of 8 at least, `limit` at most."""
    step = max(8, 1 << max(0, (count - 1).bit_length() - 4))
    return min(-(-count // step) * step, limit)


def collate(split, rows: Sequence[int]) -> Batch:
    """The arrays of a batch of `rows`, indices into `split`.

    Raises:
        DataError: none of the rows has a token to train on.
    """
    rows = tuple(int(row) for row in rows)
    examples = [split[row] for row in rows]
    sources = tuple(example.source for example in examples)
    longest = max((len(example.tokens) - 1 for example in examples), default=0)
    edges = split.bucket_lengths
    at = int(np.searchsorted(edges, longest))
    width = int(edges[at]) if at < len(edges) else longest  # an untrainable row can be longer than every bucket
    inputs = np.zeros((len(rows), width), dtype=np.int32)  # any id will do for padding: no real position sees it
    positions, targets = [], []
    for b, example in enumerate(examples):
        inputs[b, : max(len(example.tokens) - 1, 0)] = example.tokens[:-1]
        trained = np.flatnonzero(example.loss_mask[1:])
        positions.append(b * width + trained)
        targets.append(example.tokens[1:][trained])
    count = sum(len(t) for t in targets)
    if not count:
        raise DataError(f"A batch without a token to train on: rows {', '.join(sources[:8]) or '(none)'}. Batch only split.trainable rows.")
    padded = padded_count(count, inputs.size)
    fill = np.zeros(padded - count, dtype=np.int32)
    weights = np.zeros(padded, dtype=np.float32)
    weights[:count] = 1
    real = sum(max(len(example.tokens) - 1, 0) for example in examples)
    return Batch(
        inputs=inputs,
        target_positions=np.concatenate([*positions, fill]).astype(np.int32),
        targets=np.concatenate([*targets, fill]).astype(np.int32),
        weights=weights,
        num_tokens=count,
        rows=rows,
        sources=sources,
        padded_tokens=inputs.size,
        real_tokens=real,
    )


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
        self.batch_size = whole("batch_size", batch_size, low=1)
        self.seed = whole("seed", seed, low=0)
        self.grad_accumulation_steps = whole("grad_accumulation_steps", grad_accumulation_steps, low=1)
        self._trainable = split.trainable
        self._lengths = split.lengths[split.trainable]

    @property
    def batches_per_epoch(self) -> int:
        return -(-len(self._trainable) // self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.grad_accumulation_steps)

    def epoch(self, epoch: int) -> list[list[tuple[int, ...]]]:
        """The steps of epoch `epoch` (from 0): each a list of micro-batches, each a tuple of indices into the split."""
        # RandomState because numpy promises that its streams stay the same in later versions; a run must resume exactly.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self.seed, whole("epoch", epoch, low=0)))))
        order = random.permutation(len(self._trainable))
        window = self.batch_size * WINDOW_BATCHES
        batches: list[np.ndarray] = []
        partial: list[np.ndarray] = []
        for start in range(0, len(order), window):
            rows = order[start : start + window]
            rows = rows[np.argsort(self._lengths[rows], kind="stable")]
            left_over = len(rows) % self.batch_size
            if left_over:  # only in the last window
                at = self.batch_size * random.randint(len(rows) // self.batch_size + 1)
                partial.append(rows[at : at + left_over])
                rows = np.delete(rows, np.s_[at : at + left_over])
            batches.extend(rows.reshape(-1, self.batch_size))
        shuffled = [batches[i] for i in random.permutation(len(batches))] + partial
        named = [tuple(int(row) for row in self._trainable[batch]) for batch in shuffled]
        n = self.grad_accumulation_steps
        return [named[i : i + n] for i in range(0, len(named), n)]

    def __repr__(self) -> str:
        return (
            f"BatchOrder({len(self._trainable):,} rows, batch_size={self.batch_size}, seed={self.seed}, "
            f"grad_accumulation_steps={self.grad_accumulation_steps}, {self.steps_per_epoch:,} steps per epoch)"
        )


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
    batch_size = whole("batch_size", batch_size, low=1)
    rows = split.trainable
    if max_batches is not None and max_batches != -1:
        if isinstance(max_batches, bool) or max_batches == 0:
            raise ConfigError(f"max_batches: expected a whole number of at least 1, or -1 or None for all, got {max_batches!r}.")
        wanted = whole("max_batches", max_batches, low=1) * batch_size
        if wanted < len(rows):
            rows = rows[np.arange(wanted) * len(rows) // wanted]
    rows = rows[np.argsort(split.lengths[rows], kind="stable")]
    return [tuple(int(row) for row in rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
