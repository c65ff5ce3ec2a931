"""Which format a split has, and what is said about rows that do not fit."""

import pytest

from fulltune_nb.data.encode import messages_of
from fulltune_nb.data.rows import detect_format, row_format, row_problem
from fulltune_nb.data.settings import DataSettings

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
    (one(role="assistant", content=[{"type": "text", "text": "x"}]), "chat", "messages[1]: 'content' is a list, expected a string (join"),
    ({**CHAT, "tools": "add"}, "chat", "'tools' is a string, expected a list"),
    ({**COMPLETION, "tools": {"a": 1}}, "completions", "'tools' is an object, expected a list"),
]


@pytest.mark.parametrize("row, format, said", BAD_ROWS)
def test_row_that_does_not_fit_is_told_what_was_expected_and_found(row, format, said):
    assert said in row_problem(row, format, DEFAULT)


def test_assistant_turn_with_tool_calls_needs_no_content():
    assert row_problem(one(role="assistant", content=None, tool_calls=[{"function": {"name": "add"}}]), "chat", DEFAULT) is None


def test_names_of_sharegpt_in_messages_are_told_with_their_meaning():
    settings = DataSettings(chat_feature="conversations")
    problem = row_problem({"conversations": [{"from": "human", "value": "a"}]}, "chat", settings)
    assert problem.startswith("conversations[0]: 'from' and 'value' are ShareGPT's names") and "user for human" in problem
