"""Updates of some tensors, or of some rows of one, against the update of all at once."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from fulltune_nb.errors import TrainingError
from fulltune_nb.models.cpu_streams import cpu_streams
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.optimizers import Optimizers

BY_ROWS = ("adamw", "adam", "sgd", "lion")
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
        monkeypatch.setattr("fulltune_nb.training.pieces.piece_size", lambda size=size: size)
        monkeypatch.setattr("fulltune_nb.training.optimizers.piece_size", lambda size=size: size)
        assert_identical(train_at_once(dtype, config), expected)


@pytest.mark.parametrize("name", BY_ROWS)
def test_bfloat16_weights_stay_in_their_memory_and_little_is_needed_besides(name, monkeypatch):
    for module in ("pieces", "optimizers"):
        monkeypatch.setattr(f"fulltune_nb.training.{module}.piece_size", lambda: 2**16)
    model = nn.Sequential(nn.Embedding(4096, 1024), nn.Linear(1024, 2048, bias=False))
    model.layers[1].weight = model.layers[1].weight.reshape(4, 512, 1024)  # a stack
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    optimizers = Optimizers(model, config_of(name))
    found = tree_map(mx.ones_like, model.parameters())
    mx.eval(found)
    for _ in range(2):  # the first time functions are traced and the random numbers' table is made
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        optimizers.update(model, found, 1e-3)
    assert mx.get_peak_memory() - before < 24 * 2**16 * len(cpu_streams()) <= 4 * 2048 * 1024
    assert mx.get_active_memory() == before


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
