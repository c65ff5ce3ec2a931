"""Loss and gradients in stages, beside those of one graph."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import read_config
from fulltune_nb.training import engine as staged
from fulltune_nb.training.engine import StagedGradients, loss_and_gradients, step_gradients
from nbs_tests.models.model_cases import CASES
from nbs_tests.training.conftest import random_batch

WITHOUT_EXPERTS = [name for name, values in CASES.items() if not read_config(values).num_experts]


@pytest.fixture(params=["one chunk", "many chunks"])
def chunked(request, monkeypatch):
    """The logits as one piece, and in several; a chunk has 32 positions at least."""
    if request.param == "many chunks":
        monkeypatch.setattr(staged, "CHUNK_ELEMENTS", 1)


def decoder(case: str) -> Decoder:
    mx.random.seed(5)
    model = Decoder(read_config(CASES[case]))
    mx.eval(model.parameters())
    return model


def assert_same(found, expected) -> None:
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    gradients, expected_gradients = dict(tree_flatten(gradients)), dict(tree_flatten(expected_gradients))
    assert gradients.keys() == expected_gradients.keys()
    for name, array in expected_gradients.items():
        one, other = np.array(gradients[name]), np.array(array)
        assert one.shape == other.shape and np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other) + 1e-9, name


@pytest.mark.parametrize("checkpoint", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("case", WITHOUT_EXPERTS)
def test_they_are_the_same_in_every_family(kernels, chunked, case, checkpoint):
    model = decoder(case)
    batch = random_batch(model.config.vocab_size, 4, 21, 1)
    own = StagedGradients(model, kernels, checkpoint)(model, batch, 70)
    assert_same(own, loss_and_gradients(model, batch, 70))


@pytest.mark.parametrize("frozen", [["embed_tokens"], ["lm_head"], ["norm", "layers"], ["embed_tokens", "norm", "layers"]], ids=str)
def test_frozen_parts_have_no_gradients(kernels, frozen):
    model = decoder("phi_old_dialect")
    for name in frozen:
        for module in model.layers if name == "layers" else [model[name]]:
            module.freeze()
    batch = random_batch(model.config.vocab_size, 3, 20, 1)
    assert_same(StagedGradients(model, kernels)(model, batch, 40), loss_and_gradients(model, batch, 40))


def test_micro_batches_are_summed(kernels):
    model = decoder(WITHOUT_EXPERTS[0])
    batches = [random_batch(model.config.vocab_size, rows, length, seed) for seed, (rows, length) in enumerate([(3, 20), (2, 13), (1, 5)])]
    assert_same(step_gradients(model, batches, compiled=StagedGradients(model, kernels)), step_gradients(model, batches))


def test_the_model_is_left_as_it_was(kernels):
    model = decoder(WITHOUT_EXPERTS[0])
    before = dict(tree_flatten(model.parameters()))
    StagedGradients(model, kernels)(model, random_batch(model.config.vocab_size, 3, 20, 1), 40)
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is array for name, array in before.items())


@pytest.mark.long
def test_compiled_they_are_the_same_for_every_shape_and_after_every_change_of_a_weight(kernels):
    model = decoder(WITHOUT_EXPERTS[0])
    model.embed_tokens.freeze()
    function = StagedGradients(model, kernels, compiled=True)
    for rows, length in ((3, 20), (2, 13), (3, 20)):
        batch = random_batch(model.config.vocab_size, rows, length, seed=length)
        assert_same(function(model, batch, 40), loss_and_gradients(model, batch, 40))
        model.embed_tokens.weight = model.embed_tokens.weight * 1.5  # a frozen one: it must not be a constant of the program
        model.norm.update({name: array + 0.25 for name, array in model.norm.parameters().items()})


def test_logits_of_all_positions_never_exist_at_once(kernels, monkeypatch):
    monkeypatch.setattr(staged, "CHUNK_ELEMENTS", 32 * 16384)
    model = Decoder(read_config(CASES[WITHOUT_EXPERTS[0]] | {"vocab_size": 16384}))
    mx.eval(model.parameters())
    batch = random_batch(16384, 32, 20, 1)
    function = StagedGradients(model, kernels)
    mx.eval(function(model, batch, 40)[1])
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(function(model, batch, 40)[1])
    assert mx.get_peak_memory() - before < len(batch.targets) * 16384 * 4
