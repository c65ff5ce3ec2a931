"""What an optimizer's state and its update take, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mlx.core as mx

from fulltune_nb.models.cpu_streams import cpu_streams
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.optimizer_groups import group_of, is_hidden_matrix, rules_of, slots_of
from fulltune_nb.training.pieces import piece_size
from fulltune_nb.training.update_rules import Shape


def predict_state_bytes(shapes: Mapping[str, Shape], config: TrainConfig) -> int:
    """Bytes the optimizer state will take, from module paths and shapes of the trained parameters alone."""
    groups = {name: group_of(name, shape, config, lambda path: path) for name, shape in shapes.items()}
    return sum(slot.nbytes for own in slots_of(shapes, groups, rules_of(config)).values() for slot in own.values())


def random_bits_bytes(shapes: Mapping[str, Shape], config: TrainConfig, dtype: mx.Dtype) -> int:
    """Bytes of the table that stochastic rounding keeps from its first use on; arguments as for `update_bytes`."""
    if dtype == mx.float32 or config.rounding == "nearest":
        return 0
    largest = max((_piece(shape, config) for shape in shapes.values()), default=1)
    return 4 << max(largest - 1, 1).bit_length()  # a power of two


def update_bytes(shapes: Mapping[str, Shape], config: TrainConfig, dtype: mx.Dtype = mx.float32) -> int:
    """Bytes that an update needs besides parameters, gradients and state, at most.

    None for float32 parameters and state. Else the new parameters of all pieces that are worked on at a time, in their own dtype,
    and some float32 arrays for a piece on each stream.

    Args:
        shapes: module path -> shape, of the parameters that are updated at a time.
        config: `optimizer` and its settings count.
        dtype: of the parameters.
    """
    size = sum(math.prod(shape) for shape in shapes.values())
    together = min(size, piece_size() * len(cpu_streams()))
    if config.optimizer == "muon":
        largest = max((math.prod(shape) for name, shape in shapes.items() if is_hidden_matrix(name, shape)), default=0)
        return 8 * min(size, max(largest, together))
    own = {dtype, *(slot.dtype for rule in rules_of(config).values() for shape in shapes.values() for slot in rule.slots(shape).values())}
    if own == {mx.float32} and all(rule.in_place(config.weight_decay) for rule in rules_of(config).values()):
        return 0
    streams = len(cpu_streams())
    in_work = sum(sorted((size for shape in shapes.values() for size in _pieces(shape, config, streams)), reverse=True)[:streams])
    return _RESULT_BYTES * together + _BYTES_AN_ELEMENT[config.optimizer][dtype != mx.float32] * min(in_work, together)


_RESULT_BYTES = 2
_BYTES_AN_ELEMENT = {
    "adamw": (16, 16), "adam": (20, 20), "sgd": (12, 12), "lion": (8, 8), "adafactor": (3, 9), "adamw8bit": (20, 18), "lion8bit": (12, 12),
}  # fmt: skip
"""Of a piece, for float32 and for bfloat16 parameters: arrays on the way to the new parameters and state, as measured."""


def _piece(shape: Shape, config: TrainConfig) -> int:
    """Elements of the tensor's largest piece."""
    return math.prod(shape) if config.optimizer == "muon" and len(shape) >= 2 else min(math.prod(shape), piece_size())


def _pieces(shape: Shape, config: TrainConfig, most: int) -> list[int]:
    """Elements of the tensor's pieces, so many of them at most."""
    size, piece = math.prod(shape), _piece(shape, config)
    return [min(piece, size - begin) for begin in range(0, size, piece)][:most]
