"""What is said of rows that cannot be used."""

import pytest

from fulltune_nb.data.rows import OTHER_KEYS, bad_rows_error, feature_hint
from fulltune_nb.data.settings import FEATURES, DataSettings


def test_error_shows_the_first_20_problems_and_holds_all():
    problems = [f"train.jsonl:{i}: not JSON at {i}" for i in range(1, 36)]
    error = bad_rows_error(problems, "the folder")
    shown = [line for line in str(error).splitlines() if "train.jsonl:" in line]
    assert len(shown) == 20 and "train.jsonl:20:" in shown[-1]
    assert "35 problems in the folder" in str(error) and "15 more" in str(error) and error.problems == problems
    assert "more" not in str(bad_rows_error(problems[:20], "the folder"))


def test_equal_reasons_stand_once_with_all_their_lines():
    problems = [
        "train.jsonl:1: none",
        "train.jsonl:2: other: one",
        "train.jsonl:4: none",
        "valid.jsonl:1: none",
        "test.jsonl: an empty file",
    ]
    lines = str(bad_rows_error(problems, "the folder")).splitlines()[1:]
    expected = [
        "  train.jsonl:1: none",
        "    the same in train.jsonl:4, valid.jsonl:1",
        "  train.jsonl:2: other: one",
        "  test.jsonl: an empty file",
    ]
    assert lines == expected


TRY = [
    ({"prompt": "a", "response": "b"}, "Try completion_feature='response'."),
    ({"question": "a", "answer": "b", "id": 1}, "Try prompt_feature='question', completion_feature='answer'."),
    ({"promt": "a", "completion": "b"}, "Try prompt_feature='promt'."),
    ({"Text": "a"}, "Try text_feature='Text'."),
    ({"conversations": []}, "Try chat_feature='conversations'."),
    (
        {"instruction": "a", "input": "b", "output": "c"},
        "Try prompt_feature='instruction', completion_feature='output' ('input' is not used then).",
    ),
    ({"a": 1, "b": 2}, ""),
    ({"prompt": None, "completion": "a"}, ""),
    ({}, ""),
]


@pytest.mark.parametrize("row, hint", TRY, ids=range(len(TRY)))
def test_keys_of_other_data_sets_are_recognized(row, hint):
    assert feature_hint(row, DataSettings()) == hint


def test_keys_that_are_set_already_count_as_they_are():
    assert feature_hint({"q": "a", "answer": "b"}, DataSettings(prompt_feature="q")) == "Try completion_feature='answer'."


def test_every_feature_has_other_names():
    assert set(OTHER_KEYS) == set(FEATURES)
