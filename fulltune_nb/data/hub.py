"""Rows that the package `datasets` reads: data sets of the hub, folders in the hub's layout, and Parquet files.

    hf:org/name                     all splits
    hf:org/name:config              all splits of one of its configs
    hf:org/name:train[:90%]         a slice of a split, in the words of `datasets`; hf:org/name:config:train[:90%] too
    hf:folder, hf:file.jsonl        a folder or a file on this machine in place of a name
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fulltune_nb.data.rows import SPLITS, RawSplit, read_table, split_named
from fulltune_nb.errors import DataError, listed, optional_import
from fulltune_nb.files import check_own_file

PREFIX = "hf:"
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""A file's ending -> what `datasets` calls its kind."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_id(source: str) -> str | None:
    """The hub id, with all that stands behind a colon, that a source names; None where it is a folder's path.

    A plain `org/name` is one where neither it nor `org` exists here, so that a folder's misspelt name stays one.
    """
    if source.startswith(PREFIX):
        return source.removeprefix(PREFIX)
    is_id = _HUB_ID.fullmatch(source) and not Path(source).exists() and not Path(source.split("/")[0]).exists()
    return source if is_id else None


def read_hub(name: str) -> tuple[list[RawSplit], list[str]]:
    """The splits of a data set of the hub, and notes on those that were not read; where the name has a slice, the split that it is of.

    Raises:
        MissingDependencyError: `datasets` is not installed.
        DataError: it could not be loaded, or has no split that is known here.
    """
    if "[" in name:
        part = _parts(name, has_split=True)[2]
        split = split_named(re.split(r"[\[+]", part)[0])
        if split is None:
            raise DataError(f'{PREFIX}{name}: which split is this meant to be? Say so: load_data({{"train": "{PREFIX}{name}"}}, ...).')
        return [read_hub_split(split, name)], []
    found = _load(name, *_parts(name, has_split=False))
    if not isinstance(found, Mapping):
        raise DataError(f"The hub's data set {name!r} has no splits, but is a {type(found).__name__}.")
    return splits_of(found, f"The hub's data set {name!r}")


def read_hub_split(split: str, name: str) -> RawSplit:
    """One split, from the part of a data set that stands last in its name: `org/name:test`, `org/name:config:train[90%:]`.

    A name without a part is the whole data set, of which the split of the same name is taken.

    Raises:
        MissingDependencyError: `datasets` is not installed.
        DataError: it could not be loaded.
    """
    path, config, part = _parts(name, has_split=True)
    if part is None:
        return split_from(split, read_hub(name)[0], f"The hub's data set {name!r}")
    return read_table(split, part, _load(name, path, config, part))


def split_from(split: str, splits: list[RawSplit], what: str) -> RawSplit:
    """The split of that name.

    Raises:
        DataError: there is none.
    """
    found = next((raw for raw in splits if raw.name == split), None)
    if found is None:
        raise DataError(f"{what} has no split {split}, only {listed([raw.name for raw in splits])}.")
    return found


def _parts(name: str, has_split: bool) -> tuple[str, str | None, str | None]:
    """Path, config and split of `path`, `path:config`, `path:split` and `path:config:split`."""
    head, bracket, slice = name.partition("[")
    path, *rest = head.split(":")
    if not path:
        raise DataError(f"{PREFIX}{name}: expected a data set's name behind {PREFIX!r}, such as {PREFIX}org/name.")
    split = rest.pop() + bracket + slice if rest and has_split else None
    if len(rest) > 1 or (bracket and split is None) or "" in rest or split == "":
        raise DataError(
            f"{PREFIX}{name}: expected a name, and behind colons its config and a split of it, such as {PREFIX}org/name:config or"
            f' {{"train": "{PREFIX}org/name:config:train[:90%]"}}.'
        )
    return path, (rest[0] if rest else None), split


def _load(name: str, path: str, config: str | None, split: str | None) -> Any:
    """What `datasets` loads: the split, or all of them by name."""
    datasets = _library(f"The hub's data set {name!r} (there is no such folder here)")
    for file in Path(path).rglob("*") if Path(path).is_dir() else ():
        try:
            check_own_file(file, "the data folder", Path(path))
        except OSError as error:
            raise DataError(f"{error.strerror}. Put the file itself there.") from error
    try:
        with _quietly(datasets):
            options = {"split": split} if split else {}
            if Path(path).suffix in FILES and Path(path).is_file():
                return datasets.load_dataset(FILES[Path(path).suffix], config, data_files=path, **options)
            return datasets.load_dataset(path, config, **options)
    except Exception as error:  # datasets, the hub's client and the network raise many kinds here; all mean the same to the reader
        a_split = f" and is {split!r} one of its splits" if split else ""
        raise DataError(
            f"The hub's data set {name!r} could not be loaded ({type(error).__name__}: {_in_a_line(error)}). Is the name right{a_split},"
            f" and is there a network? A data set with several configs needs one: {PREFIX}{path}:config. A folder here is given by its"
            f" path, such as ./{path}."
        ) from error


def splits_of(found: Mapping[str, Any], what: str) -> tuple[list[RawSplit], list[str]]:
    """Splits by name ("validation", "val", "dev" and "eval" are "valid"), and a note on those that are none of ours.

    Raises:
        DataError: none is known, or two have the same meaning.
    """
    meant = {split: [name for name in found if split_named(name) == split] for split in SPLITS}
    for split, names in meant.items():
        if len(names) > 1:
            raise DataError(f"{what} has {' and '.join(map(repr, names))}, each of which may be {split}. Pass rows: {{{split!r}: rows}}.")
    unread = ", ".join(repr(name) for name in found if split_named(name) is None)
    if not any(meant.values()):
        raise DataError(
            f"{what} has no split named {', '.join(SPLITS)}, found {unread}. Say which is which, {{'train': 'hf:name:split'}}, or pass"
            " rows: {'train': rows}."
        )
    notes = [f"Not read: the splits {unread}; only train, valid and test are."] if unread else []
    return [read_table(split, names[0], found[names[0]]) for split, names in meant.items() if names], notes


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
    return read_table(name, path.name, rows)


def _library(needed_for: str) -> Any:
    with optional_import(f"{needed_for}: reading it, unlike JSON Lines (train.jsonl),", "datasets"):
        import datasets
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
