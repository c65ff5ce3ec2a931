"""A GPU computes what the CPU computes, and the same each time. Float32 products are float32's here: see MLX_ENABLE_TF32 in conftest.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.errors import NonFiniteError
from fulltune_nb.models.parameters import parameters_of
from nbs_tests.training.test_families_run import FAMILIES


def weights_of(trainer):
    return {name: np.array(array.astype(mx.float32)) for name, array in parameters_of(trainer.lm.model).items()}


def assert_near(found, expected, most):
    for name, reference in expected.items():
        assert np.linalg.norm(found[name] - reference) <= most * np.linalg.norm(reference) + 1e-7, name


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
@pytest.mark.parametrize("family", ["llama", "mistral", *FAMILIES])
def test_every_family_is_trained_and_answers_as_on_the_cpu(make_lm, make_data, on_the_cpu, family, backward):
    def trained():
        lm = make_lm(model_type=family, **FAMILIES.get(family, {"sliding_window": 6} if family == "mistral" else {}))
        config = ft.TrainConfig(iters=20, batch_size=2, learning_rate=1e-4, max_grad_norm=1.0, packing=True, backward=backward)
        trainer = ft.Trainer(lm, make_data(40, config=config), config)
        trainer.run()
        return trainer, lm.generate("the quick", max_tokens=12)

    with on_the_cpu():
        expected, answer = trained()
    found, own_answer = trained()
    for ours, reference in zip(found.history.steps, expected.history.steps, strict=True):
        assert ours.loss == pytest.approx(reference.loss, rel=1e-6) and ours.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
    assert_near(weights_of(found), weights_of(expected), 1e-5)
    assert own_answer == answer


@pytest.mark.parametrize("settings", [{}, {"backward": "layerwise"}, {"grad_checkpoint": True}, {"optimizer": "adamw8bit"}], ids=str)
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_run_taken_up_again_goes_on_to_the_same_bits(make_trainer, make_data, tmp_path, weights, settings):
    settings = {"weights": weights, "save_every": 3, "grad_accumulation_steps": 2, **settings}
    straight, stopped = make_trainer(**settings), make_trainer(run_dir=tmp_path / "run", **settings)
    straight.run()
    stopped.run(5)
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, config=stopped.config))
    assert resumed.step_count == 3
    resumed.run()
    assert [report.loss for report in resumed.history.steps] == [report.loss for report in straight.history.steps]
    ours, theirs = weights_of(resumed), weights_of(straight)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_steps_gradients_are_the_same_bits_each_time(make_trainer, weights):
    trainer = make_trainer(weights=weights, rows=32, batch_size=32)
    batches, first = trainer.batches.of_step(0), None
    for _ in range(20):
        (piece,) = trainer.engine.gradients(1, batches).pieces()
        found = {name: np.array(array.astype(mx.float32)) for name, array in piece.gradients.items()}
        first = first or found
        assert all(np.array_equal(array, first[name]) for name, array in found.items())


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_a_loss_that_is_no_number_leaves_everything_as_it_was(make_trainer, backward):
    trainer = make_trainer(backward=backward, max_grad_norm=1.0, grad_accumulation_steps=2)
    trainer.step()
    trainer.lm.model.norm.weight = trainer.lm.model.norm.weight * np.nan
    before, state = weights_of(trainer), {name: np.array(array) for name, array in trainer.optimizers.state_arrays().items()}
    with pytest.raises(NonFiniteError, match="nothing was updated"):
        trainer.step()
    assert all(np.array_equal(array, before[name], equal_nan=True) for name, array in weights_of(trainer).items())
    assert all(np.array_equal(array, state[name]) for name, array in trainer.optimizers.state_arrays().items())
