"""Finding rows by their texts."""

from fulltune_nb.data import load_data
from fulltune_nb.data.look import search, surroundings


def make_split(tokenizer, texts):
    return load_data({"train": [{"text": text} for text in texts]}, tokenizer).train


def test_case_does_not_matter_and_patterns_are_plain_text(tokenizer):
    split = make_split(tokenizer, ["a Fox.", "a dog", "FOX?", "f.x"])
    assert search(split, range(4), "fox").rows == [0, 2]
    assert search(split, range(4), "f.x").rows == [3]
    assert search(split, [2, 3], "fox").rows == [2]


def test_work_is_bounded_and_what_was_looked_at_is_told(tokenizer):
    split = make_split(tokenizer, ["fox " * 10] * 5)
    found = search(split, range(5), "fox", most_characters=100)
    assert (found.rows, found.looked_at) == ([0, 1, 2], 3)


def test_surroundings_show_the_first_of_all_hits():
    whole = "x" * 100 + "Fox" + "y" * 100 + "fox"
    assert surroundings(whole, "fOX") == ("… " + "x" * 60, "Fox", "y" * 60 + " …", 2)
    assert surroundings("a fox", "fox") == ("a ", "fox", "", 1)
    assert surroundings("a fox", "dog") is None and surroundings("a fox", "") is None
