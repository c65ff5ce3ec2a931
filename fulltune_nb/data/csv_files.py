"""Rows from CSV files: comma-separated, fields with commas or line breaks in double quotes, column names in the first line.

Every field is text, as it stands: "7" stays "7", and "NA" or "None" is a word like others. A table reader that guesses types would
make numbers of the one and gaps of the other.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fulltune_nb.data.reading import MAX_LINE_BYTES, RawSplit


def read_csv(name: str, path: Path) -> RawSplit:
    """The rows of one file, UTF-8. An empty field counts as absent (None); a row's source is the line where it begins.

    A row with more or fewer fields than the first line has is a problem, as a comma outside quotes is the usual reason.
    """
    split = RawSplit(name, path.name)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file, _long_fields():
            _read_rows(split, file)
    except UnicodeDecodeError as error:
        split.problems.append(f"{path.name}: not UTF-8 ({error.reason}). Save it as UTF-8, which spreadsheets offer when they export")
    except (OSError, csv.Error) as error:
        split.problems.append(f"{path.name}: cannot be read: {error}")
    if not split.rows and not split.problems:
        split.problems.append(f"{path.name}: no rows; leave the split out or give it rows")
    return split


def _read_rows(split: RawSplit, file) -> None:
    reader = csv.reader(file, strict=True)  # strict: a quote that is never closed is an error, not a field of many rows
    header = next(reader, [])
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        split.problems.append(f"{split.label}:1: the column {twice[0]!r} is there twice; give each its own name")
        return
    line = reader.line_num + 1
    while True:
        source = f"{split.label}:{line}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            split.problems.append(f"{source}: no CSV: {error}; a quote within a quoted field is written twice")
            return
        if fields is None:
            return
        line = reader.line_num + 1
        if not fields:
            split.blank_lines += 1
        elif len(fields) != len(header):
            split.problems.append(f"{source}: {len(fields)} fields where line 1 names {len(header)}; put a field with commas in quotes")
        else:
            split.rows.append((source, {column: field or None for column, field in zip(header, fields, strict=True)}))


@contextmanager
def _long_fields() -> Iterator[None]:
    """Within the block, a field may be as long as a line of JSON; the csv module's own limit of 128 KiB is the process's."""
    before = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)
