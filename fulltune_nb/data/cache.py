"""Tokenized rows kept between two loads, in files of the user's cache folder that may be deleted at any time.

A file is named by a hash of all that its content is a function of: the rows with their lines, the settings, the tokenizer, the chat
template, the code that makes examples and the versions of what it calls. It begins with the SHA-256 of the rest, and holds numbers and
text only. A file that is damaged, or is another user's, counts as absent. The environment variable `FULLTUNE_CACHE` names another
folder, or is `off`.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fulltune_nb.data.encode import Encoded
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.data.split import ExampleTable

VARIABLE = "FULLTUNE_CACHE"
LARGE = 4 * 2**20
"""Bytes of rows from which on tokens are kept; fewer are tokenized in a second or two."""
LIMIT = 4 * 2**30
"""Bytes of all files together; above it those go that were not used for longest."""
_ENDING = ".rows"
_OURS = re.compile(r"[0-9a-f]{64}(\.\w+)?\.rows")  # with a middle part while it is written
_SLICE = 4096  # texts encoded at a time

Rows = Sequence[tuple[str, Mapping[str, Any]]]


def with_cache(rows: Rows, format: str, tokenizer: Any, settings: DataSettings, encode: Callable[[], Encoded]) -> Encoded:
    """What `encode()` makes of the rows, from the cache where it has been made before."""
    key = _key(rows, format, tokenizer, settings)
    folder = None if key is None else cache_folder()
    if folder is None:
        return encode()
    path = folder / f"{key}{_ENDING}"
    with suppress(OSError, ValueError, KeyError, TypeError):  # absent, or not as it was written
        return _read(path, rows, tokenizer)
    encoded = encode()
    with suppress(OSError):  # a full disk costs only the time of the next load
        _write(path, encoded, rows)
        _tidy(folder)
    return encoded


def cache_folder() -> Path | None:
    """The folder, made where it is missing; None where it is turned off, cannot be made, or others can write into it."""
    named = os.environ.get(VARIABLE, "").strip()
    if named.lower() == "off":
        return None
    caches = Path.home() / "Library" / "Caches" if sys.platform == "darwin" else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = Path(named or caches / "fulltune_nb" / "rows").expanduser()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.lstat()
    except (OSError, RuntimeError):  # the latter without a home
        return None
    is_ours = state.st_uid == os.geteuid() and not state.st_mode & 0o022 and folder.is_dir() and not folder.is_symlink()
    return folder if is_ours else None


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
        OSError, ValueError, KeyError, TypeError: it is absent, or not what `_write` wrote.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        state = os.fstat(file.fileno())
        if state.st_uid != os.geteuid():
            raise ValueError("another user's")
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
            raise ValueError("cut short")
        self._digest.update(part)
        return part

    def array(self, size: int, dtype: type) -> np.ndarray:
        return np.frombuffer(self.take(size * np.dtype(dtype).itemsize), dtype=dtype)

    def check_end(self) -> None:
        if self._file.read(1) or self._digest.hexdigest().encode() != self._expected:
            raise ValueError("not what was written")


def _tidy(folder: Path) -> None:
    """Removes the files that were not used for longest, until the rest is no larger than `LIMIT`."""
    files = [(path, path.lstat()) for path in folder.iterdir() if _OURS.fullmatch(path.name)]
    left = sum(state.st_size for _, state in files)
    for path, state in sorted(files, key=lambda pair: pair[1].st_mtime):
        if left <= LIMIT:
            return
        path.unlink(missing_ok=True)
        left -= state.st_size
