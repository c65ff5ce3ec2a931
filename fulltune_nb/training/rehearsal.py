"""Steps that are taken back: training a model for a while, and then everything as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from fulltune_nb.training.trainer import Trainer


@contextmanager
def rehearsal(trainer: Trainer) -> Iterator[None]:
    """Within the block the model's weights, the optimizer and MLX's random state may change; afterwards they are what they were.

    Nothing is copied: while somebody holds the old arrays, updates are made in new memory. So the block needs memory for a second
    set of weights and optimizer state. History, step count, schedule and data position belong to the trainer's own `step`, which
    is not for such a block.
    """
    model, optimizers = trainer.lm.model, trainer.optimizers
    weights = tree_flatten(model.parameters())
    state = optimizers.state_arrays()
    mx.eval([array for _, array in weights], list(state.values()))
    key = mx.random.state[0].tolist()
    observers, optimizers.observers = optimizers.observers, []
    try:
        yield
    finally:
        optimizers.observers = observers
        model.update(tree_unflatten(weights))
        optimizers.load_state_arrays(state)
        mx.random.seed((key[0] << 32) | key[1])
