from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from fulltune_nb.cpu import on_cpu
from fulltune_nb.errors import CheckpointError, ConfigError, TrainingError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.model_config import read_config
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.optimizers import Group, Optimizers, predict_state_bytes, update_bytes
from nbs_tests.memory_held import memory_held
from nbs_tests.models.model_cases import SMALL

NAMES = ("adamw", "adam", "sgd", "adafactor", "lion", "muon", "adamw8bit", "lion8bit")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(8, 12)
        self.input_norm = nn.RMSNorm(8)


class Model(nn.Module):
    """Named like a decoder: embedding, two blocks with a matrix, a bias and a norm each, and a head."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(20, 8)
        self.layers = [Block(), Block()]
        self.lm_head = nn.Linear(8, 20, bias=False)


def make_model(dtype=mx.float32):
    model = Model()
    rng = np.random.default_rng(0)
    model.update(tree_map(lambda p: mx.array(rng.normal(size=p.shape), dtype=mx.float32).astype(dtype), model.parameters()))
    mx.eval(model.parameters())
    return model


def make_gradients(model, step, scale=1.0):
    rng = np.random.default_rng(1 + step)
    return tree_map(lambda p: mx.array(rng.normal(size=p.shape) * scale, dtype=mx.float32), model.trainable_parameters())


def flat(tree):
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(tree)}


def assert_close(found, expected, tolerance=1e-6):
    assert found.keys() == expected.keys()
    for name in expected:
        error = np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error <= tolerance, (name, error)


def rate(step):
    return 1e-2 / (1 + step)


def train(model, config, steps=10, **kwargs):
    optimizers = Optimizers(model, config)
    for step in range(steps):
        optimizers.update(model, make_gradients(model, step), rate(step), **kwargs)
    return optimizers


def train_mlx(model, optimizer, steps=10):
    for step in range(steps):
        optimizer.learning_rate = rate(step)
        optimizer.update(model, make_gradients(model, step))
        mx.eval(model.parameters(), optimizer.state)


@pytest.mark.parametrize(
    "name, settings, theirs",
    [
        ("adamw", {}, lambda: mlx_optimizers.AdamW(0.0, weight_decay=0.0, bias_correction=True)),
        ("adamw", {"bias_correction": False}, lambda: mlx_optimizers.AdamW(0.0, weight_decay=0.0)),
        ("adam", {"betas": (0.8, 0.9), "eps": 1e-3}, lambda: mlx_optimizers.Adam(0.0, (0.8, 0.9), 1e-3, bias_correction=True)),
        ("sgd", {}, lambda: mlx_optimizers.SGD(0.0)),
        ("sgd", {"momentum": 0.9, "dampening": 0.3}, lambda: mlx_optimizers.SGD(0.0, 0.9, 0.0, 0.3)),
        ("sgd", {"momentum": 0.9, "nesterov": True}, lambda: mlx_optimizers.SGD(0.0, 0.9, nesterov=True)),
        ("lion", {"betas": (0.8, 0.9)}, lambda: mlx_optimizers.Lion(0.0, (0.8, 0.9))),
        ("adafactor", {}, lambda: mlx_optimizers.Adafactor(0.0, relative_step=False, scale_parameter=False)),
        ("adafactor", {"beta_1": 0.9, "scale_parameter": True}, lambda: mlx_optimizers.Adafactor(0.0, relative_step=False, beta_1=0.9)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ten_steps_equal_those_of_mlx(name, settings, theirs):
    ours, reference = make_model(), make_model()
    train(ours, TrainConfig(optimizer=name, optimizer_config=settings, weight_decay=0.0))
    train_mlx(reference, theirs())
    assert_close(flat(ours.parameters()), flat(reference.parameters()))


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("adamw", lambda decay: mlx_optimizers.AdamW(0.0, weight_decay=decay, bias_correction=True)),
        ("sgd", lambda decay: mlx_optimizers.SGD(0.0, weight_decay=decay)),
        ("lion", lambda decay: mlx_optimizers.Lion(0.0, weight_decay=decay)),
        ("adafactor", lambda decay: mlx_optimizers.Adafactor(0.0, weight_decay=decay, relative_step=False, scale_parameter=False)),
    ],
)
def test_matrices_have_weight_decay_and_norms_and_biases_have_none(name, theirs):
    ours, decayed, plain = make_model(), make_model(), make_model()
    train(ours, TrainConfig(optimizer=name, weight_decay=0.3))
    train_mlx(decayed, theirs(0.3))
    train_mlx(plain, theirs(0.0))
    with_decay, without = flat(decayed.parameters()), flat(plain.parameters())
    assert_close(flat(ours.parameters()), {k: (with_decay if v.ndim > 1 else without)[k] for k, v in without.items()})


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    ours, muon, adamw = make_model(), make_model(), make_model()
    train(ours, TrainConfig(optimizer="muon", weight_decay=0.0, optimizer_config={"momentum": 0.9, "betas": (0.8, 0.9)}))
    train_mlx(muon, mlx_optimizers.Muon(0.0, momentum=0.9, weight_decay=0.0))
    train_mlx(adamw, mlx_optimizers.AdamW(0.0, (0.8, 0.9), weight_decay=0.0, bias_correction=True))
    by_muon, by_adamw = flat(muon.parameters()), flat(adamw.parameters())
    matrices = {"layers.0.up_proj.weight", "layers.1.up_proj.weight"}
    assert_close(flat(ours.parameters()), {k: (by_muon if k in matrices else by_adamw)[k] for k in by_muon})


def test_muon_treats_a_stack_of_matrices_as_that_many_matrices():
    class Stack(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.experts = weights

    weights, gradients = mx.random.normal((3, 6, 4)), mx.random.normal((3, 6, 4))
    stack = Stack(weights)
    Optimizers(stack, config := TrainConfig(optimizer="muon")).update(stack, {"experts": gradients}, 0.1)
    for i in range(3):
        single = Stack(weights[i])
        Optimizers(single, config).update(single, {"experts": gradients[i]}, 0.1)
        np.testing.assert_allclose(np.array(stack.experts[i]), np.array(single.experts), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_parameters_are_updated_in_float32_and_rounded(name):
    ours, reference = make_model(mx.bfloat16), make_model(mx.bfloat16)
    optimizers = train(ours, config := TrainConfig(optimizer=name, weight_decay=0.1, rounding="nearest"), steps=3)
    exact = Optimizers(reference, config)
    for step in range(3):
        reference.set_dtype(mx.float32)
        exact.update(reference, make_gradients(reference, step), rate(step))
        reference.set_dtype(mx.bfloat16)
    assert all(p.dtype == mx.bfloat16 for _, p in tree_flatten(ours.parameters()))
    assert all(a.dtype == mx.float32 for n, a in optimizers.state_arrays().items() if n != "step")
    assert_close(flat(ours.parameters()), flat(reference.parameters()), tolerance=1e-3)


def test_learning_rate_factors_go_by_name_and_the_first_match_counts():
    model, reference = make_model(), make_model()
    before = flat(model.parameters())
    config = TrainConfig(optimizer="sgd", lr_factors={"*embed*": 0.0, "model.layers.0.*": 0.5, "layers.?.input_norm*": 2.0})
    model.config = SimpleNamespace(family="llama")
    optimizers = Optimizers(model, config)
    optimizers.update(model, make_gradients(model, 0), 0.1)
    train_plain = Optimizers(reference, TrainConfig(optimizer="sgd"))
    train_plain.update(reference, make_gradients(reference, 0), 0.1)
    after, plain = flat(model.parameters()), flat(reference.parameters())
    factors = {"embed_tokens.weight": 0.0, "lm_head.weight": 1.0, "layers.1.input_norm.weight": 2.0, "layers.1.up_proj.weight": 1.0}
    factors |= {f"layers.0.{name}": 0.5 for name in ("input_norm.weight", "up_proj.weight", "up_proj.bias")}
    for name, factor in factors.items():
        np.testing.assert_allclose(after[name] - before[name], factor * (plain[name] - before[name]), rtol=1e-4, atol=1e-6)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match="up_proj") as caught:
        Optimizers(make_model(), TrainConfig(lr_factors={"*upproj*": 0.5}))
    assert caught.value.setting == "lr_factors"


def test_patterns_match_the_familys_hugging_face_names_unless_told_otherwise():
    model = make_model()
    model.config = SimpleNamespace(family="llama")
    optimizers = Optimizers(model, TrainConfig(lr_factors={"model.embed_tokens.weight": 0.1}))
    assert optimizers.groups()[Group("adamw", 0.1, 0.01)] == ["embed_tokens.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_are_never_touched(name):
    model = make_model()
    model.layers[0].freeze()
    before = flat(model.parameters())
    optimizers = train(model, TrainConfig(optimizer=name, weight_decay=0.1), steps=2)
    after = flat(model.parameters())
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed == {key for key in before if not key.startswith("layers.0.")}
    assert not any(key.startswith("layers.0.") for key in optimizers.state_arrays())


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_scale_is_the_same_as_scaled_gradients(name):
    config = TrainConfig(optimizer=name, weight_decay=0.1)
    ours, reference = make_model(), make_model()
    scaled, plain = Optimizers(ours, config), Optimizers(reference, config)
    for step in range(3):
        scaled.update(ours, make_gradients(ours, step), 0.01, gradient_scale=0.25)
        plain.update(reference, make_gradients(reference, step, 0.25), 0.01)
    assert_close(flat(ours.parameters()), flat(reference.parameters()), tolerance=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_saved_state_goes_on_bit_for_bit(name, tmp_path):
    config = TrainConfig(optimizer=name, weight_decay=0.1)
    whole, first = make_model(), make_model()
    train(whole, config, steps=4)
    saved = train(first, config, steps=2).state_arrays()
    mx.save_safetensors(str(tmp_path / "state.safetensors"), saved)
    resumed = Optimizers(first, config)
    resumed.load_state_arrays(mx.load(str(tmp_path / "state.safetensors")))
    (tmp_path / "state.safetensors").unlink()
    assert resumed.step == 2
    for step in (2, 3):
        resumed.update(first, make_gradients(first, step), rate(step))
    for key, value in flat(whole.parameters()).items():
        np.testing.assert_array_equal(flat(first.parameters())[key], value)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    model = make_model()
    optimizers = train(model, TrainConfig(), steps=1)
    good = optimizers.state_arrays()
    key = "layers.0.up_proj.weight.m"
    wrong = [
        ({k: v for k, v in good.items() if k != key}, "missing layers.0.up_proj.weight.m"),
        ({**good, "other.m": good[key]}, "unexpected other.m"),
        ({**good, key: mx.zeros((3, 3))}, "expected mlx.core.float32"),
        ({**good, key: good[key].astype(mx.bfloat16)}, "bfloat16"),
        (Optimizers(model, TrainConfig(optimizer="sgd")).state_arrays(), "and 6 more"),
    ]
    for arrays, words in wrong:
        with pytest.raises(CheckpointError, match=words):
            optimizers.load_state_arrays(arrays)
    after = optimizers.state_arrays()
    assert optimizers.step == 1 and all(mx.array_equal(after[k], good[k]).item() for k in good)


def test_a_gradient_of_another_name_or_shape_is_refused_before_anything_changes():
    model = make_model()
    before = flat(model.parameters())
    optimizers = Optimizers(model, TrainConfig())
    gradients = make_gradients(model, 0)
    for wrong in ({**gradients, "other": mx.zeros((2,))}, {**gradients, "lm_head": {"weight": mx.zeros((2, 8))}}):
        with pytest.raises(TrainingError, match="other|lm_head"):
            optimizers.update(model, wrong, 0.1)
    assert optimizers.step == 0
    assert all(np.array_equal(before[k], v) for k, v in flat(model.parameters()).items())


def test_gradients_are_neither_changed_nor_kept():
    model = make_model()
    optimizers = Optimizers(model, TrainConfig())
    gradients = make_gradients(model, 0)
    before = flat(gradients)
    optimizers.update(model, gradients, 0.1)
    assert all(np.array_equal(before[k], v) for k, v in flat(gradients).items())


def test_arrays_held_by_others_keep_their_values():
    model = make_model()
    optimizers = train(model, TrainConfig(), steps=1)
    weight, state = model.lm_head.weight, optimizers.state_arrays()
    values, moments = np.array(weight), {k: np.array(v) for k, v in state.items()}
    optimizers.update(model, make_gradients(model, 1), 0.1)
    assert np.array_equal(np.array(weight), values) and not np.array_equal(np.array(model.lm_head.weight), values)
    assert all(np.array_equal(np.array(state[k]), v) for k, v in moments.items())


def big_model(rows=1024, columns=1024):
    model = nn.Sequential(*[nn.Linear(columns, rows, bias=False) for _ in range(4)])
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion"])
def test_an_update_needs_no_memory_of_its_own_but_lions_on_a_gpu_what_is_predicted(name):
    model = big_model()
    settings = {"momentum": 0.9} if name == "sgd" else {}
    optimizers = Optimizers(model, config := TrainConfig(optimizer=name, optimizer_config=settings))
    gradients = tree_map(mx.ones_like, model.parameters())
    mx.eval(gradients)
    for _ in range(2):  # the first time functions are traced
        before = memory_held()
        optimizers.update(model, gradients, 1e-3)
        mx.synchronize()
    tensor = 4 * 1024 * 1024
    predicted = update_bytes({name: array.shape for name, array in tree_flatten(model.parameters())}, config)
    assert predicted == 0 or (name == "lion" and not on_cpu())
    assert mx.get_peak_memory() - before < predicted + tensor / 4
    assert abs(mx.get_active_memory() - before) < tensor / 4


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_the_others_need_memory_for_a_part_of_the_model_only(name, monkeypatch):
    monkeypatch.setattr("fulltune_nb.training.rules.piece_size", lambda: 2**12)
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(80)])
    mx.eval(model.parameters())
    optimizers = Optimizers(model, TrainConfig(optimizer=name, optimizer_config={"ns_steps": 1} if name == "muon" else {}))
    gradients = tree_map(mx.ones_like, model.parameters())
    mx.eval(gradients)
    before = memory_held()
    optimizers.update(model, gradients, 1e-3)
    mx.synchronize()
    assert mx.get_peak_memory() - before < 80 * 4 * 256 * 256 / 3


@pytest.mark.parametrize("name", NAMES)
def test_the_predicted_state_is_the_real_one(name):
    model = make_model()
    model.layers[1].freeze()
    config = TrainConfig(optimizer=name)
    optimizers = Optimizers(model, config)
    shapes = {name: array.shape for name, array in tree_flatten(model.trainable_parameters())}
    assert predict_state_bytes(shapes, config) == optimizers.state_bytes
    assert optimizers.state_bytes == sum(a.nbytes for n, a in optimizers.state_arrays().items() if n != "step")


def test_groups_name_their_rule_factor_and_decay():
    config = TrainConfig(optimizer="muon", lr_factors={"embed*": 0.1})
    groups = Optimizers(make_model(), config).groups()
    assert groups[Group("adamw", 0.1, 0.01)] == ["embed_tokens.weight"]
    assert groups[Group("muon", 1.0, 0.01)] == ["layers.0.up_proj.weight", "layers.1.up_proj.weight"]
    assert len(groups[Group("adamw", 1.0, 0.0)]) == 4 and groups[Group("adamw", 1.0, 0.01)] == ["lm_head.weight"]


def test_a_norm_with_a_row_of_weights_for_each_head_is_a_norm():
    config = read_config({"model_type": "cohere", **SMALL, "use_qk_norm": True})
    groups = Optimizers(Decoder(config), TrainConfig(optimizer="muon", weight_decay=0.1)).groups()
    assert "layers.0.attention.q_norm.weight" in groups[Group("adamw", 1.0, 0.0)]


def test_it_shows_its_groups():
    optimizers = train(make_model(), TrainConfig(), steps=2)
    assert repr(optimizers) == "Optimizers(8 tensors in 2 groups, step 2)"
    assert "after 2 steps" in optimizers._repr_html_() and "adamw" in optimizers._repr_html_()


def test_an_update_of_lazy_gradients_equals_one_of_evaluated_ones():
    model, reference = make_model(), make_model()
    for m, evaluate in ((model, False), (reference, True)):
        optimizers = Optimizers(m, TrainConfig())
        gradients = tree_unflatten([(n, p * 2.0) for n, p in tree_flatten(m.parameters())])
        if evaluate:
            mx.eval(gradients)
        optimizers.update(m, gradients, 0.1)
    assert_close(flat(model.parameters()), flat(reference.parameters()), tolerance=0)
