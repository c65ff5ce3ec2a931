"""Tokenized rows kept between two loads, in files of the user's cache folder that may be deleted at any time.

A file is named by a hash of all that its content is a function of: the rows with their lines, the settings, the tokenizer, the chat
template, the code that makes examples and the versions of what it calls. It begins with the SHA-256 of the rest, and holds numbers and
text only. A file that is damaged, or is another user's, is replaced, and a note tells it. The environment variable `FULLTUNE_CACHE`
names another folder, or is `off`.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fulltune_nb.data.encode import Encoded
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.data.split import ExampleTable
from fulltune_nb.files import check_ordinary, open_ordinary

VARIABLE = "FULLTUNE_CACHE"
LARGE = 4 * 2**20
"""Bytes of rows from which on tokens are kept; fewer are tokenized in a second or two."""
LIMIT = 4 * 2**30
"""Bytes of all files together; above it those go that were not used for longest."""
_ENDING = ".rows"
_OURS = re.compile(r"[0-9a-f]{64}(\.\w+)?\.rows")  # with a middle part while it is written
_SLICE = 4096  # texts encoded at a time

Rows = Sequence[tuple[str, Mapping[str, Any]]]


_DAMAGED = (OSError, ValueError, KeyError, TypeError, RecursionError)  # what reading raises at a file that is not as it was written


def with_cache(rows: Rows, format: str, tokenizer: Any, settings: DataSettings, encode: Callable[[], Encoded], notes: list[str]) -> Encoded:
    """What `encode()` makes of the rows, from the cache where it has been made before; `notes` grows by what is wrong with the cache."""
    key = _key(rows, format, tokenizer, settings)
    if key is None or _named().lower() == "off":
        return encode()
    advice = f"Free or correct the place, or set {VARIABLE} to another folder, or to off."
    try:
        path = cache_folder() / f"{key}{_ENDING}"
    except OSError as error:
        notes.append(f"Tokenized rows are not kept: {error}. {advice}")
        return encode()
    try:
        return _read(path, rows, tokenizer)
    except FileNotFoundError:
        pass
    except _DAMAGED as error:
        notes.append(f"Rows were tokenized again: the file in which they were kept, {path}, is not what was written there ({error}).")
    encoded = encode()
    try:
        _write(path, encoded, rows)
        _tidy(path.parent)
    except OSError as error:
        notes.append(f"Tokenized rows could not be kept, so the next load takes as long as this one: {error}. {advice}")
    return encoded


def _named() -> str:
    return os.environ.get(VARIABLE, "").strip()


def cache_folder() -> Path:
    """The folder, made where it is missing.

    Raises:
        OSError: it cannot be made, or somebody else could write into it.
    """
    try:
        caches = Path.home() / "Library" / "Caches" if sys.platform == "darwin" else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        folder = Path(_named() or caches / "fulltune_nb" / "rows").expanduser()
    except RuntimeError as error:
        raise OSError(f"the cache folder of this user is not known: {error}") from error
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_ordinary(folder, stat.S_IFDIR)
    about = folder.lstat()
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        mode = stat.S_IMODE(about.st_mode)
        raise OSError(f"others can write into {folder}: it belongs to user {about.st_uid} and has mode {mode:o}")
    return folder


# ---- the key


def _key(rows: Rows, format: str, tokenizer: Any, settings: DataSettings) -> str | None:
    """The hash that names the file; None where the rows are few, or are or depend on something that no hash can be made of."""
    digest, size = hashlib.sha256(), 0
    try:
        for pair in rows:
            content = marshal.dumps(pair, 2)  # in version 2, equal rows are equal bytes
            if marshal.loads(content) != pair:  # numpy's values are written as bytes, which may be those of another type
                return None
            digest.update(content)
            size += len(content)
    except ValueError:  # a row has more than what JSON has
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if size < LARGE or backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    backend.no_padding()  # what the last call asked for is no part of the tokenizer
    backend.no_truncation()
    facts = [format, settings, sorted(tokenizer.special_tokens_map.items()), tokenizer.chat_template, type(tokenizer).__qualname__]
    facts += [getattr(tokenizer, "split_special_tokens", None), _code()]
    digest.update(repr(facts).encode("utf-8", "surrogatepass") + backend.to_str().encode())
    return digest.hexdigest()


@cache
def _code() -> str:
    """A hash of the code that makes examples, and the versions of what it calls."""
    package = Path(__file__).parents[1]
    files = sorted([*package.glob("data/*.py"), *package.glob("*template*.py")])
    versions = [sys.version, *(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "jinja2"))]
    return hashlib.sha256(b"\n".join([*(file.read_bytes() for file in files), *map(str.encode, versions)])).hexdigest()


# ---- the files: SHA-256 in hex, a line of JSON, then arrays and texts as bytes one behind the other

_ARRAYS = {"tokens": np.int32, "loss_mask": np.uint8, "lengths": np.int64, "columns": np.int64, "rows": np.int64, "texts": np.int64}


def _write(path: Path, encoded: Encoded, rows: Rows) -> None:
    """
    Raises:
        OSError: it cannot be written; then there is no file.
    """
    table, numbers = encoded.examples, {source: number for number, (source, _) in enumerate(rows)}
    if len(numbers) < len(rows):  # then a source does not tell its row
        return
    of_row = np.array([numbers[source] for source in table.sources], dtype=np.int64)
    texts = [table.texts[next(same)] for _, same in groupby(range(len(table)), key=lambda i: of_row[i])]  # windows share their row's
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    arrays = (table.tokens, np.packbits(table.loss_mask), np.diff(table.begins), table.columns, of_row, sizes)  # as in `_ARRAYS`
    header = {"sizes": [values.size for values in arrays], "tokens_dropped": table.tokens_dropped, "dropped": table.dropped}
    header |= {"problems": encoded.problems, "left_out": encoded.left_out}

    def parts() -> Iterator[bytes | memoryview]:
        yield json.dumps(header).encode() + b"\n"
        for values in arrays:
            yield memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        for start in range(0, len(texts), _SLICE):
            yield "".join(texts[start : start + _SLICE]).encode()

    digest = hashlib.sha256()
    for part in parts():
        digest.update(part)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=_ENDING)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(digest.hexdigest().encode())
            file.writelines(parts())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read(path: Path, rows: Rows, tokenizer: Any) -> Encoded:
    """
    Raises:
        FileNotFoundError: it is absent.
        OSError, ValueError, KeyError, TypeError, RecursionError: it is not what `_write` wrote.
    """
    with open_ordinary(path) as file:
        state = os.fstat(file.fileno())
        if state.st_uid != os.geteuid():
            raise ValueError("it is another user's")
        reader = _Reader(file, state.st_size)
        header = json.loads(reader.line())
        arrays = {name: reader.array(size, dtype) for (name, dtype), size in zip(_ARRAYS.items(), header["sizes"], strict=True)}
        ends = [0, *np.cumsum(arrays["texts"]).tolist()]
        texts = [reader.take(end - start).decode() for start, end in pairwise(ends)]
        reader.check_end()
    os.utime(path)
    of_row = arrays["rows"].tolist()
    of_text = np.cumsum(np.diff(arrays["rows"], prepend=-1) != 0) - 1
    begins = np.concatenate([[0], np.cumsum(arrays["lengths"])])
    loss_mask = np.unpackbits(arrays["loss_mask"], count=len(arrays["tokens"])).view(bool)
    table = ExampleTable(
        arrays["tokens"], loss_mask, begins, arrays["columns"].reshape(3, -1), [texts[i] for i in of_text.tolist()],
        [rows[i][0] for i in of_row], [rows[i][1] for i in of_row], tokenizer,
    )  # fmt: skip
    table.dropped, table.tokens_dropped = header["dropped"], header["tokens_dropped"]
    return Encoded(table, header["problems"], header["left_out"])


class _Reader:
    """Reads a file's parts one behind the other, none of them longer than the file, and checks the whole at the end."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self._digest = file, size, hashlib.sha256()
        self._expected = file.read(64)

    def line(self) -> bytes:
        line = self._file.readline()
        self._digest.update(line)
        return line

    def take(self, size: int) -> bytes:
        part = self._file.read(size) if 0 <= size <= self._size else b""
        if len(part) != size:
            raise ValueError("it is cut short")
        self._digest.update(part)
        return part

    def array(self, size: int, dtype: type) -> np.ndarray:
        return np.frombuffer(self.take(size * np.dtype(dtype).itemsize), dtype=dtype)

    def check_end(self) -> None:
        if self._file.read(1) or self._digest.hexdigest().encode() != self._expected:
            raise ValueError("its checksum is another")


def _tidy(folder: Path) -> None:
    """Removes the files that were not used for longest, until the rest is no larger than `LIMIT`."""
    files = [(path, path.lstat()) for path in folder.iterdir() if _OURS.fullmatch(path.name)]
    left = sum(state.st_size for _, state in files)
    for path, state in sorted(files, key=lambda pair: pair[1].st_mtime):
        if left <= LIMIT:
            return
        path.unlink(missing_ok=True)
        left -= state.st_size
