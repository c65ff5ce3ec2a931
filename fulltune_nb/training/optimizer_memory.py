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


def update_bytes(shapes: Mapping[str, Shape], config: TrainConfig, dtype: mx.Dtype = mx.float32) -> int:
    """Bytes that an update needs besides parameters, gradients and state, at most.

    None for float32 parameters and state; else some float32 arrays for each of the pieces that are worked on at a time.

    Args:
        shapes: module path -> shape, of the parameters that are updated at a time.
        config: `optimizer` and its settings count.
        dtype: of the parameters.
    """
    size = sum(math.prod(shape) for shape in shapes.values())
    together = min(size, piece_size() * len(cpu_streams()))
    random_table = 0 if dtype == mx.float32 or config.rounding == "nearest" else 4 * min(size, 2 * piece_size())
    if config.optimizer == "muon":
        largest = max((math.prod(shape) for name, shape in shapes.items() if is_hidden_matrix(name, shape)), default=0)
        return 8 * min(size, max(largest, together)) + random_table
    own = {dtype, *(slot.dtype for rule in rules_of(config).values() for shape in shapes.values() for slot in rule.slots(shape).values())}
    if own == {mx.float32} and all(rule.in_place(config.weight_decay) for rule in rules_of(config).values()):
        return 0
    return _BYTES_AN_ELEMENT[config.optimizer] * together + random_table


_BYTES_AN_ELEMENT = {"adamw": 18, "adam": 22, "sgd": 14, "lion": 10, "adafactor": 12, "adamw8bit": 22, "lion8bit": 14}
"""Of a piece: float32 arrays on the way to the new parameters and state, as measured."""
