"""Experts in stacks on a GPU: a step reads and writes one array, of which parameters and moments are parts. MLX computes on the CPU."""

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.insight import UpdateMeter
from fulltune_nb.models.experts import stacks_in
from fulltune_nb.models.parameters import parameters_of, stack_of
from fulltune_nb.training.optimizers import Optimizers
from nbs_tests.gpu_like import gpu_like
from nbs_tests.memory_held import memory_held

MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
ONE_EXPERT = "model.layers.0.block_sparse_moe.experts.1.*"


@pytest.fixture
def make(make_lm, make_data):
    """`make(run_dir, **settings)`: a trainer of a small Mixtral."""

    def make(run_dir=None, **settings):
        config = ft.TrainConfig(**{"iters": 2, "learning_rate": 1e-3, "compile": False, **settings})
        return ft.Trainer(make_lm(**MIXTRAL), make_data(config=config), config, run_dir)

    with gpu_like():
        yield make


def in_stacks(trainer: ft.Trainer) -> list[bool]:
    own = parameters_of(trainer.lm.model)
    return [stack_of([own[name] for name in names]) is not None for names in stacks_in(own)]


def one_by_one(monkeypatch) -> None:
    """From now on nothing is updated as a stack."""
    monkeypatch.setattr(Optimizers, "_alike", lambda self, names: False)


def arrays(trainer: ft.Trainer) -> dict[str, np.ndarray]:
    found = parameters_of(trainer.lm.model) | trainer.optimizers.state_arrays()
    return {name: np.array(array.astype(mx.float32)) for name, array in found.items()}


def same(ours: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return ours.keys() == other.keys() and all(np.array_equal(array, other[name]) for name, array in ours.items())


SETTINGS = [
    {"weights": "bfloat16"},
    {"optimizer": "lion", "grad_accumulation_steps": 2},
    {"optimizer": "sgd", "grad_checkpoint": True, "lr_factors": {"*.embed_tokens.weight": 0.5}},
    {"backward": "layerwise", "weights": "bfloat16", "grad_accumulation_steps": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_stack_is_updated_to_the_bits_of_its_parts_and_these_stay_its_parts(make, monkeypatch, settings):
    ours = make(**settings)
    ours.run()
    assert all(in_stacks(ours))
    one_by_one(monkeypatch)
    other = make(**settings)
    other.run()
    assert not any(in_stacks(other)) and same(arrays(ours), arrays(other))


@pytest.mark.parametrize("settings", [{"optimizer": "adafactor"}, {"optimizer": "muon"}, {"lr_factors": {ONE_EXPERT: 0.5}}], ids=str)
def test_what_is_not_updated_alike_is_not_laid_together(make, settings):
    trainer = make(**settings, iters=1)
    trainer.run()
    assert not any(in_stacks(trainer))


@pytest.mark.parametrize("settings", [{"freeze": [ONE_EXPERT]}, {"train_only": ["*.gate.weight"]}, {"train_only": [ONE_EXPERT]}], ids=str)
def test_frozen_experts_stay_as_they_are(make, monkeypatch, settings):
    trainer = make(**settings)
    before = arrays(trainer)
    trainer.run()
    after, own = arrays(trainer), parameters_of(trainer.lm.model)
    assert {name for name in own if not np.array_equal(after[name], before[name])} == trainer.lm.trained_as[0]
    one_by_one(monkeypatch)
    other = make(**settings)
    other.run()
    assert same(arrays(trainer), arrays(other))


def test_a_step_needs_no_memory_that_it_keeps(make):
    trainer, held = make(iters=4), []
    for _ in trainer.steps():
        held.append(memory_held())
    assert held[-1] - held[1] < 2**14  # a stack is 2**15 bytes


def test_a_run_that_was_resumed_after_an_answer_ends_with_the_same_bits(make, tmp_path):
    expected = make(weights="bfloat16", iters=4)
    expected.run()
    first = make(tmp_path / "run", weights="bfloat16", iters=4)
    first.step()
    first.step()
    first.lm.generate("the quick", max_tokens=3)
    first.step()
    first.save()
    resumed = ft.Trainer.resume(tmp_path / "run", data=first.data)
    resumed.run()
    assert all(in_stacks(resumed)) and same(arrays(resumed), arrays(expected))


def test_whoever_watches_updates_sees_each_expert(make, monkeypatch):
    found = []
    for _ in range(2):
        trainer, meter = make(iters=1), UpdateMeter(every=1)
        trainer.run(callbacks=[meter])
        found.append({record.name: record for record in meter.records})
        one_by_one(monkeypatch)
    ours, other = found
    assert ours.keys() == other.keys() == trainer.lm.trained_as[0]
    assert all(ours[name] == other[name] for name in ours)


def test_weights_that_somebody_has_put_in_are_trained(make):
    trainer = make()
    trainer.step()
    linear = trainer.lm.model.layers[0].mlp.experts[1].up_proj
    linear.weight = mx.zeros_like(linear.weight)
    trainer.step()
    assert all(in_stacks(trainer)) and 0 < mx.abs(linear.weight).max().item() < 0.01
