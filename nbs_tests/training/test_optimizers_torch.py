"""Ten steps of AdamW, Adam and SGD against PyTorch's."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.optimizers import Optimizers

torch = pytest.importorskip("torch", reason="compared with the real torch.optim; CI has it")

SHAPES = {"weight": (16, 24), "bias": (24,)}


class Model(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight, self.bias = mx.array(values["weight"]), mx.array(values["bias"])


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "name, settings, torch_settings",
    [
        ("adamw", {}, {}),
        ("adamw", {"betas": (0.8, 0.95), "eps": 1e-4}, {"betas": (0.8, 0.95), "eps": 1e-4}),
        ("adam", {}, {}),
        ("sgd", {}, {}),
        ("sgd", {"momentum": 0.9}, {"momentum": 0.9}),
        ("sgd", {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
    ],
)
def test_ten_steps_equal_those_of_torch(name, settings, torch_settings, decay):
    make = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    values = draw(0)
    model = Model(values)
    parameters = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in values.items()}
    groups = [{"params": [parameters["weight"]], "weight_decay": decay}, {"params": [parameters["bias"]], "weight_decay": 0.0}]
    theirs = make(groups, lr=1.0, **torch_settings)
    ours = Optimizers(model, TrainConfig(optimizer=name, optimizer_config=settings, weight_decay=decay))
    for step in range(10):
        rate, gradients = 1e-2 / (1 + step), draw(1 + step)
        for group in theirs.param_groups:
            group["lr"] = rate
        for key, parameter in parameters.items():
            parameter.grad = torch.tensor(gradients[key])
        theirs.step()
        ours.update(model, {key: mx.array(value) for key, value in gradients.items()}, rate)
    for key, parameter in parameters.items():
        expected = parameter.detach().numpy()
        assert np.linalg.norm(np.array(model[key]) - expected) <= 1e-6 * np.linalg.norm(expected)
