"""The order of rows, the shapes of batches and their arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulltune_nb.data import Batch, Example, Split, StepBatches, collate, evaluation_batches
from fulltune_nb.errors import ConfigError, DataError


def make_split(lengths, seed=0, trained=0.5, name="train"):
    """Random tokens of the given lengths; about `trained` of them are trained on, in each row that can have one at least one."""
    random = np.random.RandomState(seed)
    examples = []
    for i, length in enumerate(lengths, 1):
        mask = random.rand(length) < trained
        mask[-1:] = True
        mask[:1] = False
        tokens = random.randint(0, 50, length).astype(np.int32)
        examples.append(Example(tokens, mask, "", f"{name}.jsonl:{i}", 0, {}))
    return Split(name, "text", examples)


rows_of_any_size = st.lists(st.integers(1, 60), min_size=1, max_size=50).filter(lambda lengths: max(lengths) > 1)


def assert_every_trainable_example_once(split, batch_size, accumulation, seed, packing):
    order = StepBatches(split, batch_size=batch_size, seed=seed, grad_accumulation_steps=accumulation, packing=packing, max_seq_length=60)
    for epoch in range(2):
        steps = order.epoch(epoch)
        batches = [batch for step in steps for batch in step]
        groups = [row if packing else (row,) for batch in batches for row in batch]
        assert sorted(index for group in groups for index in group) == split.trainable.tolist()
        assert all(split.lengths[list(group)].sum() <= 60 for group in groups)
        assert len(steps) == order.steps_per_epoch == -(-len(batches) // accumulation) and len(batches) == order.batches_per_epoch
        assert all(len(step) == accumulation for step in steps[:-1]) and 1 <= len(steps[-1]) <= accumulation
        assert all(len(batch) == batch_size for batch in batches[:-1]) and 1 <= len(batches[-1]) <= batch_size
        assert sum(collate(split, rows, order.shape(rows)).num_tokens for rows in batches) == split.trained_tokens


@pytest.mark.parametrize("packing", [False, True], ids=["single", "packed"])
@given(lengths=rows_of_any_size, batch_size=st.integers(1, 8), accumulation=st.integers(1, 4), seed=st.integers(0, 2**40))
@settings(max_examples=200, deadline=None)
def test_every_trainable_example_is_seen_exactly_once_per_epoch(packing, lengths, batch_size, accumulation, seed):
    assert_every_trainable_example_once(make_split(lengths), batch_size, accumulation, seed, packing)


@pytest.mark.parametrize("packing", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("size", range(1, 51))
def test_every_example_is_seen_once_for_each_small_size_and_batch_size(size, packing):
    split = make_split([2 + (7 * i) % (41 if packing else 11) for i in range(size)])
    for batch_size in range(1, 6 if packing else 9):
        for accumulation in range(1, 4):
            assert_every_trainable_example_once(split, batch_size, accumulation, 0, packing)


@pytest.mark.parametrize("packing", [False, True], ids=["single", "packed"])
def test_order_is_a_function_of_seed_and_epoch_only(packing):
    split = make_split([2 + i % 9 for i in range(60)])

    def order(seed=7):
        return StepBatches(split, batch_size=2, seed=seed, packing=packing, max_seq_length=30)

    first = order()
    second = first.epoch(1)
    np.random.seed(3)
    first.epoch(0)
    assert first.epoch(1) == second == order().epoch(1)
    assert len({str(order(seed).epoch(epoch)) for seed in (7, 8) for epoch in (0, 1)}) == 4


def test_order_stays_the_same_in_later_versions():
    # A run that is resumed after an update of numpy must go on in the same order: these values may not change.
    steps = StepBatches(make_split([5, 9, 3, 7, 8, 4, 6]), batch_size=2, seed=0, grad_accumulation_steps=2).epoch(0)
    assert steps == [[(2, 5), (0, 6)], [(4, 1), (3,)]]


def test_rows_of_a_batch_have_about_the_same_length():
    random = np.random.RandomState(0)
    split = make_split(random.randint(2, 400, 1000))
    batches = [batch for step in StepBatches(split, batch_size=4, seed=0).epoch(0) for batch in step]
    spread = [np.ptp(split.lengths[list(batch)]) for batch in batches]
    assert np.mean(spread) < 10
    lengths = [split.lengths[list(batch)].mean() for batch in batches]
    assert abs(np.corrcoef(lengths[:-1], lengths[1:])[0, 1]) < 0.3  # ... and the batches come in no order of length


def test_partial_batch_is_not_always_made_of_the_longest_rows():
    split = make_split(range(2, 13))
    last = [StepBatches(split, batch_size=4, seed=0).epoch(e)[-1][-1] for e in range(40)]
    assert all(len(rows) == 3 for rows in last)
    assert {10 in rows for rows in last} == {True, False} and {0 in rows for rows in last} == {True, False}


WRONG_NUMBERS = [("batch_size", 0), ("batch_size", "4"), ("seed", -1), ("seed", None), ("grad_accumulation_steps", 0)]


@pytest.mark.parametrize("name, value", WRONG_NUMBERS)
def test_number_out_of_range_is_an_error_that_names_it(name, value):
    with pytest.raises(ConfigError, match=name):
        StepBatches(make_split([3, 4]), **{"batch_size": 1, "seed": 0, name: value})


# ---------------------------------------------------------------- arrays


@given(st.lists(st.integers(2, 20), min_size=1, max_size=6), st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_batch_holds_each_trained_target_at_its_position(lengths, seed, trained):
    split = make_split(lengths, seed, trained)
    rows = tuple(np.random.RandomState(seed).permutation(len(lengths)))
    batch = collate(split, rows)
    expected = [
        (b, t, int(split[row].tokens[t + 1]))
        for b, row in enumerate(rows)
        for t in range(len(split[row].tokens) - 1)
        if split[row].loss_mask[t + 1]
    ]
    width = batch.inputs.shape[1]
    found = [(p // width, p % width, t) for p, t, w in zip(batch.target_positions, batch.targets, batch.weights, strict=True) if w == 1]
    assert found == expected
    assert batch.num_tokens == len(expected) == batch.weights.sum() == sum(int(split[row].loss_mask.sum()) for row in rows)
    for b, row in enumerate(rows):
        tokens = split[row].tokens
        assert batch.inputs[b, : len(tokens) - 1].tolist() == tokens[:-1].tolist()
        assert batch.inputs[b, len(tokens) - 1 :].tolist() == [0] * (width - len(tokens) + 1)
    assert batch.real_tokens == sum(lengths) - len(lengths) and batch.padded_tokens == len(lengths) * width
    assert batch.rows == tuple(rows) and batch.sources == tuple(f"train.jsonl:{row + 1}" for row in rows)


def test_arrays_have_the_types_and_shapes_promised():
    batch = collate(make_split([5, 9, 7]), (2, 0))
    assert {a.dtype for a in (batch.inputs, batch.target_positions, batch.targets)} == {np.dtype(np.int32)}
    assert batch.weights.dtype == np.float32
    assert batch.target_positions.shape == batch.targets.shape == batch.weights.shape
    assert batch.inputs.shape == (2, 6) and set(batch.weights.tolist()) <= {0.0, 1.0}
    assert isinstance(batch, Batch) and "2, 6" in repr(batch)


def test_padding_is_never_a_target_even_if_its_id_is_a_token_of_the_row():
    tokens = np.array([5, 0, 0, 7, 0], dtype=np.int32)  # the id that padding has is an ordinary token here
    mask = np.array([False, True, True, True, True])
    long = Example(np.arange(9, dtype=np.int32), np.array([False] + [True] * 8), "", "train.jsonl:2", 0, {})
    batch = collate(Split("train", "text", [Example(tokens, mask, "", "train.jsonl:1", 0, {}), long]), [0, 1])
    first_row = [(int(p), int(t)) for p, t, w in zip(batch.target_positions, batch.targets, batch.weights, strict=True) if w and p < 8]
    assert first_row == [(0, 0), (1, 0), (2, 7), (3, 0)]


def test_batch_without_a_trained_token_is_an_error_that_names_the_rows():
    split = make_split([1, 1, 5])
    with pytest.raises(DataError, match=r"train\.jsonl:1, train\.jsonl:2"):
        collate(split, [0, 1])
    with pytest.raises(DataError, match="none"):
        collate(split, [])


def test_untrainable_row_longer_than_all_others_can_stand_in_a_batch():
    long = Example(np.arange(40, dtype=np.int32), np.zeros(40, dtype=bool), "", "train.jsonl:1", 0, {})
    split = Split("train", "chat", [long, make_split([5])[0]])
    assert collate(split, [0, 1]).inputs.shape == (2, 39)


# ---------------------------------------------------------------- evaluation


@given(lengths=rows_of_any_size, batch_size=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_whole_evaluation_sees_every_trainable_row_once_in_order_of_length(lengths, batch_size):
    split = make_split(lengths)
    for whole in (None, -1, 10**6):
        batches = evaluation_batches(split, batch_size, whole)
        rows = [row for batch in batches for row in batch]
        assert sorted(rows) == split.trainable.tolist()
        assert split.lengths[rows].tolist() == sorted(split.lengths[split.trainable].tolist())
        assert all(len(batch) == batch_size for batch in batches[:-1])


@given(size=st.integers(1, 200), batch_size=st.integers(1, 8), batches=st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_limited_evaluation_takes_full_batches_of_rows_spread_over_the_split(size, batch_size, batches):
    split = make_split([2 + (i * 7) % 13 for i in range(size)])
    chosen = evaluation_batches(split, batch_size, batches)
    rows = sorted(row for batch in chosen for row in batch)
    assert len(rows) == len(set(rows)) == min(size, batches * batch_size)
    gaps = np.diff([*rows, size + rows[0]])
    assert gaps.max() - gaps.min() <= 1
    assert chosen == evaluation_batches(split, batch_size, batches)


@pytest.mark.parametrize("count", [0, -2, 1.5, "3", True])
def test_number_of_evaluation_batches_out_of_range_is_an_error(count):
    with pytest.raises(ConfigError, match="max_batches"):
        evaluation_batches(make_split([3, 4]), 1, count)
