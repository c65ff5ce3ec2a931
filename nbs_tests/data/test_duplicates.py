"""Rows that occur more than once."""

from fulltune_nb.data import load_data
from fulltune_nb.data.look import find_duplicates

A, B, C, D = ({"prompt": f"What is {letter}?", "completion": f"It is {letter}."} for letter in "abcd")


def test_rows_of_two_splits_are_found_from_either_side(tokenizer):
    data = load_data({"train": [A, B, A, C], "valid": [D, A], "test": [A, B, B]}, tokenizer)
    found = find_duplicates(data.splits)
    assert found.across == {
        ("train", "valid"): [(0, 1), (2, 1)], ("valid", "train"): [(1, 0)],
        ("train", "test"): [(0, 0), (1, 1), (2, 0)], ("test", "train"): [(0, 0), (1, 1), (2, 1)],
        ("valid", "test"): [(1, 0)], ("test", "valid"): [(0, 1)],
    }  # fmt: skip
    assert found.rows("train") == [0, 1, 2] and found.rows("valid") == [1] and found.rows("test") == [0, 1, 2]


def test_repeated_rows_of_a_split_are_counted(tokenizer):
    found = find_duplicates(load_data({"train": [A, A, A, B], "test": [C]}, tokenizer).splits)
    assert found.within == {"train": 2, "test": 0} and found.rows("train") == []


def test_what_the_model_reads_counts_and_not_other_keys(tokenizer):
    data = load_data({"train": [{**A, "id": 1}], "test": [{**A, "id": 2}, {**A, "completion": "Another."}]}, tokenizer)
    assert find_duplicates(data.splits).rows("test") == [0]
