"""What was set by hand since the last checkpoint, when the process is killed: taken up again by the run that goes on, or told."""

import gc

import pytest

import fulltune_nb as ft
from nbs_tests.training.test_resuming import MASKED


def losses_and_rates(trainer):
    return [(report.loss, report.learning_rate) for report in trainer.history.steps]


def notes_of(trainer):
    return " ".join(event.message for event in trainer.history.events if event.kind == "resume")


@pytest.mark.parametrize("name", ["set_learning_rate", "set_next_learning_rate"])
@pytest.mark.parametrize("at", [4, 6], ids=["at the checkpoint", "later"])
def test_a_learning_rate_set_by_hand_survives_crashes_bit_for_bit(make_trainer, make_data, tmp_path, at, name):
    def begin(run_dir=None):
        trainer = make_trainer(run_dir=run_dir, save_every=4, lr_schedule="cosine")
        trainer.run(at)
        getattr(trainer, name)(0.00012345678912345)
        return trainer

    straight, trainer = begin(), begin(tmp_path / "run")
    straight.run()
    trainer.step()
    del trainer  # killed: what is in memory is gone
    gc.collect()
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    assert resumed.step_count == 4 and f"set to 0.00012345678912345 at step {at}" in notes_of(resumed)
    if at > 4:
        resumed.step()
        resumed.save()  # of a step before the one at which the rate is set
    del resumed
    gc.collect()
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    resumed.run()
    assert losses_and_rates(resumed) == losses_and_rates(straight)


def test_a_rate_that_is_set_anew_takes_the_place_of_the_one_to_come(make_trainer, make_data, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", save_every=2)
    trainer.run(3)
    trainer.set_learning_rate(1e-5)
    del trainer
    gc.collect()
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    resumed.set_learning_rate(2e-5)
    resumed.run()
    assert {report.learning_rate for report in resumed.history.steps[2:]} == {2e-5}


def test_a_run_that_went_back_and_was_killed_before_it_was_saved_says_so(make_trainer, make_data, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", save_every=4)
    start = trainer.snapshot()
    trainer.run(4)
    trainer.restore(start)
    trainer.set_learning_rate(1e-5)
    del trainer, start
    gc.collect()
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    notes = notes_of(resumed)
    assert "after this checkpoint the run went back from step 4 to step 0" in notes and "set to 1e-05 by hand at step 0" in notes
    resumed.run()
    assert resumed.history.steps[-1].learning_rate == 1e-3
