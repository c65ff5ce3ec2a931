"""What is lost by storing weights and moments in fewer bits, on a problem like fine-tuning: many small steps from good weights."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.optimizers import Optimizers

OUTPUTS, INPUTS, HIDDEN, ROWS = 32, 512, 4, 64
STEPS, RATE = 200, 3e-5


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight


@pytest.fixture(scope="module")
def problem():
    """Inputs of few directions, weights around 0.3, and targets of weights 0.004 away from them."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(HIDDEN, INPUTS))
    x = rng.normal(size=(ROWS, HIDDEN)) @ directions / np.sqrt(INPUTS)
    weight = mx.array(rng.normal(size=(OUTPUTS, INPUTS)) * 0.3).astype(mx.bfloat16)
    wanted = np.array(weight.astype(mx.float32)) + 0.004 * np.sign(rng.normal(size=(OUTPUTS, HIDDEN)) @ directions)
    return mx.array(x, dtype=mx.float32), weight, mx.array(x @ wanted.T, dtype=mx.float32)


def final_loss(problem, dtype, optimizer, **settings):
    """The loss after training as a share of that before."""
    x, weight, y = problem
    model = Linear(weight.astype(dtype))
    optimizers = Optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.0, **settings))
    loss = mx.value_and_grad(lambda w: ((x @ w.astype(mx.float32).T - y) ** 2).mean())
    first = loss(model.weight)[0].item()
    for _ in range(STEPS):
        optimizers.update(model, {"weight": loss(model.weight)[1]}, RATE)
    assert model.weight.dtype == dtype
    return loss(model.weight)[0].item() / first


def test_nearest_rounding_stands_still_where_stochastic_rounding_trains_as_float32_does(problem):
    exact = final_loss(problem, mx.float32, "adamw")
    assert exact < 0.02
    assert final_loss(problem, mx.bfloat16, "adamw", rounding="nearest") > 0.9
    assert final_loss(problem, mx.bfloat16, "adamw") < exact + 0.002


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_moments_of_8_bits_train_as_those_of_float32_do(problem, name, dtype):
    exact = final_loss(problem, mx.float32, name)
    assert abs(final_loss(problem, dtype, f"{name}8bit") - exact) < 0.02


def test_adafactor_trains_bfloat16_weights_as_float32_ones(problem):
    exact = final_loss(problem, mx.float32, "adafactor")
    assert exact < 0.02 and final_loss(problem, mx.bfloat16, "adafactor") < exact + 0.002
