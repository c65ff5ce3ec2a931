"""All cores for element-wise work on a CPU: MLX's streams, and on Linux kernels of our own (`kernels.cpp`), compiled where they run.

MLX runs a CPU stream's operations on one core and compiles them for any processor; only the BLAS uses more cores. Work on many arrays,
such as an optimizer's, is therefore dealt out to several streams. The same arithmetic in one pass, vectorised and on all cores,
takes AdamW less than half the time, and the gradients' norm a third (`docs/decisions/0020`). Like `mx.compile` this needs g++; without
it MLX does everything.

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

from fulltune_nb.cpu.blas import warn_caller
from fulltune_nb.cpu.fast_math import on_cpu
from fulltune_nb.cpu.kernel_folder import CompileWarning, compiler_environment, ensure_kernel_folder, reason

VARIABLE = "FULLTUNE_KERNELS"
"""Environment variable; "off" leaves everything to MLX."""

SMALLEST_MODEL = 2**20
"""Trained elements from which on a run is worth compiling for (a quarter of a second)."""

CHUNK, SMALL_CHUNK = 2**19, 2**16
"""Elements that a core is given at a time, and of rows of logits, which take it longer. Sums are made by chunk, so that they do not
depend on the number of cores."""

MOST_CORES = 4
"""Element-wise work is bound by memory soon: more cores than this gain little."""

_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# No fused multiply-add (-ffp-contract=off): results then are those of MLX's own loops.

_of_thread = threading.local()  # a stream can be used only in the thread that made it


def streams_for(sizes: Sequence[int]) -> list[mx.Stream]:
    """A stream of this thread for each of several independent pieces of work; only the default one on other devices than the CPU.

    Args:
        sizes: how much work each piece is, in any unit.
    """
    default = mx.default_stream(mx.default_device())
    if not on_cpu():
        return [default] * len(sizes)
    if not hasattr(_of_thread, "more"):
        _of_thread.more = [mx.new_stream(mx.cpu) for _ in range(worker_cores() - 1)]
    streams = [default, *_of_thread.more]
    return [streams[worker] for worker in _deal(sizes, len(streams))]


def num_streams() -> int:
    """How many different streams `streams_for` gives."""
    return worker_cores() if on_cpu() else 1


def worker_cores() -> int:
    """How many cores element-wise work is dealt out to."""
    return min(available_cores(), MOST_CORES)


def available_cores() -> int:
    """Logical processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _deal(sizes: Sequence[int], workers: int) -> list[int]:
    """Each piece of work goes to the worker that has got the least so far."""
    loads, chosen = [0] * workers, []
    for size in sizes:
        worker = loads.index(min(loads))
        loads[worker] += size
        chosen.append(worker)
    return chosen


def compiler() -> str | None:
    """The path of g++, which compiles for the CPU; None: there is none."""
    return shutil.which("g++")


def lacks_compiler() -> bool:
    """Whether MLX computes on a CPU where `mx.compile` needs g++ and finds none."""
    return on_cpu() and sys.platform != "darwin" and compiler() is None


def compiles() -> bool:
    """Whether `mx.compile` has an effect here."""
    return not lacks_compiler() and (not on_cpu() or ensure_kernel_folder().problem is None)


def kernels_for(num_elements: int) -> Kernels | None:
    """The kernels for a model with so many trained elements; None where MLX does the work."""
    return compiled_kernels() if may_use_kernels() and num_elements >= SMALLEST_MODEL else None


def may_use_kernels() -> bool:
    """Whether a model that is large enough is trained with the kernels here."""
    # With a GPU there, arrays may lie where only MLX can write.
    usable = sys.platform == "linux" and on_cpu() and not mx.is_available(mx.gpu) and compiler() is not None
    return usable and ensure_kernel_folder().path is not None and os.environ.get(VARIABLE, "").strip().lower() not in ("off", "0", "none")


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


class Kernels:
    """The functions of `kernels.cpp`, on all cores.

    Args:
        library: the compiled file, loaded.
    """

    def __init__(self, library: ctypes.CDLL):
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float
        self._adam, self._sum_of_squares, self._cross_entropy = library.adam, library.sum_of_squares, library.cross_entropy
        self._adam.argtypes, self._adam.restype = [*[pointer] * 4, size, *[number] * 9], None
        self._sum_of_squares.argtypes, self._sum_of_squares.restype = [pointer, size], ctypes.c_double
        self._cross_entropy.argtypes, self._cross_entropy.restype = [pointer, size, size, pointer, pointer, pointer], None

    def adam(self, updates: Sequence[AdamUpdate], scalars: Sequence[float]) -> None:
        """Adam's update of parameters and moments, in place. `scalars`: the nine numbers of `adam` in `kernels.cpp`."""
        tasks = []
        for p, g, m, v, first in updates:
            starts = [_address(array) + 4 * offset for array, offset in ((p, first), (g, 0), (m, first), (v, first))]
            for begin, count in _chunks(g.size):
                tasks.append((count, partial(self._adam, *(start + 4 * begin for start in starts), count, *scalars)))
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
            tasks.append((count, partial(self._cross_entropy, start + 4 * first * width, count, width, *others)))
        _on_all_cores(tasks)
        return float(losses.sum(dtype=np.float64))


def sole(arrays: Sequence[mx.array]) -> list[mx.array]:
    """The same values in memory that nothing else holds, once evaluated: an array's own if only the result holds it, else a copy's.

    Args:
        arrays: evaluated, of at least one dimension each.
    """
    # An update of no rows at all, which MLX makes in place where it may.
    return [mx.slice_update(mx.contiguous(array), *_no_rows(array.shape[1:], array.dtype), axes=[0]) for array in arrays]


@cache
def _no_rows(shape_of_row: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
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
    """Runs (size, task) pairs; the C functions let go of Python's lock."""
    shares: list[list[Callable[[], None]]] = [[] for _ in range(worker_cores())]
    for (_, task), worker in zip(tasks, _deal([size for size, _ in tasks], len(shares)), strict=True):
        shares[worker].append(task)
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
def compiled_kernels() -> Kernels | None:
    """Compiled in the folder of kernels, which only this user can write to, loaded, and removed."""
    path, place = compiler(), ensure_kernel_folder().path
    if path is None or place is None:
        return None
    source = Path(__file__).with_name("kernels.cpp")
    try:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            library, environment = Path(folder, "kernels.so"), compiler_environment(place)
            subprocess.run([path, *_FLAGS, "-o", library, source], check=True, capture_output=True, timeout=60, env=environment)
            return Kernels(ctypes.CDLL(str(library)))
    except (OSError, subprocess.SubprocessError) as error:
        what = f"fulltune_nb's kernels could not be compiled in {place} ({reason(error)})"
        warn_caller(f"{what}: MLX does their work, which takes longer", CompileWarning)
        return None
