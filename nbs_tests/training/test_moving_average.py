"""The moving average of the weights: torch's numbers, the same with both engines, exact in checkpoints, and never taken for the weights."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.errors import ConfigError, TrainingError
from fulltune_nb.training.moving_average import MovingAverage
from fulltune_nb.training.optimizers import predict_state_bytes
from nbs_tests.models.parity import need_torch, relative_error

DECAY = 0.8


def weights(lm) -> dict[str, np.ndarray]:
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(lm.model.parameters())}


def averages(trainer) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in trainer.optimizers.average.arrays.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_after_each_step_it_is_torch_s(make_trainer, memory):
    need_torch()
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    trainer = make_trainer(ema_decay=DECAY, memory=memory, learning_rate=1e-2)
    module = torch.nn.ParameterDict({name.replace(".", "/"): torch.from_numpy(array) for name, array in weights(trainer.lm).items()})
    theirs = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    theirs.update_parameters(module)  # the first call copies: ours begins with the weights before the first step
    for _ in range(4):
        trainer.step()
        with torch.no_grad():
            for name, array in weights(trainer.lm).items():
                module[name.replace(".", "/")].copy_(torch.from_numpy(array))
        theirs.update_parameters(module)
    expected = {name.replace("/", "."): array.detach().numpy() for name, array in theirs.module.items()}
    found = averages(trainer)
    assert found.keys() == expected.keys()
    assert all(relative_error(found[name], array) < 1e-6 for name, array in expected.items())
    assert not same(found, weights(trainer.lm))


def test_training_itself_is_as_without(make_trainer):
    plain, averaged = make_trainer(val_batches=0), make_trainer(ema_decay=DECAY, val_batches=0)
    plain.run()
    averaged.run()
    assert same(weights(plain.lm), weights(averaged.lm))


def test_small_differences_are_kept_whatever_the_weights_dtype():
    weight = mx.ones((4,), dtype=mx.bfloat16)
    average = MovingAverage({"a": mx.zeros((4,), dtype=mx.bfloat16)}, 0.999)
    for _ in range(100):
        average.update({"a": weight})
    np.testing.assert_allclose(average.arrays["a"], 1 - 0.999**100, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"memory": "fast"}, {"memory": "lean", "optimizer": "adafactor"}, {"weights": "bfloat16"}], ids=str)
def test_it_goes_on_to_the_same_bits(make_trainer, tmp_path, settings):
    settings = {"ema_decay": DECAY, "save_every": 3, "steps_per_eval": 2, **settings}
    straight = make_trainer(**settings)
    straight.run()
    make_trainer(run_dir=tmp_path / "run", **settings).run(3)
    again = ft.Trainer.resume(tmp_path / "run", data=straight.data)
    again.run()
    assert same(averages(again), averages(straight)) and same(weights(again.lm), weights(straight.lm))
    assert [report.loss for report in again.history.evals] == [report.loss for report in straight.history.evals]


def test_a_snapshot_and_a_rehearsal_bring_it_back(make_trainer):
    trainer = make_trainer(ema_decay=DECAY)
    trainer.step()
    before, taken = averages(trainer), trainer.snapshot()
    with trainer.rehearsal() as step:
        step(1e-2)
        assert not same(averages(trainer), before)
    assert same(averages(trainer), before)
    trainer.step()
    trainer.restore(taken)
    assert same(averages(trainer), before)


def test_validations_best_and_load_best_are_of_the_average(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", ema_decay=DECAY, steps_per_eval=4, val_batches=-1, load_best=True, learning_rate=1e-2)
    trainer.run(7)
    trainer.step()
    last, average = weights(trainer.lm), averages(trainer)
    plain = trainer.evaluate("valid").loss
    with trainer.averaged() as lm:
        assert same(weights(lm), average)
        of_average = trainer.evaluate("valid").loss
        lm.save(tmp_path / "saved")
    assert same(weights(trainer.lm), last) and plain != of_average
    trainer.run()
    in_run = [report for report in trainer.history.evals if report.step == 8][-1]
    assert in_run.loss == of_average
    assert trainer.loaded_best == 8 and same(weights(trainer.lm), average)
    assert same(weights(ft.load_model(tmp_path / "saved")), average) and same(weights(ft.load_model(tmp_path / "run" / "best")), average)
    assert any("ema_decay=0.8" in event.message for event in trainer.history.events)


def test_while_the_model_has_the_average_it_is_neither_trained_nor_saved(make_trainer):
    trainer = make_trainer(ema_decay=DECAY)
    trainer.step()
    taken = trainer.snapshot()
    with trainer.averaged():
        for use in (trainer.step, trainer.snapshot, trainer.fork, lambda: trainer.restore(taken), lambda: trainer.averaged().__enter__()):
            with pytest.raises(TrainingError, match="has the average of its weights now"):
                use()
    trainer.step()


def test_frozen_tensors_have_none_and_memory_is_counted(make_trainer):
    trainer = make_trainer(ema_decay=DECAY, freeze=["model.embed_tokens.weight"])
    trained = {name: array.shape for name, array in tree_flatten(trainer.lm.model.trainable_parameters())}
    assert averages(trainer).keys() == trained.keys()
    assert predict_state_bytes(trained, trainer.config) == trainer.optimizers.state_bytes
    with_it, without = (ft.preflight(trainer.lm, trainer.data, trainer.config.replace(ema_decay=decay)).peak for decay in (DECAY, None))
    assert with_it >= without + 4 * sum(map(np.prod, trained.values()))


def test_where_there_is_none_it_is_not_to_be_had(make_trainer):
    with pytest.raises(ConfigError, match="ema_decay=0.999"), make_trainer().averaged():
        pass
    with pytest.raises(ConfigError, match="ema_decay"):
        ft.TrainConfig(ema_decay=1.0)
