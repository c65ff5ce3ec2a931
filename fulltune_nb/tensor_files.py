"""Weights files, `.safetensors` and `.npz`: read and written as arrays, or a piece at a time where a file is larger than memory.

What a file says of itself is checked before its tensors are read: by the safetensors library where it can, and here for what it lets
through (a key given twice, more dimensions than MLX has) and for npz (Python objects, zip bombs, wrong checksums).

bfloat16, which numpy does not know, stands in an npz as two raw bytes (`<V2`), as `mx.savez` writes it and `mx.load` reads it back.
The safetensors library (0.8) gives no bfloat16 to numpy or MLX, and writes no tensor before it has the bytes of all; `mx.savez` (0.32.4) is
silent where the disk is full at the end of an archive. So bytes are read and written here.

Formats: https://github.com/huggingface/safetensors#format and `numpy.lib.format`.
"""

from __future__ import annotations

import json
import math
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import safe_open

from fulltune_nb.device import device_kind
from fulltune_nb.errors import WeightsError, listed
from fulltune_nb.files import Checksum, atomic_path, begin_checksum, no_key_twice, write_parts
from fulltune_nb.html import printable

ENDINGS = (".npz", ".safetensors")
"""Of weights files."""
FORMAT = {"format": "pt"}
"""In the header of every safetensors file that is written: the layout is PyTorch's, and accelerate and older transformers ask for it."""

_NUMPY = {  # dtype in a safetensors header -> in an npy header
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<V2", "C64": "<c8", "BOOL": "|b1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
}  # fmt: skip
_CODES = {np.dtype(descr).newbyteorder("="): code for code, descr in _NUMPY.items()}
_CHUNK = 2**20  # bytes in memory at a time
COPIED_BYTES = 2**26
"""Of an array on a CUDA device that are copied at a time to be read."""
_ALWAYS_UNPACKED, _MAX_RATIO = 2**26, 20  # bytes an npz may unpack to in any case, and times its own size


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file, or about to be written to one, as little-endian bytes in C order."""

    name: str
    dtype: str
    """safetensors' code, such as `"BF16"`."""
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[bytes | memoryview]]
    """Reads its bytes, a piece at a time."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(_NUMPY[self.dtype]).itemsize


def check_ending(path: Path) -> None:
    """
    Raises:
        WeightsError: a file name that is neither `.npz` nor `.safetensors`.
    """
    if path.suffix not in ENDINGS:
        found = repr(path.suffix) if path.suffix else "no ending"
        raise WeightsError(f"{path}: a weights file ends in .safetensors or .npz, found {found}.")


# ---- whole files, as arrays ----------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a `.safetensors` or `.npz` file, not evaluated yet.

    float64, which no GPU computes in and MLX reads from no safetensors file, becomes float32 there; a warning tells.

    Raises:
        WeightsError: the file cannot be read, is damaged, or has another ending. Pickled objects in an npz are refused.
    """
    tensors = open_tensors(path)  # before MLX sees the file: its own reader trusts what a header says
    doubles = {tensor.name for tensor in tensors if tensor.dtype == "F64"}
    if doubles:
        what = f"{len(doubles):,} tensors of {path} are float64 ({listed(sorted(doubles), 2)})"
        warnings.warn(printable(f"{what}: they are trained in float32 at most, with half of their digits."), stacklevel=3)
    with _reading(path):
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # MLX finds a wrong checksum only when the array is used
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged[:80]} is wrong")
        if path.suffix == ".safetensors" or device_kind() != "cpu":  # MLX reads no float64 there
            return {tensor.name: _in_float32(tensor) for tensor in tensors}
        return dict(mx.load(str(path)))


def _in_float32(tensor: Tensor) -> mx.array:
    """A tensor of a file, read; float64 becomes float32."""
    data = b"".join(tensor.chunks())
    if tensor.dtype == "BF16":
        return mx.array(np.frombuffer(data, np.uint16).reshape(tensor.shape)).view(mx.bfloat16)
    array = np.frombuffer(data, _NUMPY[tensor.dtype]).reshape(tensor.shape)
    with np.errstate(over="ignore"):
        return mx.array(array.astype(np.float32) if tensor.dtype == "F64" else array)


def write_tensors(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors into a `.safetensors` or `.npz` file, atomically; `metadata` goes into a safetensors file's header.

    Raises:
        WeightsError: another ending, or the file cannot be written.
    """
    check_ending(path)
    try:
        with atomic_path(path) as temporary:
            if path.suffix == ".npz":
                write_npz(temporary, tensors_of(tensors))
            else:
                write_safetensors(temporary, tensors_of(tensors), {**(metadata or {}), **FORMAT})
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{path} could not be written: {error}. Check free space and permissions.") from error


def begin_checksum_of(tensors: Mapping[str, mx.array]) -> Checksum:
    """The SHA-256 of the safetensors file that `write_tensors` makes of these tensors, computed in a thread from now on."""
    return begin_checksum(_safetensors(tensors_of(tensors), FORMAT))


def tensors_of(arrays: Mapping[str, mx.array]) -> list[Tensor]:
    """Arrays as tensors to be written, evaluated; their bytes are the arrays' own memory where that lies in C order, on CUDA copies."""
    mx.eval(list(arrays.values()))
    chunks = _copied_bytes if device_kind() == "cuda" else _own_bytes
    return [Tensor(name, _code_of(array), tuple(array.shape), chunks(array)) for name, array in arrays.items()]


def _code_of(array: mx.array) -> str:
    return "BF16" if array.dtype == mx.bfloat16 else _CODES[np.asarray(mx.zeros((), array.dtype)).dtype]


def _own_bytes(array: mx.array) -> Callable[[], Iterator[memoryview]]:
    known = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array  # numpy knows no bfloat16
    data = memoryview(np.ascontiguousarray(np.asarray(known)).reshape(-1).view(np.uint8))
    return partial(iter, (data,))


def _copied_bytes(array: mx.array) -> Callable[[], Iterator[memoryview]]:
    """Of copies, a piece at a time: whoever reads a CUDA array has MLX move it, for good, to memory shared with the host (`raw_ptr`)."""

    def pieces() -> Iterator[memoryview]:
        flat, size = array.reshape(-1), max(1, COPIED_BYTES // array.itemsize)
        for begin in range(0, array.size, size):
            piece = flat[begin : begin + size]
            yield from _own_bytes(mx.where(mx.array(True), piece, piece))()  # a slice alone would share the array's memory

    return pieces


def open_tensors(path: Path) -> list[Tensor]:
    """The tensors of a weights file, none of them read yet: what the file says of them is true and fits its size.

    Raises:
        WeightsError: the file is damaged, made up, holds what is no tensor, or has another ending.
    """
    check_ending(path)
    return open_npz(path) if path.suffix == ".npz" else open_safetensors(path)


def check_regular_file(path: Path) -> None:
    """
    Raises:
        WeightsError: there is none, or something that is no file, such as a folder or a pipe, which could be read for ever.
    """
    if not path.is_file():
        what = "No weights file at" if not path.exists() else "Expected a file of weights, found something else at"
        raise WeightsError(f"{what} {path}.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within it, whatever a library finds wrong becomes a `WeightsError` that names the file."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:  # numpy, zipfile, json, safetensors and MLX raise some fifteen kinds at damaged and made up files
        why = str(error)[:300].rstrip(".")
        raise WeightsError(f"{path} cannot be read as {path.suffix[1:]}: {why}. If it is cut short, copy it again.") from error


def _check_shape(path: Path, name: str, shape: Sequence[int]) -> None:
    if any(not 0 <= size < 2**31 for size in shape) or len(shape) > 32:
        raise WeightsError(f"{path}: {name[:80]} has the shape {str(shape)[:80]}, beyond what an array can have. Get the file again.")


# ---- safetensors ---------------------------------------------------------------------------------------------------------------


def open_safetensors(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file.

    Raises:
        WeightsError: not a whole safetensors file, or a dtype that is not copied.
    """
    header, begin = _read_header(path)
    tensors = []
    for name, entry in header.items():
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _NUMPY:
            raise WeightsError(f"{path}: {name} is of dtype {dtype}; copied are {', '.join(_NUMPY)}.")
        _check_shape(path, name, shape)
        tensors.append(Tensor(name, dtype, tuple(shape), partial(_pieces, path, begin + first, last - first)))
    return tensors


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The free texts a safetensors file carries.

    Raises:
        WeightsError: not a safetensors file.
    """
    check_regular_file(path)
    with _reading(path), safe_open(path, framework="numpy") as file:
        return file.metadata() or {}


def _read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The entries of a safetensors header by tensor name, and where the tensors' bytes begin."""
    check_regular_file(path)
    with _reading(path):
        with safe_open(path, framework="numpy"):  # checks dtypes, and that shapes, offsets and the file's size fit each other
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=no_key_twice)
    header.pop("__metadata__", None)
    return header, 8 + size


def _pieces(path: Path, first: int, size: int) -> Iterator[bytes]:
    """`size` bytes of a file from `first` on."""
    with path.open("rb") as file:
        file.seek(first)
        while size:
            piece = file.read(min(size, _CHUNK))
            if not piece:
                raise WeightsError(f"{path} is cut short. Copy it again.")
            size -= len(piece)
            yield piece


def write_safetensors(path: Path, tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> None:
    """Writes in place; give a temporary path."""
    write_parts(path, _safetensors(tensors, metadata))


def _safetensors(tensors: Iterable[Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a piece at a time."""
    tensors, end = list(tensors), 0
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors:
        yield from tensor.chunks()


# ---- npz -----------------------------------------------------------------------------------------------------------------------


def open_npz(path: Path) -> list[Tensor]:
    """The tensors of an npz file, compressed or not. Each is read whole.

    Raises:
        WeightsError: not a whole npz file, Python objects in it, or a dtype that is not copied.
    """
    check_regular_file(path)
    with _reading(path), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) != len(entries) or not entries:
            raise WeightsError(f"{path}: {'a tensor is there twice' if entries else 'there is no tensor in it'}.")
        if others := [entry.filename[:80] for entry in entries if not entry.filename.endswith(".npy")]:
            raise WeightsError(f"{path}: expected .npy entries only, found {listed(others)}. It is no npz of weights.")
        unpacked, packed = sum(entry.file_size for entry in entries), path.stat().st_size
        if unpacked > _ALWAYS_UNPACKED and unpacked > _MAX_RATIO * packed:
            raise WeightsError(
                f"{path}: its {packed:,} bytes would unpack to {unpacked:,}. Weights do not compress like that, so nothing was read."
                " If you trust the file, unpack it yourself and save it with numpy.savez."
            )
        return [_npz_tensor(path, archive, entry) for entry in entries]


def _npz_tensor(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Tensor:
    name = entry.filename
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"npy version {version} is not known")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        there = entry.file_size - file.tell()
    code = _CODES.get(dtype.newbyteorder("="))
    if code is None or dtype.hasobject:
        pickled = " Python objects (pickle) can run code when they are read, so they are not." if dtype.hasobject else ""
        raise WeightsError(f"{path}: {name} is of dtype {str(dtype)[:80]}; copied are {', '.join(_NUMPY)}.{pickled}")
    _check_shape(path, name, shape)
    tensor = Tensor(name.removesuffix(".npy"), code, shape, lambda: iter([_entry_bytes(path, name)]))
    if tensor.nbytes != there:
        raise WeightsError(f"{path}: {name} should have {tensor.nbytes:,} bytes of data, the archive has {there:,}. Copy the file again.")
    return tensor


def _entry_bytes(path: Path, name: str) -> memoryview:
    with _reading(path), zipfile.ZipFile(path) as archive, archive.open(name) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # to the end, where the archive's checksum is compared
    if array.dtype.kind != "V":
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def write_npz(path: Path, tensors: Iterable[Tensor]) -> None:
    """Writes in place, uncompressed; give a temporary path."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for tensor in tensors:
            with archive.open(zipfile.ZipInfo(f"{tensor.name}.npy"), "w", force_zip64=tensor.nbytes >= 2**31) as file:
                header = {"descr": _NUMPY[tensor.dtype], "fortran_order": False, "shape": tensor.shape}
                np.lib.format.write_array_header_1_0(file, header)
                for chunk in tensor.chunks():
                    file.write(chunk)
