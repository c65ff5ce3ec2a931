"""Packing: how full rows are, that each example stands in exactly one, and a packed batch's arrays."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulltune_nb.data import StepBatches, collate
from fulltune_nb.data.batches import best_fit
from fulltune_nb.errors import ConfigError
from nbs_tests.data.test_batching import make_split

CAPACITY = 60


def slow_best_fit(lengths, capacity):
    """The same by looking at every row."""
    rows = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        free = [capacity - sum(lengths[i] for i in row) for row in rows]
        candidates = [room for room in free if room >= lengths[index]]
        if candidates:
            rows[free.index(min(candidates))].append(index)
        else:
            rows.append([index])
    return rows


def lengths_in(rows, lengths):
    return Counter(tuple(sorted(lengths[i] for i in row)) for row in rows)


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=50), st.integers(CAPACITY, 100))
@settings(max_examples=300, deadline=None)
def test_each_example_goes_into_the_fullest_row_that_has_room(lengths, capacity):
    rows = best_fit(np.array(lengths), capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert sum(map(len, rows)) == len(lengths) and len(rows) == len(slow_best_fit(lengths, capacity))
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(
        sum(lengths[i] for i in row) for row in slow_best_fit(lengths, capacity)
    )


def test_examples_that_fill_rows_exactly_leave_nothing_free():
    assert lengths_in(best_fit(np.array([3, 7, 5, 5, 2, 8, 10]), 10), [3, 7, 5, 5, 2, 8, 10]) == Counter([(3, 7), (5, 5), (2, 8), (10,)])


def test_rows_of_many_skewed_lengths_are_nearly_full():
    lengths = np.minimum(np.random.RandomState(0).lognormal(4, 1, 5000).astype(int) + 2, 1024)
    rows = best_fit(lengths, 1024)
    assert lengths.sum() / (len(rows) * 1024) > 0.995


# ---------------------------------------------------------------- order


def packed(split, batch_size, seed=0, accumulation=1, capacity=CAPACITY):
    return StepBatches(
        split, batch_size=batch_size, seed=seed, grad_accumulation_steps=accumulation, packing=True, max_seq_length=capacity
    )


def test_examples_of_one_length_change_their_neighbours_from_epoch_to_epoch():
    split = make_split([5] * 40)
    rows = [{frozenset(row) for step in packed(split, 2, capacity=20).epoch(e) for batch in step for row in batch} for e in range(2)]
    assert len(rows[0] & rows[1]) < 5


def test_order_stays_the_same_in_later_versions():
    # As without packing: a run that is resumed after an update must go on in the same order.
    steps = packed(make_split([5, 9, 3, 7, 8, 4, 6, 5]), 2, accumulation=2, capacity=14).epoch(0)
    assert steps == [[((5, 2), (3, 7)), ((1, 0), (4, 6))]]


def test_an_example_longer_than_a_row_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"train\.jsonl:2 has 9 tokens"):
        packed(make_split([5, 9, 3]), 2, capacity=8)


def test_packing_needs_fewer_positions_than_buckets_of_skewed_lengths():
    split = make_split(np.minimum(np.random.RandomState(1).lognormal(4, 0.8, 1500).astype(int) + 2, 512))

    def positions(order):
        return sum(collate(split, rows, order.shape(rows)).padded_tokens for step in order.epoch(0) for rows in step)

    needed = positions(packed(split, 2, capacity=512))
    assert needed < 1.03 * (split.lengths - 1).sum() and needed < 0.9 * positions(StepBatches(split, batch_size=16, seed=0))


# ---------------------------------------------------------------- arrays


@given(st.lists(st.integers(2, 20), min_size=1, max_size=9), st.integers(0, 1000), st.floats(0, 1), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_a_packed_batch_holds_each_example_with_its_targets_side_by_side(lengths, seed, trained, spare):
    split = make_split(lengths, seed, trained)
    rows = tuple(tuple(row) for row in best_fit(split.lengths, 40))
    width = max(sum(lengths[i] - 1 for i in row) for row in rows) + spare
    count = sum(int(split[i].loss_mask.sum()) for i in range(len(split)))
    batch = collate(split, rows, (width, count + spare))
    assert batch.inputs.shape == batch.segments.shape == (len(rows), width) and batch.segments.dtype == np.int32
    assert len(batch.targets) == count + spare and batch.num_tokens == count
    found = {(p // width, p % width): t for p, t, w in zip(batch.target_positions, batch.targets, batch.weights, strict=True) if w}
    for b, row in enumerate(rows):
        begin = 0
        for number, index in enumerate(row):
            example = split[index]
            end = begin + len(example.tokens) - 1
            assert batch.inputs[b, begin:end].tolist() == example.tokens[:-1].tolist()
            assert batch.segments[b, begin:end].tolist() == [number] * (end - begin)
            for t in np.flatnonzero(example.loss_mask[1:]):
                assert found.pop((b, begin + t)) == example.tokens[t + 1]
            begin = end
        assert set(batch.segments[b, begin:].tolist()) <= {-1} and set(batch.inputs[b, begin:].tolist()) <= {0}
    assert not found
    assert batch.rows == tuple(i for row in rows for i in row) and batch.sources == tuple(f"train.jsonl:{i + 1}" for i in batch.rows)
    assert batch.real_tokens == sum(lengths) - len(lengths)


def test_a_batch_that_is_not_packed_has_no_segments():
    assert collate(make_split([5, 9]), (0, 1)).segments is None
