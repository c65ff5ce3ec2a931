"""Counts the bytes that the kernels of a graph read and write on a GPU; nothing is computed, and no array of the graph is made.

    with as_on_gpu():                                    # of kernel_counts.py
        found = traffic(mx.compile(step)(arrays))        # kind of kernel -> [kernels, bytes]

A kernel reads each of its inputs once and writes its outputs once: what a product reads again, tile by tile, depends on the device and is
not counted. A view reads no more than what it is of; a gather the rows it takes. MLX shows a graph's shapes to C++ only: a few lines of it
walk the graph (`WALK`), so that a compiler is needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from fulltune_nb.cpu import compiler
from nbs_tests.kernel_counts import VIEWS

WALK = r"""
#include <sstream>
#include <unordered_set>
#include "mlx/array.h"
#include "mlx/primitives.h"
using mlx::core::array;
static std::string text;
static void show(std::ostream& out, const array& a) {
    out << a.id() << ':' << a.itemsize();
    for (auto size : a.shape()) out << ',' << size;
}
// A line for each primitive: its name, its inputs, its outputs. A Python object holds its array inside, behind a head of `offset` bytes.
extern "C" const char* walk(char** objects, int count) {
    std::ostringstream out;
    std::unordered_set<std::uintptr_t> seen;
    std::vector<array> todo;
    for (int i = 0; i < count; i++) {
        char* inside = objects[i] + *reinterpret_cast<std::int32_t*>(objects[i] + 16);
        bool direct = *reinterpret_cast<std::uint32_t*>(objects[i] + 20) & 4;
        todo.push_back(*(direct ? reinterpret_cast<array*>(inside) : *reinterpret_cast<array**>(inside)));
    }
    while (!todo.empty()) {
        array a = todo.back();
        todo.pop_back();
        if (!a.has_primitive() || !seen.insert(a.id()).second) continue;
        out << a.primitive().name();
        for (const array& in : a.inputs()) { out << " <"; show(out, in); todo.push_back(in); }
        for (const array& made : a.outputs()) { out << " >"; show(out, made); seen.insert(made.id()); }
        out << '\n';
    }
    text = out.str();
    return text.c_str();
}
"""


@dataclass(frozen=True)
class Array:
    """An array of a graph."""

    id: str
    bytes: int
    shape: tuple[int, ...]

    @classmethod
    def read(cls, text: str) -> Array:
        name, rest = text.split(":")
        size, *shape = (int(number) for number in rest.split(","))
        return cls(name, size * math.prod(shape), tuple(shape))


@dataclass(frozen=True)
class Node:
    """A primitive of a graph."""

    kind: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


@cache
def _walk() -> ctypes.CDLL:
    folder = Path(mx.__file__).parent
    place = Path(tempfile.gettempdir()) / f"walk-{hashlib.sha256((WALK + mx.__version__).encode()).hexdigest()[:16]}"
    if not place.with_suffix(".so").exists():
        place.with_suffix(".cpp").write_text(WALK, encoding="utf-8")
        found = [f"-I{folder / 'include'}", f"-L{folder / 'lib'}", "-lmlx", f"-Wl,-rpath,{folder / 'lib'}"]
        command = [compiler() or "g++", "-std=c++20", "-O1", "-shared", "-fPIC", str(place.with_suffix(".cpp")), *found]
        subprocess.run([*command, "-o", str(place.with_suffix(".so"))], check=True)
    library = ctypes.CDLL(str(place.with_suffix(".so")))
    library.walk.restype = ctypes.c_char_p
    return library


def nodes(outputs: object) -> list[Node]:
    """All primitives that the arrays in `outputs`, a tree, are computed by; what is evaluated already has none."""
    arrays = [array for _, array in tree_flatten(outputs) if isinstance(array, mx.array)]
    pointers = (ctypes.c_void_p * len(arrays))(*(id(array) for array in arrays))
    found = []
    for line in _walk().walk(pointers, len(arrays)).decode().splitlines():
        kind, *rest = line.split()
        sides = (tuple(Array.read(part[1:]) for part in rest if part[0] == side) for side in "<>")
        found.append(Node(kind, *sides))
    return found


def traffic(outputs: object, given: Sequence[mx.array] = ()) -> dict[str, list[int]]:
    """Kind of kernel -> [kernels, bytes] of `outputs`. `given` are there already, though they are not evaluated."""
    of_given = {node.outputs[0].id for node in nodes(list(given))}
    graph = [node for node in nodes(outputs) if node.outputs[0].id not in of_given]
    made_by = {array.id: node for node in graph for array in node.outputs}
    found: dict[str, list[int]] = {}
    for node in graph:
        if node.kind not in VIEWS or _is_copied(node, made_by):
            kernels = found.setdefault("Compiled" if node.kind.startswith("Compiled") else node.kind, [0, 0])
            kernels[0] += len(node.inputs) if node.kind == "Concatenate" else 1
            kernels[1] += _bytes(node, made_by)
    return found


def _bytes(node: Node, made_by: dict[str, Node]) -> int:
    """What a kernel reads and writes."""
    written = sum(array.bytes for array in node.outputs)
    if node.kind in ("Gather", "GatherAxis"):  # as many elements of the first as there are in the output
        return 2 * written + sum(array.bytes for array in node.inputs[1:])
    if node.kind in ("Scatter", "ScatterAxis", "SliceUpdate", "DynamicSliceUpdate"):  # written into the first
        return 2 * sum(array.bytes for array in node.inputs[1:]) + node.inputs[-1].bytes * node.kind.startswith("Scatter")
    read: dict[str, tuple[int, int]] = {}  # base -> the bytes that all views of it read, and its own
    for array in node.inputs:
        for base, size, whole in _read(array, made_by, node.kind == "Sort"):
            before, _ = read.get(base, (0, 0))
            read[base] = before + size, whole
    return sum(min(sizes) for sizes in read.values()) + written


def _read(array: Array, made_by: dict[str, Node], all_of_it: bool = False) -> Iterator[tuple[str, int, int]]:
    """The arrays that a view is of, the bytes read of each and its own; `all_of_it`: of a stand-in, see `kernel_counts._node`."""
    node = made_by.get(array.id)
    if node is None or node.kind not in VIEWS or _is_copied(node, made_by):
        yield array.id, array.bytes, array.bytes
        return
    place = [made.id for made in node.outputs].index(array.id)
    one = {"Depends": place, "CustomTransforms": len(node.inputs) - len(node.outputs) + place}.get(node.kind, 0)
    for of in node.inputs if all_of_it and node.kind == "Depends" else (node.inputs[one],):
        for base, size, whole in _read(of, made_by):
            yield base, size if all_of_it else min(size, array.bytes), whole


def _is_copied(node: Node, made_by: dict[str, Node]) -> bool:
    """Whether a view has to be copied: axes are joined that are not in the order in which they lie in memory."""
    before = made_by.get(node.inputs[0].id) if node.inputs else None
    return node.kind in ("Reshape", "Flatten") and before is not None and before.kind == "Transpose" and _is_moved(before)


def _is_moved(transpose: Node) -> bool:
    """Whether elements lie elsewhere afterwards: more than one axis is longer than 1."""
    return sum(size > 1 for size in transpose.outputs[0].shape) > 1
