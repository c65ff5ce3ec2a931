"""Rows that were tokenized before are taken from the cache, and nothing of them differs."""

import os
import stat

import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.data import cache, dataset
from nbs_tests.conftest import CHATML
from nbs_tests.data import chat_templates as templates


def chat(i, *more):
    return {"messages": [{"role": "user", "content": f"How many are {i}? "}, {"role": "assistant", "content": f"{i} naïve 東京."}, *more]}


BAD = [{"messages": []}, {"messages": [{"role": "user", "content": "\ud800"}]}]
ROWS = {
    "chat": [*(chat(i) for i in range(9)), *BAD, chat(10, *chat(11)["messages"])],
    "text": [{"text": "the quick brown fox " * n} for n in range(1, 9)],
}
SETTINGS = [{"mask_prompt": True}, {"mask_prompt": "last", "long_rows": "split"}, {"long_rows": "drop"}, {"valid_fraction": 0.3}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder; all rows are enough to be kept."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "rows"))
    monkeypatch.setattr(cache, "LARGE", 0)
    return tmp_path / "rows"


@pytest.fixture
def tokenized(monkeypatch):
    """Grows by a split's name whenever one is tokenized."""
    names, encode = [], dataset.encode_rows

    def counted(*arguments):
        names.append(arguments[-1])
        return encode(*arguments)

    monkeypatch.setattr(dataset, "encode_rows", counted)
    return names


def load(tokenizer, rows, **settings):
    return ft.load_data({"train": rows}, tokenizer, **{"max_seq_length": 30, "bad_rows": "skip", **settings})


def facts(data):
    """All that a data set says of itself and its examples."""
    examples = [
        (name, e.tokens.tolist(), e.loss_mask.tolist(), e.text, e.source, e.cut, e.window, e.row)
        for name, split in data.splits.items() for e in split
    ]  # fmt: skip
    splits = [(s.dropped, s.tokens_dropped, s.truncated, s.windows, s.skipped, s.blank_lines) for s in data.splits.values()]
    return examples, splits, data.notes, data.fingerprint


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_rows_from_the_cache_are_the_rows_that_were_tokenized(folder, tokenized, make_tokenizer, rows, settings):
    tokenizer = make_tokenizer(CHATML)
    if rows is ROWS["text"]:
        settings = {key: value for key, value in settings.items() if key != "mask_prompt"}
    first, second = (facts(load(tokenizer, rows, **settings)) for _ in range(2))
    assert first == second and tokenized == ["train"]


def test_what_a_template_leaves_out_is_told_again(folder, tokenized, make_tokenizer):
    tokenizer = make_tokenizer(templates.DROPS_EARLIER_THINKING)
    thought = {"role": "assistant", "content": "<think>Let us see.</think>Four."}
    rows = [{"messages": [chat(1)["messages"][0], thought, *chat(2)["messages"]]}]
    first, second = (load(tokenizer, rows, mask_prompt="last", max_seq_length=200).notes for _ in range(2))
    assert first == second and "the reasoning of earlier turns" in first[0] and tokenized == ["train"]


CHANGES = {
    "a word": lambda rows, tokenizer: ([*rows[:-1], chat(99)], {}),
    "the order": lambda rows, tokenizer: (rows[::-1], {}),
    "a key that nothing reads": lambda rows, tokenizer: ([{**rows[0], "id": 1}, *rows[1:]], {}),
    "a setting": lambda rows, tokenizer: (rows, {"mask_prompt": "last"}),
    "the chat template": lambda rows, tokenizer: (setattr(tokenizer, "chat_template", templates.LLAMA3), (rows, {}))[1],
    "a token": lambda rows, tokenizer: (tokenizer.add_tokens(["naïve"]), (rows, {}))[1],
    "the end of text": lambda rows, tokenizer: (setattr(tokenizer, "eos_token", "<|im_end|>"), (rows, {}))[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_are_tokenized_anew_where_anything_that_they_depend_on_is_another(folder, tokenized, make_tokenizer, change):
    tokenizer, rows = make_tokenizer(CHATML), [chat(i) for i in range(5)]
    load(tokenizer, rows, mask_prompt=True)
    rows, settings = CHANGES[change](rows, tokenizer)
    load(tokenizer, rows, **{"mask_prompt": True, **settings})
    assert tokenized == ["train", "train"]


DAMAGES = {
    "cut short": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "longer": lambda content: content + b"\0",
    "a byte of the tokens": lambda content: content[:-300] + bytes([content[-300] ^ 1]) + content[-299:],
    "a byte of the header": lambda content: content[:80].replace(b"[", b"{") + content[80:],
    "another file": lambda content: b"\n" * len(content),
    "a pickle": lambda content: b"cos\nsystem\n(S'exit 3'\ntR.",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_and_made_anew(folder, tokenized, make_tokenizer, damage):
    tokenizer = make_tokenizer(CHATML)
    first = facts(load(tokenizer, ROWS["chat"]))
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(DAMAGES[damage](whole))
    assert file.read_bytes() != whole
    again = load(tokenizer, ROWS["chat"])
    assert f"tokenized again: the file in which they were kept, {file}, is not what was written there (" in again.notes[0]
    assert facts(load(tokenizer, ROWS["chat"])) == first and tokenized == ["train", "train"] and again.fingerprint == first[-1]
    assert file.read_bytes() == whole and list(folder.iterdir()) == [file]


def test_a_file_or_folder_of_another_user_is_not_read(folder, tokenized, make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(CHATML)
    load(tokenizer, ROWS["chat"])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    (file,), us = folder.iterdir(), os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: us + 1)
    with pytest.raises(OSError, match=f"belongs to user {us} and has mode 700"):
        cache.cache_folder()
    with pytest.raises(ValueError, match="another user's"):
        cache._read(file, [], tokenizer)


def test_a_folder_that_others_can_write_into_is_not_used(folder, tokenized, make_tokenizer, tmp_path):
    folder.mkdir()
    folder.chmod(0o777)
    (note, *_) = load(make_tokenizer(CHATML), ROWS["chat"]).notes
    assert note.startswith(f"Tokenized rows are not kept: others can write into {folder}") and not list(folder.iterdir())
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert f"{folder} is a link" in load(make_tokenizer(CHATML), ROWS["chat"]).notes[0] and list(tmp_path.iterdir()) == [folder]


def test_a_link_in_the_place_of_a_file_is_not_followed(folder, tokenized, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(CHATML)
    load(tokenizer, ROWS["chat"])
    (file,) = folder.iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    load(tokenizer, ROWS["chat"])
    assert tokenized == ["train", "train"] and not file.is_symlink()


def test_the_files_that_were_not_used_for_longest_go_first_and_nobody_elses(folder, make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(CHATML)
    for number in range(3):
        load(tokenizer, [chat(number)])
        newest = max(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    (folder / "mine.rows").write_text("kept")
    load(tokenizer, [chat(0)])  # used again
    first_two = sorted(folder.glob("?" * 64 + ".rows"), key=lambda file: file.stat().st_mtime)[:2]
    monkeypatch.setattr(cache, "LIMIT", sum(file.stat().st_size for file in folder.glob("?" * 64 + ".rows")) - 1)
    load(tokenizer, [chat(3)])
    assert [file.exists() for file in first_two] == [False, False] and (folder / "mine.rows").read_text() == "kept"


def test_without_room_for_it_the_rows_are_loaded_all_the_same(folder, make_tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    data = load(make_tokenizer(CHATML), ROWS["chat"])
    assert len(data.train) == 10 and not list(folder.iterdir())
    assert data.notes[0].startswith("Tokenized rows could not be kept, so the next load takes as long as this one: [Errno 28]")


def test_it_can_be_turned_off_and_few_rows_are_not_kept(folder, make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(CHATML)
    monkeypatch.setattr(cache, "LARGE", 2**20)
    load(tokenizer, ROWS["chat"])
    monkeypatch.setattr(cache, "LARGE", 0)
    monkeypatch.setenv(cache.VARIABLE, "off")
    load(tokenizer, ROWS["chat"])
    assert not folder.exists() or not list(folder.iterdir())


def test_rows_that_no_hash_can_be_made_of_are_tokenized_each_time(folder, tokenized, make_tokenizer):
    rows = [{"messages": chat(1)["messages"], "score": np.float32(1)}]
    for _ in range(2):
        load(make_tokenizer(CHATML), rows)
    assert tokenized == ["train", "train"] and not list(folder.iterdir() if folder.exists() else ())
