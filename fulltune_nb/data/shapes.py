"""The few shapes (T, N) that the batches of a split may have: chosen so that little is padded.

T input positions, N target positions. A module of its own because it is arithmetic on sizes: it knows nothing of rows and splits.
"""

from __future__ import annotations

import numpy as np

MAX_BUCKETS = 12
"""Values of T at most, before pairs (T, N) are formed."""

_CANDIDATES = 256
_COUNTS_PER_LENGTH = 6  # values of N that are candidates, for each T


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


def smallest(shapes: np.ndarray, rows: int, width: int, count: int) -> tuple[int, int]:
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
