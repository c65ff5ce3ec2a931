"""Several data sets with weights: what an epoch takes of each, in which order, and what is told of it."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulltune_nb.data import Split, StepBatches, load_data
from fulltune_nb.data.mixture import rows_of_epoch
from fulltune_nb.data.split import Part
from fulltune_nb.errors import DataError
from nbs_tests.data.test_batching import make_split

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def mixed(lengths, weights):
    """A split of several data sets: lengths of the rows of each."""
    whole = make_split([length for own in lengths for length in own])
    ends = np.cumsum([len(own) for own in lengths]).tolist()
    parts = [Part(f"d{i}", weights[i] / sum(weights), end - len(own), end) for i, (own, end) in enumerate(zip(lengths, ends, strict=True))]
    return Split("train", "text", list(whole), parts=parts)


def write(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def texts(name, count):
    return [{"text": f"{name} number {i} of them"} for i in range(count)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.data())
@settings(max_examples=200, deadline=None)
def test_an_epoch_has_as_many_rows_as_all_data_sets_shared_out_by_weight(sizes, data):
    weights = data.draw(st.lists(st.floats(0.01, 1), min_size=len(sizes), max_size=len(sizes)))
    weights = [weight / sum(weights) for weight in weights]
    taken = rows_of_epoch(weights, sizes)
    floors = [max(1, int(weight * sum(sizes))) for weight in weights]
    assert all(low <= count <= low + 1 for low, count in zip(floors, taken, strict=True))
    assert sum(taken) == max(sum(sizes), sum(floors))


@pytest.mark.parametrize("packing", [False, True], ids=["single", "packed"])
@given(
    lengths=st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=12), min_size=2, max_size=3),
    weights=st.lists(st.integers(1, 9), min_size=3, max_size=3), batch_size=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_no_example_comes_again_before_all_of_its_data_set_have_come(packing, lengths, weights, batch_size, seed):
    split = mixed(lengths, weights[: len(lengths)])
    order = StepBatches(split, batch_size=batch_size, seed=seed, packing=packing, max_seq_length=30)
    seen, rows_of = Counter(), [Counter() for _ in split.parts]
    for epoch in range(4):
        batches = [batch for step in order.epoch(epoch) for batch in step]
        rows = [row if packing else (row,) for batch in batches for row in batch]
        assert len(rows) == order.rows_per_epoch and len(batches) == order.batches_per_epoch
        for number, part in enumerate(split.parts):
            own = [row for row in rows if part.begin <= row[0] < part.end]
            assert all(part.begin <= index < part.end for row in own for index in row)  # no row holds examples of two data sets
            rows_of[number][epoch] = len(own)
            seen.update(index for row in own for index in row)
            counts = [seen[index] for index in range(part.begin, part.end)]
            assert max(counts) - min(counts) <= 1  # gone through in passes
        for batch in batches:
            width, count = order.shape(batch)
            assert width >= max(sum(split.lengths[list(row if packing else (row,))] - 1) for row in batch)
            assert count >= sum(split.trained_lengths[list(row if packing else (row,))].sum() for row in batch)
    assert all(len(set(counts.values())) == 1 for counts in rows_of)  # the same number of rows of each in every epoch


@pytest.mark.parametrize("packing", [False, True], ids=["single", "packed"])
def test_an_epoch_is_the_piece_of_the_passes_that_follows_the_one_before(packing):
    split = mixed([[5] * 7, [3] * 4], [1, 3])
    order = StepBatches(split, batch_size=2, seed=5, packing=packing, max_seq_length=5)
    stream = [[], []]  # by brute force: one permutation of each data set behind the other
    for number, part in enumerate(split.parts):
        for passed in range(9):
            random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((5, passed, number + 1))))
            places = random.permutation(part.end - part.begin) if packing else np.arange(part.end - part.begin)
            stream[number] += (part.begin + places[random.permutation(part.end - part.begin)]).tolist()
    taken = [3, 8]  # of 11 rows a quarter and three quarters
    for epoch in (2, 0, 1):
        rows = sorted(row[0] if packing else row for step in order.epoch(epoch) for batch in step for row in batch)
        expected = [own[epoch * count : (epoch + 1) * count] for own, count in zip(stream, taken, strict=True)]
        assert rows == sorted(sum(expected, []))


def test_order_is_a_function_of_seed_and_epoch_only_and_stays_the_same_in_later_versions():
    split = mixed([[5, 9, 3], [7, 8]], [1, 2])
    orders = [StepBatches(split, batch_size=2, seed=seed) for seed in (0, 0, 1)]
    orders[1].epoch(3)
    assert [orders[0].epoch(e) for e in range(4)] == [orders[1].epoch(e) for e in range(4)] != [orders[2].epoch(e) for e in range(4)]
    assert orders[0].epoch(0) == [[(4, 4)], [(0, 3)], [(2,)]] and orders[0].epoch(1) == [[(3, 4)], [(0, 3)], [(1,)]]


def test_folders_with_weights_are_one_data_set_that_knows_where_each_row_stood(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", train=texts("a", 30), valid=texts("va", 2), test=texts("ta", 1))
    write(tmp_path / "b", train=[CHAT] * 10, valid=[CHAT])
    data = load_data({"a": 7, "b": 3}, tokenizer)
    assert len(data.train) == 40 and data.train[2].source == "a/train.jsonl:3" and data.train[39].source == "b/train.jsonl:10"
    assert [e.source for e in data.valid] == ["a/valid.jsonl:1", "a/valid.jsonl:2", "b/valid.jsonl:1"] and len(data.test) == 1
    assert json.loads(data.source) == {str(tmp_path / "a"): 7, str(tmp_path / "b"): 3} and data.train.format == "chat and text"
    assert data.notes == ["train: each epoch's 40 rows are drawn by weight: 28 (70 %) from the 30 of a, 12 (30 %) from the 10 of b."]
    again = load_data(data.source, tokenizer)
    assert again.fingerprint == data.fingerprint
    others = [load_data(source, tokenizer).fingerprint for source in ({"a": 1, "b": 1}, {"b": 3, "a": 7}, "a")]
    assert len({data.fingerprint, *others}) == 4


def test_what_is_wrong_with_the_data_sets_is_told_by_name(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", train=texts("a", 3))
    write(tmp_path / "b", train=[{"text": "fine"}, {"txt": "not"}])
    write(tmp_path / "c", valid=texts("c", 2))
    with pytest.raises(DataError) as error:
        load_data({"a": 1, "b": 1}, tokenizer)
    assert error.value.problems[0].startswith("b/train.jsonl:2: ")
    with pytest.raises(DataError, match="'?c'? has no train split"):
        load_data({"a": 1, "c": 1}, tokenizer)
    with pytest.raises(DataError, match="given twice"):
        load_data({"a": 1, "./a": 1}, tokenizer)
    for weight in (0, -1, float("nan"), float("inf"), True):
        with pytest.raises(DataError, match="weight of 'a'.*above 0"):
            load_data({"a": weight, "b": 1}, tokenizer)
    notes = load_data({"a": 1, "b": 1}, tokenizer, bad_rows="skip").notes
    assert any(note.startswith("b/train: 1 rows cannot be used") and "data.train.skipped" in note for note in notes)


def test_a_mapping_of_split_names_is_rows_and_not_weights(tokenizer):
    with pytest.raises(DataError, match="train: expected"):
        load_data({"train": 0.7}, tokenizer)


def test_data_sets_are_called_by_the_end_of_their_paths_from_wherever_they_are_loaded(tmp_path, tokenizer, monkeypatch):
    for name in ("x/old", "x/new", "y/new"):
        write(tmp_path / name, train=texts(name, 2))
    monkeypatch.chdir(tmp_path / "x")
    one = load_data({"old": 1, "new/": 1}, tokenizer)
    other = load_data(one.source, tokenizer)
    assert [e.source for e in one.train] == [f"{name}/train.jsonl:{i}" for name in ("old", "new") for i in (1, 2)]
    assert [e.source for e in other.train] == [e.source for e in one.train] and other.notes == one.notes
    three = load_data({"old": 1, "new": 1, tmp_path / "y" / "new": 1}, tokenizer)
    assert [part.name for part in three.train.parts] == ["x/old", "x/new", "y/new"]


def test_a_mask_that_means_nothing_for_one_data_set_is_told_and_holds_for_the_others(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", train=[{"text": "Q: B A: C"}] * 2)
    write(tmp_path / "b", train=[CHAT] * 2)
    masked = load_data({"a": 1, "b": 1}, tokenizer, mask_prompt=True)
    assert masked.train.trained_lengths[0] == masked.train.lengths[0] - 1 and masked.train.trained_lengths[2] < masked.train.lengths[2] - 1
    assert any(note.startswith("a/train.jsonl: mask_prompt=True means nothing") for note in masked.notes)
    until = load_data({"a": 1, "b": 1}, tokenizer, mask_until="A:")
    assert until.train.trained_lengths[0] < until.train.lengths[0] - 1 and until.train.trained_lengths[2] == until.train.lengths[2] - 1
    assert any(note.startswith("b/train.jsonl: mask_until='A:' means nothing") for note in until.notes)
