"""A part of train that becomes valid: by the rows' texts, with equal rows on one side."""

import random

import pytest

from fulltune_nb.data import load_data
from fulltune_nb.errors import ConfigError, DataError

ROWS = [{"text": f"The fox number {i % 60} jumps."} for i in range(100)]  # 40 texts twice, 20 once


def texts(split):
    return [example.text for example in split]


def test_a_share_of_the_rows_is_held_out_and_equal_rows_stay_together(tokenizer):
    data = load_data({"train": ROWS}, tokenizer, valid_fraction=0.1)
    assert 9 <= len(data.valid) <= 10 and len(data.train) + len(data.valid) == 100 and not set(texts(data.train)) & set(texts(data.valid))
    assert sorted(texts(data.train) + texts(data.valid)) == sorted(row["text"] for row in ROWS)
    whole = {e.source: e for e in load_data({"train": ROWS}, tokenizer).train}
    for example in [*data.train, *data.valid]:
        same = whole[example.source]
        assert example.tokens.tolist() == same.tokens.tolist() and example.loss_mask.tolist() == same.loss_mask.tolist()
    assert [int(e.source.split(":")[1]) for e in data.train] == sorted(int(e.source.split(":")[1]) for e in data.train)


def test_which_rows_is_told_and_depends_on_their_texts_alone(tokenizer):
    first = load_data({"train": ROWS}, tokenizer, valid_fraction=0.1)
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    second = load_data({"train": shuffled, "test": ROWS[:3]}, tokenizer, valid_fraction=0.1)
    assert sorted(texts(first.valid)) == sorted(texts(second.valid)) and len(second.test) == 3
    count = len(first.valid)
    assert first.notes == [
        f"valid: {count} of 100 examples of train ({count}.0 %) are held out, chosen by their texts; rows of the same text stay together."
    ]
    assert first.settings.valid_fraction == 0.1


def test_at_least_one_row_is_held_out_and_at_least_one_is_left(tokenizer):
    few = [{"text": f"Row {i}."} for i in range(3)]
    assert len(load_data({"train": few}, tokenizer, valid_fraction=0.001).valid) == 1
    assert len(load_data({"train": few}, tokenizer, valid_fraction=0.999).train) == 1
    large = load_data({"train": [{"text": "Same."}] * 9 + [{"text": "Other."}]}, tokenizer, valid_fraction=0.05)
    assert texts(large.valid) == ["Other."] and len(large.train) == 9
    with pytest.raises(DataError, match="same text"):
        load_data({"train": [{"text": "Same."}] * 9}, tokenizer, valid_fraction=0.5)


def test_rows_without_a_trained_token_are_not_held_out(tokenizer):
    rows = [{"prompt": "word " * 40, "completion": f"{i}"} for i in range(8)] + [{"prompt": "a", "completion": f"{i}"} for i in range(2)]
    for _ in range(3):
        data = load_data({"train": rows}, tokenizer, mask_prompt=True, max_seq_length=24, valid_fraction=0.1)
        assert len(data.valid.trainable) == len(data.train.trainable) == 1


def test_windows_of_a_row_stay_together(tokenizer):
    rows = [{"text": " ".join(f"{name}{i}" for i in range(50))} for name in "abcdef"]
    data = load_data({"train": rows}, tokenizer, max_seq_length=16, long_rows="split", valid_fraction=0.4)
    sides = [{e.source for e in split} for split in (data.train, data.valid)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 6 and len(sides[1]) == 2


def test_it_is_refused_beside_a_valid_split_and_without_a_train_split(tokenizer):
    with pytest.raises(ConfigError, match="valid_fraction=0.1: there is a valid split"):
        load_data({"train": ROWS, "valid": ROWS}, tokenizer, valid_fraction=0.1)
    with pytest.raises(ConfigError, match="no train split"):
        load_data({"test": ROWS}, tokenizer, valid_fraction=0.1)
    for wrong in (1.0, -0.1, 5, "0.1", True):
        with pytest.raises(ConfigError, match="valid_fraction"):
            load_data({"train": ROWS}, tokenizer, valid_fraction=wrong)
