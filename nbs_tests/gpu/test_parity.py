"""A GPU computes what the CPU computes, and the same each time. Float32 products are float32's here: see MLX_ENABLE_TF32 in conftest.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from nbs_tests.training.promises import assert_a_resumed_run_has_the_same_bits, assert_nan_changes_nothing, weights_of
from nbs_tests.training.test_families_run import FAMILIES


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
    settings = {"weights": weights, "grad_accumulation_steps": 2, **settings}
    assert_a_resumed_run_has_the_same_bits(make_trainer, make_data, tmp_path / "run", **settings)


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
    assert_nan_changes_nothing(make_trainer(backward=backward, max_grad_norm=1.0, grad_accumulation_steps=2))
