"""safetensors and npz files read and written a piece at a time, so that a file larger than memory can be copied.

A tensor is its name, dtype, shape and little-endian bytes in C order; no array is made of it. bfloat16, which numpy does not
know, stands in an npz as two raw bytes (`<V2`), as `mx.savez` writes it and `mx.load` reads it back.

Formats: https://github.com/huggingface/safetensors#format and `numpy.lib.format`.
"""

from __future__ import annotations

import json
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fulltune_nb.errors import WeightsError
from fulltune_nb.files import no_key_twice

_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<V2", "C64": "<c8", "BOOL": "|b1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
}  # fmt: skip
_CODES = {np.dtype(descr).newbyteorder("="): code for code, descr in _NUMPY.items()}
_CHUNK = 2**20  # bytes in memory at a time
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_ALWAYS_UNPACKED, _MAX_RATIO = 2**26, 20  # bytes an npz may unpack to in any case, and times its own size
UNREADABLE = (
    OSError, ValueError, EOFError, RecursionError, SyntaxError, TypeError, OverflowError, struct.error, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError, NotImplementedError, MemoryError,
)  # fmt: skip
"""What zipfile and numpy raise at archives that are damaged, encrypted or made up."""


ENDINGS = (".npz", ".safetensors")
"""Of weights files."""


def check_ending(path: Path) -> None:
    """
    Raises:
        WeightsError: a file name that is neither `.npz` nor `.safetensors`.
    """
    if path.suffix not in ENDINGS:
        found = repr(path.suffix) if path.suffix else "no ending"
        raise WeightsError(f"{path}: a weights file ends in .safetensors or .npz, found {found}.")


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file. `dtype` is safetensors' code, such as `"BF16"`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes]]
    """Reads its bytes."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(_NUMPY[self.dtype]).itemsize


def check_regular_file(path: Path) -> None:
    """
    Raises:
        WeightsError: there is none, or something that is no file, such as a folder or a pipe, which could be read for ever.
    """
    if not path.is_file():
        what = "No weights file at" if not path.exists() else "Expected a file of weights, found something else at"
        raise WeightsError(f"{what} {path}.")


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where the tensors' bytes begin.

    Raises:
        WeightsError: not a whole safetensors file.
    """
    check_regular_file(path)
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            file_size = path.stat().st_size
            if not 2 <= size <= min(_MAX_HEADER, file_size - 8):
                raise ValueError(f"the header should have {size:,} bytes, the file has {file_size:,}")
            header = json.loads(file.read(size), object_pairs_hook=no_key_twice)
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {str(error)[:300]}. If it is cut short, copy it again.") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path} is not a safetensors file: its header is not a JSON object.")
    header["__metadata__"] = header.get("__metadata__") or {}  # MLX writes null for none
    if not all(isinstance(entry, dict) for entry in header.values()):
        raise WeightsError(f"{path} is not a safetensors file: its header's entries are not JSON objects.")
    return header, 8 + size


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The free texts a safetensors file carries.

    Raises:
        WeightsError: not a safetensors file.
    """
    return {str(key): str(value) for key, value in read_safetensors_header(path)[0]["__metadata__"].items()}


def open_safetensors(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file.

    Raises:
        WeightsError: not a whole safetensors file, or a dtype that is not copied.
    """
    header, begin = read_safetensors_header(path)
    size = path.stat().st_size - begin
    tensors, places = [], []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, first, last = _checked_entry(path, name, entry)
        tensor = Tensor(name, dtype, shape, lambda first=begin + first, size=last - first: _file_chunks(path, first, size))
        if tensor.nbytes != last - first or last > size:
            raise WeightsError(f"{path}: {name} should have {tensor.nbytes} bytes, but they are not all there. Copy the file again.")
        tensors.append(tensor)
        places.append((first, last, name))
    end = 0
    for first, last, name in sorted(places):
        if first != end:
            what = "overlaps the tensor before it" if first < end else f"comes after {first - end:,} bytes that belong to no tensor"
            raise WeightsError(f"{path}: {name} {what}, by the header's data_offsets. The file is damaged or made up: get it again.")
        end = last
    if end != size:
        raise WeightsError(f"{path}: {size - end:,} bytes at its end belong to no tensor of its header. Get the file again.")
    return tensors


def _checked_entry(path: Path, name: str, entry: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape and the two data offsets of a tensor in a safetensors header."""
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1] and isinstance(dtype, str)):
        raise WeightsError(f"{path}: the header's entry for {name[:80]!r} is broken: {str(entry)[:120]}. Get the file again.")
    if dtype not in _NUMPY:
        raise WeightsError(f"{path}: {name} is of dtype {dtype[:20]}; copied are {', '.join(_NUMPY)}.")
    if any(size >= 2**31 for size in shape) or len(shape) > 32:
        raise WeightsError(f"{path}: {name} has the shape {str(shape)[:80]}, beyond what an array can have. Get the file again.")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _file_chunks(path: Path, first: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(first)
        yield from _read_exactly(file, size, path)


def _read_exactly(file: BinaryIO, size: int, path: Path) -> Iterator[bytes]:
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            raise WeightsError(f"{path} is cut short. Copy it again.")
        size -= len(chunk)
        yield chunk


def write_safetensors(path: Path, tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    """Writes in place; give a temporary path."""
    tensors, offset = list(tensors), 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for tensor in tensors:
        offsets = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for chunk in tensor.chunks():
                file.write(chunk)


def open_npz(path: Path) -> list[Tensor]:
    """The tensors of an npz file, compressed or not.

    Raises:
        WeightsError: not a whole npz file, Python objects in it, or a dtype that is not copied.
    """
    check_regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry.filename for entry in archive.infolist()]
            if len(set(entries)) != len(entries) or not entries:
                raise WeightsError(f"{path}: {'a tensor is there twice' if entries else 'there is no tensor in it'}.")
            if others := [name[:80] for name in entries if not name.endswith(".npy")]:
                raise WeightsError(f"{path}: expected .npy entries only, found {', '.join(others[:5])}. It is no npz of weights.")
            _check_sizes(archive, path)
            return [_open_entry(archive, path, entry) for entry in entries]
    except UNREADABLE as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} cannot be read as npz: {str(error)[:300]}. If it is cut short, copy it again.") from error


def _check_sizes(archive: zipfile.ZipFile, path: Path) -> None:
    """Weights hardly compress. What unpacks to many times its size is meant to fill the memory, or the disk."""
    unpacked, packed = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
    if unpacked > _ALWAYS_UNPACKED and unpacked > _MAX_RATIO * packed:
        raise WeightsError(
            f"{path}: its {packed:,} bytes would unpack to {unpacked:,}. Weights do not compress like that, so nothing was read."
            " If you trust the file, unpack it yourself and save it with numpy.savez."
        )


def _open_entry(archive: zipfile.ZipFile, path: Path, entry: str) -> Tensor:
    with archive.open(entry) as file:
        shape, in_fortran_order, dtype = _npy_header(file)
        header_bytes = file.tell()
    code = _CODES.get(dtype.newbyteorder("="))
    if code is None or dtype.hasobject:
        pickled = " Python objects (pickle) can run code when they are read, so they are not." if dtype.hasobject else ""
        raise WeightsError(f"{path}: {entry} is of dtype {str(dtype)[:80]}; copied are {', '.join(_NUMPY)}.{pickled}")
    if any(not 0 <= size < 2**31 for size in shape) or len(shape) > 32:
        raise WeightsError(f"{path}: {entry} has the shape {str(shape)[:80]}, beyond what an array can have. Get the file again.")
    turned = (in_fortran_order and sum(size != 1 for size in shape) > 1) or dtype != np.dtype(_NUMPY[code])
    read = _turned_entry if turned else _entry_chunks
    tensor = Tensor(entry.removesuffix(".npy"), code, shape, lambda: read(path, entry))
    there = archive.getinfo(entry).file_size - header_bytes
    if tensor.nbytes != there:
        raise WeightsError(f"{path}: {entry} should have {tensor.nbytes:,} bytes of data, the archive has {there:,}. Copy the file again.")
    return tensor


def _npy_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"npy version {version} is not known")


def _entry_chunks(path: Path, entry: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
            shape, _, dtype = _npy_header(file)
            yield from _read_exactly(file, math.prod(shape) * dtype.itemsize, path)
            if file.read(1):
                raise WeightsError(f"{path}: {entry} has more bytes than its header says.")
    except UNREADABLE as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: {entry} cannot be read: {error}. Copy the file again.") from error


def _turned_entry(path: Path, entry: str) -> Iterator[bytes]:
    """One whole tensor in memory: its bytes stand in another order in the file."""
    data = b"".join(_entry_chunks(path, entry))
    with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
        shape, in_fortran_order, dtype = _npy_header(file)
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if in_fortran_order else "C")
    if array.dtype.kind != "V":
        array = array.astype(array.dtype.newbyteorder("<"))
    yield array.tobytes(order="C")


def write_npz(path: Path, tensors: Iterable[Tensor]) -> None:
    """Writes in place, uncompressed; give a temporary path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for tensor in tensors:
            with archive.open(zipfile.ZipInfo(f"{tensor.name}.npy"), "w", force_zip64=tensor.nbytes >= 2**31) as file:
                header = {"descr": _NUMPY[tensor.dtype], "fortran_order": False, "shape": tensor.shape}
                np.lib.format.write_array_header_1_0(file, header)
                for chunk in tensor.chunks():
                    file.write(chunk)


def check_weights_file(path: Path) -> list[Tensor]:
    """Looks through a weights file without reading its tensors: what it says of itself must be true and fit its size.

    Raises:
        WeightsError: it is damaged, made up, or holds what is no tensor.
    """
    check_ending(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    tensors = open_npz(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # a checksum for each, which MLX finds wrong only when the array is used
    except UNREADABLE as error:
        raise WeightsError(f"{path} cannot be read as npz: {str(error)[:300]}. If it is cut short, copy it again.") from error
    if damaged is not None:
        raise WeightsError(f"{path} cannot be read as npz: the checksum of {damaged[:80]} is wrong. Copy the file again.")
    return tensors
