"""Where rows come from: a folder of JSON Lines, CSV or Parquet files, a data set of the hub, or lists in memory.

    load_data("folder", ...)              train.jsonl, valid.jsonl, test.jsonl, or the same with .csv or .parquet
    load_data("hf:org/name", ...)         a data set of the hub; "hf:org/name:config" where it has several
    load_data("org/name", ...)            the same, where there is no such folder here
    load_data({"train": rows}, ...)       rows in memory

Bad lines are collected, by file and line. The hub and Parquet are read by the optional package `datasets`.
"""

from __future__ import annotations

import csv
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from fulltune_nb.data.rows import RowError, parse_line, whole_file_problem
from fulltune_nb.errors import DataError, MissingDependencyError, closest, listed

SPLITS = ("train", "valid", "test")
OTHER_NAMES = {"train": ("training",), "valid": ("validation", "val", "dev", "eval"), "test": ("testing", "tests")}
ENDINGS = (".jsonl", ".csv", ".parquet")
PREFIX = "hf:"
MAX_LINE_BYTES = 16 * 2**20
"""A longer line is reported and skipped without being held in memory. As text it would be some four million tokens."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FOLDER_LAYOUT = "a folder with train.jsonl, valid.jsonl and test.jsonl (any of them)"
_NO_ROWS = "no rows; leave the split out or give it rows"


@dataclass
class RawSplit:
    """The rows of one split as read."""

    name: str
    label: str
    """What stands before the row number: `"train.jsonl"`, or `"train"` for rows in memory."""
    rows: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    """(source, row), the source being label and 1-based line."""
    problems: list[str] = field(default_factory=list)
    blank_lines: int = 0

    def or_problem(self, reason: str = _NO_ROWS) -> RawSplit:
        """The split itself; where it has neither rows nor problems, `reason` becomes its problem."""
        if not self.rows and not self.problems:
            self.problems.append(f"{self.label}: {reason}")
        return self


def _split_meant(name: str) -> str | None:
    """The split that a file or key of this name probably is."""
    stem = name.lower().split(".")[0]
    return next((split for split in SPLITS if stem in OTHER_NAMES[split] or closest(stem, [split], cutoff=0.75)), None)


# ---- rows in memory


def read_memory(source: Mapping[str, Any]) -> list[RawSplit]:
    """Splits from `{"train": rows, "valid": rows, "test": rows}`; a split that is None counts as absent.

    Raises:
        DataError: a split has an unknown name or is no list of rows, or there is none at all.
    """
    for name in source:
        if name not in SPLITS:
            meant = _split_meant(str(name))
            hint = f" Did you mean {meant!r}?" if meant else ""
            raise DataError(f"Unknown split {str(name)!r}: expected {', '.join(SPLITS)}.{hint}")
    splits = [_read_list(name, source[name]) for name in SPLITS if source.get(name) is not None]
    if not splits:
        raise DataError(f"No split given: expected rows under at least one of {', '.join(SPLITS)}.")
    return splits


def _read_list(name: str, rows: Any) -> RawSplit:
    if isinstance(rows, (str, bytes, os.PathLike, Mapping)) or not isinstance(rows, Iterable):
        raise DataError(f"{name}: expected a list of rows (dicts), got {type(rows).__name__}.")
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a pandas DataFrame iterates over its column names
        raise DataError(f'{name}: expected a list of rows (dicts), got a {type(rows).__name__}. Pass its to_dict("records").')
    split = RawSplit(name, name)
    for number, row in enumerate(rows, 1):
        if isinstance(row, Mapping):
            split.rows.append((f"{name}:{number}", row))
        else:
            split.problems.append(f"{name}:{number}: not an object (dict) but of type {type(row).__name__}")
    return split.or_problem()


# ---- folders


def read_folder(folder: Path) -> tuple[list[RawSplit], list[str]]:
    """Splits from the `.jsonl`, `.csv` or `.parquet` files of a folder, and notes on what in it was not read.

    Raises:
        DataError: there is no such folder, or none of the three files in it, or one of them in two forms.
        MissingDependencyError: it has a `.parquet` file, and `datasets` is not installed.
    """
    names = folder_names(folder)
    files = {split: [f"{split}{ending}" for ending in ENDINGS if f"{split}{ending}" in names] for split in SPLITS}
    found = [split for split in SPLITS if files[split]]
    if not found:
        raise DataError(_no_splits(folder, names))
    for split in found:
        if len(files[split]) > 1:
            raise DataError(f"{str(folder)!r} has {' and '.join(files[split])}. Which is meant? Leave one of them there.")
    notes = []
    if unread := [name for name in names if name.endswith(".jsonl") and name[: -len(".jsonl")] not in SPLITS]:
        meant = {name: split for name in unread if (split := _split_meant(name)) and split not in found}
        hints = "".join(f" Is {name} meant as {split}.jsonl?" for name, split in list(meant.items())[:3])
        notes.append(f"Not read: {listed(unread)}; only train.jsonl, valid.jsonl and test.jsonl are.{hints}")
    readers = {".jsonl": read_file, ".csv": read_csv, ".parquet": read_parquet}
    paths = {split: folder / files[split][0] for split in found}
    return [readers[path.suffix](split, path) for split, path in paths.items()], notes


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
    packed = [name for name in files if name.endswith((".gz", ".zip", ".zst", ".bz2", ".xz")) and _split_meant(name)]
    renames = [f"{name} -> {split}.jsonl" for name in files if name not in packed and (split := _split_meant(name))]
    ours = [f"{split}{ending}" for split in SPLITS for ending in ENDINGS]
    inner = [str(folder / name) for name in names if name not in files and any((folder / name / file).is_file() for file in ours)]
    hint = f" Rename (one JSON object per line): {', '.join(renames[:3])}." if renames else ""
    hint += f" Unpack {', '.join(packed[:3])}." if packed else ""
    hint += f" Is one of these folders meant: {listed(inner)}?" if inner else ""
    if "dataset_dict.json" in names or ("README.md" in names and "data" in names):
        hint += f" If it is a data set in the hub's own layout, give it as 'hf:{folder}'."
    return f"No data in {str(folder)!r}: expected {_FOLDER_LAYOUT}, found {listed(names, 10) or 'nothing'}.{hint}"


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
            file.seek(begin)
            for number, line, size in _lines(file):
                _read_line(split, f"{split.label}:{number}", line, size)
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


# ---- the hub and Parquet, by the package `datasets`


def hub_id(source: str) -> str | None:
    """The hub id, with its config behind a colon, that a source names; None where it is a folder's path.

    A plain `org/name` is one where neither it nor `org` exists here, so that a folder's misspelt name stays one.
    """
    if source.startswith(PREFIX):
        return source.removeprefix(PREFIX)
    is_id = _HUB_ID.fullmatch(source) and not Path(source).exists() and not Path(source.split("/")[0]).exists()
    return source if is_id else None


def read_hub(name: str) -> tuple[list[RawSplit], list[str]]:
    """The splits of a data set of the hub, and notes on those that were not read.

    Raises:
        MissingDependencyError: `datasets` is not installed.
        DataError: it could not be loaded, or has no split that is known here.
    """
    datasets = _library(f"The hub's data set {name!r} (there is no such folder here)")
    path, _, config = name.partition(":")
    if not path:
        raise DataError(f"{PREFIX}{name}: expected a data set's name behind {PREFIX!r}, such as {PREFIX}org/name.")
    try:
        with _quietly(datasets):
            found = datasets.load_dataset(path, config or None)
    except Exception as error:  # datasets, the hub's client and the network raise many kinds here; all mean the same to the reader
        raise DataError(
            f"The hub's data set {name!r} could not be loaded ({type(error).__name__}: {_in_a_line(error)}). Is the name right, and is"
            f" there a network? A data set with several configs needs one: {PREFIX}{path}:config. A folder here is given by its path,"
            f" such as ./{path}."
        ) from error
    if not isinstance(found, Mapping):
        raise DataError(f"The hub's data set {name!r} has no splits, but is a {type(found).__name__}.")
    return splits_of(found, f"The hub's data set {name!r}")


def splits_of(found: Mapping[str, Any], what: str) -> tuple[list[RawSplit], list[str]]:
    """Splits by name ("validation", "val", "dev" and "eval" are "valid"), and a note on those that are none of ours.

    Raises:
        DataError: none is known, or two have the same meaning.
    """
    meant: dict[str, list[str]] = {split: [name for name in found if name.lower() in (split, *OTHER_NAMES[split])] for split in SPLITS}
    for split, names in meant.items():
        if len(names) > 1:
            raise DataError(f"{what} has {' and '.join(map(repr, names))}, each of which may be {split}. Pass rows: {{{split!r}: rows}}.")
    unread = ", ".join(repr(name) for name in found if not any(name in names for names in meant.values()))
    if not any(meant.values()):
        raise DataError(f"{what} has no split named {', '.join(SPLITS)}, found {unread}. Pass rows: {{'train': rows}}.")
    notes = [f"Not read: the splits {unread}; only train, valid and test are."] if unread else []
    return [_read_table(split, names[0], found[names[0]]) for split, names in meant.items() if names], notes


def read_parquet(name: str, path: Path) -> RawSplit:
    """The rows of one Parquet file.

    Raises:
        MissingDependencyError: `datasets` is not installed.
    """
    datasets = _library(f"{path.name}")
    with tempfile.TemporaryDirectory(prefix="fulltune_nb-") as cache, _quietly(datasets):
        try:
            rows = list(datasets.Dataset.from_parquet(str(path), keep_in_memory=True, cache_dir=cache))
        except Exception as error:  # pyarrow and datasets raise many kinds here
            return RawSplit(name, path.name).or_problem(f"cannot be read: {_in_a_line(error.__cause__ or error)}")
    return _read_table(name, path.name, rows)


def _read_table(name: str, label: str, rows: Iterable[Mapping[str, Any]]) -> RawSplit:
    return RawSplit(name, label, [(f"{label}:{number}", dict(row)) for number, row in enumerate(rows, 1)]).or_problem()


def _library(needed_for: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{needed_for} is read by the package 'datasets', which is not installed: pip install 'fulltune_nb[datasets]', or pip install"
            " datasets. Rows in JSON Lines (train.jsonl) need nothing more."
        ) from error
    return datasets


@contextmanager
def _quietly(datasets: Any) -> Iterator[None]:
    """Within the block, `datasets` draws no progress bars."""
    were_on = datasets.are_progress_bars_enabled() if hasattr(datasets, "are_progress_bars_enabled") else True
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()


def _in_a_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
