"""The correction of a router: it changes which experts are chosen, and stays as it is whatever is trained, saved or cast."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.errors import ConfigError
from fulltune_nb.models.folder import load_decoder
from fulltune_nb.models.model_file import save_model_file
from fulltune_nb.models.parameters import buffers_of, parameters_of, select_trainable, trainable_of
from nbs_tests.models.parity import corrected

FAMILIES = {
    "glm4_moe": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 16},
}
NAMES = {
    "glm4_moe": "model.layers.1.mlp.gate.e_score_correction_bias",
    "ernie4_5_moe": "model.layers.1.mlp.moe_statics.e_score_correction_bias",
}
SETTINGS = {"iters": 4, "save_every": 2, "val_batches": 0, "learning_rate": 1e-2, "weight_decay": 0.5}


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def lm(family, make_lm):
    made = make_lm(model_type=family, **FAMILIES[family])
    corrected(made.model)
    return made


def corrections(model) -> dict[str, bytes]:
    """Name and dtype -> the bits."""
    arrays = parameters_of(model)
    return {f"{name} {arrays[name].dtype}": bytes(memoryview(arrays[name])) for name in buffers_of(model)}


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_it_has_the_same_bits_after_training_resuming_saving_and_loading(lm, make_data, tmp_path, backward, weights):
    before, router = corrections(lm.model), np.array(lm.model.layers[1].mlp.router.weight)
    assert len(before) == 1 and "float32" in next(iter(before))
    config = ft.TrainConfig(backward=backward, weights=weights, **SETTINGS)
    trainer = ft.Trainer(lm, make_data(config=config), config, run_dir=tmp_path / "run")
    for report in trainer.steps():
        if report.step == 3:
            break
    assert corrections(lm.model) == before
    assert not np.array_equal(np.array(lm.model.layers[1].mlp.router.weight.astype(mx.float32)), router)
    assert not any("correction" in name for name in trainer.optimizers.state_arrays())
    again = ft.Trainer.resume(tmp_path / "run", data=trainer.data)
    assert corrections(again.lm.model) == before
    again.run()
    assert corrections(again.lm.model) == before
    again.lm.save(tmp_path / "saved")
    for dtype in (None, "float32", "bfloat16"):
        assert corrections(load_decoder(tmp_path / "saved", dtype)) == before
    save_model_file(tmp_path / "weights.safetensors", again.lm)
    read = ft.load_model(tmp_path / "saved", model_file=tmp_path / "weights.safetensors")
    assert corrections(read.model) == before


def test_nothing_makes_it_trainable(lm, family):
    name = NAMES[family]
    for change in (lm.model.unfreeze, lambda: select_trainable(lm.model, [], []), lambda: select_trainable(lm.model, ["*"], [name])):
        change()
        assert parameters_of(lm.model).keys() - trainable_of(lm.model) == buffers_of(lm.model)
    with pytest.raises(ConfigError, match=f"train_only: '{name}' matches only tensors that are kept as they are, such as {name}"):
        select_trainable(lm.model, [name], [])


def test_it_changes_which_experts_are_chosen(lm):
    moe = lm.model.layers[1].mlp
    tokens = mx.random.normal((40, lm.config.hidden_size), key=mx.random.key(0))
    with_it = np.sort(np.array(moe.route(tokens).chosen))
    moe.correction.e_score_correction_bias = mx.zeros_like(moe.correction.e_score_correction_bias)
    assert np.mean(with_it != np.sort(np.array(moe.route(tokens).chosen))) > 0.2


def test_a_balance_loss_beside_sigmoids_is_refused_with_the_reason(make_lm, make_data):
    config = ft.TrainConfig(iters=1, router_aux_loss_coef=0.01)
    with pytest.raises(ConfigError, match="router_aux_loss_coef=0.01: the balance loss is of a softmax.*glm4_moe are scored by a sigmoid"):
        ft.Trainer(make_lm(model_type="glm4_moe", **FAMILIES["glm4_moe"]), make_data(config=config), config)
