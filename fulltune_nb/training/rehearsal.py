"""Steps that are taken back: training a model for a while, and then everything as it was, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from fulltune_nb.training.gradients import StepResult, take_step
from fulltune_nb.training.state import random_state, set_random_state
from fulltune_nb.training.trainer import Trainer

Step = Callable[[float], StepResult]


@contextmanager
def rehearsal(trainer: Trainer) -> Iterator[Step]:
    """A function that takes the next step with a learning rate; after the block all is as it was.

    The steps are the trainer's own, with its data, its optimizer and its way to get gradients, but they are in no history and move no
    schedule. Nothing is copied: while somebody holds the old arrays, updates are made in new memory. So the block needs memory
    for a second set of weights and optimizer state.
    """
    model, optimizers = trainer.lm.model, trainer.optimizers
    weights = tree_flatten(model.parameters())
    state = optimizers.state_arrays()
    mx.eval([array for _, array in weights], list(state.values()))
    key = random_state()
    observers, optimizers.observers = optimizers.observers, []
    taken = 0

    def step(learning_rate: float) -> StepResult:
        nonlocal taken
        number, taken = trainer.step_count + taken, taken + 1
        limit = trainer.config.max_grad_norm
        return take_step(model, trainer.engine, optimizers, number + 1, trainer.batches.of_step(number), learning_rate, limit)

    try:
        yield step
    finally:
        optimizers.end_step()  # one that failed on the way
        optimizers.observers = observers
        model.update(tree_unflatten(weights))
        optimizers.load_state_arrays(state)
        set_random_state(key)
