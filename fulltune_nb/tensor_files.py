"""safetensors and npz files read and written a piece at a time, so that a file larger than memory can be copied.

A tensor is its name, dtype, shape and little-endian bytes in C order; no array is made of it. bfloat16, which numpy does not
know, stands in an npz as two raw bytes (`<V2`), as `mx.savez` writes it and `mx.load` reads it back.

Formats: https://github.com/huggingface/safetensors#format and `numpy.lib.format`.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fulltune_nb.errors import WeightsError

_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<V2", "C64": "<c8", "BOOL": "|b1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
}  # fmt: skip
_CODES = {np.dtype(descr).newbyteorder("="): code for code, descr in _NUMPY.items()}
_CHUNK = 2**20  # bytes in memory at a time
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library


ENDINGS = (".npz", ".safetensors")
"""Of weights files."""


def check_ending(path: Path) -> None:
    """
    Raises:
        WeightsError: a file name that is neither `.npz` nor `.safetensors`.
    """
    if path.suffix not in ENDINGS:
        raise WeightsError(f"{path}: a weights file ends in .safetensors or .npz, found {path.suffix or 'no ending'!r}.")


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


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where the tensors' bytes begin.

    Raises:
        WeightsError: not a whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _MAX_HEADER else None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as safetensors: {error}. If it is cut short, copy it again.") from error
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
    file_size = path.stat().st_size
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise WeightsError(f"{path}: the header's entry for {name!r} is broken.") from None
        if dtype not in _NUMPY:
            raise WeightsError(f"{path}: {name} is of dtype {dtype}; copied are {', '.join(_NUMPY)}.")
        tensor = Tensor(name, dtype, shape, lambda first=begin + first, size=last - first: _file_chunks(path, first, size))
        if min(shape, default=0) < 0 or tensor.nbytes != last - first or first < 0 or begin + last > file_size:
            raise WeightsError(f"{path}: {name} should have {tensor.nbytes} bytes, but they are not all there. Copy the file again.")
        tensors.append(tensor)
    return tensors


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
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [name for name in archive.namelist() if name.endswith(".npy")]
            if len(set(entries)) != len(entries) or not entries:
                raise WeightsError(f"{path}: {'a tensor is there twice' if entries else 'there is no tensor in it'}.")
            return [_open_entry(archive, path, entry) for entry in entries]
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} cannot be read as npz: {error}. If it is cut short, copy it again.") from error


def _open_entry(archive: zipfile.ZipFile, path: Path, entry: str) -> Tensor:
    with archive.open(entry) as file:
        shape, in_fortran_order, dtype = _npy_header(file)
    code = _CODES.get(dtype.newbyteorder("="))
    if code is None or dtype.hasobject:
        raise WeightsError(f"{path}: {entry} is of dtype {dtype}; copied are {', '.join(_NUMPY)}.")
    turned = (in_fortran_order and sum(size != 1 for size in shape) > 1) or dtype != np.dtype(_NUMPY[code])
    read = _turned_entry if turned else _entry_chunks
    return Tensor(entry.removesuffix(".npy"), code, shape, lambda: read(path, entry))


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
    except (zipfile.BadZipFile, OSError) as error:
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
