"""Objects of which nothing is lost in reading."""

import json

import pytest

from fulltune_nb.files import KeyTwice, no_key_twice


def read(text: str):
    return json.loads(text, object_pairs_hook=no_key_twice)


def test_what_has_each_key_once_is_read_as_ever():
    text = '{"a": {"a": [1, {"b": null}]}, "b": 2.5, "": {}}'
    assert read(text) == json.loads(text) and list(read(text)) == ["a", "b", ""]


@pytest.mark.parametrize(
    "text, key", [('{"a": 1, "b": 2, "a": 1}', "'a'"), ('[{"x": {"": 1, "": 2}}]', "''"), ('{"a": 1, "\\u0061": 2}', "'a'")]
)
def test_a_key_given_twice_is_named_at_any_depth(text, key):
    with pytest.raises(KeyTwice, match=f"the key {key} is given twice"):
        read(text)


def test_the_message_stays_short_and_the_search_quick():
    many = ", ".join(f'"{number}": 0' for number in range(200_000))  # comparing each with each would take minutes
    with pytest.raises(KeyTwice, match="'199999'"):
        read("{" + many + ', "199999": 1}')
    with pytest.raises(KeyTwice) as error:
        read(json.dumps({"x" * 10_000: 1})[:-1] + ', "' + "x" * 10_000 + '": 2}')
    assert len(str(error.value)) < 200
