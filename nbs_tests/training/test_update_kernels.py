"""The kernels of an update on a GPU, counted in its graph; and that these give what the CPU's give."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.training.optimizers import Optimizers, predict_state_bytes, update_bytes
from fulltune_nb.training.rounding import round_to
from nbs_tests.gpu_like import gpu_like
from nbs_tests.kernel_counts import as_on_gpu, kernels
from nbs_tests.memory_held import memory_held
from nbs_tests.training.test_update_tensors import gradients, make_model

DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
CASES = {
    "adamw": ("adamw", {}, 2, 2),
    "adam": ("adam", {}, 2, 2),
    "sgd": ("sgd", {}, 1, 1),
    "momentum": ("sgd", {"momentum": 0.9}, 2, 2),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}, 2, 2),
    "lion": ("lion", {}, 2, 2),
    "adamw8bit": ("adamw8bit", {}, 7, 3),
    "lion8bit": ("lion8bit", {}, 4, 2),
    "muon": ("muon", {}, 20, 2),
    "adafactor": ("adafactor", {}, 10, 4),
    "adafactor with all": ("adafactor", {"beta_1": 0.9, "scale_parameter": True}, 14, 7),
}
"""Optimizer, its own settings, and the kernels of a float32 matrix or stack, and of a vector; decay and clipping inside. Rounding to
bfloat16 is one more."""


def config_of(case):
    name, settings, *_ = CASES[case]
    return ft.TrainConfig(optimizer=name, optimizer_config=settings, weight_decay=0.1)


def train(case, dtype, steps=4):
    model = make_model(dtype)
    optimizers = Optimizers(model, config_of(case))
    for step in range(steps):
        optimizers.update(model, gradients(model, step), 0.01, 0.5)
    return model, optimizers


def arrays(model, optimizers):
    found = dict(tree_flatten(model.parameters())) | optimizers.state_arrays()
    return {name: np.array(array.astype(mx.float32)) for name, array in found.items()}


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_a_tensor_takes_few_kernels(case, dtype, monkeypatch):
    with as_on_gpu():
        model, optimizers = train(case, dtype, 0)
        mx.eval(model.parameters(), optimizers.state_arrays())
        found = gradients(model, 1)
        mx.eval(found)
        monkeypatch.setattr(mx, "async_eval", lambda *arrays: None)
        optimizers.update(model, found, 0.01, 0.5)
        state = [array for own in optimizers._state.values() for array in own.values()]
        counted = kernels(*(array for _, array in tree_flatten(model.parameters())), *state).total()
    matrix, vector = CASES[case][2:]
    matrices = sum(array.ndim > 1 and (case != "muon" or "embed" not in name) for name, array in found.items())
    assert counted == matrix * matrices + vector * (len(found) - matrices) + (dtype == mx.bfloat16) * len(found)


BY_ONE_KERNEL = [case for case, (name, *_) in CASES.items() if name in ("adamw", "adam", "sgd", "lion")]


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, mx.float32) for case in CASES), *((case, mx.bfloat16) for case in BY_ONE_KERNEL)], ids=str
)
def test_they_compute_what_a_cpu_computes(case, dtype):
    model, optimizers = train(case, dtype)
    expected = arrays(model, optimizers)
    with gpu_like():
        found = arrays(*train(case, dtype))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        # Sums are in another order, and a float32 number that differs in its last bit may be rounded to the other neighbour.
        within = 1e-5 if case in ("muon", "adafactor", "adafactor with all") else 1e-6
        within = 2e-3 if dtype == mx.bfloat16 else 1e-4 if optimizers.state_arrays().get(name, array).dtype == mx.uint8 else within
        assert np.linalg.norm(found[name] - array) <= within * np.linalg.norm(array), name


def test_state_of_a_cpu_is_taken_up_on_a_gpu_and_the_other_way_round():
    model, optimizers = train("adamw", mx.float32)
    with gpu_like():
        other = Optimizers(model, config_of("adamw"))
        other.load_state_arrays(optimizers.state_arrays())
        back = other.state_arrays()
    for name, array in optimizers.state_arrays().items():
        assert mx.array_equal(array, back[name]).item() and array.dtype == back[name].dtype, name
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    with gpu_like():
        assert other.state_bytes == optimizers.state_bytes == predict_state_bytes(shapes, config_of("adamw"))


@pytest.mark.parametrize("shape", [(7,), (5, 48), (3, 4, 6)])
def test_a_gpu_draws_the_random_bits_of_a_cpu(shape):
    x = mx.random.normal(shape, key=mx.random.key(0))
    expected = round_to(x, mx.bfloat16, 11, 96)
    with gpu_like():
        assert mx.array_equal(round_to(x, mx.bfloat16, 11, 96), expected).item()


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_an_update_on_a_gpu_writes_over_the_old_arrays_and_the_predicted_bytes_are_enough_besides(case, dtype):
    with gpu_like():
        model = nn.Sequential(nn.Embedding(1024, 1024), nn.Linear(1024, 2048, bias=False))
        model.set_dtype(dtype)
        optimizers, found = Optimizers(model, config_of(case)), {name: mx.ones_like(a) for name, a in tree_flatten(model.parameters())}
        mx.eval(model.parameters(), found)
        for _ in range(2):  # the first time functions are traced
            before = memory_held()
            optimizers.update(model, found, 1e-3)
            mx.eval(model.parameters(), optimizers.state_arrays())
        predicted = update_bytes({name: array.shape for name, array in found.items()}, config_of(case), dtype)
        assert mx.get_peak_memory() - before <= predicted + 2**16
        assert abs(mx.get_active_memory() - before) < 2**16
