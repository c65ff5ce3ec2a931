"""Tensors in pieces of rows, so that what is computed on the way stays small, and where a model keeps a tensor.

A tensor (..., C) is seen as the matrix (R, C) of all its rows; a piece is a range of them. What is kept beside a tensor, such as
codes (..., C) and their scales (..., C / 256), is cut in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.models.cpu_streams import cpu_streams

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A tensor, or some of its rows."""

    name: str
    size: int
    """Elements."""
    rows: slice | None = None
    """Rows of the matrix that the tensor is seen as; None: the tensor as it is."""
    before: int = 0
    """Row of the tensor that is the first one of the gradient at hand."""
    in_place: bool = False
    """It needs no memory of its own."""
    native: tuple[float, ...] | None = None
    """What kernels of our own need to know of the step; None: MLX updates it."""


def matrix_rows(shape: Shape, places: slice | None) -> tuple[int, int]:
    """First and last (excluded) row of the matrix that a tensor is seen as, from places on its first axis; None: all."""
    per_place = math.prod(shape[1:-1])
    return (places.start * per_place, places.stop * per_place) if places else (0, math.prod(shape[:-1]))


def first_row(piece: Piece) -> int:
    """Where a piece begins in the matrix that its tensor is seen as."""
    return 0 if piece.rows is None else piece.rows.start


def piece_size() -> int:
    """Elements of a piece. On the CPU one that fits into the cache; elsewhere enough to keep a GPU busy."""
    return 2**20 if mx.default_device().type == mx.DeviceType.cpu else 2**24


def cut(start: int, stop: int, columns: int) -> Iterator[slice]:
    """The rows from `start` to `stop` in pieces of about `piece_size()` elements."""
    step = max(1, piece_size() // columns)
    for row in range(start, stop, step):
        yield slice(row, min(row + step, stop))


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are evaluated together: a piece for each stream, more where they are small or need no memory."""
    most = piece_size() * len(cpu_streams())
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        own = piece.size // 8 if piece.in_place else piece.size
        if batch and size + own > most:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += own
    if batch:
        yield batch


def take(array: mx.array, rank: int, rows: slice) -> mx.array:
    """Some rows of what is kept for a tensor of this rank: (..., *) -> (rows, *)."""
    return _as_rows(array, rank)[rows]


def put(array: mx.array, rank: int, rows: slice, part: mx.array) -> mx.array:
    """`array` with some rows replaced; lazy. Evaluated, it is in the memory of `array` unless something else holds that."""
    changed = mx.slice_update(_as_rows(array, rank), part, mx.array([rows.start]), axes=[0])
    return changed if changed.shape == array.shape else changed.reshape(array.shape)


def _as_rows(array: mx.array, rank: int) -> mx.array:
    if rank == 2:
        return array
    shape = array.shape
    return array.reshape(math.prod(shape[: rank - 1]), *shape[rank - 1 :])


class Place:
    """Where a model keeps a parameter, given by its module path."""

    def __init__(self, model: nn.Module, name: str):
        *path, last = name.split(".")
        self._holder: Any = model
        for part in path:
            self._holder = self._holder[int(part) if isinstance(self._holder, list) else part]
        self._key = int(last) if isinstance(self._holder, list) else last

    @property
    def array(self) -> mx.array:
        return self._holder[self._key]

    @array.setter
    def array(self, array: mx.array) -> None:
        self._holder[self._key] = array
