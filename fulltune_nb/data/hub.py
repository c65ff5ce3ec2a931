"""Rows from the hub and from Parquet, read by the optional package `datasets`.

    load_data("hf:org/name", ...)         a data set of the hub; "hf:org/name:config" where it has several
    load_data("org/name", ...)            the same, where there is no such folder here
    load_data("folder", ...)              with train.parquet in it
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fulltune_nb.data.reading import OTHER_NAMES, SPLITS, RawSplit
from fulltune_nb.errors import DataError, MissingDependencyError

PREFIX = "hf:"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_id(source: str) -> str | None:
    """The hub id, with its config behind a colon, that a source names; None where it is a folder's path.

    A plain `org/name` is one where neither it nor `org` exists here, so that a folder's misspelt name stays one.
    """
    if source.startswith(PREFIX):
        return source.removeprefix(PREFIX)
    is_id = _ID.fullmatch(source) and not Path(source).exists() and not Path(source.split("/")[0]).exists()
    return source if is_id else None


def _library(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} is read by the package 'datasets', which is not installed: pip install 'fulltune_nb[datasets]', or pip install"
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
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"The hub's data set {name!r} could not be loaded ({type(error).__name__}: {reason}). Is the name right, and is there a"
            f" network? A data set with several configs needs one: {PREFIX}{path}:config."
            f" A folder here is given by its path, such as ./{path}."
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
    unread = [name for name in found if not any(name in names for names in meant.values())]
    if len(unread) == len(found):
        there = ", ".join(map(repr, unread))
        raise DataError(f"{what} has no split named {', '.join(SPLITS)}, found {there}. Pass rows: {{'train': rows}}.")
    notes = [f"Not read: the splits {', '.join(map(repr, unread))}; only train, valid and test are."] if unread else []
    return [raw_split(split, names[0], found[names[0]]) for split, names in meant.items() if names], notes


def raw_split(name: str, label: str, rows: Any) -> RawSplit:
    """The rows of a `datasets.Dataset`, counted from 1."""
    split = RawSplit(name, label)
    split.rows = [(f"{label}:{number}", dict(row)) for number, row in enumerate(rows, 1)]
    if not split.rows:
        split.problems.append(f"{label}: no rows; leave the split out or give it rows")
    return split


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
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            split = RawSplit(name, path.name)
            split.problems.append(f"{path.name}: cannot be read: {reason}")
            return split
    return raw_split(name, path.name, rows)
