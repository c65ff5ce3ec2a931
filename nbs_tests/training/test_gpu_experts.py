"""A mixture of experts on a GPU: the routing stays there, a step is compiled, and gives what it does on a CPU. MLX computes on the CPU."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.models import experts
from fulltune_nb.models.parameters import parameters_of
from nbs_tests.gpu_like import gpu_like
from nbs_tests.models.parity import relative_error
from nbs_tests.training.test_families_run import FAMILIES

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture
def trained(make_lm, make_data):
    """`trained(**settings)`: a trainer after its run."""

    def run(shape=MIXTRAL, **settings) -> ft.Trainer:
        config = ft.TrainConfig(**{"iters": 3, "learning_rate": 1e-4, "max_grad_norm": 1.0, **settings})
        trainer = ft.Trainer(make_lm(**shape), make_data(config=config), config)
        trainer.run()
        return trainer

    return run


@pytest.mark.skipif(shutil.which("g++") is None, reason="under this emulation MLX compiles for the CPU, with g++")
@pytest.mark.parametrize("settings", [{}, {"grad_checkpoint": True}, {"router_aux_loss_coef": 0.1, "grad_accumulation_steps": 2}], ids=str)
def test_a_compiled_step_is_that_of_a_cpu(trained, settings):
    expected = trained(compile=False, **settings)
    with gpu_like():
        found = trained(compile=True, **settings)
    for ours, reference in zip(found.history.steps, expected.history.steps, strict=True):
        assert ours.loss == pytest.approx(reference.loss, rel=1e-6) and ours.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
    reference = parameters_of(expected.lm.model)
    for name, array in parameters_of(found.lm.model).items():
        assert relative_error(np.array(array), np.array(reference[name])) < 1e-5, name


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
@pytest.mark.parametrize("family", ["qwen2_moe", "glm4_moe", "ernie4_5_moe", "granitemoe", "gpt_oss"])
def test_in_bfloat16_it_learns_as_on_a_cpu(trained, family, backward):
    shape = {"model_type": family, **FAMILIES[family]}
    settings = {"backward": backward, "weights": "bfloat16", "compile": False, "iters": 4, "learning_rate": 1e-3}
    expected = trained(shape, **settings)
    with gpu_like():
        found = trained(shape, **settings)
    for ours, reference in zip(found.history.steps, expected.history.steps, strict=True):
        assert ours.loss == pytest.approx(reference.loss, rel=5e-3)


def test_nobody_reads_where_tokens_go(trained, monkeypatch):
    def read(*_):
        raise AssertionError("the routing was read")

    monkeypatch.setattr(experts.MixtureOfExperts, "route", read)
    with gpu_like():
        trainer = trained(compile=False, router_aux_loss_coef=0.1)
        monkeypatch.setattr(mx, "eval", read)
        trainer.step()


def test_an_expert_that_no_token_goes_to_has_gradients_of_zero_and_one_that_is_frozen_none(make_lm, make_data):
    lm = make_lm(**MIXTRAL)
    router = lm.model.layers[0].mlp.router
    router.weight = mx.zeros_like(router.weight)  # all alike: the same two of four are chosen for all tokens
    lm.model.layers[0].mlp.experts[1].freeze()
    with gpu_like():
        config = ft.TrainConfig(iters=1, compile=False, freeze=["model.layers.0.block_sparse_moe.experts.1.*"])
        trainer = ft.Trainer(lm, make_data(config=config), config)
        (piece,) = trainer.engine.gradients(1, trainer.batches.of_step(0)).pieces()
    norms = [float(mx.linalg.norm(piece.gradients.get(f"layers.0.mlp.experts.{e}.up_proj.weight", mx.array([-1.0])))) for e in range(4)]
    assert norms[1] == 1.0 and "layers.0.mlp.experts.1.up_proj.weight" not in piece.gradients
    assert sum(norm == 0.0 for norm in norms) >= 1
