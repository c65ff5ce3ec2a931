"""Rows from the hub and from Parquet."""

from __future__ import annotations

import importlib.util
import os
import sys
import types

import pytest

import fulltune_nb as ft
from fulltune_nb.data.hub import hub_id, splits_of

INSTALLED_IN_CI = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None and not os.environ.get("CI"), reason="datasets is not installed; it is in CI"
)
ROWS = [{"q": "Capital of France?", "a": "Paris"}, {"q": "a, b\nand c?", "a": "d"}]


def hub(monkeypatch, load):
    """A stand-in for `datasets` whose hub is `load(name, config)`."""
    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = load  # called as load(name, config) or load(name, config, split="...")
    stand_in.disable_progress_bars = stand_in.enable_progress_bars = lambda: None
    monkeypatch.setitem(sys.modules, "datasets", stand_in)


def test_a_data_set_of_the_hub_comes_by_its_splits_and_keys(monkeypatch, tokenizer):
    asked = []
    hub(monkeypatch, lambda name, config: asked.append((name, config)) or {"train": ROWS, "validation": ROWS[:1], "unsupervised": ROWS})
    data = ft.load_data("hf:org/name:small", tokenizer, prompt_feature="q", completion_feature="a")
    assert asked == [("org/name", "small")] and (len(data.train), len(data.valid), data.test) == (2, 1, None)
    assert data.source == "hf:org/name:small" and data.valid[0].source == "validation:1"
    assert any("'unsupervised'" in note for note in data.notes)


PLACES = [
    ({"train": "hf:org/name:train[:90%]"}, ("org/name", None, "train[:90%]")),
    ({"train": "hf:org/name:small:train[:50%]+test[:10%]"}, ("org/name", "small", "train[:50%]+test[:10%]")),
    ({"valid": "hf:org/name:test"}, ("org/name", None, "test")),
    ("hf:org/name:train[10:20]", ("org/name", None, "train[10:20]")),
]


@pytest.mark.parametrize("source, expected", PLACES, ids=range(len(PLACES)))
def test_a_part_of_a_data_set_can_be_a_split(source, expected, monkeypatch, tokenizer):
    asked = []
    hub(monkeypatch, lambda name, config, split: asked.append((name, config, split)) or ROWS)
    data = ft.load_data(source, tokenizer, prompt_feature="q", completion_feature="a")
    assert asked == [expected]
    again = ft.load_data(data.source, tokenizer, prompt_feature="q", completion_feature="a")
    assert again.fingerprint == data.fingerprint and asked == [expected] * 2
    assert next(iter(data.splits.values()))[1].source == f"{expected[2]}:2"


def test_a_whole_data_set_gives_the_split_of_the_same_name(monkeypatch, tokenizer):
    hub(monkeypatch, lambda name, config: {"train": ROWS, "validation": ROWS[:1]})
    data = ft.load_data({"train": ROWS, "dev": "hf:org/name"}, tokenizer, prompt_feature="q", completion_feature="a")
    assert len(data.valid) == 1 and data.source is None


@pytest.mark.parametrize("source", ["hf:org/name:all[:9]", "hf:org/name[:9]", "hf:a:b:c", {"train": "hf:a:b:c:d"}, {"train": "hf:a:"}])
def test_a_part_that_is_not_clear_is_refused(source, monkeypatch, tokenizer):
    hub(monkeypatch, lambda name, config, split=None: ROWS)
    with pytest.raises(ft.DataError, match="which split|expected a name"):
        ft.load_data(source, tokenizer)


@INSTALLED_IN_CI
def test_a_folder_can_be_sliced_into_splits(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("".join(f'{{"text": "row {i}"}}\n' for i in range(10)))
    monkeypatch.chdir(tmp_path)
    data = ft.load_data({"train": "hf:rows:train[:80%]", "validation": "hf:rows:train[80%:]"}, tokenizer)
    assert [e.row["text"] for e in data.valid] == ["row 8", "row 9"] and len(data.train) == 8
    file = ft.load_data({"train": "hf:rows/train.jsonl:train[:80%]"}, tokenizer)
    assert file.train.fingerprint == data.train.fingerprint
    monkeypatch.chdir(tmp_path / "cache")
    assert ft.load_data(data.source, tokenizer).fingerprint == data.fingerprint


def test_a_plain_name_is_the_hubs_only_where_no_folder_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert (hub_id("org/name"), hub_id("hf:name")) == ("org/name", "name")
    assert not any(map(hub_id, ("mine/data", "data", "./org/name", "/a/b")))


@pytest.mark.parametrize("names", [("README.md", "data/train-00000.parquet"), ("dataset_dict.json", "train/data.arrow")])
def test_a_folder_in_the_hubs_layout_is_told_how_to_be_given(names, tmp_path, tokenizer):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ft.DataError, match=f"give it as 'hf:{tmp_path}'"):
        ft.load_data(tmp_path, tokenizer)


@INSTALLED_IN_CI
def test_a_folder_in_the_hubs_layout_is_read_with_its_keys(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "downloaded" / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "downloaded" / "data" / f"{split}-00000-of-00001.parquet"))
    data = ft.load_data(f"hf:{tmp_path / 'downloaded'}", tokenizer, prompt_feature="q", completion_feature="a")
    assert [example.row["a"] for example in data.valid] == ["Paris", "d"] and data.valid[0].source == "validation:1"


def test_what_cannot_be_loaded_is_told_with_what_to_do(monkeypatch, tokenizer):
    def offline(name, config):
        raise ConnectionError("no network <b>")

    hub(monkeypatch, offline)
    with pytest.raises(ft.DataError, match=r"'org/name' could not be loaded .*no network.*name right.*\./org/name"):
        ft.load_data("org/name", tokenizer)
    with pytest.raises(ft.DataError, match="expected a data set's name"):
        ft.load_data("hf:", tokenizer)


@pytest.mark.parametrize("splits, message", [({"all": []}, "no split named"), ({"val": [], "dev": []}, "'val' and 'dev'")])
def test_splits_that_are_not_clear_are_refused(splits, message):
    with pytest.raises(ft.DataError, match=message):
        splits_of(splits, "The data set")


@pytest.mark.parametrize("source", ["hf:org/name", "table"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(source, monkeypatch, tokenizer, tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ft.errors.MissingDependencyError, match=r"pip install 'fulltune_nb\[datasets\]'"):
        ft.load_data(tmp_path if source == "table" else source, tokenizer)


@INSTALLED_IN_CI
def test_parquet_is_read_like_json_lines(tmp_path, tokenizer, capfd):
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "train.parquet"))
    capfd.readouterr()
    data = ft.load_data(tmp_path, tokenizer, prompt_feature="q", completion_feature="a")
    same = ft.load_data({"train": ROWS}, tokenizer, prompt_feature="q", completion_feature="a")
    assert data.fingerprint == same.fingerprint and data.train[1].source == "train.parquet:2"
    assert capfd.readouterr() == ("", "")


@INSTALLED_IN_CI
def test_a_table_that_cannot_be_read_and_one_that_is_there_twice_are_refused(tmp_path, tokenizer):
    (tmp_path / "train.parquet").write_bytes(b"not parquet")
    with pytest.raises(ft.DataError, match="train.parquet: cannot be read"):
        ft.load_data(tmp_path, tokenizer)
    (tmp_path / "train.jsonl").write_text('{"text": "a b c"}\n')
    with pytest.raises(ft.DataError, match="train.jsonl and train.parquet"):
        ft.load_data(tmp_path, tokenizer)
