"""Compiled steps beside those that are not."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import fulltune_nb as ft
from fulltune_nb.models.decoder import Decoder, causal_mask
from fulltune_nb.models.families import read_config
from fulltune_nb.training import engine as compiled
from fulltune_nb.training.engine import CompiledGradients, loss_and_gradients
from fulltune_nb.training.layerwise import BlockPasses
from nbs_tests.models.model_cases import CASES
from nbs_tests.training.conftest import random_batch

ONE_OF_EACH_FAMILY = {read_config(values).family: name for name, values in CASES.items() if not read_config(values).num_experts}
LLAMA_AND_THE_OTHERS_IN_CI = [
    name if family == "llama" else pytest.param(name, marks=pytest.mark.ci) for family, name in ONE_OF_EACH_FAMILY.items()
]
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def flat(gradients) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(gradients)}


def assert_same(one: Decoder, batch, function: CompiledGradients) -> None:
    (loss, got), (expected_loss, expected) = function(one, batch, 40), loss_and_gradients(one, batch, 40)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    got, expected = flat(got), flat(expected)
    assert got.keys() == expected.keys()
    for name in expected:
        assert np.linalg.norm(got[name] - expected[name]) <= 1e-6 * np.linalg.norm(expected[name]) + 1e-9, name


@pytest.mark.long
@pytest.mark.parametrize("case", LLAMA_AND_THE_OTHERS_IN_CI)
def test_loss_and_gradients_are_the_same_for_every_shape_and_after_every_change_of_a_weight(case):
    config = read_config(CASES[case])
    model = Decoder(config)
    mx.eval(model.parameters())
    model.embed_tokens.freeze()
    function = CompiledGradients(model)
    for rows, length in ((3, 20), (2, 13), (3, 20)):
        assert_same(model, random_batch(config.vocab_size, rows, length, seed=length), function)
        model.embed_tokens.weight = model.embed_tokens.weight * 1.5  # a frozen one: it must not be a constant of the program
        model.norm.update({name: array + 0.25 for name, array in model.norm.parameters().items()})


@pytest.mark.long
def test_a_block_s_passes_are_the_same_for_every_shape_and_after_every_change_of_a_weight():
    model = Decoder(config := read_config(CASES[ONE_OF_EACH_FAMILY["llama"]]))
    block = model.layers[0]
    mx.eval(block.parameters())
    block.attention.freeze()
    plain, together = BlockPasses(block), BlockPasses(block, compiled=True)
    for rows, length in ((3, 20), (2, 13), (3, 20)):
        x, cotangent = (mx.random.normal((rows, length, config.hidden_size)) for _ in range(2))
        context = model.context(length)[0], causal_mask(length)
        inputs = x, cotangent, context
        (to_x, got), (expected_to_x, expected) = together.backward(*inputs), plain.backward(*inputs)
        assert got.keys() == expected.keys() and not any(name.startswith("attention") for name in got)
        pairs = [(together.forward(x, context), plain.forward(x, context)), (to_x, expected_to_x)]
        for one, other in pairs + [(got[name], expected[name]) for name in expected]:
            assert np.linalg.norm(np.array(one) - np.array(other)) <= 1e-6 * np.linalg.norm(np.array(other))
        block.update(tree_map(lambda array: array * 1.25, block.parameters()))  # frozen ones too: none is a constant of the program


@pytest.mark.ci
@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_a_run_is_the_same_and_goes_on_from_a_checkpoint(make_trainer, tmp_path, backward):
    settings = {"iters": 4, "learning_rate": 1e-3, "packing": True, "grad_accumulation_steps": 2, "backward": backward}
    plain, together = make_trainer(**settings), make_trainer(**settings, compile=True, run_dir=tmp_path / "run")
    plain.run()
    together.run(2)
    together.save()
    losses = [report.loss for report in together.history.steps]
    del together
    resumed = ft.Trainer.resume(tmp_path / "run", data=plain.data)
    resumed.run()
    assert resumed.config.compile and not [event for event in resumed.history.events if event.kind == "compile"]
    losses += [report.loss for report in resumed.history.steps[len(losses) :]]
    assert losses == pytest.approx([report.loss for report in plain.history.steps], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        ({}, {"grad_checkpoint": True}, "grad_checkpoint"), (MIXTRAL, {}, "expert"), (MIXTRAL, {"backward": "layerwise"}, "expert"),
    ],
    ids=["grad_checkpoint", "experts", "experts, layerwise"],
)  # fmt: skip
def test_where_it_has_no_effect_an_event_says_so_and_training_goes_on(make_lm, make_data, model, settings, reason):
    config = ft.TrainConfig(iters=1, compile=True, **settings)
    trainer = ft.Trainer(make_lm(**model), make_data(config=config), config)
    (event,) = [event for event in trainer.history.events if event.kind == "compile"]
    assert reason in event.message and "no effect" in event.message
    trainer.run()
    assert trainer.done


def test_without_a_compiler_the_event_says_what_to_install(make_trainer, monkeypatch):
    monkeypatch.setattr(compiled.sys, "platform", "linux")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiled.mx, "default_device", lambda: mx.Device(mx.cpu))
    (event,) = [event for event in make_trainer(compile=True).history.events if event.kind == "compile"]
    assert "apt-get install g++" in event.message


def event_of(trainer) -> list[str]:
    return [event.message for event in trainer.history.events if event.kind == "compile"]


def test_left_to_the_trainer_long_runs_are_compiled_and_short_ones_not(kernels, make_trainer, monkeypatch):
    assert event_of(make_trainer(iters=1000)) == []
    monkeypatch.setattr(compiled, "PAYS_FROM", 1e9)
    (message,) = event_of(make_trainer(iters=1000))
    assert "compile=False" in message
    assert event_of(make_trainer(iters=1)) == []
    assert event_of(make_trainer(iters=1000, compile=False)) == []
    assert event_of(make_trainer(iters=1000, grad_checkpoint=True)) == []
    monkeypatch.setenv("FULLTUNE_KERNELS", "off")  # as where nothing can be compiled or loaded
    assert event_of(make_trainer(iters=1000)) == []


@pytest.mark.long
@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_a_run_that_the_trainer_compiles_is_the_one_that_the_user_has_compiled(kernels, make_trainer, monkeypatch, backward):
    monkeypatch.setattr(compiled, "PAYS_FROM", 0)
    own, theirs = make_trainer(iters=3, backward=backward), make_trainer(iters=3, backward=backward, compile=True)
    assert [report.loss for report in own.steps()] == [report.loss for report in theirs.steps()]
