"""A GPU computes the same each time, and what is no number changes nothing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from nbs_tests.training.promises import assert_a_resumed_run_has_the_same_bits, assert_nan_changes_nothing

pytestmark = pytest.mark.skipif(not mx.is_available(mx.gpu), reason="MLX finds no GPU here")


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
