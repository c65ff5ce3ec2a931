"""Where rows come from: a folder of JSON Lines, CSV or Parquet files, a data set of the hub, or lists in memory.

    load_data("folder", ...)              train.jsonl, valid.jsonl, test.jsonl, or the same with .csv or .parquet
    load_data("hf:org/name", ...)         a data set of the hub; "hf:org/name:config" where it has several
    load_data("org/name", ...)            the same, where there is no such folder here
    load_data({"train": rows}, ...)       rows in memory
    load_data({"train": "hf:org/name:train[:90%]", "valid": "other/valid.jsonl"}, ...)      each split from its own place

Bad lines are collected, by file and line. The hub and Parquet are read by the optional package `datasets`, see `hub`.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from fulltune_nb.data.hub import PREFIX, hub_id, read_hub, read_hub_split, read_parquet, split_from
from fulltune_nb.data.rows import (
    OTHER_NAMES,
    SPLITS,
    RawSplit,
    RowError,
    parse_line,
    read_table,
    split_meant,
    split_named,
    whole_file_problem,
)
from fulltune_nb.data.watching import watched
from fulltune_nb.errors import DataError, closest, listed
from fulltune_nb.files import absolute, check_own_file

ENDINGS = (".jsonl", ".csv", ".parquet")
MAX_LINE_BYTES = 16 * 2**20
"""A longer line is reported and skipped without being held in memory. As text it would be some four million tokens."""
_ROWS_BETWEEN = 4096  # of which reading is told

_FOLDER_LAYOUT = "a folder with train.jsonl, valid.jsonl and test.jsonl (any of them)"


def read_source(source: Any) -> tuple[str | None, list[RawSplit], list[str]]:
    """Where the rows come from, as text that can be stored and read again (None for rows in memory), the rows, and what was not read.

    Raises:
        DataError: there is nothing to read, or it is not clear what is meant.
        MissingDependencyError: the package `datasets` is needed and not installed.
    """
    if isinstance(source, str) and source.startswith("{"):
        source = stored(source)
    if isinstance(source, Mapping):
        return read_splits(source)
    if isinstance(source, str) and (name := hub_id(source)) is not None:
        return _place(source), *read_hub(name)
    if isinstance(source, (str, os.PathLike)):
        folder = absolute(source)
        return str(folder), *read_folder(folder)
    hint = ' Give the rows their split: {"train": rows}.' if isinstance(source, (list, tuple)) else ""
    raise DataError(f'Expected a folder or {{"train": rows, ...}}, got {type(source).__name__}.{hint}')


def is_there(source: str) -> bool:
    """Whether a stored source may still be read: it is the hub's, or all of its folders and files are on this machine."""
    places = [value if isinstance(value, str) else key for key, value in stored(source).items()] if source.startswith("{") else [source]
    return all(hub_id(place) is not None or Path(place).exists() for place in places)


def stored(source: str) -> dict[str, Any]:
    """The places that `DataSet.source` names, by split or with weights.

    Raises:
        DataError: it is no object of JSON.
    """
    try:
        return json.loads(source)
    except (ValueError, RecursionError) as error:
        expected = 'a folder, or an object of JSON such as {"train": "folder"}'
        raise DataError(f"Expected {expected}, got {source[:80]!r} ({error}).") from None


# ---- splits by name: rows in memory, or the place of each


def read_splits(source: Mapping[str, Any]) -> tuple[str | None, list[RawSplit], list[str]]:
    """Splits from `{"train": rows, "valid": rows, "test": rows}`; a split that is None counts as absent.

    In place of rows may stand where they are: a file, a folder or a data set of the hub, of which the split of that name is taken,
    or a part of the latter. Where all are so given, the places are what is stored.

    Raises:
        DataError: a split has an unknown name or is no list of rows, is there by two names, or there is none at all.
        MissingDependencyError: the package `datasets` is needed and not installed.
    """
    keys: dict[str, str] = {}
    for key in source:
        split = split_named(key) if isinstance(key, str) else None
        if split is None:
            meant = split_meant(str(key))
            hint = f" Did you mean {meant!r}?" if meant else ""
            raise DataError(f"Unknown split {str(key)!r}: expected {', '.join(SPLITS)}.{hint}")
        if source[key] is None:
            continue
        if split in keys:
            raise DataError(f"{keys[split]!r} and {key!r} both name the split {split}. Which is meant? Give one of them.")
        keys[split] = key
    if not keys:
        raise DataError(f"No split given: expected rows under at least one of {', '.join(SPLITS)}.")
    values = {split: source[keys[split]] for split in SPLITS if split in keys}
    places = {split: _place(value) for split, value in values.items() if isinstance(value, (str, os.PathLike))}
    splits = [_read_place(split, places[split]) if split in places else _read_list(split, keys[split], values[split]) for split in values]
    return (json.dumps(places, ensure_ascii=False) if len(places) == len(values) else None), splits, []


def _place(value: str | os.PathLike) -> str:
    """A place as it can be stored: a name of the hub with its prefix, or an absolute path."""
    name = hub_id(value) if isinstance(value, str) else None
    if name is None:
        return str(absolute(value))
    path, colon, part = name.partition(":")
    is_here = Path(path).expanduser().exists()
    return f"{PREFIX}{absolute(path) if path and is_here else path}{colon}{part}"


def _read_place(split: str, place: str) -> RawSplit:
    if place.startswith(PREFIX):
        return read_hub_split(split, place.removeprefix(PREFIX))
    path = Path(place)
    if path.is_file() and path.suffix in READERS:
        return READERS[path.suffix](split, path)
    if path.is_dir():
        return split_from(split, read_folder(path)[0], repr(place))
    raise DataError(
        f"{split}: expected a list of rows (dicts), or the place of a file ({', '.join(ENDINGS)}), a folder or a data set of the hub"
        f" ({PREFIX}org/name:split), found nothing of that kind at {place!r}."
    )


def _read_list(split: str, key: str, rows: Any) -> RawSplit:
    """The rows of a list, a generator, a table of `datasets`, of pandas, Polars or Arrow."""
    for method, arguments in (("to_pylist", ()), ("to_dicts", ()), ("to_dict", ("records",))):
        if hasattr(rows, method) and hasattr(rows, "columns"):
            return read_table(split, key, _without_nan(getattr(rows, method)(*arguments)))
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise DataError(f"{key}: expected a list of rows (dicts), got {type(rows).__name__}.")
    if type(rows).__module__.split(".")[0] == "datasets":
        return read_table(split, key, rows)
    raw = RawSplit(split, key)
    for number, row in enumerate(rows, 1):
        if isinstance(row, Mapping):
            raw.rows.append((f"{key}:{number}", row))
        else:
            raw.problems.append(f"{key}:{number}: not an object (dict) but of type {type(row).__name__}")
    return raw.or_problem()


def _without_nan(rows: Iterable[Mapping[Any, Any]]) -> Iterator[dict[Any, Any]]:
    """Rows of a data frame, in which pandas writes NaN where there is nothing."""
    return ({key: None if isinstance(value, float) and value != value else value for key, value in row.items()} for row in rows)


# ---- folders


def read_folder(folder: Path) -> tuple[list[RawSplit], list[str]]:
    """Splits from the `.jsonl`, `.csv` or `.parquet` files of a folder, and notes on what in it was not read.

    Raises:
        DataError: there is no such folder, or none of the three files in it, or one of them in two forms.
        MissingDependencyError: it has a `.parquet` file, and `datasets` is not installed.
    """
    names = folder_names(folder)
    files = {split: names_of(split, names) for split in SPLITS}
    found = [split for split in SPLITS if files[split]]
    if not found:
        raise DataError(_no_splits(folder, names))
    for split in found:
        if len(files[split]) > 1:
            raise DataError(f"{str(folder)!r} has {' and '.join(files[split])}. Which is meant? Leave one of them there.")
    notes = []
    if unread := [name for name in names if name.endswith(".jsonl") and all(name not in files[split] for split in SPLITS)]:
        meant = {name: split for name in unread if (split := split_meant(name)) and split not in found}
        hints = "".join(f" Is {name} meant as {split}.jsonl?" for name, split in list(meant.items())[:3])
        notes.append(f"Not read: {listed(unread)}; only train.jsonl, valid.jsonl and test.jsonl are.{hints}")
    paths = {split: folder / files[split][0] for split in found}
    for path in paths.values():
        try:
            check_own_file(path, "the data folder")
        except OSError as error:
            hint = f' A file elsewhere is given by its place: load_data({{"{path.stem}": "place/of/{path.name}"}}).'
            raise DataError(f"{error.strerror}.{hint}") from error
    return [READERS[path.suffix](split, path) for split, path in paths.items()], notes


def names_of(split: str, names: Iterable[str]) -> list[str]:
    """Those of a folder's names that a split's file may have: `valid.jsonl`, `validation.csv` and so on."""
    wanted = {f"{name}{ending}" for name in (split, *OTHER_NAMES[split]) for ending in ENDINGS}
    return sorted(wanted.intersection(names))


def folder_names(folder: Path) -> list[str]:
    """The names in a folder.

    Raises:
        DataError: not a folder; the message lists the nearest names that there are.
    """
    try:
        return sorted(os.listdir(folder))
    except NotADirectoryError:
        hint = f" Give the folder it is in: {str(folder.parent)!r}." if folder.is_file() else ""
        raise DataError(f"{str(folder)!r} is a file: expected {_FOLDER_LAYOUT}.{hint}") from None
    except FileNotFoundError:
        raise DataError(f"There is no folder {str(folder)!r}: expected {_FOLDER_LAYOUT}.{_nearest_folder(folder)}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"The folder {str(folder)!r} cannot be read: {error}.") from error


def _nearest_folder(folder: Path) -> str:
    parent = next((p for p in folder.parents if p.is_dir()), None)
    if parent is None:
        return ""
    try:
        folders = sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return ""
    close = closest(folder.relative_to(parent).parts[0], folders, cutoff=0.5)
    if close:
        return f" Near it in {str(parent)!r}: {', '.join(close)}."
    return f" {str(parent)!r} has these folders: {listed(folders, 10) or 'nothing'}."


def _no_splits(folder: Path, names: list[str]) -> str:
    """Why a folder gives no data: what is in it, and which of that may be meant."""
    files = [name for name in names if not (folder / name).is_dir()]
    packed = [name for name in files if name.endswith((".gz", ".zip", ".zst", ".bz2", ".xz")) and split_meant(name)]
    renames = [f"{name} -> {split}.jsonl" for name in files if name not in packed and (split := split_meant(name))]
    folders = [folder / name for name in names if name not in files]
    inner = [str(inside) for inside in folders if any(names_of(split, _names_or_none(inside)) for split in SPLITS)]
    hint = f" Rename (one JSON object per line): {', '.join(renames[:3])}." if renames else ""
    hint += f" Unpack {', '.join(packed[:3])}." if packed else ""
    hint += f" Is one of these folders meant: {listed(inner)}?" if inner else ""
    if "dataset_dict.json" in names or ("README.md" in names and "data" in names):
        hint += f" If it is a data set in the hub's own layout, give it as 'hf:{folder}'."
    return f"No data in {str(folder)!r}: expected {_FOLDER_LAYOUT}, found {listed(names, 10) or 'nothing'}.{hint}"


def _names_or_none(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


# ---- JSON Lines


def read_file(name: str, path: Path) -> RawSplit:
    """The rows of one JSON Lines file: UTF-8 (a byte order mark is allowed), LF or CRLF; blank lines are counted."""
    split = RawSplit(name, path.name)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            if start.startswith((b"\xff\xfe", b"\xfe\xff")):
                return split.or_problem("not UTF-8 but UTF-16 (it begins with that byte order mark); save the file as UTF-8")
            begin = 3 if start.startswith(b"\xef\xbb\xbf") else 0
            if problem := whole_file_problem(*_first_and_last_line(file, begin)):
                return split.or_problem(problem)
            done = file.seek(begin)
            with watched(f"{name}: reading", os.fstat(file.fileno()).st_size) as update:
                for number, line, size in _lines(file):
                    _read_line(split, f"{split.label}:{number}", line, size)
                    done += size
                    if number % _ROWS_BETWEEN == 0:
                        update(done)
    except OSError as error:
        split.problems.append(f"{path.name}: cannot be read: {error.strerror or error}")
    found = f"only {split.blank_lines} blank lines" if split.blank_lines else "an empty file"
    return split.or_problem(f"{found}, expected one JSON object per line; fill the file or remove it")


def _first_and_last_line(file: BinaryIO, begin: int) -> tuple[bytes, bytes]:
    """The first and the last line that are not blank, as far as they stand in the first and last 64 KiB behind `begin`."""
    file.seek(begin)
    first = next((line for line in file.read(2**16).split(b"\n") if line.strip()), b"")
    size = file.seek(0, os.SEEK_END)
    file.seek(max(begin, size - 2**16))
    return first, next((line for line in reversed(file.read().split(b"\n")) if line.strip()), b"")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None, int]]:
    """(1-based number, line, bytes in it); the line is None where it is longer than `MAX_LINE_BYTES`."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        size = len(line)
        if size <= MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line, size
            continue
        while not line.endswith(b"\n") and (line := file.readline(2**20)):
            size += len(line)
        yield number, None, size


def _read_line(split: RawSplit, source: str, line: bytes | None, size: int) -> None:
    if line is None:
        found = f"a line of {size / 2**20:,.1f} MiB, the limit is {MAX_LINE_BYTES // 2**20} MiB"
        split.problems.append(f"{source}: {found}; is a line break missing? Write one JSON object per line")
    elif not line.strip():
        split.blank_lines += 1
    else:
        try:
            split.rows.append((source, parse_line(line)))
        except RowError as error:
            split.problems.append(f"{source}: {error}")


# ---- CSV


def read_csv(name: str, path: Path) -> RawSplit:
    """The rows of one file, UTF-8. An empty field counts as absent (None); a row's source is the line where it begins.

    A row with more or fewer fields than the first line has is a problem, as a comma outside quotes is the usual reason.
    """
    split = RawSplit(name, path.name)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
            _read_csv_rows(split, file)
    except UnicodeDecodeError as error:
        split.problems.append(f"{path.name}: not UTF-8 ({error.reason}). Save it as UTF-8, which spreadsheets offer when they export")
    except (OSError, csv.Error) as error:
        split.problems.append(f"{path.name}: cannot be read: {error}")
    return split.or_problem()


def _read_csv_rows(split: RawSplit, file: TextIO) -> None:
    reader = csv.reader(file, strict=True)  # strict: a quote that is never closed is an error, not a field of many rows
    header = next(reader, [])
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        split.problems.append(f"{split.label}:1: the column {twice[0]!r} is there twice; give each its own name")
        return
    while True:
        source = f"{split.label}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            split.problems.append(f"{source}: no CSV: {error}; a quote within a quoted field is written twice")
            return
        if fields is None:
            return
        if not fields:
            split.blank_lines += 1
        elif len(fields) != len(header):
            split.problems.append(f"{source}: {len(fields)} fields where line 1 names {len(header)}; put a field with commas in quotes")
        else:
            split.rows.append((source, {column: value or None for column, value in zip(header, fields, strict=True)}))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within the block, a field may be as long as a line of JSON; the csv module's own limit of 128 KiB is the process's."""
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


READERS = {".jsonl": read_file, ".csv": read_csv, ".parquet": read_parquet}
"""A file's ending -> what reads it, given the split's name and the path."""
