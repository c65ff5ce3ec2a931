"""Noise on the embeddings: of the size that transformers gives it, a function of seed and step, and the same with every engine."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.data.batches import collate
from fulltune_nb.errors import ConfigError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.model_config import read_config
from fulltune_nb.training.engine import make_engine
from fulltune_nb.training.objective import Objective
from nbs_tests.models.parity import need_torch, relative_error
from nbs_tests.training.conftest import TINY_LLAMA, random_batch

NOISY = Objective(noise_alpha=5.0, seed=3)


def weights(trainer) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(trainer.lm.model.parameters())}


def test_it_has_the_size_of_transformers_noise():
    need_torch()
    if importlib.util.find_spec("transformers.integrations.neftune") is None:
        pytest.fail("transformers has its NEFTune elsewhere now")
    import torch
    from transformers.integrations.neftune import neftune_post_forward_hook

    rows, length, hidden = 4, 37, 64
    module = SimpleNamespace(training=True, neftune_noise_alpha=5.0)
    theirs = neftune_post_forward_hook(module, None, torch.zeros(rows, length, hidden)).numpy()
    ours = np.array(NOISY.noise(random_batch(512, rows, length, 0), 1, 0, hidden))
    assert ours.shape == theirs.shape
    for found in (ours, theirs):
        assert np.abs(found).max() == pytest.approx(5.0 / np.sqrt(length * hidden), rel=1e-2)
    assert ours.std() == pytest.approx(theirs.std(), rel=2e-2) and abs(ours.mean()) < 3 * ours.std() / np.sqrt(ours.size)


def test_each_row_has_its_own_size_packed_or_not(make_data):
    split = make_data(6, mask_prompt=True).train
    for rows in ([0, 3, 5], [(0, 3), (5,), (1, 2, 4)]):
        batch = collate(split, rows)
        noise, at = np.abs(np.array(NOISY.noise(batch, 1, 0, 4096))), 0
        for row, group in enumerate(rows):
            begin = 0
            for example in group if isinstance(group, tuple) else (group,):
                length = len(split[example].tokens) - 1
                bound = 5.0 / np.sqrt(length * 4096)
                assert noise[row, begin : begin + length].max() == pytest.approx(bound, rel=1e-2)
                begin, at = begin + length, at + 1
        assert at == len(batch.rows)


def test_it_is_a_function_of_seed_step_and_micro_batch():
    batch, other_seed = random_batch(512, 2, 9, 0), Objective(noise_alpha=5.0, seed=4)
    drawn = ((NOISY, (1, 0)), (NOISY, (1, 0)), (NOISY, (2, 0)), (NOISY, (1, 1)), (other_seed, (1, 0)))
    found = [np.array(objective.noise(batch, *place, 32)) for objective, place in drawn]
    assert np.array_equal(found[0], found[1]) and not any(np.array_equal(found[0], other) for other in found[2:])


@pytest.mark.parametrize("tied", [True, False])
def test_all_engines_compute_the_same_step_with_it(tied, kernels):
    model = Decoder(read_config({**TINY_LLAMA, "tie_word_embeddings": tied}))
    batches, found = [random_batch(512, 3, 20, 1), random_batch(512, 2, 13, 2)], []
    ways = [("whole", {}), ("whole", {"grad_checkpoint": True}), ("whole", {"compiled": True}), ("whole", {"kernels": kernels})]
    for backward, settings in (*ways, ("layerwise", {}), ("layerwise", {"compiled": True})):
        gradients = make_engine(model, backward, **settings, objective=NOISY).gradients(7, batches)
        found.append((gradients.loss, {name: np.array(array) for piece in gradients.pieces() for name, array in piece.gradients.items()}))
    plain = make_engine(model, "whole").gradients(7, batches).loss
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5) and abs(loss - plain) > 1e-4
        assert all(relative_error(gradients[name], array) < 1e-4 for name, array in found[0][1].items())


@pytest.mark.parametrize("settings", [{"memory": "fast"}, {"memory": "lean", "max_grad_norm": 0.5}, {"packing": True}], ids=str)
def test_a_run_goes_on_to_the_same_bits(make_trainer, tmp_path, settings):
    settings = {"neftune_alpha": 5.0, "grad_accumulation_steps": 2, "save_every": 3, "iters": 6, "max_seq_length": 64, **settings}
    straight = make_trainer(**settings)
    straight.run()
    make_trainer(run_dir=tmp_path / "run", **settings).run(3)
    mx.random.seed(99)
    again = ft.Trainer.resume(tmp_path / "run", data=straight.data)
    again.run()
    assert [report.loss for report in again.history.steps] == [report.loss for report in straight.history.steps]
    assert all(np.array_equal(array, weights(straight)[name]) for name, array in weights(again).items())
    assert any("neftune_alpha=5" in event.message for event in straight.history.events)
    assert straight.evaluate("valid").loss == straight.evaluate("valid").loss  # without noise


def test_an_alpha_is_above_0():
    with pytest.raises(ConfigError, match="neftune_alpha"):
        ft.TrainConfig(neftune_alpha=0.0)
