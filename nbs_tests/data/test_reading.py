"""Files and lists to rows: what is accepted, and how bad input is reported."""

import json
import tracemalloc

import pytest

from fulltune_nb.data import read as reading
from fulltune_nb.data.read import is_there, read_file, read_folder, read_source, read_splits
from fulltune_nb.errors import DataError


def read(tmp_path, content: bytes):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    return read_file("train", path)


def test_rows_come_with_file_and_line_and_duplicates_stay(tmp_path):
    split = read(tmp_path, b'{"text": "a"}\n{"text": "a"}\n{"text": "b", "id": 1}')
    assert split.rows == [
        ("train.jsonl:1", {"text": "a"}),
        ("train.jsonl:2", {"text": "a"}),
        ("train.jsonl:3", {"text": "b", "id": 1}),
    ]
    assert split.problems == [] and split.blank_lines == 0


def test_byte_order_mark_and_crlf_are_accepted(tmp_path):
    split = read(tmp_path, b'\xef\xbb\xbf{"text": "a\\r\\n"}\r\n{"text": "b"}\r\n')
    assert [row for _, row in split.rows] == [{"text": "a\r\n"}, {"text": "b"}] and split.problems == []


def test_blank_lines_are_counted_and_keep_the_line_numbers(tmp_path):
    split = read(tmp_path, b'\n{"text": "a"}\n  \r\n{"text": "b"}\n\n')
    assert [source for source, _ in split.rows] == ["train.jsonl:2", "train.jsonl:4"] and split.blank_lines == 3


def test_line_separators_of_unicode_inside_a_string_end_no_line(tmp_path):
    split = read(tmp_path, '{"text": "a\u2028b\u0085c"}\n'.encode())
    assert split.rows == [("train.jsonl:1", {"text": "a\u2028b\u0085c"})]


BAD_LINES = [
    (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at byte 14 of the line)"),
    (b'{"text": "a"', "not JSON: Expecting ',' delimiter"),
    (b"{'text': 'a'}", "not JSON"),
    (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    (b"hello", "not JSON"),
    (b"[", "each object on one line"),
    (b'["a"]', "not an object but a list"),
    (b'"a"', "not an object but a string"),
    (b"3", "not an object but a number"),
    (b"true", "not an object but true or false"),
    (b"null", "not an object but null"),
    (b'{"text": "a", "text": "b"}', "the key 'text' is given twice"),
    (b'{"messages": [{"role": "user", "role": "system"}]}', "the key 'role' is given twice"),
    (b'{"a":' * 100_000, "not readable as JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not readable as JSON"),
]


@pytest.mark.parametrize("line, said", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_line_is_reported_with_file_and_line_and_the_others_are_read(tmp_path, line, said):
    split = read(tmp_path, b'{"text": "a"}\n' + line + b'\n{"text": "c"}\n')
    assert [row["text"] for _, row in split.rows] == ["a", "c"]
    assert len(split.problems) == 1 and split.problems[0].startswith("train.jsonl:2: ") and said in split.problems[0]
    assert len(split.problems[0]) < 300


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf16_file_is_one_problem(tmp_path, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    split = read(tmp_path, (mark + '{"text": "a"}\n' * 30).encode(encoding))
    assert len(split.problems) == 1 and "train.jsonl: not UTF-8 but UTF-16" in split.problems[0]


@pytest.mark.parametrize("content, said", [(b"", "an empty file"), (b"\n\n", "only 2 blank lines"), (b"\xef\xbb\xbf", "an empty file")])
def test_file_without_rows_is_a_problem(tmp_path, content, said):
    assert said in read(tmp_path, content).problems[0]


@pytest.mark.parametrize("last", [b"", b'\n{"text": "b"}\n'])
def test_line_of_50_mb_is_a_problem_by_line_and_never_held_in_memory(tmp_path, last):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"x" * 50_000_000 + b'"}' + last)
    tracemalloc.start()
    split = read_file("train", path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [source for source, _ in split.rows] == ["train.jsonl:1", "train.jsonl:3"][: 1 + bool(last)]
    assert len(split.problems) == 1 and "train.jsonl:2: a line of 47.7 MiB, the limit is 16 MiB" in split.problems[0]
    assert peak < 2.5 * reading.MAX_LINE_BYTES


def test_line_of_just_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE_BYTES", 20)
    fits, too_long = json.dumps({"text": "x" * 8}), json.dumps({"text": "x" * 9})
    assert len(fits) == 20
    split = read(tmp_path, f"{fits}\n{too_long}\n{fits}\n{fits}".encode())
    assert [source for source, _ in split.rows] == ["train.jsonl:1", "train.jsonl:3", "train.jsonl:4"]
    assert [p.split(" ")[0] for p in split.problems] == ["train.jsonl:2:"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"},\n {"text": "b"}]\n',
        '[\n{"text": "a"},\n{"text": "b"}\n]',
        '\n[\n  {\n    "text": "a"\n  }\n]\n\n',
        '\ufeff[{"text":\n"a"}]',
    ],
    ids=["a row a line", "brackets on their own", "indented", "byte order mark"],
)
def test_file_that_is_one_json_array_is_one_problem_that_says_how_to_go_on(tmp_path, content):
    split = read(tmp_path, content.encode())
    assert split.rows == [] and len(split.problems) == 1
    assert split.problems[0].startswith("train.jsonl: the file is one JSON array") and "json.load" in split.problems[0]


def test_json_that_is_nested_without_end_is_told(tmp_path):
    split = read(tmp_path, b"[" * 100_000 + b"\n]\n")
    assert split.rows == [] and "one JSON array" in split.problems[0]
    with pytest.raises(DataError, match="an object of JSON"):
        reading.stored('{"train":' * 100_000)


def test_array_on_one_line_is_told_the_same_way(tmp_path):
    assert "json.load and pass the rows" in read(tmp_path, b'[{"text": "a"}, {"text": "b"}]').problems[0]


def test_object_over_several_lines_is_one_problem(tmp_path):
    split = read(tmp_path, b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n')
    assert split.rows == [] and len(split.problems) == 1 and "spread over several lines" in split.problems[0]


def test_a_bad_bracket_among_rows_is_that_lines_problem_and_the_rows_are_read(tmp_path):
    split = read(tmp_path, b'[\n{"text": "a"}\n')
    assert len(split.rows) == 1 and split.problems[0].startswith("train.jsonl:1: not JSON")


HINTS = [
    ('{"text": "a"},', "remove the comma at the end of the line"),
    ('{"text": "a",}', "remove the comma before the closing bracket"),
    ('{"messages": [1, 2, ]}', "remove the comma before the closing bracket"),
    ('{"text": "a"}{"text": "b"}', "more than one object on this line"),
    ("{'text': 'a'}", "double quotes"),
    ('{"text": None}', "null, true and false"),
]


@pytest.mark.parametrize("line, hint", HINTS, ids=range(len(HINTS)))
def test_mistakes_that_are_made_often_are_told_what_to_do(tmp_path, line, hint):
    assert hint in read(tmp_path, f'{{"text": "a"}}\n{line}\n'.encode()).problems[0]


# ---------------------------------------------------------------- folders


def test_folder_with_some_of_the_files_is_read(tmp_path):
    for name in ("test", "valid"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "README.md").write_text("about")
    splits, notes = read_folder(tmp_path)
    assert [s.name for s in splits] == ["valid", "test"] and notes == []


def test_jsonl_files_that_are_not_read_are_noted_with_the_name_that_is_meant(tmp_path):
    for name in ("train.jsonl", "Valid.jsonl", "more.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    note = read_folder(tmp_path)[1][0]
    assert "Valid.jsonl, more.jsonl" in note and "Is Valid.jsonl meant as valid.jsonl?" in note


ELSEWHERE = [("validation", "valid"), ("val", "valid"), ("dev", "valid"), ("eval", "valid"), ("testing", "test")]


@pytest.mark.parametrize("name, split", ELSEWHERE)
def test_names_that_splits_have_elsewhere_are_taken_as_files_and_as_keys(tmp_path, name, split):
    (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "train.csv").write_text("text\na\n")
    (_, found), notes = read_folder(tmp_path)
    assert (found.name, found.rows[0][0], notes) == (split, f"{name}.jsonl:1", [])
    (found,) = read_splits({name: [{"text": "a"}]})[1]
    assert (found.name, found.rows[0][0]) == (split, f"{name}:1")


def test_a_split_by_two_names_is_an_error(tmp_path):
    for name in ("valid", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"valid\.jsonl and validation\.jsonl. Which is meant"):
        read_folder(tmp_path)
    with pytest.raises(DataError, match="'dev' and 'val' both name the split valid"):
        read_splits({"dev": [{"text": "a"}], "val": [{"text": "a"}]})


def test_missing_folder_is_an_error_with_the_nearest_name(tmp_path):
    (tmp_path / "wikisql").mkdir()
    with pytest.raises(DataError, match=r"no folder.*wikisqll.*wikisql\."):
        read_folder(tmp_path / "wikisqll")
    with pytest.raises(DataError, match="has these folders: wikisql"):
        read_folder(tmp_path / "zzz" / "deeper")


def test_file_in_place_of_a_folder_is_an_error_that_names_the_folder(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(DataError) as error:
        read_folder(path)
    assert "is a file" in str(error.value) and f"Give the folder it is in: {str(tmp_path)!r}" in str(error.value)


WRONG_NAMES = [
    (["Train.jsonl", "Val.jsonl"], "Train.jsonl -> train.jsonl, Val.jsonl -> valid.jsonl"),
    (["train.json"], "train.json -> train.jsonl"),
]


@pytest.mark.parametrize("names, hint", WRONG_NAMES)
def test_folder_without_data_is_an_error_that_lists_what_is_there(tmp_path, names, hint):
    for name in [*names, "notes.txt"]:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError) as error:
        read_folder(tmp_path)
    assert all(name in str(error.value) for name in [*names, "notes.txt"]) and hint in str(error.value)


def test_packed_file_is_to_be_unpacked_not_renamed(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(b"x")
    with pytest.raises(DataError, match=r"Unpack train\.jsonl\.gz\.$"):
        read_folder(tmp_path)


def test_folder_of_data_folders_is_an_error_that_names_those_with_data(tmp_path):
    for name in ("text", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "valid.csv").write_text("text")
    with pytest.raises(DataError) as error:
        read_folder(tmp_path)
    assert f"Is one of these folders meant: {tmp_path / 'text'}?" in str(error.value) and "Rename" not in str(error.value)


def test_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="found nothing"):
        read_folder(tmp_path)


def test_folder_in_place_of_a_file_is_a_problem(tmp_path):
    (tmp_path / "train.jsonl").mkdir()
    assert "train.jsonl: cannot be read" in read_folder(tmp_path)[0][0].problems[0]


# ---------------------------------------------------------------- rows in memory


def test_rows_in_memory_come_with_split_and_number():
    row = {"text": "a"}
    splits = read_splits({"test": [row], "train": iter([row, row]), "valid": None})[1]
    assert [(s.name, s.rows) for s in splits] == [("train", [("train:1", row), ("train:2", row)]), ("test", [("test:1", row)])]


def test_row_in_memory_that_is_no_dict_is_a_problem_by_number():
    (split,) = read_splits({"train": [{"text": "a"}, "b", None]})[1]
    assert [p.split(" not")[0] for p in split.problems] == ["train:2:", "train:3:"]


@pytest.mark.parametrize("name, meant", [("vaild", "valid"), ("tset", "test"), ("tarin", "train")])
def test_unknown_split_is_an_error_with_the_nearest_name(name, meant):
    with pytest.raises(DataError, match=f"Unknown split '{name}'.*Did you mean {meant!r}"):
        read_splits({name: [{"text": "a"}]})


@pytest.mark.parametrize("rows", ["train.jsonl", {"text": "a"}, 3, b"x"])
def test_split_that_is_no_list_is_an_error(rows):
    with pytest.raises(DataError, match="train: expected a list of rows"):
        read_splits({"train": rows})


def test_a_data_frame_is_read_by_rows_and_what_it_lacks_counts_as_absent():
    pandas = pytest.importorskip("pandas", reason="pandas is an optional package")
    frame = pandas.DataFrame({"text": ["a", None], "messages": [None, [{"role": "user", "name": None}]], "n": [1.5, float("nan")]})
    (split,) = read_splits({"train": frame})[1]
    first, second = (row for _, row in split.rows)
    assert first["text"] == "a" and first["messages"] is None and first["n"] == 1.5 and split.rows[1][0] == "train:2"
    assert second == {"text": None, "messages": [{"role": "user"}], "n": None}


def test_each_split_may_have_its_own_place_which_is_stored_and_read_again(tmp_path):
    for folder, name in (("a", "rows.jsonl"), ("b", "validation.jsonl")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(f'{{"text": "{folder}"}}\n')
    where, splits, _ = read_source({"train": tmp_path / "a" / "rows.jsonl", "val": str(tmp_path / "b")})
    expected = {"train": [("rows.jsonl:1", {"text": "a"})], "valid": [("validation.jsonl:1", {"text": "b"})]}
    assert {split.name: split.rows for split in splits} == expected
    assert read_source(where)[:2] == (where, splits) and is_there(where)
    (tmp_path / "a" / "rows.jsonl").unlink()
    assert not is_there(where)
    with pytest.raises(DataError, match=r"train: expected a list of rows .*rows\.jsonl"):
        read_source(where)
    with pytest.raises(DataError, match="has no split test, only valid"):
        read_splits({"test": tmp_path / "b"})


@pytest.mark.parametrize("source", [{}, {"train": None}])
def test_no_split_is_an_error(source):
    with pytest.raises(DataError, match="No split given"):
        read_splits(source)


def test_empty_list_is_a_problem():
    assert read_splits({"train": [{"text": "a"}], "valid": []})[1][1].problems == ["valid: no rows; leave the split out or give it rows"]
