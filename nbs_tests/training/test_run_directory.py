"""The folder of a run: its lock, its files, its result."""

import gc
import json
import os
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.errors import CheckpointError, ModelError
from fulltune_nb.training.lock import LOCK_FILE, RunLock
from fulltune_nb.training.run import read_metrics

HOLD = """
import sys, time
from pathlib import Path
from fulltune_nb.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_directory_that_another_process_has_is_refused_until_it_ends(tmp_path, other_process):
    with pytest.raises(CheckpointError, match=rf"in use by process {other_process.pid} on .*shut its kernel down"):
        RunLock(tmp_path)
    other_process.kill()
    other_process.wait()
    lock = RunLock(tmp_path)
    assert f"taken over from process {other_process.pid}" in lock.note and "without letting go" in lock.note
    lock.release()
    assert os.listdir(tmp_path) == []


def test_without_file_locks_the_process_named_in_the_file_counts(tmp_path, other_process, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(CheckpointError, match=r"in use by process .*remove .*run\.lock"):
        RunLock(tmp_path)
    other_process.kill()
    other_process.wait()
    assert "taken over" in RunLock(tmp_path).note


def test_a_lock_file_with_nonsense_in_it_locks_nobody_out(tmp_path):
    for content in (b"", b"\xff\x00", b"[" * 5000, b'{"process": "x"}'):
        (tmp_path / LOCK_FILE).write_bytes(content)
        RunLock(tmp_path).release()


def test_the_lock_ends_with_its_trainer(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run")
    assert (tmp_path / "run" / LOCK_FILE).exists()
    del trainer
    gc.collect()
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_trainer_that_takes_the_run_up_again_shuts_the_one_before_out(make_trainer, make_data, tmp_path):
    first = make_trainer(run_dir=tmp_path / "run")
    first.run(2)
    first.save()
    second = ft.Trainer.resume(tmp_path / "run", data=make_data(10, mask_prompt=True))
    for write in (first.save, first.step, first.run):
        with pytest.raises(CheckpointError, match="taken up by a later trainer"):
            write()
    del first
    gc.collect()
    second.run(1)
    assert (tmp_path / "run" / LOCK_FILE).exists() and second.step_count == 3


def test_the_files_of_a_run(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", iters=3, save_every=2)
    trainer.run()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["best", "checkpoints", "config.yaml", "metrics.jsonl", "result.json", LOCK_FILE]
    trainer.event("note", "looked at")
    assert json.loads((tmp_path / "run" / "events.jsonl").read_text())["message"] == "looked at"
    assert ft.TrainConfig.from_yaml(tmp_path / "run" / "config.yaml") == trainer.config


def test_metrics_are_read_with_damaged_lines_counted_and_named(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", iters=2)
    trainer.run()
    path = tmp_path / "run" / "metrics.jsonl"
    reports = [report for report in trainer.history if not isinstance(report, ft.Event)]
    assert read_metrics(path.parent) == (reports, []) and read_metrics(tmp_path) == ([], [])
    text = path.read_bytes()
    path.write_bytes(text[:-5])  # as a crash leaves it
    last = len(reports)
    assert read_metrics(path.parent) == (reports[:-1], [f"metrics.jsonl: 1 line is no report and was passed over (line {last})"])
    bad = [b"\xff\xfe", b"[" * 100_000, b'{"kind": "step", "step": "1"}', b"null", b"x" * 1000, b"{}", b"1" * 5000]
    path.write_bytes(b"\n".join([*bad, b"", text]))
    history, notes = read_metrics(path.parent)
    assert history == reports and notes == ["metrics.jsonl: 7 lines are no reports and were passed over (line 1, 2, 3, 4, 5 and 2 more)"]
    path.unlink()
    path.mkdir()
    assert "metrics.jsonl cannot be read: " in read_metrics(path.parent)[1][0]


def test_what_was_reported_before_the_directory_was_there_stands_in_it_too(make_lm, make_data, tmp_path):
    import mlx.core as mx

    lm = make_lm()
    lm.model.set_dtype(mx.bfloat16)
    trainer = ft.Trainer(lm, make_data(), ft.TrainConfig(iters=1, weights="float32"), tmp_path / "run")
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == [event.kind for event in trainer.history.events] != []


def test_the_result_is_written_at_the_end_and_again_after_a_test(make_trainer, tmp_path):
    trainer, path = make_trainer(run_dir=tmp_path / "run", steps_per_eval=2, iters=6), tmp_path / "run" / "result.json"
    trainer.run(4)
    assert not path.exists()
    trainer.run()
    result = json.loads(path.read_text())
    losses = [report.loss for report in trainer.history.evals]
    assert (result["steps"], result["test"], result["stopped_early"]) == (6, None, False)
    assert result["valid_last"]["loss"] == losses[-1] and result["valid_best"]["loss"] == min(losses)
    assert result["tokens"] == sum(report.tokens for report in trainer.history.steps)
    assert result["config"] == trainer.config.to_dict() and result["data"]["fingerprint"] == trainer.data.fingerprint
    assert result["versions"]["mlx"] and result["versions"]["fulltune_nb"]
    report = trainer.evaluate("test")
    test = json.loads(path.read_text())["test"]
    names = ("loss", "perplexity", "accuracy", "entropy", "tokens")
    assert test == {"step": 6, **{name: getattr(report, name) for name in names}}


def test_what_killed_writes_left_is_cleaned_up_at_the_next_start(make_trainer, make_data, tmp_path):
    run = tmp_path / "run"
    make_trainer(run_dir=run, save_every=2).run(4)
    gc.collect()
    shutil.copytree(run / "checkpoints" / "step-000004", run / "checkpoints" / ".step-000006-0a1b2c3d")
    os.rename(run / "checkpoints" / "step-000004", run / "checkpoints" / ".step-000004-0a1b2c3d-old")
    (run / ".best-0a1b2c3d").mkdir()
    (run / ".metrics-0a1b2c3d.jsonl").write_text("{")
    (run / "my notes.txt").write_text("mine")
    trainer = ft.Trainer.resume(run, data=make_data(10, mask_prompt=True))
    assert trainer.step_count == 4
    told = " ".join(event.message for event in trainer.history.events)
    assert "brought back" in told and "removed .metrics-0a1b2c3d.jsonl" in told
    assert not [path for path in run.rglob(".*")] and (run / "my notes.txt").exists()


def test_the_source_models_folder_is_never_written_to(make_lm, make_data, tmp_path):
    lm = ft.load_model(make_lm().save(tmp_path / "base"))
    before = sorted(path.name for path in (tmp_path / "base").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "base")
    for place in (tmp_path / "base", tmp_path / "base" / "run", tmp_path / "link" / "run"):
        with pytest.raises(CheckpointError, match="source model's folder"):
            ft.Trainer(lm, make_data(), ft.TrainConfig(), place)
        with pytest.raises(ModelError):
            lm.save(place)
    trainer = ft.Trainer(lm, make_data(), ft.TrainConfig(iters=1), tmp_path / "base-run")
    with pytest.raises(ModelError, match="source model's folder"):
        trainer.snapshot(tmp_path / "base" / "snapshot")
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == before


def test_a_directory_deleted_under_a_run_is_made_anew_by_save(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run")
    trainer.step()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run is gone: it was deleted or moved .* trainer\.save\(\) makes it anew"):
        trainer.step()
    trainer.save()
    trainer.run()
    losses, data = [report.loss for report in trainer.history.steps], trainer.data
    del trainer
    gc.collect()
    again = ft.Trainer.resume(tmp_path / "run", data=data)
    assert again.done and len(losses) == again.step_count


def test_a_refused_second_trainer_leaves_the_living_one_its_folder(make_trainer, make_data, tmp_path):
    living = make_trainer(run_dir=tmp_path / "run")
    living.run(2)
    living.save()
    for refused in (
        lambda: ft.Trainer(living.lm, living.data, living.config, tmp_path / "run"),
        lambda: ft.Trainer.resume(tmp_path / "run", data=make_data(11, mask_prompt=True)),
        lambda: ft.Trainer(living.lm, make_data(11, mask_prompt=True), living.config, tmp_path / "run", resume="auto"),
    ):
        with pytest.raises(CheckpointError, match="already holds a run|data differs"):
            refused()
    gc.collect()
    assert living.lm.card.history is living.history
    living.run(1)
    living.save()
    assert (tmp_path / "run" / LOCK_FILE).exists() and living.step_count == 3


def test_a_refused_second_trainer_leaves_the_model_as_it_is(make_trainer, make_data, tmp_path):
    """Nothing of a living trainer's model is touched: its weights are not those of the checkpoint, and as many are trained."""
    straight = make_trainer(freeze=["*embed_tokens*"])
    straight.run(4)
    run = tmp_path / "run"
    living = make_trainer(run_dir=run, freeze=["*embed_tokens*"])
    living.run(2)
    living.save()
    living.run(1)
    (tmp_path / "file").touch()
    lm, data, config = living.lm, living.data, living.config
    all_trained = config.replace(freeze=[])
    for refused in (
        lambda: ft.Trainer.resume(run, lm),
        lambda: ft.Trainer.resume(run, lm, make_data(11, mask_prompt=True)),
        lambda: ft.Trainer(lm, data, config.replace(iters=1), run, resume="auto"),
        lambda: ft.Trainer(lm, data, all_trained, tmp_path / "file"),
        lambda: ft.Trainer(lm, data, all_trained.replace(lr_factors={"nonsense": 1.0})),
        lambda: ft.Trainer(lm, data, config.replace(train_only=["nonsense"])),
    ):
        with pytest.raises((CheckpointError, ft.ConfigError)):
            refused()
    living.run(1)
    assert [r.loss for r in living.history.steps] == [r.loss for r in straight.history.steps]
    assert lm.card.history is living.history


def test_a_run_whose_folder_another_one_has_taken_writes_nothing_into_it(make_trainer, tmp_path):
    first = make_trainer(run_dir=tmp_path / "run")
    first.run(1)
    os.rename(tmp_path / "run", tmp_path / "old")
    second = make_trainer(run_dir=tmp_path / "run")
    with pytest.raises(CheckpointError, match="another run has begun there"):
        first.step()
    del first
    gc.collect()
    second.run(1)
    assert (tmp_path / "run" / LOCK_FILE).exists()


def test_resume_auto_begins_a_run_and_goes_on_with_it(make_trainer, make_lm, make_data, tmp_path):
    straight = make_trainer()
    straight.run()
    data, settings = make_data(10, mask_prompt=True), straight.config

    def cell(**changes):
        return ft.Trainer(make_lm(), data, settings.replace(**changes), tmp_path / "run", resume="auto")

    assert cell().state == "ready"
    cell().run(3)
    cell(save_every=3).run()  # no checkpoint was written after its third step
    trainer = cell(save_every=5)
    assert trainer.step_count == 8 and trainer.state == "done"
    assert [r.loss for r in trainer.history.steps] == [r.loss for r in straight.history.steps]
    assert ft.TrainConfig.from_yaml(tmp_path / "run" / "config.yaml").save_every == 5
    with pytest.raises(CheckpointError, match="config given has changed in a way that matters.*learning_rate was 0.001 and is 0.1"):
        cell(learning_rate=0.1)
    with pytest.raises(ft.ConfigError, match="resume: expected"):
        ft.Trainer(make_lm(), data, settings, tmp_path / "run", resume=True)


@pytest.mark.parametrize("loads_anew", [False, True])
def test_a_cell_that_is_run_again_loses_no_step_of_the_living_trainer(make_trainer, make_lm, tmp_path, loads_anew):
    straight = make_trainer()
    straight.run()
    living = make_trainer(run_dir=tmp_path / "run", save_every=100)
    for _ in range(5):
        living.step()  # in a panel, or by hand: nothing is saved but the beginning
    lm = make_lm() if loads_anew else living.lm
    again = ft.Trainer(lm, living.data, living.config, tmp_path / "run", resume="auto")
    assert again.step_count == 5 and [e.kind for e in again.history.events][-1] == "resume"
    again.run()
    assert [r.loss for r in again.history.steps] == [r.loss for r in straight.history.steps]
    ours, theirs = (dict(tree_flatten(trainer.lm.model.parameters())) for trainer in (again, straight))
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_living_trainer_that_cannot_save_goes_on_and_one_that_is_torn_is_passed_over(make_trainer, tmp_path, monkeypatch):
    living = make_trainer(run_dir=tmp_path / "run")
    living.step()

    def again():
        return ft.Trainer(living.lm, living.data, living.config, tmp_path / "run", resume="auto")

    with monkeypatch.context() as patch:
        patch.setattr("fulltune_nb.training.run.write_checkpoint", lambda *_: (_ for _ in ()).throw(CheckpointError("the disk is full")))
        with pytest.raises(CheckpointError, match="the disk is full"):
            again()
    assert living.step().step == 2
    monkeypatch.setattr(living.optimizers, "step", 7)  # as where an update was broken off
    assert again().step_count == 0


def test_a_loop_whose_run_was_taken_up_does_not_touch_the_model_that_both_train(make_trainer, tmp_path):
    """As where the cell that makes the trainer is run again while a panel trains."""
    straight = make_trainer()
    straight.run()
    first = make_trainer(run_dir=tmp_path / "run")
    loop = first.steps()
    next(loop)
    again = ft.Trainer(first.lm, first.data, first.config, tmp_path / "run", resume="auto")
    with pytest.raises(CheckpointError, match="taken up by a later trainer"):
        next(loop)
    assert first.step_count == 1 and first.state == "failed"
    again.run()
    assert [r.loss for r in again.history.steps] == [r.loss for r in straight.history.steps]


def test_an_evaluation_after_the_last_cell_takes_nothing_out_of_the_result(make_trainer, tmp_path):
    from fulltune_nb.experiments.result import experiment_result, write_result

    trainer, path = make_trainer(run_dir=tmp_path / "run", iters=2), tmp_path / "run" / "result.json"
    before = trainer.evaluate("test")
    trainer.run()
    write_result(path.parent, experiment_result(trainer, before, trainer.evaluate("test"), "out"))
    whole = json.loads(path.read_text())
    assert whole["test_loss"] == whole["after"]["loss"] == whole["test"]["loss"] and whole["exported"] == "out"
    trainer.evaluate("valid")
    assert json.loads(path.read_text()).keys() == whole.keys()


def test_a_run_that_goes_on_drops_the_losses_of_its_former_end_from_the_result(make_trainer, make_data, tmp_path):
    run = tmp_path / "run"
    trainer = make_trainer(run_dir=run, iters=2)
    trainer.run()
    trainer.evaluate("test")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "note": "mine"}))
    config = trainer.config.replace(iters=4)
    ft.Trainer(trainer.lm, trainer.data, config, run, resume="auto").run()
    on = json.loads((run / "result.json").read_text())
    assert (on["steps"], on["note"], on["test"]["step"]) == (4, "mine", 2) and "test_loss" in result.keys() - on.keys()
    assert on["valid_loss"] == on["valid_last"]["loss"]


def test_what_was_said_by_hand_at_a_checkpoints_step_is_there_when_the_cell_is_run_again(make_trainer, tmp_path):
    first = make_trainer(run_dir=tmp_path / "run", save_every=3, steps_per_eval=3, val_batches=1)
    first.run(3)  # saved
    told = [first.evaluate("test"), first.evaluate("valid")]
    first.set_learning_rate(5e-4)
    again = ft.Trainer(first.lm, first.data, first.config, tmp_path / "run", resume="auto")
    assert again.learning_rate == pytest.approx(5e-4) and again.history.evals[-2:] == told
    del first, again  # the process ends
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    stored = ft.Trainer.resume(tmp_path / "run", data=make_trainer().data)
    assert stored.learning_rate == pytest.approx(5e-4) and (tmp_path / "run" / "metrics.jsonl").read_text() == metrics


def test_an_evaluation_after_the_last_checkpoint_stands_in_metrics_and_result_of_the_run_taken_up_again(make_trainer, tmp_path):
    trainer, run = make_trainer(run_dir=tmp_path / "run", iters=3), tmp_path / "run"
    trainer.run()
    test, data = trainer.evaluate("test"), trainer.data
    metrics, result = (run / "metrics.jsonl").read_text(), json.loads((run / "result.json").read_text())
    del trainer
    again = ft.Trainer.resume(run, data=data)
    assert again.history.evals[-1] == test and (run / "metrics.jsonl").read_text() == metrics
    again.run()
    again.evaluate("valid")
    assert json.loads((run / "result.json").read_text())["test"] == result["test"]


STOPS_EARLY = {"patience": 1, "steps_per_eval": 1, "learning_rate": 1e3}


@pytest.mark.parametrize(("settings", "state"), [({}, "done"), (STOPS_EARLY, "stopped early")])
def test_the_result_says_how_the_run_ended_in_the_word_of_its_trainer(make_trainer, tmp_path, settings, state):
    trainer = make_trainer(run_dir=tmp_path / "run", **settings)
    assert trainer.result()["state"] == "ready"
    steps = trainer.steps()
    next(steps)
    assert trainer.result()["state"] == "running" or trainer.done
    list(steps)
    assert trainer.state == json.loads((tmp_path / "run" / "result.json").read_text())["state"] == state


def test_a_run_that_went_back_and_took_another_way_to_its_end_drops_the_losses_of_the_first(make_trainer, tmp_path):
    trainer, path = make_trainer(run_dir=tmp_path / "run", iters=4, save_every=2), tmp_path / "run" / "result.json"
    trainer.run()
    test = trainer.evaluate("test")
    trainer.restore(tmp_path / "run" / "checkpoints" / "step-000002")
    trainer.run()
    assert json.loads(path.read_text())["test_loss"] == test.loss  # of the same weights
    trainer.restore(tmp_path / "run" / "checkpoints" / "step-000002")
    trainer.set_learning_rate(5e-3)
    trainer.run()
    assert "test_loss" not in json.loads(path.read_text())
