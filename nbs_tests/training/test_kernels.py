"""Training with the CPU's kernels: the same run as with MLX alone, bit for bit after a pause, and nobody's arrays are changed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.training.optimizers import Optimizers


def test_weights_that_a_user_keeps_are_not_changed_by_a_step(kernels, make_trainer):
    trainer = make_trainer()
    assert trainer.optimizers.kernels is not None
    kept = dict(tree_flatten(trainer.lm.model.parameters()))
    values = {name: np.array(array) for name, array in kept.items()}
    part = kept["embed_tokens.weight"][3:5]
    trainer.step()
    after = dict(tree_flatten(trainer.lm.model.parameters()))
    assert all(np.array_equal(np.array(kept[name]), values[name]) for name in kept)
    assert np.array_equal(np.array(part), values["embed_tokens.weight"][3:5])
    assert all(not np.array_equal(np.array(after[name]), values[name]) for name in kept)


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "muon", "adamw8bit", "sgd"])
def test_a_run_is_the_same_with_and_without_kernels(kernels, make_trainer, monkeypatch, backward, optimizer):
    losses, weights = [], []
    for setting in ("", "off"):
        monkeypatch.setenv("FULLTUNE_KERNELS", setting)
        trainer = make_trainer(optimizer=optimizer, backward=backward, max_grad_norm=0.5, weight_decay=0.1)
        assert (trainer.optimizers.kernels is None) == (setting == "off")
        losses.append([report.loss for report in trainer.steps()])
        weights.append({name: np.array(array) for name, array in tree_flatten(trainer.lm.model.parameters())})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, expected in weights[1].items():
        assert np.linalg.norm(weights[0][name] - expected) <= 1e-4 * np.linalg.norm(expected), name


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_a_run_goes_on_bit_for_bit(kernels, make_trainer, tmp_path, backward):
    settings = {"backward": backward, "max_grad_norm": 0.5, "steps_per_eval": 100}
    straight, stopped = make_trainer(**settings), make_trainer(**settings, run_dir=tmp_path / "run")
    straight.run()
    stopped.run(3)
    stopped.save()
    del stopped
    resumed = ft.Trainer.resume(tmp_path / "run", data=straight.data)
    resumed.run()
    assert [r.grad_norm for r in resumed.history.steps] == [r.grad_norm for r in straight.history.steps]
    expected = dict(tree_flatten(straight.lm.model.parameters()))
    for name, array in tree_flatten(resumed.lm.model.parameters()):
        assert np.array_equal(np.array(array), np.array(expected[name])), name


def test_a_step_may_be_taken_in_another_thread_than_the_last(kernels, make_trainer):
    trainer, errors = make_trainer(), []
    trainer.step()

    def elsewhere() -> None:
        try:
            Optimizers(trainer.lm.model, trainer.config).update(trainer.lm.model, trainer.lm.model.trainable_parameters(), 1e-3)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert not errors
