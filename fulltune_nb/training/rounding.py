"""In which dtype weights are stored while they are trained, and how a float32 result is rounded to it.

A bfloat16 number has 8 bits: a change smaller than 1/512 of a weight is lost when the sum is rounded to the nearest one, and
most changes of fine-tuning are. Stochastic rounding goes up or down with the probability that makes the expectation exact, so
that small changes add up. Measured (200 steps of AdamW at 3e-5): float32 3.440, nearest 4.080, stochastic 3.440.

The random bits are a function of seed, step, tensor and the element's place in the tensor, and of nothing else: they are the same
in a run that was resumed, and however a tensor is cut into pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from fulltune_nb.cpu import on_cpu
from fulltune_nb.errors import TrainingError

NEAREST_WARNING = (
    "rounding='nearest' loses small updates of bfloat16 weights: 200 steps at a learning rate of 3e-5 ended at a loss of 4.080, with"
    " rounding='stochastic' at 3.440, as in float32. Use 'stochastic' unless the loss of updates is what you study."
)

_MODULUS = 2**32
# Counter-based generator: an odd multiple of the place (a Weyl sequence) plus the key, mixed by two rounds of shift, xor and
# multiplication (splitmix's scheme in 32 bits; constants of C. Wellons' hash prospector). mx.random.randint takes nine times the time.
_WEYL, _MIX1, _MIX2 = 0x9E3779B9, 0x21F0AAAD, 0x735A2D97
TABLE_SIZE = 2**21

_kept: list[mx.array] = []  # the multiples of the Weyl constant, as many as have been needed so far


def stored_dtype(weights: str, checkpoint: str) -> mx.Dtype:
    """The dtype of the weights during training.

    Args:
        weights: `TrainConfig.weights`.
        checkpoint: dtype the weights were loaded in, such as "bfloat16".

    Returns:
        bfloat16 or float32. With "auto" it is the checkpoint's own; float32 for float16, whose range is too small for training.
    """
    name = checkpoint if weights == "auto" else weights
    return mx.bfloat16 if name == "bfloat16" else mx.float32


def check_dtype(name: str, dtype: mx.Dtype) -> None:
    """Refuse to train a tensor stored in anything but bfloat16 and float32.

    Raises:
        TrainingError: another dtype.
    """
    if dtype not in (mx.bfloat16, mx.float32):
        raise TrainingError(
            f"{name} is {dtype}; weights can be trained in float32 or bfloat16. Convert the model first, for example with"
            " load_model(..., dtype='float32')."
        )


def rounding_key(seed: int, step: int, name: str) -> int:
    """A number of 32 bits from the run's seed, the step and the tensor's name."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


class Rounding(NamedTuple):
    """How the parameters are rounded in one step."""

    seed: int | None
    """Of the run; None rounds to nearest even."""
    step: int

    def round_all(
        self, arrays: Sequence[mx.array], places: Sequence[tuple[mx.Dtype, str, int]], streams: Sequence[mx.Stream]
    ) -> list[mx.array]:
        """Parameters, or pieces of them, in their own dtypes; lazy.

        Args:
            arrays: float32.
            places: for each its dtype, the tensor's name (a stack's parts' names), and where in the tensor its first element stands.
            streams: for each where it is computed.
        """
        found = []
        for x, (dtype, name, first), stream in zip(arrays, places, streams, strict=True):
            key = None
            if self.seed is not None and dtype != mx.float32:
                key, *others = (rounding_key(self.seed, self.step, part) for part in name.split(" "))
                key = [key, *others] if others else key
            with mx.stream(stream):
                found.append(round_to(x, dtype, key, first))
        return found


def round_to(x: mx.array, dtype: mx.Dtype, key: int | list[int] | None, first: int = 0) -> mx.array:
    """`x` in another dtype.

    Args:
        x: float32, or what is in `dtype` already and is returned as it is.
        dtype: float32 or bfloat16.
        key: for stochastic rounding (`rounding_key`), on a GPU one for each part of a stack; None rounds to nearest even.
        first: place of x's first element in the tensor that x is a piece of, counted in elements.

    Returns:
        An array of x's shape. Rounded stochastically, a number that bfloat16 can represent stays as it is, any other becomes one
        of its two neighbours, with the expectation x; inf stays inf and NaN stays NaN.
    """
    if x.dtype == dtype:
        return x
    if key is None or dtype != mx.bfloat16:
        return x.astype(dtype)
    if not on_cpu():
        return _rounded_by_one_kernel(x, key, first)
    offset = mx.array((key + first * _WEYL) % _MODULUS, dtype=mx.uint32)
    bits = x.astype(mx.float32).reshape(-1).view(mx.uint32)  # (n,): one trace for all shapes of this size
    return _carry(bits, _mixed(_multiples(x.size), offset)).view(mx.bfloat16).reshape(x.shape)


# Two functions, and not shapeless ones: up to a depth of 11 operations MLX makes one kernel of a function, and in shapeless ones
# each operation counts twice.
@mx.compile
def _mixed(table: mx.array, offset: mx.array) -> mx.array:
    """Random bits of 32 for each place (uint32)."""
    h = table + offset
    h = (h ^ (h >> 16)) * _MIX1
    return (h ^ (h >> 15)) * _MIX2


@mx.compile
def _carry(bits: mx.array, h: mx.array) -> mx.array:
    """Bits of float32 and random ones, of which the upper 16 count -> bits of bfloat16 (uint16)."""
    # A carry out of a NaN's low bits would change its sign and exponent; inf has no low bits.
    bits = mx.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, bits)
    return ((bits + (h >> 16)) >> 16).astype(mx.uint16)


def _rounded_by_one_kernel(x: mx.array, key: int | list[int], first: int) -> mx.array:
    """`round_to` on a GPU, with the same bits. It reads no random number: those of a row begin with the row's place."""
    columns = x.shape[-1]
    keys = np.array(key, dtype=np.uint64).reshape(-1, 1)  # (parts, 1)
    rows = np.arange(x.size // columns // len(keys), dtype=np.uint64)
    begins = ((keys + (first + columns * rows) * _WEYL) % _MODULUS).reshape(-1)  # (R,), exact: below 2**64
    bits = x.astype(mx.float32).reshape(-1, columns).view(mx.uint32)  # (R, C)
    rounded = _carry_at(bits, mx.array(begins.astype(np.uint32))[:, None], _multiples(columns))
    return rounded.view(mx.bfloat16).reshape(x.shape)


@mx.compile
def _carry_at(bits: mx.array, rows: mx.array, columns: mx.array) -> mx.array:
    return _carry(bits, _mixed(rows, columns))


def _multiples(size: int) -> mx.array:
    """0, 1, 2, ... times the Weyl constant (uint32); kept for pieces of the usual sizes."""
    if size > TABLE_SIZE:
        return mx.arange(size, dtype=mx.uint32) * _WEYL
    if not _kept or _kept[0].size < size:
        table = mx.arange(1 << max(size - 1, 1).bit_length(), dtype=mx.uint32) * _WEYL
        mx.eval(table)  # evaluated, it may be used in any thread and on any stream
        _kept[:] = [table]
    return _kept[0][:size]
