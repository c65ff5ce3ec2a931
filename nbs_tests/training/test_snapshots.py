"""Going back to a snapshot, and branching off: bit for bit, and without a trace in the run that goes on."""

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.errors import CheckpointError, ConfigError, TrainingError
from fulltune_nb.training.state import list_checkpoints
from nbs_tests.training.test_resuming import MASKED, same_arrays, untimed
from nbs_tests.training.test_trainer import weights_of


def losses(trainer):
    return [report.loss for report in trainer.history.steps]


def same_weights(one, other):
    return all(np.array_equal(array, weights_of(other)[name]) for name, array in weights_of(one).items())


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_going_back_and_on_again_is_what_never_going_back_is(make_trainer, tmp_path, place, optimizer):
    settings = {"optimizer": optimizer, "lr_schedule": "linear", "steps_per_eval": 3}
    straight, trainer = make_trainer(**settings), make_trainer(**settings)
    straight.run()
    trainer.run(3)
    trainer.set_learning_rate(trainer.peak_learning_rate)
    snapshot = trainer.snapshot(tmp_path / "snapshot" if place == "disk" else None)
    assert snapshot.step == 3 and snapshot.nbytes > 0 and "step 3" in repr(snapshot) and "<table" in snapshot._repr_html_()
    for _ in range(2):  # a snapshot can be gone back to again and again
        trainer.set_learning_rate(1.0)
        trainer.run(2)
        trainer.restore(snapshot)
        assert trainer.step_count == 3 and len(trainer.history.steps) == 3
    trainer.run()
    assert losses(trainer) == losses(straight) and same_weights(trainer, straight)
    assert [untimed(r) for r in trainer.history.evals] == [untimed(r) for r in straight.history.evals]
    assert trainer.history.events[-1].kind == "restore"


def test_a_checkpoint_of_the_run_can_be_gone_back_to(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", save_every=2)
    trainer.run()
    ended = losses(trainer)
    trainer.restore(tmp_path / "run" / "checkpoints" / "step-000004")
    trainer.run()
    assert losses(trainer) == ended


def test_after_going_back_the_new_line_is_what_is_resumed_and_the_old_one_is_set_aside(make_trainer, make_data, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", save_every=2)
    trainer.run(3)
    snapshot = trainer.snapshot()
    trainer.run()
    trainer.restore(snapshot)
    trainer.set_learning_rate(1e-5)
    trainer.run(2)
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    assert resumed.step_count == 4 and resumed.learning_rate == pytest.approx(1e-5)
    assert (tmp_path / "run" / "checkpoints" / "left-step-000008").is_dir()
    ft.load_model(tmp_path / "run" / "checkpoints" / "left-step-000008")


def test_a_snapshot_that_does_not_fit_changes_nothing(make_trainer, make_lm, make_data, tmp_path):
    trainer = make_trainer()
    trainer.run(2)
    other = ft.Trainer(make_lm(hidden_size=16), make_data(10, **MASKED), trainer.config)
    sgd, rows = make_trainer(optimizer="sgd"), make_trainer(rows=11)
    rows.snapshot(tmp_path / "rows")
    before, state = weights_of(trainer), trainer.optimizers.state_arrays()
    for snapshot in (other.snapshot(), sgd.snapshot(), rows.snapshot(), tmp_path / "rows", tmp_path / "nothing"):
        with pytest.raises(CheckpointError):
            trainer.restore(snapshot)
    with pytest.raises(TrainingError, match="what snapshot"):
        trainer.restore(3)
    assert trainer.step_count == 2 and all(np.array_equal(array, before[name]) for name, array in weights_of(trainer).items())
    assert same_arrays(trainer.optimizers.state_arrays(), state)


def test_a_snapshot_is_not_written_over_anything(make_trainer, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        make_trainer().snapshot(tmp_path / "full")


def test_a_fork_without_changes_goes_on_as_the_run_does_and_the_run_does_not_notice(make_trainer, tmp_path):
    straight, trainer = make_trainer(), make_trainer(run_dir=tmp_path / "run")
    straight.run()
    trainer.run(3)
    random = mx.random.state[0].tolist()
    fork = trainer.fork(tmp_path / "fork")
    assert mx.random.state[0].tolist() == random
    assert fork.step_count == 3 and [path.name for path in list_checkpoints(tmp_path / "fork" / "checkpoints")] == ["step-000003"]
    fork.run()
    assert trainer.step_count == 3
    trainer.run()
    assert losses(fork) == losses(trainer) == losses(straight) and same_weights(fork, straight) and same_weights(trainer, straight)


def test_a_fork_with_another_rate_is_a_run_of_its_own(make_trainer, make_data, tmp_path):
    trainer = make_trainer()
    trainer.run(3)
    trainer.set_learning_rate(3e-5)
    fork = trainer.fork(tmp_path / "fork", learning_rate=1e-2)
    assert fork.learning_rate == pytest.approx(1e-2) and trainer.learning_rate == pytest.approx(3e-5)
    assert "learning_rate=0.01" in fork.history.events[-1].message
    fork.run(2)
    trainer.run(2)
    assert losses(fork)[:4] == losses(trainer)[:4] and losses(fork)[4] != losses(trainer)[4]
    fork.save()
    resumed = ft.Trainer.resume(tmp_path / "fork", data=make_data(10, **MASKED))
    assert resumed.config.learning_rate == 1e-2 and losses(resumed) == losses(fork)


def test_a_fork_with_another_optimizer_begins_that_anew_and_can_be_resumed(make_trainer, make_data, tmp_path):
    trainer = make_trainer()
    trainer.run(3)
    fork = trainer.fork(tmp_path / "fork", optimizer="sgd")
    assert "the optimizer begins anew" in fork.history.events[-1].message
    fork.run(2)
    fork.save()
    resumed = ft.Trainer.resume(tmp_path / "fork", data=make_data(10, **MASKED))
    fork_losses = losses(fork)
    resumed.run()
    assert losses(resumed)[:5] == fork_losses and resumed.done


def test_a_fork_that_cannot_be_is_refused(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.run(3)
    with pytest.raises(ConfigError, match="learning_rate"):
        trainer.fork(lerning_rate=1)
    with pytest.raises(ConfigError, match="3 are taken"):
        trainer.fork(iters=2)
    with pytest.raises(ConfigError, match="mask_prompt"):
        trainer.fork(mask_prompt=False)
