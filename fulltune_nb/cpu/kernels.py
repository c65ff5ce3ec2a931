"""Kernels of our own for element-wise work outside of MLX's graph, on a Linux CPU: `kernels.cpp`, compiled where it runs.

MLX runs a CPU stream's operations on one core and compiles them for any processor. The same arithmetic in one pass, vectorised and
on all cores, takes AdamW less than half the time, and the gradients' norm a third (`docs/decisions/0020`). Like `mx.compile` this
needs g++; without it MLX does everything.

Kernels write into the memory of MLX arrays. `sole` makes that safe: what somebody else still holds is copied first.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from fulltune_nb.cpu.streams import LeastLoaded, worker_cores

VARIABLE = "FULLTUNE_KERNELS"
"""Environment variable; "off" leaves everything to MLX."""

SMALLEST_MODEL = 2**20
"""Trained elements from which on a run is worth compiling for (a quarter of a second)."""

CHUNK, SMALL_CHUNK = 2**19, 2**16
"""Elements that a core is given at a time, and of rows of logits, which take it longer. Sums are made by chunk, so that they do not
depend on the number of cores."""

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# No fused multiply-add (-ffp-contract=off): results then are those of MLX's own loops.

_ADAM_SCALARS = 9


def kernels_for(num_elements: int) -> Kernels | None:
    """The kernels for a model with so many trained elements; None where MLX does the work."""
    # With a GPU there, arrays may lie where only MLX can write.
    on_cpu = sys.platform == "linux" and mx.default_device().type == mx.DeviceType.cpu and not mx.is_available(mx.gpu)
    if not on_cpu or num_elements < SMALLEST_MODEL or os.environ.get(VARIABLE, "").strip().lower() in ("off", "0", "none"):
        return None
    return _compiled()


class AdamUpdate(NamedTuple):
    """Some elements of a parameter, to be updated by `Kernels.adam`. Arrays are evaluated, float32 and contiguous."""

    p: mx.array
    """The parameter; like the moments, held by nobody else (`sole`)."""
    g: mx.array
    """Its gradient, or that of some rows."""
    m: mx.array
    v: mx.array
    first: int
    """Where the gradient's first element stands in the others."""
    scalars: tuple[float, ...]
    """`update_rules.Adam.begin`."""


class Kernels:
    """The functions of `kernels.cpp`, on all cores.

    Args:
        library: the compiled file, loaded.
    """

    def __init__(self, library: ctypes.CDLL):
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
        self._adam, self._sum_of_squares, self._cross_entropy = library.adam, library.sum_of_squares, library.cross_entropy
        self._adam.argtypes, self._adam.restype = [*[pointer] * 4, size, *[number] * _ADAM_SCALARS], None
        self._sum_of_squares.argtypes, self._sum_of_squares.restype = [pointer, size], ctypes.c_double
        self._cross_entropy.argtypes, self._cross_entropy.restype = [pointer, size, size, pointer, pointer, pointer], None

    def adam(self, updates: Sequence[AdamUpdate]) -> None:
        """Adam's update of parameters and moments, in place."""
        tasks = []
        for p, g, m, v, first, scalars in updates:
            starts = [_address(array) + 4 * offset for array, offset in ((p, first), (g, 0), (m, first), (v, first))]
            for begin, count in _chunks(g.size):
                arguments = (*(start + 4 * begin for start in starts), count, *scalars)
                tasks.append((count, partial(self._adam, *arguments)))
        _on_all_cores(tasks)

    def sum_of_squares(self, arrays: Sequence[mx.array]) -> float:
        """Of all elements of float32 arrays, in float64."""
        arrays = [mx.contiguous(array) for array in arrays]
        mx.eval(arrays)
        parts = [(_address(array) + 4 * begin, count) for array in arrays for begin, count in _chunks(array.size)]
        sums = [0.0] * len(parts)

        def sum_part(i: int) -> None:
            sums[i] = self._sum_of_squares(*parts[i])

        _on_all_cores([(count, partial(sum_part, i)) for i, (_, count) in enumerate(parts)])
        return sum(sums)

    def cross_entropy(self, logits: mx.array, targets: np.ndarray, weights: np.ndarray) -> float:
        """The weighted sum of -log softmax(logits)[target]; in place, logits become their gradients.

        Args:
            logits: (n, V) float32, evaluated, contiguous, and held by nobody else. They become weight (softmax - one_hot(target)).
            targets: (n,), from 0 to V - 1.
            weights: (n,).

        Raises:
            ValueError: a target is not among the logits.
        """
        rows, width = logits.shape
        targets, weights = np.ascontiguousarray(targets, np.int32), np.ascontiguousarray(weights, np.float32)
        if rows and not 0 <= targets.min() <= targets.max() < width:
            raise ValueError(f"targets: expected ids from 0 to {width - 1}, got {targets.min()} to {targets.max()}")
        losses = np.empty(rows, np.float32)
        start, tasks = _address(logits), []
        for first in range(0, rows, step := max(1, SMALL_CHUNK // width)):
            count = min(step, rows - first)
            others = (array.ctypes.data + 4 * first for array in (targets, weights, losses))
            arguments = (start + 4 * first * width, count, width, *others)
            tasks.append((count, partial(self._cross_entropy, *arguments)))
        _on_all_cores(tasks)
        return float(losses.sum(dtype=np.float64))


def sole(array: mx.array) -> mx.array:
    """The same values in memory that nothing else holds, once evaluated: the array's own if only the result holds it, else a copy's.

    An update of no rows at all, which MLX makes in place where it may. `array`: evaluated, of at least one dimension.
    """
    no_rows, nowhere = _nothing(array.shape[1:], array.dtype)
    return mx.slice_update(mx.contiguous(array), no_rows, nowhere, axes=[0])


@cache
def _nothing(shape_of_row: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """No rows at all, and where they go; evaluated, so for all threads."""
    nothing = mx.zeros((0, *shape_of_row), dtype=dtype), mx.array([0])
    mx.eval(nothing)
    return nothing


def _address(array: mx.array) -> int:
    return np.asarray(array).ctypes.data


def _chunks(size: int) -> list[tuple[int, int]]:
    """(first element, number of elements) of each chunk."""
    return [(begin, min(CHUNK, size - begin)) for begin in range(0, size, CHUNK)]


def _on_all_cores(tasks: Sequence[tuple[int, Callable[[], None]]]) -> None:
    """Runs (size, task) pairs, each on the core that has got the least so far; C functions let go of Python's lock."""
    shares: list[list[Callable[[], None]]] = [[] for _ in range(worker_cores())]
    workers = LeastLoaded(len(shares))
    for size, task in tasks:
        shares[workers.next(size)].append(task)
    others = [threading.Thread(target=_run_all, args=(share,)) for share in shares[1:] if share]
    for thread in others:
        thread.start()
    try:
        _run_all(shares[0])
    finally:
        for thread in others:
            thread.join()


def _run_all(share: Sequence[Callable[[], None]]) -> None:
    for task in share:
        task()


@cache
def _compiled() -> Kernels | None:
    """Compiled in a folder that only this user can reach, loaded, and removed."""
    if (compiler := shutil.which("g++")) is None:
        return None
    source = Path(__file__).with_name("kernels.cpp")
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "native.so")
            subprocess.run([compiler, *_FLAGS, "-o", library, source], check=True, capture_output=True, timeout=60)
            return Kernels(ctypes.CDLL(str(library)))
    except (OSError, subprocess.SubprocessError):
        return None
