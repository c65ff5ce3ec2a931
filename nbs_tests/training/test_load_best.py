"""The best weights loaded at the end of a run: they are those of the best validation, and nobody takes them for the last ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.errors import CheckpointError, TrainingError


def weights(trainer) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(trainer.lm.model.parameters())}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


class Worse:
    """Has the run get worse after step 4."""

    def on_step(self, trainer, report):
        if report.step == 4:
            trainer.set_learning_rate(0.5)


SETTINGS = {"iters": 8, "steps_per_eval": 2, "save_every": 4, "val_batches": -1}


@pytest.mark.parametrize("in_folder", [True, False])
def test_the_model_has_the_weights_of_the_best_validation(make_trainer, tmp_path, in_folder):
    trainer = make_trainer(run_dir=tmp_path / "run" if in_folder else None, load_best=True, **SETTINGS)
    trainer.run(4, callbacks=[Worse()])
    best = weights(trainer)
    trainer.run(callbacks=[Worse()])
    assert trainer.loaded_best == 4 and same(weights(trainer), best)
    evaluations = {report.step: report.loss for report in trainer.history.evals}
    report = trainer.evaluate("valid")
    assert report.step == 4 and report.loss == evaluations[4] == min(evaluations.values()) < evaluations[8]
    assert any(event.kind == "load_best" and "step 4" in event.message for event in trainer.history.events)
    if in_folder:
        assert json.loads((tmp_path / "run" / "result.json").read_text())["loaded_best"] == 4


def test_they_are_neither_trained_on_nor_saved_as_the_last(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", load_best=True, **SETTINGS)
    trainer.run(callbacks=[Worse()])
    last = trainer.run_dir / "checkpoints" / "step-000008"
    for use in (trainer.save, trainer.step, trainer.snapshot, lambda: trainer.fork(iters=9)):
        with pytest.raises(TrainingError, match="best weights now, those of step 4.*restore"):
            use()
    trainer.restore(last)
    trainer.step()  # as it would have gone on
    other = make_trainer(run_dir=tmp_path / "other", **SETTINGS)
    other.run(callbacks=[Worse()])
    other.step()
    assert same(weights(trainer), weights(other))


def test_a_finished_run_that_is_resumed_has_the_last_weights_until_it_is_run(make_trainer, make_data, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", load_best=True, **SETTINGS)
    trainer.run(callbacks=[Worse()])
    best = weights(trainer)
    trainer = ft.Trainer.resume(tmp_path / "run", data=trainer.data)
    assert trainer.loaded_best is None and not same(weights(trainer), best)
    trainer.run()
    assert trainer.loaded_best == 4 and same(weights(trainer), best)


def test_weights_that_are_not_what_was_written_are_not_loaded(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", load_best=True, **SETTINGS)
    trainer.run(7, callbacks=[Worse()])
    (file,) = (tmp_path / "run" / "best").glob("model.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
    with pytest.raises(CheckpointError, match="best.*sha256"):
        trainer.run()


def test_where_the_last_are_the_best_or_the_base_was_nothing_is_loaded(make_trainer):
    trainer = make_trainer(load_best=True, **SETTINGS)
    trainer.run()
    evaluations = {report.step: report.loss for report in trainer.history.evals}
    assert min(evaluations, key=evaluations.get) == 8 and trainer.loaded_best is None
    trainer = make_trainer(load_best=True, learning_rate=50.0, **SETTINGS)
    trainer.run()
    assert trainer.loaded_best is None
    assert any("had before it was trained: those of step 8 stay" in event.message for event in trainer.history.events)


def test_without_evaluations_an_event_says_that_it_has_no_effect(make_trainer):
    trainer = make_trainer(load_best=True, iters=1, val_batches=0)
    assert any(event.kind == "load_best" and "no effect" in event.message for event in trainer.history.events)
