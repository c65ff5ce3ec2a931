"""A mixture of experts on a GPU: the routing stays there, a step is compiled, and gives what it does on a CPU. MLX computes on the CPU."""

import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.models import experts
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.folder import save_folder
from fulltune_nb.models.generation import Sampling
from fulltune_nb.models.kv_cache import make_cache
from fulltune_nb.models.model_config import read_config
from fulltune_nb.models.parameters import parameters_of, stack_of, together
from fulltune_nb.training.engine import WholeGraph
from nbs_tests.gpu_like import gpu_like
from nbs_tests.kernel_counts import as_on_gpu, kernels
from nbs_tests.models.model_cases import SMALL
from nbs_tests.models.parity import need, relative_error
from nbs_tests.models.test_decode_kernels import of_a_token, of_mlx_lms
from nbs_tests.training.conftest import family_shape

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
    settings = {"backward": backward, "weights": "bfloat16", "compile": False, "iters": 4, "learning_rate": 1e-3}
    expected = trained(family_shape(family), **settings)
    with gpu_like():
        found = trained(family_shape(family), **settings)
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


# -- kernels, beside mlx-lm's where that is installed -----------------------------------------------------------------------------------


RAW = {**SMALL, **MIXTRAL, "num_local_experts": 8, "num_hidden_layers": 4, "tie_word_embeddings": False}


def stacks(lm) -> list[mx.array | None]:
    own = parameters_of(lm.model)
    return [stack_of([own[name] for name in names]) for names in experts.stacks_in(own)]


def test_an_answer_copies_the_experts_together_once_and_again_when_they_have_changed(make_lm):
    lm = make_lm(**MIXTRAL)
    before = make_lm(**MIXTRAL).generate("the quick", max_tokens=6)
    with gpu_like():
        assert all(one is None for one in stacks(lm))
        cache = make_cache(lm.config.windows)
        lm.model(mx.array([[3, 4, 5, 6, 7]]), cache)
        made = stacks(lm)
        first = lm.model(mx.array([[8]]), cache)
        assert all(one is not None for one in made) and lm.generate("the quick", max_tokens=6) == before
        assert all(stack is one for stack, one in zip(stacks(lm), made, strict=True))
        for expert in lm.model.layers[0].mlp.experts:
            expert.up_proj.weight = expert.up_proj.weight * 3
        second = lm.model(mx.array([[8]]), cache)
        assert sum(stack is not one for stack, one in zip(stacks(lm), made, strict=True)) == 1
    assert not mx.allclose(first, second)


@pytest.mark.ci
def test_a_step_takes_no_more_products_than_mlx_lms_and_copies_no_experts_together(tmp_path):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.utils import load_model

    decoder, (rows, length) = Decoder(read_config(RAW)), (2, 64)
    mx.eval(decoder.parameters())
    save_folder(tmp_path / "model", decoder, None)
    ids = mx.random.randint(0, RAW["vocab_size"], (rows, length + 1), key=mx.random.key(0))
    with as_on_gpu():
        experts.lay_together(experts.stacks_of(decoder))
        inputs = {"ids": ids[:, :-1], "positions": mx.arange(rows * length)}
        targets = {"targets": ids[:, 1:].reshape(-1), "weights": mx.ones(rows * length)}
        graph = mx.compile(WholeGraph(decoder)._whole)
        ours = kernels(*(array for _, array in tree_flatten(graph((None, {}), together(parameters_of(decoder)), inputs, targets))))
        model = load_model(tmp_path / "model")[0]
        value_and_grad = nn.value_and_grad(model, default_loss)

        def step(parameters):
            model.update(parameters)
            return value_and_grad(model, ids, mx.array([[0, length]] * rows))

        theirs = kernels(*(array for _, array in tree_flatten(mx.compile(step)(model.parameters()))))
    assert ours.total() <= theirs.total(), (ours, theirs)
    assert ours["GatherMM"] < theirs["GatherMM"] and ours["SegmentedMM"] < theirs["SegmentedMM"] and ours["Scatter"] < theirs["Scatter"]


@pytest.mark.ci
def test_a_decoded_token_takes_no_more_kernels_than_mlx_lms(tmp_path):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    decoder = Decoder(read_config(RAW))
    mx.eval(decoder.parameters())
    save_folder(tmp_path / "model", decoder, None)
    ours, theirs = of_a_token(decoder, Sampling()), of_mlx_lms(tmp_path / "model", Sampling())
    assert ours.total() <= theirs.total(), (ours, theirs)
