"""Optimizer state in 8 bits: an average of gradients, or of their squares, as codes with a scale for each block.

A block is up to 256 neighbours in a row. Both codes are finer for small numbers than for large ones, because in one block there are
gradients of very different size:

- first moment: x = s d |d|, d = (code - 128) / 127, s the largest |x|. The smallest is s / 16129; with equal steps it would be
  s / 127, and much of a block would be 0.
- second moment: x = s (code / 255)^4, code at least 1. The square root of it divides the update, so that a code of 0 would make
  that of a weight with small gradients arbitrarily large; equal steps diverge.

Arithmetic is float32; only what is kept is rounded, to the nearest code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers

from fulltune_nb.cpu import num_streams, on_cpu

# -- pieces: Tensors in pieces of rows, so that what is computed on the way stays small, and where a model keeps 


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
    return 2**20 if on_cpu() else 2**24


def cut(start: int, stop: int, columns: int) -> Iterator[slice]:
    """The rows from `start` to `stop` in pieces of about `piece_size()` elements."""
    step = max(1, piece_size() // columns)
    for row in range(start, stop, step):
        yield slice(row, min(row + step, stop))


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are evaluated together: a piece for each stream, more where they are small or need no memory."""
    most = piece_size() * num_streams()
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


# -- update_rules: How one tensor is updated: the arithmetic of each optimizer as pure functions, and what it keeps bet

State = dict[str, mx.array]

_compiled = partial(mx.compile, shapeless=True)


def _scalar(value: float) -> mx.array:
    return mx.array(value, dtype=mx.float32)


@dataclass(frozen=True)
class Slot:
    """An array that is kept for a parameter between steps; it starts as zeros."""

    shape: Shape
    dtype: mx.Dtype = mx.float32

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.size


class UpdateRule(Protocol):
    """An optimizer, seen from one tensor. Rules hold no state; `begin` is called once a step."""

    by_rows: bool
    """Rows are updated independently of each other: `apply` may be called with some rows of p, g and every slot, and gives bit
    for bit what it gives for all at once. A row is what has one place on all axes but the last; slots have the same rows."""

    def in_place(self, weight_decay: float) -> bool:
        """Whether float32 parameters and state are updated with no memory besides their own."""

    def slots(self, shape: Shape) -> dict[str, Slot]:
        """Name -> array kept for a parameter of this shape."""

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> Any:
        """The scalars of a step, for all tensors with this learning rate and weight decay. `step` counts from 1."""

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: Any) -> tuple[mx.array, State]:
        """The parameter (float32, not rounded) and the state after the step; lazy."""


@_compiled
def _decayed_gradient(p: mx.array, g: mx.array, weight_decay: mx.array, scale: mx.array) -> mx.array:
    return g.astype(mx.float32) * scale + weight_decay * p.astype(mx.float32)


@_compiled
def _average(m: mx.array, g: mx.array, keep: mx.array, take: mx.array) -> mx.array:
    return keep * m + take * g.astype(mx.float32)


@_compiled
def _average_of_squares(v: mx.array, g: mx.array, keep: mx.array, take: mx.array, scale: mx.array) -> mx.array:
    g = g.astype(mx.float32) * scale
    return keep * v + take * (g * g)


@_compiled
def _adam_step(p, m, v, keep, rate, root, eps) -> mx.array:
    return keep * p.astype(mx.float32) - rate * m / (mx.sqrt(v) * root + eps)


@_compiled
def _descend(p: mx.array, g: mx.array, rate: mx.array) -> mx.array:
    return p.astype(mx.float32) - rate * g.astype(mx.float32)


@_compiled
def _descend_ahead(p, g, m, rate, rate_of_momentum) -> mx.array:
    return p.astype(mx.float32) - (rate * g.astype(mx.float32) + rate_of_momentum * m)


@_compiled
def _lion_step(p, g, m, keep, take, kept, rate) -> mx.array:
    return kept * p.astype(mx.float32) - rate * mx.sign(keep * m + take * g.astype(mx.float32))


# Updates themselves, before they are added and rounded; what `change` methods give.


@_compiled
def _adam_change(p, m, v, keep, rate, root, eps) -> mx.array:
    return (keep - 1.0) * p - rate * m / (mx.sqrt(v) * root + eps)


@_compiled
def _lion_change(p, g, m, keep, take, kept, rate) -> mx.array:
    return (kept - 1.0) * p - rate * mx.sign(keep * m + take * g.astype(mx.float32))


class Adam:
    """Adam (Kingma & Ba 2015), bias-corrected as in PyTorch; AdamW (Loshchilov & Hutter 2019) when `decoupled`.

    Not decoupled, weight decay is added to the gradient, as `torch.optim.Adam` does.
    """

    by_rows = True

    def __init__(self, settings: Mapping[str, Any], decoupled: bool):
        self.betas, self.eps, self.bias_correction = settings["betas"], settings["eps"], settings.get("bias_correction", True)
        self.decoupled = decoupled

    def in_place(self, weight_decay: float) -> bool:
        return self.decoupled or not weight_decay  # else the decayed gradient is an array of its own

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"m": Slot(shape), "v": Slot(shape)}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        b1, b2 = self.betas
        correction1, correction2 = (1.0 - b1**step, 1.0 - b2**step) if self.bias_correction else (1.0, 1.0)
        decay_now = weight_decay if self.decoupled else 0.0
        l2 = None if self.decoupled or not weight_decay else (_scalar(weight_decay), _scalar(gradient_scale))
        scale = 1.0 if l2 else gradient_scale  # the decayed gradient is scaled already
        m, v = (b1, (1.0 - b1) * scale), (b2, 1.0 - b2, scale)
        p = (1.0 - learning_rate * decay_now, learning_rate / correction1, 1.0 / math.sqrt(correction2), self.eps)
        lazily = {name: tuple(map(_scalar, values)) for name, values in (("m", m), ("v", v), ("p", p))}
        return {"l2": l2, **lazily, "native": None if l2 else (*m, *v, *p)}

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        if scalars["l2"]:
            g = _decayed_gradient(p, g, *scalars["l2"])
        m = _average(state["m"], g, *scalars["m"])
        v = _average_of_squares(state["v"], g, *scalars["v"])
        return _adam_step(p, m, v, *scalars["p"]), {"m": m, "v": v}

    def change(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> mx.array:
        """What `apply` adds to a float32 p, before any rounding; float32, lazy. Any rows of the tensors will do."""
        after = self.apply(p, g, state, scalars)[1]
        return _adam_change(p, after["m"], after["v"], *scalars["p"])


class SGD:
    """Stochastic gradient descent with momentum, dampening and Nesterov's look ahead, as `mlx.optimizers.SGD`."""

    by_rows = True

    def __init__(self, settings: Mapping[str, Any]):
        self.momentum, self.dampening, self.nesterov = settings["momentum"], settings["dampening"], settings["nesterov"]

    def in_place(self, weight_decay: float) -> bool:
        return not weight_decay

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"v": Slot(shape)} if self.momentum else {}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        l2 = (_scalar(weight_decay), _scalar(gradient_scale)) if weight_decay else None
        scale = 1.0 if l2 else gradient_scale
        return {
            "l2": l2,
            "v": (_scalar(self.momentum), _scalar((1.0 - self.dampening) * scale)),
            "plain": (_scalar(learning_rate * scale),),
            "momentum": (_scalar(learning_rate),),
            "nesterov": (_scalar(learning_rate * scale), _scalar(learning_rate * self.momentum)),
        }

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        if scalars["l2"]:
            g = _decayed_gradient(p, g, *scalars["l2"])
        if not self.momentum:
            return _descend(p, g, *scalars["plain"]), {}
        v = _average(state["v"], g, *scalars["v"])
        if self.nesterov:
            return _descend_ahead(p, g, v, *scalars["nesterov"]), {"v": v}
        return _descend(p, v, *scalars["momentum"]), {"v": v}

    def change(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> mx.array:
        """As `Adam.change`."""
        if scalars["l2"]:
            g, scalars = _decayed_gradient(p, g, *scalars["l2"]), {**scalars, "l2": None}
        return self.apply(mx.zeros_like(p), g, state, scalars)[0]  # apart from the decay, p is only added to


class Lion:
    """Lion (Chen et al. 2023): the sign of an average of gradients."""

    by_rows = True

    def __init__(self, settings: Mapping[str, Any]):
        self.betas = settings["betas"]

    def in_place(self, weight_decay: float) -> bool:
        return True

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"m": Slot(shape)}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        b1, b2 = self.betas
        return {
            "p": (
                _scalar(b1),
                _scalar((1.0 - b1) * gradient_scale),
                _scalar(1.0 - learning_rate * weight_decay),
                _scalar(learning_rate),
            ),
            "m": (_scalar(b2), _scalar((1.0 - b2) * gradient_scale)),
        }

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        return _lion_step(p, g, state["m"], *scalars["p"]), {"m": _average(state["m"], g, *scalars["m"])}

    def change(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> mx.array:
        """As `Adam.change`."""
        return _lion_change(p, g, state["m"], *scalars["p"])


class MlxRule:
    """An optimizer of `mlx.optimizers`, one tensor at a time, in float32.

    Args:
        optimizer: its `learning_rate`, `weight_decay` and step are set anew for every step.
        per_matrix: a stack of matrices (E, out, in) is treated as E parameters.
    """

    by_rows = False

    def __init__(self, optimizer: mlx.optimizers.Optimizer, per_matrix: bool = False):
        self.optimizer, self.per_matrix = optimizer, per_matrix

    def in_place(self, weight_decay: float) -> bool:
        return False

    def slots(self, shape: Shape) -> dict[str, Slot]:
        probe: State = {}
        self.optimizer.init_single(mx.zeros(shape, dtype=mx.float32), probe)  # lazy: nothing is allocated
        return {name: Slot(array.shape) for name, array in probe.items()}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        scalars = {"step": mx.array(step, dtype=mx.uint64), "learning_rate": _scalar(learning_rate)}
        return {"state": scalars, "weight_decay": weight_decay, "scale": None if gradient_scale == 1.0 else _scalar(gradient_scale)}

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        self.optimizer.state.update(scalars["state"])
        self.optimizer.weight_decay = scalars["weight_decay"]
        p, g = p.astype(mx.float32), g.astype(mx.float32)
        if scalars["scale"] is not None:
            g = g * scalars["scale"]
        if not (self.per_matrix and p.ndim > 2):
            state = dict(state)
            return self.optimizer.apply_single(g, p, state), state
        states = [{name: array[i] for name, array in state.items()} for i in range(p.shape[0])]
        p = mx.stack([self.optimizer.apply_single(g[i], p[i], states[i]) for i in range(p.shape[0])])
        return p, {name: mx.stack([one[name] for one in states]) for name in state}


# -- eight_bit: Optimizer state in 8 bits: an average of gradients, or of their squares, as codes with a scale for e

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 16
SMALL = 4096
"""Tensors of fewer elements keep their state in float32; so do vectors, and matrices whose rows have no fitting block."""

_SMALLEST_NORMAL = 1.1754944e-38  # 1 / x overflows below a quarter of it; such a block counts as zeros



def block_size(columns: int) -> int | None:
    """The largest divisor of a row's length that is at most 256; None where there is none of at least 16."""
    return next((size for size in range(min(LARGEST_BLOCK, columns), SMALLEST_BLOCK - 1, -1) if columns % size == 0), None)


class EightBit:
    """A rule that works by rows, with its state in 8 bits: `m` as a first moment, `v` as a second one."""

    by_rows = True

    def __init__(self, rule: UpdateRule):
        self.rule = rule

    def in_place(self, weight_decay: float) -> bool:
        return False

    def slots(self, shape: Shape) -> dict[str, Slot]:
        own = self.rule.slots(shape)
        block = block_size(shape[-1]) if len(shape) >= 2 and math.prod(shape) >= SMALL else None
        if block is None:
            return own
        scales = {f"{name}_scale": Slot((*shape[:-1], shape[-1] // block)) for name in own}
        return {name: Slot(shape, mx.uint8) for name in own} | scales

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> Any:
        return self.rule.begin(step, learning_rate, weight_decay, gradient_scale)

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: Any) -> tuple[mx.array, State]:
        names = [name for name in state if not name.endswith("_scale")]
        if len(names) == len(state):
            return self.rule.apply(p, g, state, scalars)
        decoded = {name: _CODES[name].decode(state[name], state[f"{name}_scale"]) for name in names}
        p, decoded = self.rule.apply(p, g, decoded, scalars)
        new: State = {}
        for name in names:
            new[name], new[f"{name}_scale"] = _CODES[name].encode(decoded[name], state[f"{name}_scale"].shape)
        return p, new


@dataclass(frozen=True)
class BlockCode:
    """Codes of 8 bits with a scale for each block, which is the largest size in it."""

    largest: Callable[[mx.array], mx.array]
    """(blocks, block) float32 -> (blocks,)"""
    to_codes: Callable[[mx.array], mx.array]
    """Values over their block's scale, float32 -> uint8."""
    from_codes: Callable[[mx.array], mx.array]
    """uint8 -> values over their block's scale, float32."""

    def decode(self, codes: mx.array, scales: mx.array) -> mx.array:
        """(..., C) uint8, (..., C / block) -> (..., C) float32."""
        return (self.from_codes(codes).reshape(scales.size, -1) * scales.reshape(-1, 1)).reshape(codes.shape)

    def encode(self, x: mx.array, scales: Shape) -> tuple[mx.array, mx.array]:
        """(..., C) float32 -> (..., C) uint8 and their scales (..., C / block)."""
        blocks = x.reshape(math.prod(scales), -1)  # (blocks, block)
        largest = self.largest(blocks)
        codes = self.to_codes(blocks * _inverse(largest)[:, None])
        return codes.reshape(x.shape), largest.reshape(scales)


@_compiled
def _inverse(largest: mx.array) -> mx.array:
    return mx.where(largest >= _SMALLEST_NORMAL, 1.0 / largest, 0.0)


@_compiled
def _signed_square(codes: mx.array) -> mx.array:
    d = codes.astype(mx.float32) * (1.0 / 127.0) - (128.0 / 127.0)
    return d * mx.abs(d)


@_compiled
def _signed_codes(x: mx.array) -> mx.array:
    return (mx.sign(x) * (127.0 * mx.sqrt(mx.abs(x))) + 128.5).astype(mx.uint8)  # astype cuts off: 1 to 255


@_compiled
def _fourth_power(codes: mx.array) -> mx.array:
    d = mx.square(codes.astype(mx.float32) * (1.0 / 255.0))
    return d * d


@_compiled
def _root_codes(x: mx.array) -> mx.array:
    return mx.maximum((255.0 * mx.sqrt(mx.sqrt(x)) + 0.5).astype(mx.uint8), 1)


SIGNED_CODE = BlockCode(lambda blocks: mx.maximum(mx.max(blocks, axis=-1), -mx.min(blocks, axis=-1)), _signed_codes, _signed_square)
"""Of a first moment."""
ROOT_CODE = BlockCode(lambda blocks: mx.max(blocks, axis=-1), _root_codes, _fourth_power)
"""Of a second moment: nothing is below 0."""
_CODES = {"m": SIGNED_CODE, "v": ROOT_CODE}
