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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from fulltune_nb.training.rules import Rule, Scalars, Shape, Slot, State, at_a_time

_compiled = partial(mx.compile, shapeless=True)

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 16
SMALL = 4096
"""Tensors of fewer elements keep their state in float32; so do vectors, and matrices whose rows have no fitting block."""

_SMALLEST_NORMAL = 1.1754944e-38  # 1 / x overflows below a quarter of it; such a block counts as zeros


def block_size(columns: int) -> int | None:
    """The largest divisor of a row's length that is at most 256; None where there is none of at least 16."""
    return next((size for size in range(min(LARGEST_BLOCK, columns), SMALLEST_BLOCK - 1, -1) if columns % size == 0), None)


class EightBit(Rule):
    """A rule that works by rows, with its state in 8 bits: `m` as a first moment, `v` as a second one."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.temporary_bytes = tuple(4 + own for own in rule.temporary_bytes)

    def slots(self, shape: Shape) -> dict[str, Slot]:
        own = self.rule.slots(shape)
        block = block_size(shape[-1]) if len(shape) >= 2 and math.prod(shape) >= SMALL else None
        if block is None:
            return own
        scales = {f"{name}_scale": Slot((*shape[:-1], shape[-1] // block)) for name in own}
        return {name: Slot(shape, mx.uint8) for name in own} | scales

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> Scalars:
        return self.rule.begin(step, learning_rate, weight_decay, gradient_scale)

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: Scalars) -> tuple[mx.array, State]:
        names = [name for name in state if not name.endswith("_scale")]
        if len(names) == len(state):
            return self.rule.apply(p, g, state, scalars)
        decoded = {name: _CODES[name].decode(state[name], state[f"{name}_scale"]) for name in names}
        p, decoded = self.rule.apply(p, g, decoded, scalars)
        new: State = {}
        for name in names:
            new[name], new[f"{name}_scale"] = _CODES[name].encode(decoded[name], state[f"{name}_scale"].shape)
        return p, new

    def update_bytes(self, shapes: Sequence[Shape], dtype: mx.Dtype, weight_decay: float) -> int:
        sizes = [math.prod(shape) for shape in shapes]
        scales = [sum(slot.nbytes for name, slot in self.slots(shape).items() if name.endswith("_scale")) for shape in shapes]
        most = max(kept / size for kept, size in zip(scales, sizes, strict=True))  # bytes of scales for an element
        # A block's old scale, its new one and the inverse of that, with one more on the way.
        return super().update_bytes(shapes, dtype, weight_decay) + int(4 * most * at_a_time(sizes))


class GpuEightBit(EightBit):
    """`EightBit` by few kernels: one for the parameter, and for each moment one for its numbers, one for the scales, one for the codes.

    The old codes are decoded in each kernel that needs them, which moves less than float32 numbers would.
    """

    def __init__(self, rule: Rule):
        super().__init__(rule)
        # Each moment, the absolute values of a first one, and new codes: the old ones are read by what a GPU may still have before it.
        moments = sum(9 if name == "m" else 5 for name in rule.slots((1,)))
        self.temporary_bytes = (moments - 2, moments + 4)  # bfloat16: the parameter too; two bytes are counted anyway
        self._parameter, self._moment = mx.compile(partial(_parameter, rule)), mx.compile(partial(_moment, rule))

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> Scalars:
        scalars = super().begin(step, learning_rate, weight_decay, gradient_scale)
        return {name: numbers for name, numbers in scalars.items() if name != "numbers"}  # a program is made for each value of those

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: Scalars) -> tuple[mx.array, State]:
        names = [name for name in state if not name.endswith("_scale")]
        if len(names) == len(state):
            return self.rule.apply(p, g, state, scalars)
        blocks = (state[f"{names[0]}_scale"].shape[-1], -1)
        codes = {name: mx.unflatten(state[name], -1, blocks) for name in names}
        scales = {name: state[f"{name}_scale"][..., None] for name in names}
        given = mx.unflatten(p, -1, blocks), mx.unflatten(g, -1, blocks), codes, scales, scalars
        p, new = self._parameter(*given), {}
        for name in names:
            moment, size = self._moment(name, *given)
            largest = mx.max(size, axis=-1, keepdims=True)
            new[name], new[f"{name}_scale"] = _GPU_ENCODE[name](moment, largest).flatten(-2), largest.squeeze(-1)
        return p.flatten(-2), new


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


# -- on a GPU: MLX makes one kernel of up to eleven operations in a row, which in shapeless functions count twice ------


def _decoded_step(rule: Rule, p: mx.array, g: mx.array, codes: State, scales: State, scalars: Scalars) -> tuple[mx.array, State]:
    """In blocks: scales (..., C / block, 1), the other arrays (..., C / block, block)."""
    return rule.apply(p, g, {name: _GPU_DECODE[name](codes[name], scales[name]) for name in codes}, scalars)


def _parameter(rule: Rule, *given: Any) -> mx.array:
    return _decoded_step(rule, *given)[0]


def _moment(rule: Rule, name: str, *given: Any) -> tuple[mx.array, mx.array]:
    """A moment and its absolute values, which a second one is itself: both by one kernel."""
    moment = _decoded_step(rule, *given)[1][name]
    return moment, mx.abs(moment) if name == "m" else moment


def _fourth_power_of_scale(codes: mx.array, scales: mx.array) -> mx.array:
    """`_fourth_power` times the scale with an operation less in a row, so that Adam's step has eleven."""
    squares = mx.square(codes.astype(mx.float32))
    return squares * (scales * (1.0 / 255.0**2)) * (squares * (1.0 / 255.0**2))


_GPU_DECODE = {"m": lambda codes, scales: _signed_square(codes) * scales, "v": _fourth_power_of_scale}
_GPU_ENCODE = {name: mx.compile(lambda x, largest, code=code: code.to_codes(x * _inverse(largest))) for name, code in _CODES.items()}
