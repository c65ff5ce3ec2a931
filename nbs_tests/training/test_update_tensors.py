"""Updates of some tensors, or of some rows of one, against the update of all at once."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from fulltune_nb.cpu import on_cpu
from fulltune_nb.errors import TrainingError
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.optimizers import Optimizers, update_bytes
from nbs_tests.memory_held import memory_held

BY_ROWS = ("adamw", "adam", "sgd", "lion", "adamw8bit", "lion8bit")
OF_WHOLE_TENSORS = ("adamw", "adam", "sgd", "lion")
"""On a GPU these need what test_update_kernels.py asserts."""
STEPS = 3


class Model(nn.Module):
    """An embedding, a stack of experts, a matrix with a bias, a norm."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(300, 64)
        self.layers = [{"experts": mx.zeros((3, 48, 64)), "up_proj": nn.Linear(64, 96)}]
        self.norm = nn.RMSNorm(64)


def make_model(dtype):
    model, rng = Model(), np.random.default_rng(0)
    model.update(tree_map(lambda p: mx.array(rng.normal(size=p.shape), dtype=dtype), model.parameters()))
    mx.eval(model.parameters())
    return model


def gradients(model, step):
    rng = np.random.default_rng(1 + step)
    return dict(tree_flatten(tree_map(lambda p: mx.array(rng.normal(size=p.shape), dtype=mx.float32), model.parameters())))


def config_of(name, **settings):
    momentum = {"momentum": 0.9} if name == "sgd" else {}
    return TrainConfig(optimizer=name, optimizer_config=momentum, weight_decay=0.1, **settings)


def everything(model, optimizers):
    arrays = dict(tree_flatten(model.parameters())) | optimizers.state_arrays()
    mx.eval(arrays)
    return arrays


def assert_identical(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and mx.array_equal(found[name], expected[name]).item(), name


def train_at_once(dtype, config):
    model = make_model(dtype)
    optimizers = Optimizers(model, config)
    for step in range(STEPS):
        optimizers.update(model, gradients(model, step), 0.01, 0.5)
    return everything(model, optimizers)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", BY_ROWS)
def test_tensor_by_tensor_and_row_by_row_is_the_same_bit_for_bit(name, dtype):
    model = make_model(dtype)
    optimizers = Optimizers(model, config := config_of(name))
    for step in range(STEPS):
        flat = gradients(model, step)
        embedding, experts = flat.pop("embed_tokens.weight"), flat.pop("layers.0.experts")
        optimizers.begin_step(0.01, 0.5)
        for start, stop in ((128, 300), (0, 1), (1, 128)):
            optimizers.update_tensors(model, {"embed_tokens.weight": embedding[start:stop]}, rows=slice(start, stop))
        for expert in range(3):
            optimizers.update_tensors(model, {"layers.0.experts": experts[expert : expert + 1]}, rows=slice(expert, expert + 1))
        for tensor, gradient in reversed(flat.items()):
            optimizers.update_tensors(model, {tensor: gradient})
        optimizers.end_step()
    assert_identical(everything(model, optimizers), train_at_once(dtype, config))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", BY_ROWS)
def test_the_size_of_the_pieces_changes_nothing(name, dtype, monkeypatch):
    expected = train_at_once(dtype, config := config_of(name))
    for size in (1, 1000, 5000):
        monkeypatch.setattr("fulltune_nb.training.rules.piece_size", lambda size=size: size)
        assert_identical(train_at_once(dtype, config), expected)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*BY_ROWS, "adafactor"])
def test_weights_and_state_stay_in_their_memory_and_the_predicted_bytes_are_enough_besides(name, dtype, monkeypatch):
    monkeypatch.setattr("fulltune_nb.training.rules.piece_size", lambda: 2**16)
    model = nn.Sequential(nn.Embedding(4096, 1024), nn.Linear(1024, 2048, bias=False))
    model.layers[1].weight = model.layers[1].weight.reshape(4, 512, 1024)  # a stack
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    optimizers = Optimizers(model, config := config_of(name))
    found = tree_map(mx.ones_like, model.parameters())
    mx.eval(found)
    for _ in range(2):  # the first time functions are traced and the random numbers' table is made
        before = memory_held()
        optimizers.update(model, found, 1e-3)
        mx.synchronize()
    used = mx.get_peak_memory() - before
    predicted = update_bytes({name: array.shape for name, array in tree_flatten(model.parameters())}, config, dtype)
    # On a GPU the rounding begins at a number of each row.
    assert used <= predicted + (2**14 if on_cpu() else 2**16) and used >= predicted / 3
    if on_cpu() or name not in OF_WHOLE_TENSORS:
        assert predicted < dtype.size * 2048 * 1024  # less than one of the tensors
    assert mx.get_active_memory() == before


def rows_of(array, *cuts):
    return [(slice(a, b), array[a:b]) for a, b in zip((0, *cuts), (*cuts, array.shape[0]), strict=True)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"clip_threshold": None}, {"beta_1": 0.9, "scale_parameter": True, "clip_threshold": 0.5}])
def test_adafactor_by_rows_is_adafactor_of_the_whole(settings, dtype):
    config = TrainConfig(optimizer="adafactor", optimizer_config=settings, weight_decay=0.1, rounding="nearest")
    model, reference = make_model(dtype), make_model(dtype)
    optimizers, whole = Optimizers(model, config), Optimizers(reference, config)
    name, experts = "embed_tokens.weight", "layers.0.experts"
    assert optimizers.passes(name) == (1 if settings.get("clip_threshold", 1) is None else 2) and optimizers.passes("norm.weight") == 0
    for step in range(STEPS):
        flat = gradients(model, step)
        whole.update(reference, flat, 0.01, 0.5)
        optimizers.begin_step(0.01, 0.5)
        for _ in range(optimizers.passes(name)):
            for rows, part in reversed(rows_of(flat[name], 1, 100)):
                optimizers.observe(model, {name: part}, rows)
        for rows, part in rows_of(flat.pop(name), 200):
            optimizers.update_tensors(model, {name: part}, rows)
        for rows, part in rows_of(flat.pop(experts), 1, 2):
            optimizers.update_tensors(model, {experts: part}, rows)
        optimizers.update_tensors(model, flat)
        optimizers.end_step()
    found, expected = everything(model, optimizers), everything(reference, whole)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        difference = mx.linalg.norm((found[key] - array).astype(mx.float32)) / mx.linalg.norm(array.astype(mx.float32))
        assert difference.item() < (1e-6 if array.dtype == mx.float32 else 1e-4), key  # in bfloat16 a tie may fall the other way


def test_adafactor_treats_experts_of_a_stack_as_parameters_of_their_own():
    class Experts(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.experts = weights

    weights, found = mx.random.normal((3, 6, 4), key=mx.random.key(0)), mx.random.normal((3, 6, 4), key=mx.random.key(1))
    stack = Experts(weights)
    Optimizers(stack, config := TrainConfig(optimizer="adafactor")).update(stack, {"experts": found}, 0.1)
    for i in range(3):
        single = Experts(weights[i])
        Optimizers(single, config).update(single, {"experts": found[i]}, 0.1)
        np.testing.assert_allclose(np.array(stack.experts[i]), np.array(single.experts), rtol=1e-6)


def test_adafactor_refuses_rows_before_it_has_seen_all_and_rows_that_come_twice():
    model = make_model(mx.float32)
    optimizers = Optimizers(model, TrainConfig(optimizer="adafactor"))
    name, part = "embed_tokens.weight", mx.ones((100, 64))
    optimizers.begin_step(0.1)
    before = mx.array(model.embed_tokens.weight)
    for _ in range(2):
        with pytest.raises(TrainingError, match="observe"):
            optimizers.update_tensors(model, {name: part}, rows=slice(0, 100))
        for start in (0, 100, 200):
            optimizers.observe(model, {name: part}, rows=slice(start, start + 100))
    optimizers.update_tensors(model, {name: part}, rows=slice(0, 100))
    assert not mx.array_equal(model.embed_tokens.weight[:100], before[:100]).item()
    assert mx.array_equal(model.embed_tokens.weight[100:], before[100:]).item()
    optimizers.begin_step(0.1)
    optimizers.observe(model, {name: mx.ones((250, 64))}, rows=slice(0, 250))
    with pytest.raises(TrainingError, match="each must come once"):
        optimizers.observe(model, {name: part}, rows=slice(200, 300))


def test_a_resumed_run_rounds_as_the_one_that_was_never_stopped():
    whole = train_at_once(mx.bfloat16, config := config_of("adamw"))
    model = make_model(mx.bfloat16)
    optimizers = Optimizers(model, config)
    for step in range(STEPS):
        mx.random.seed(step)  # nothing may hang on the global state
        saved = optimizers.state_arrays()
        optimizers = Optimizers(model, config)
        optimizers.load_state_arrays(saved)
        optimizers.update(model, gradients(model, step), 0.01, 0.5)
    assert_identical(everything(model, optimizers), whole)
    other = train_at_once(mx.bfloat16, config.replace(seed=1))
    assert not mx.array_equal(other["embed_tokens.weight"], whole["embed_tokens.weight"]).item()


def test_what_cannot_be_updated_is_refused_and_nothing_changes():
    model = make_model(mx.float32)
    flat = gradients(model, 0)
    optimizers = Optimizers(model, config_of("adamw"))
    with pytest.raises(TrainingError, match="begin_step"):
        optimizers.update_tensors(model, flat)
    optimizers.begin_step(0.1)
    before = everything(model, optimizers)
    for name, rows, words in (
        ("embed_tokens.weight", slice(0, 10), r"expected the shape \(10, 64\), got \(300, 64\)"),
        ("embed_tokens.weight", slice(299, 301), "within 0 and 300"),
        ("embed_tokens.weight", slice(None, 10), r"slice\(start, stop\)"),
        ("norm.weight", slice(0, 64), "whole gradient"),
        ("other", slice(0, 10), "trainable at the start"),
    ):
        with pytest.raises(TrainingError, match=words):
            optimizers.update_tensors(model, {name: flat.get(name, mx.zeros((10, 64)))}, rows=rows)
    assert_identical(everything(model, optimizers), before)


def test_muon_takes_whole_matrices_only():
    model = make_model(mx.float32)
    optimizers = Optimizers(model, TrainConfig(optimizer="muon"))
    optimizers.begin_step(0.1)
    optimizers.update_tensors(model, {"embed_tokens.weight": mx.ones((2, 64))}, rows=slice(4, 6))  # AdamW's
    with pytest.raises(TrainingError, match="muon updates this tensor as a whole"):
        optimizers.update_tensors(model, {"layers.0.experts": mx.ones((1, 48, 64))}, rows=slice(0, 1))
