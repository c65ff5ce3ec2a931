"""What holds of a trainer on every device, for tests on a GPU and for those that believe in one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.errors import NonFiniteError
from fulltune_nb.models.parameters import parameters_of


def weights_of(trainer):
    """Module path -> weights in float32."""
    return {name: np.array(array.astype(mx.float32)) for name, array in parameters_of(trainer.lm.model).items()}


def assert_a_resumed_run_has_the_same_bits(make_trainer, make_data, run_dir, **settings):
    """A run of ten steps that saves every third and ends after five goes on from the third as one that was not broken off."""
    settings = {"save_every": 3, **settings}
    straight, stopped = make_trainer(**settings), make_trainer(run_dir=run_dir, **settings)
    straight.run()
    stopped.run(5)
    resumed = ft.Trainer.resume(run_dir, data=make_data(10, config=stopped.config))
    assert resumed.step_count == 3
    resumed.run()
    assert [report.loss for report in resumed.history.steps] == [report.loss for report in straight.history.steps]
    ours, theirs = weights_of(resumed), weights_of(straight)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def assert_nan_changes_nothing(trainer):
    """A step whose loss is NaN, after one that was taken, leaves weights, state and count as they were."""
    trainer.step()
    trainer.lm.model.norm.weight = trainer.lm.model.norm.weight * np.nan
    before, state = weights_of(trainer), {name: np.array(array) for name, array in trainer.optimizers.state_arrays().items()}
    with pytest.raises(NonFiniteError, match="nothing was updated"):
        trainer.step()
    assert all(np.array_equal(array, before[name], equal_nan=True) for name, array in weights_of(trainer).items())
    assert all(np.array_equal(array, state[name]) for name, array in trainer.optimizers.state_arrays().items())
    assert trainer.step_count == 1
