"""The shapes of batches: few, large enough, and little of it padding."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulltune_nb.data import StepBatches, collate, evaluation_batches, evaluation_shapes
from fulltune_nb.data.batches import MAX_SHAPES
from fulltune_nb.data.shapes import MAX_BUCKETS, choose_buckets, choose_shapes
from nbs_tests.data.test_batching import make_split


def padding(lengths, edges):
    return sum(min(edge for edge in edges if edge >= length) - length for length in lengths)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_buckets_pad_as_little_as_any_choice_of_as_many(lengths, count):
    edges = choose_buckets(np.array(lengths), count)
    assert edges.tolist() == sorted(set(edges.tolist())) and len(edges) <= count and edges[-1] == max(lengths)
    others = sorted(set(lengths) - {max(lengths)})
    choices = [[*some, max(lengths)] for k in range(min(count - 1, len(others)) + 1) for some in combinations(others, k)]
    assert padding(lengths, edges.tolist()) == min(padding(lengths, choice) for choice in choices)


def test_buckets_of_very_many_lengths_are_few_and_close():
    lengths = np.minimum(np.random.RandomState(0).lognormal(6, 1, 20_000).astype(np.int64) + 1, 2047)
    edges = choose_buckets(lengths)
    assert len(edges) == MAX_BUCKETS and edges[-1] == lengths.max()
    padded = edges[np.searchsorted(edges, lengths)].sum()
    assert 1 - lengths.sum() / padded < 0.1  # 0.0956 is the least that 12 lengths can reach here


# ---------------------------------------------------------------- shapes of a whole run


def batches_of(split, order, epochs):
    return [collate(split, rows, order.shape(rows)) for epoch in range(epochs) for step in order.epoch(epoch) for rows in step]


def shapes_of(batches):
    return {(*batch.inputs.shape, len(batch.targets)) for batch in batches}


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=50),
    batch_size=st.integers(1, 6),
    trained=st.floats(0, 1),
    seed=st.integers(0, 99),
    packing=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_batch_of_every_epoch_fits_into_one_of_few_shapes(lengths, batch_size, trained, seed, packing):
    split = make_split(lengths, seed, trained)
    order = StepBatches(split, batch_size=batch_size, seed=seed, packing=packing, max_seq_length=64)
    batches = batches_of(split, order, 4)
    assert sum(batch.num_tokens for batch in batches) == 4 * split.trained_tokens
    assert len(shapes_of(batches)) <= MAX_SHAPES


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=50),
    batch_size=st.integers(1, 6),
    multiple=st.sampled_from([8, 32, 128]),
    packing=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_padding_to_a_multiple_changes_nothing_but_the_padding(lengths, batch_size, multiple, packing):
    split = make_split(lengths, trained=0.5)
    orders = [StepBatches(split, batch_size=batch_size, seed=3, packing=packing, max_seq_length=61, multiple_of=m) for m in (1, multiple)]
    expected, found = (batches_of(split, order, 3) for order in orders)
    assert len(shapes_of(found)) <= MAX_SHAPES
    for ours, reference in zip(found, expected, strict=True):
        width, least = ours.inputs.shape[1], int(ours.row_lengths.max())
        assert width % multiple == 0 and width >= least
        assert ours.rows == reference.rows and np.array_equal(ours.row_lengths, reference.row_lengths)
        assert np.array_equal(ours.inputs[:, :least], reference.inputs[:, :least]) and not ours.inputs[:, least:].any()
        assert np.array_equal(places_of(ours), places_of(reference))
        if packing:
            assert np.array_equal(ours.segments[:, :least], reference.segments[:, :least]) and (ours.segments[:, least:] == -1).all()


def places_of(batch):
    """(num_tokens, 3): row and position of each target, and the target."""
    count = batch.num_tokens
    return np.array([*np.divmod(batch.target_positions[:count], batch.inputs.shape[1]), batch.targets[:count]]).T


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("trained", [1.0, 0.3], ids=["every token", "some tokens"])
@pytest.mark.parametrize("packing", [False, True], ids=["bucketed", "packed"])
def test_a_thousand_different_lengths_have_sixteen_shapes_and_little_padding(batch_size, trained, packing):
    split = make_split(range(2, 1002), trained=trained)
    order = StepBatches(split, batch_size=batch_size, seed=0, packing=packing, max_seq_length=1002)
    batches = batches_of(split, order, 3)
    assert len(shapes_of(batches)) <= MAX_SHAPES
    assert 1 - sum(batch.real_tokens for batch in batches) / sum(batch.padded_tokens for batch in batches) < 0.15
    assert 1 - sum(batch.num_tokens for batch in batches) / sum(len(batch.targets) for batch in batches) < 0.25


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=80), batch_size=st.integers(1, 6), trained=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_every_batch_of_an_evaluation_fits_into_one_of_few_shapes(lengths, batch_size, trained):
    split = make_split(lengths, trained=trained)
    rows = evaluation_batches(split, batch_size)
    batches = [collate(split, own, shape) for own, shape in zip(rows, evaluation_shapes(split, rows), strict=True)]
    assert sum(batch.num_tokens for batch in batches) == split.trained_tokens and len(shapes_of(batches)) <= MAX_SHAPES


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("trained", [1.0, 0.3], ids=["every token", "some tokens"])
def test_an_evaluation_of_a_thousand_different_lengths_has_sixteen_shapes_and_little_padding(batch_size, trained):
    split = make_split(range(2, 1002), trained=trained)
    rows = evaluation_batches(split, batch_size)
    batches = [collate(split, own, shape) for own, shape in zip(rows, evaluation_shapes(split, rows), strict=True)]
    assert len(shapes_of(batches)) <= MAX_SHAPES
    assert 1 - sum(batch.real_tokens for batch in batches) / sum(batch.padded_tokens for batch in batches) < 0.15
    assert 1 - sum(batch.num_tokens for batch in batches) / sum(len(batch.targets) for batch in batches) < 0.25


def test_as_many_batches_as_shapes_are_not_padded_at_all():
    widths, counts = np.array([5, 9, 7]), np.array([4, 30, 11])
    assert sorted(map(tuple, choose_shapes(widths, counts, 4, 3))) == [(5, 4), (7, 11), (9, 30)]
    assert choose_shapes(widths, counts, 4, 1).tolist() == [[9, 30]]


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40)), min_size=2, max_size=6), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_the_first_union_of_shapes_is_the_cheapest_of_all_pairs(needs, rows):
    needs = sorted(set(needs))
    widths, counts = np.array(needs).T
    shapes = choose_shapes(widths, counts, rows, max(len(needs) - 1, 1))

    def padded(pairs):
        return sum(min(rows * t + n for t, n in pairs if t >= width and n >= count) for width, count in needs)

    if len(needs) > 1:
        unions = []
        for one, other in combinations(range(len(needs)), 2):
            union = tuple(np.maximum(needs[one], needs[other]))
            unions.append(padded([union, *(need for i, need in enumerate(needs) if i not in (one, other))]))
        assert padded([tuple(shape) for shape in shapes]) == min(unions)
