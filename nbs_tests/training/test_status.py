"""What a run says that it does: its status while it happens, and how it ended."""

import errno

import pytest

import fulltune_nb as ft
from fulltune_nb.errors import CheckpointError
from nbs_tests.training.test_full_disk import fail_with


class Hears:
    """Notes the status whenever it is told of a change, and the names of what it was told."""

    def __init__(self):
        self.statuses, self.told = [], []

    def on_start(self, trainer, target):
        self.told.append("on_start")

    def on_end(self, trainer):
        self.told.append("on_end")

    def on_doing(self, trainer):
        self.statuses.append(trainer.status)

    def on_change(self, trainer):
        self.statuses.append(trainer.status)


def test_the_status_says_what_is_done_while_it_is_done(make_trainer, tmp_path):
    trainer, hears = make_trainer(run_dir=tmp_path / "run", iters=2, steps_per_eval=1, save_every=2, batch_size=1), Hears()
    assert trainer.status == "ready"
    trainer.run(callbacks=[hears])
    batches = len(trainer.data.valid)
    assert hears.statuses[0] == "running" and hears.statuses[-1] == "done"
    assert set(hears.statuses[1:-1]) == {
        "running", "saving", "evaluating valid", f"evaluating valid 0 of {batches}", "saving the best weights"
    }  # fmt: skip
    assert trainer.status == "done" and trainer.doing == ""
    trainer.evaluate("valid")
    assert trainer.status == "done"


def test_a_pause_during_what_is_due_before_the_first_step_takes_no_step(make_trainer):
    class PausesEvaluation:
        def on_doing(self, trainer):
            if trainer.doing.startswith("evaluating"):
                trainer.pause()

    trainer = make_trainer(iters=9, steps_per_eval=3)
    for _ in range(3):
        trainer.step()  # which does not evaluate
    trainer.run(callbacks=[PausesEvaluation()])
    assert trainer.step_count == 3 and trainer.status == "paused" and trainer.history.evals[-1].step == 3


def test_a_callback_pauses_the_run_at_a_whole_step_with_what_is_due_at_it(make_trainer):
    class PausesAt3:
        def on_step(self, trainer, report):
            if report.step == 3:
                trainer.pause()

        def on_doing(self, trainer):
            statuses.append(trainer.status)

    trainer, statuses = make_trainer(iters=9, steps_per_eval=3), []
    trainer.pause()  # nothing runs: of no effect on the run to come
    trainer.run(callbacks=[PausesAt3()])
    assert trainer.step_count == 3 and trainer.status == trainer.state == "paused"
    assert trainer.history.evals[-1].step == 3
    assert statuses[-3:] == ["evaluating valid, then pausing", statuses[-2], "pausing after this step"] and " 0 of " in statuses[-2]
    trainer.run(2, callbacks=[PausesAt3()])
    assert trainer.step_count == 5


def test_a_failure_is_said_with_its_reason_until_the_run_goes_on(make_trainer):
    trainer = make_trainer()
    norm = trainer.lm.model.norm
    good, norm.weight = norm.weight, norm.weight * float("nan")
    with pytest.raises(ft.errors.NonFiniteError):
        trainer.run(1)
    assert trainer.status == "failed" and trainer.failure.startswith("NonFiniteError: ") and "NonFiniteError" in trainer._repr_html_()
    norm.weight = good
    trainer.run(1)
    assert trainer.status == "paused" and trainer.failure == ""


def test_an_error_at_the_start_of_a_run_still_ends_it_for_every_callback(make_trainer):
    class Fails:
        def on_start(self, trainer, target):
            raise ValueError("on purpose")

    hears = Hears()
    with pytest.raises(ValueError, match="on purpose"):
        make_trainer().run(callbacks=[Fails(), hears])
    assert hears.told == ["on_start", "on_end"]


def test_of_two_callbacks_that_fail_both_are_told(make_trainer):
    class Fails:
        def __init__(self, word):
            self.word = word

        def on_step(self, trainer, report):
            raise ValueError(self.word)

    with pytest.raises(ValueError, match="one") as caught:
        make_trainer().run(1, callbacks=[Fails("one"), Fails("two")])
    assert "ValueError: two" in caught.value.__notes__[0]


def test_what_cannot_be_written_is_told_once_though_two_things_fail_in_turn(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(run_dir=tmp_path / "run", iters=6, save_every=1, on_save_error="continue")
    trainer.run(1)

    def cannot_save(*args):
        raise CheckpointError("no checkpoint: the disk is full")

    monkeypatch.setattr(trainer._directory, "save_checkpoint", cannot_save)
    monkeypatch.setattr("fulltune_nb.training.run.append_line", fail_with(errno.ENOSPC))
    trainer.run(3)
    told = [event.message for event in trainer.history.events if event.kind == "save_failed"]
    assert len(told) == 2 and len(set(told)) == 2


def test_a_second_trainer_of_a_trained_model_says_so_in_its_history(make_trainer):
    first = make_trainer()
    untouched = ft.Trainer(first.lm, first.data, first.config)
    assert not untouched.history.events
    untouched.run(2)
    second = ft.Trainer(first.lm, first.data, first.config)
    event = second.history.events[0]
    assert event.kind == "model" and "trained before, 2 steps by an earlier trainer" in event.message
    assert not [event for event in untouched.fork().history.events if event.kind == "model"]
