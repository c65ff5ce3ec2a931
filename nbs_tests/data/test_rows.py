"""Which format a split has, and what is said about rows that cannot be used."""

import pytest

from fulltune_nb.data.encode import messages_of
from fulltune_nb.data.rows import OTHER_KEYS, bad_rows_error, detect_format, feature_hint, row_format, row_problem
from fulltune_nb.data.settings import FEATURES, DataSettings

DEFAULT = DataSettings()
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"prompt": "Hi", "completion": "Hello"}
TEXT = {"text": "Hi"}


FOUND = [(CHAT, "chat"), (COMPLETION, "completions"), (TEXT, "text"), ({"prompt": "Hi"}, None), ({}, None)]


@pytest.mark.parametrize("row, expected", FOUND)
def test_format_is_found_by_the_keys(row, expected):
    assert row_format(row, DEFAULT) == expected
    assert row_format({**row, "id": 3}, DEFAULT) == expected


def test_row_that_fits_several_formats_is_chat_then_completions_then_text():
    assert row_format({**TEXT, **COMPLETION, **CHAT}, DEFAULT) == "chat"
    assert row_format({**TEXT, **COMPLETION}, DEFAULT) == "completions"


def test_null_key_counts_as_absent():
    assert row_format({"messages": None, "text": "Hi"}, DEFAULT) == "text"


def test_renamed_keys_are_used():
    names = DataSettings(prompt_feature="question", completion_feature="answer", text_feature="body", chat_feature="turns")
    assert row_format({"question": "Hi", "answer": "Hello"}, names) == "completions"
    assert row_format({"body": "Hi"}, names) == "text"
    assert row_format({"turns": CHAT["messages"]}, names) == "chat"
    assert row_format(TEXT, names) is None
    pair = messages_of({"question": "Hi", "answer": "Hello"}, "completions", names)
    assert pair == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_one_bad_first_row_does_not_decide_the_format():
    assert detect_format([{"txet": "Hi"}, TEXT, TEXT], DEFAULT) == "text"
    assert detect_format([COMPLETION, TEXT, TEXT], DEFAULT) == "text"
    assert detect_format([COMPLETION, TEXT], DEFAULT) == "completions"
    assert detect_format([{}, {"a": 1}], DEFAULT) is None


@pytest.mark.parametrize("row, format", [(CHAT, "chat"), (COMPLETION, "completions"), (TEXT, "text"), ({"text": ""}, "text")])
def test_row_that_fits_has_no_problem(row, format):
    assert row_problem(row, format, DEFAULT) is None


def one(**message):
    return {"messages": [{"role": "user", "content": "Hi"}, message]}


BAD_ROWS = [
    (TEXT, "chat", "mixed formats: this row is text"),
    (COMPLETION, "text", "mixed formats: this row is completions"),
    ({"prompt": "Hi"}, "completions", "missing key 'completion'"),
    ({"promt": "Hi", "completion": "x"}, "completions", "'promt' misspelt"),
    ({"prompt": "Hi", "completion": None}, "completions", "'completion' is null"),
    ({"prompt": 3, "completion": "x"}, "completions", "'prompt' is a number, expected a string"),
    ({"prompt": "x", "completion": ["x"]}, "completions", "'completion' is a list, expected a string"),
    ({"text": {"a": 1}}, "text", "'text' is an object, expected a string"),
    ({"text": True}, "text", "'text' is true or false, expected a string"),
    ({}, "text", "missing key 'text'"),
    ({"messages": "Hi"}, "chat", "'messages' is a string, expected a list"),
    ({"messages": []}, "chat", "'messages' is an empty list"),
    ({"messages": ["Hi"]}, "chat", "messages[0] is a string, expected an object"),
    (one(content="x"), "chat", "messages[1]: missing key 'role'"),
    (one(role=1, content="x"), "chat", "messages[1]: 'role' is a number"),
    (one(role="assistant"), "chat", "messages[1]: 'content' is missing"),
    (one(role="assistant", content=None), "chat", "messages[1]: 'content' is null"),
    (one(role="assistant", content=[{"type": "image"}]), "chat", "messages[1]: 'content' is a list, expected a string or a list of text"),
    ({**CHAT, "tools": "add"}, "chat", "'tools' is a string, expected a list"),
    ({**COMPLETION, "tools": {"a": 1}}, "completions", "'tools' is an object, expected a list"),
]


@pytest.mark.parametrize("row, format, said", BAD_ROWS)
def test_row_that_does_not_fit_is_told_what_was_expected_and_found(row, format, said):
    assert said in row_problem(row, format, DEFAULT)


def test_assistant_turn_with_tool_calls_needs_no_content():
    assert row_problem(one(role="assistant", content=None, tool_calls=[{"function": {"name": "add"}}]), "chat", DEFAULT) is None


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
