"""Rows from CSV files."""

from __future__ import annotations

import csv
import sys

import pytest

import fulltune_nb as ft

ROWS = [
    {"q": "Capital of France?", "a": "Paris"},
    {"q": 'a, "b"\nand c?', "a": "7"},
    {"q": "Which word means nothing?", "a": "None"},
    {"q": "Two letters?", "a": "NA"},
]
KEYS = {"prompt_feature": "q", "completion_feature": "a"}


def write(folder, rows=ROWS, **options):
    with (folder / "train.csv").open("w", encoding=options.pop("encoding", "utf-8"), newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), **options)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("options", [{}, {"encoding": "utf-8-sig"}, {"lineterminator": "\n"}, {"quoting": csv.QUOTE_ALL}])
def test_csv_is_read_like_json_lines_and_needs_no_other_package(options, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    write(tmp_path, **options)
    data, same = ft.load_data(tmp_path, tokenizer, **KEYS), ft.load_data({"train": ROWS}, tokenizer, **KEYS)
    assert data.fingerprint == same.fingerprint
    assert [example.row["a"] for example in data.train] == ["Paris", "7", "None", "NA"]


def test_a_row_is_named_by_the_line_where_it_begins(tmp_path, tokenizer):
    write(tmp_path)
    assert [e.source for e in ft.load_data(tmp_path, tokenizer, **KEYS).train] == [f"train.csv:{line}" for line in (2, 3, 5, 6)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("q,a\nOne, two?,three\n", r"train.csv:2: 3 fields where line 1 names 2"),
        ("q,a\nOne?\n", r"train.csv:2: 1 fields where line 1 names 2"),
        ("q,a\nOne?,two\nThree?,\n", r"train.csv:3: 'a' is null"),
        ('q,a\n"One?,two\nThree?,four\n', r"train.csv:2: no CSV: unexpected end of data"),
        ("q,q\nOne?,two\n", "the column 'q' is there twice"),
        ("q,a\n", "train.csv: no rows"),
        ("", "train.csv: no rows"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text, message, tmp_path, tokenizer):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(ft.DataError, match=message):
        ft.load_data(tmp_path, tokenizer, **KEYS)


def test_another_encoding_is_told(tmp_path, tokenizer):
    write(tmp_path, [{"q": "Où?", "a": "là"}], encoding="latin-1")
    with pytest.raises(ft.DataError, match="train.csv: not UTF-8"):
        ft.load_data(tmp_path, tokenizer, **KEYS)


def test_long_fields_are_read_and_the_limit_of_the_process_is_left_alone(tmp_path, tokenizer):
    before = csv.field_size_limit()
    write(tmp_path, [{"text": "word " * 40_000}])
    assert len(ft.load_data(tmp_path, tokenizer).train) == 1 and csv.field_size_limit() == before
