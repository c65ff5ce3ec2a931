"""A run's folder is held by what it is, and what others have put into a folder stays as it is."""

import gc
import os
import shutil
import socket
import subprocess
import sys

import pytest

import fulltune_nb as ft
from fulltune_nb.errors import CheckpointError, DataError, ModelError
from fulltune_nb.training.lock import LOCK_FILE, RunLock
from fulltune_nb.training.run import holds_run, read_metrics, read_result


def contents(folder):
    """Every name in a folder, with what it is or what is in it."""
    kinds = ((path, path.lstat().st_mode) for path in sorted(folder.rglob("*")))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else mode for path, mode in kinds}


def resume(trainer, run):
    data = trainer.data
    del trainer
    gc.collect()
    return ft.Trainer.resume(run, data=data)


# ---- the folder is held by what it is


def test_a_run_goes_on_in_its_folder_when_the_working_directory_changes(make_trainer, tmp_path, monkeypatch):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    trainer = make_trainer(run_dir="run", iters=4)
    assert trainer.run_dir == tmp_path / "one" / "run"
    monkeypatch.chdir(tmp_path / "two")
    trainer.run()
    assert os.listdir(tmp_path / "two") == [] and (tmp_path / "one" / "run" / "result.json").exists()


def test_a_relative_place_with_no_working_directory_is_told(make_trainer, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ft.FulltuneError, match="run: the working directory is gone"):
        make_trainer(run_dir="run")
    monkeypatch.chdir(tmp_path)


def test_the_source_of_a_model_is_kept_from_the_root(make_lm, tmp_path, monkeypatch):
    make_lm().save(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    lm = ft.load_model("base")
    monkeypatch.chdir("/")
    with pytest.raises(ModelError, match="source model's folder"):
        lm.save(tmp_path / "base" / "new")


@pytest.mark.parametrize("then", ["deleted", "moved", "begun anew", "without its lock"])
def test_a_run_that_has_lost_its_folder_writes_nothing_and_goes_on_elsewhere(make_trainer, tmp_path, then):
    straight = make_trainer()
    straight.run()
    run = tmp_path / "run"
    trainer = make_trainer(run_dir=run, save_every=2)
    trainer.run(3)
    if then == "without its lock":
        (run / LOCK_FILE).unlink()
    elif then == "deleted":
        shutil.rmtree(run)
    else:
        run.rename(tmp_path / "old")
    other = make_trainer(run_dir=run) if then == "begun anew" else None
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"run(\.lock)? (is gone|was removed).*trainer\.move_run"):
        trainer.run()
    assert contents(tmp_path) == before
    path = trainer.move_run(tmp_path / "elsewhere")
    assert path == tmp_path / "elsewhere" / "checkpoints" / f"step-{trainer.step_count:06d}" and trainer.run_dir == tmp_path / "elsewhere"
    trainer.run()
    assert trainer.history.events[0].kind == "move"
    again = resume(trainer, tmp_path / "elsewhere")
    assert [r.loss for r in again.history.steps] == [r.loss for r in straight.history.steps]
    assert read_metrics(tmp_path / "elsewhere")[0].steps == again.history.steps
    assert read_result(tmp_path / "elsewhere" / "result.json")["steps"] == again.step_count
    if other:
        other.run(1)
        assert (run / LOCK_FILE).exists()


def test_a_trainer_without_a_folder_gets_one(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.run(2)
    trainer.move_run(tmp_path / "run")
    trainer.run(1)
    trainer.save()
    assert resume(trainer, tmp_path / "run").step_count == 3


def test_a_run_that_cannot_move_stays_where_it_is(make_trainer, tmp_path, monkeypatch):
    trainer, other = make_trainer(run_dir=tmp_path / "run"), make_trainer(run_dir=tmp_path / "other")
    trainer.run(1)
    other.run(1)
    with pytest.raises(CheckpointError, match="already holds a run"):
        trainer.move_run(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr("fulltune_nb.training.run.write_checkpoint", lambda *_: (_ for _ in ()).throw(CheckpointError("the disk is full")))
        with pytest.raises(CheckpointError, match="the disk is full"):
            trainer.move_run(tmp_path / "new")
    trainer.run(1)
    assert trainer.run_dir == tmp_path / "run"
    trainer.move_run(tmp_path / "new")  # what the first try left is no obstacle
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_folder_that_is_moved_while_a_checkpoint_is_written_leaves_the_run_there_now_alone(make_trainer, tmp_path, monkeypatch):
    from fulltune_nb.training import state

    run, trainer, others = tmp_path / "run", make_trainer(run_dir=tmp_path / "run"), []
    trainer.run(1)
    written = state.fill_folder

    def move_meanwhile(partial, *arguments, **options):
        checksums = written(partial, *arguments, **options)
        if not others:
            run.rename(tmp_path / "old")
            others.append(make_trainer(run_dir=run))
            others[0].step()
            partial.mkdir(parents=True)  # as the next file that is written there would
        return checksums

    monkeypatch.setattr(state, "fill_folder", move_meanwhile)
    with pytest.raises(CheckpointError):
        trainer.save()
    assert os.listdir(run / "checkpoints") == ["step-000000"] and others[0].step().step == 2


def test_an_old_trainer_does_not_remove_the_lock_of_the_new_one(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run")
    trainer.run(1)
    shutil.rmtree(tmp_path / "run")
    new = make_trainer(run_dir=tmp_path / "run")
    del trainer
    gc.collect()
    new.run(1)
    assert (tmp_path / "run" / LOCK_FILE).exists()


FORK = """
import os, sys
from pathlib import Path
from fulltune_nb.errors import CheckpointError
from fulltune_nb.training.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
child = os.fork()
if child:
    print(child, flush=True)
    os._exit(9)  # as if killed
try:
    lock.check()
except CheckpointError as error:
    print(error, flush=True)
del lock
sys.stdin.read()
"""


def test_a_forked_child_neither_writes_nor_keeps_its_parents_lock(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", FORK, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines = {process.stdout.readline() for _ in range(2)}
    assert process.wait() == 9 and any("belongs to the process that this one was forked from" in line for line in lines)
    assert f"taken over from process {process.pid}" in RunLock(tmp_path).note  # while the child lives
    process.stdin.close()
    process.stdout.read()


def test_without_file_locks_a_clock_that_is_set_lets_nobody_in_and_the_later_of_two_has_the_folder(tmp_path, monkeypatch):
    import fcntl
    import json

    from fulltune_nb.training import lock as module

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    sleeper = subprocess.Popen(["sleep", "60"])
    owner = {"process": sleeper.pid, "process_started": 0.0, "host": socket.gethostname(), "since": "then"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(owner))
    with pytest.raises(CheckpointError, match="in use by process .*remove"):
        RunLock(tmp_path)
    sleeper.kill()
    sleeper.wait()
    first = RunLock(tmp_path)
    first.check()
    monkeypatch.setattr(module.psutil, "pid_exists", lambda process: False)  # as where both looked before either wrote
    monkeypatch.setattr(module, "_holders", type(module._holders)())  # another process
    second = RunLock(tmp_path)
    second.check()
    assert not first._file.is_at_its_place()


# ---- files of others


OTHERS = {
    "config.yaml": "# my experiment\niters: 2\n", "metrics.jsonl": '{"loss": 1.0, "epoch": 3}\n', "events.jsonl": "{}\n",
    "result.json": '{"mine": 1}', "best/model.safetensors": "mine", "checkpoints/epoch-1.ckpt": "mine", "run.lock": "my lock\n",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("options", [{}, {"resume": "auto"}], ids=["new", "auto"])
def test_a_folder_with_files_of_others_is_refused_by_name_and_left_as_it_is(make_trainer, tmp_path, name, options):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(OTHERS[name])
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before, trainer = contents(tmp_path), make_trainer()
    with pytest.raises(CheckpointError, match=rf"run holds {name.partition('/')[0]}, .*Nothing was changed"):
        ft.Trainer(trainer.lm, trainer.data, trainer.config, tmp_path / "run", **options)
    assert contents(tmp_path) == before
    path.unlink()
    if path.parent != tmp_path / "run":
        path.parent.rmdir()
    make_trainer(run_dir=tmp_path / "run").run(1)  # what a run does not write is in nobody's way
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_beginning_of_our_own_is_begun_again_with_other_settings(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run")
    trainer.evaluate("valid")
    trainer.event("note", "looked at")
    del trainer
    gc.collect()
    assert not holds_run(tmp_path / "run")
    make_trainer(run_dir=tmp_path / "run", seed=3, iters=2).run()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder link"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "config.yaml", "run.lock", "best", "checkpoints/step-000009"])
def test_links_and_pipes_in_a_runs_folder_are_refused_before_they_are_opened(make_trainer, tmp_path, name, kind):
    trainer, run = make_trainer(run_dir=tmp_path / "run"), tmp_path / "run"
    trainer.run(2)
    trainer.save()
    data, victim = trainer.data, tmp_path / "victim"
    del trainer
    gc.collect()
    (run / name).unlink(missing_ok=True)
    victim.mkdir() if kind == "folder link" else victim.write_text("mine\n")
    os.mkfifo(run / name) if kind == "pipe" else (run / name).symlink_to(victim)
    before = contents(tmp_path)
    for refused in (lambda: ft.Trainer.resume(run, data=data), lambda: make_trainer(run_dir=run)):
        with pytest.raises(CheckpointError, match=rf"{name} is a (link|pipe), expected|already holds a run"):
            refused()
    read_metrics(run), read_result(run / "result.json"), holds_run(run)  # others look at it without waiting for ever
    assert contents(tmp_path) == before


def test_a_link_that_is_planted_while_a_run_goes_on_is_not_followed(make_trainer, tmp_path):
    trainer, metrics = make_trainer(run_dir=tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    trainer.run(1)
    metrics.rename(tmp_path / "victim")
    metrics.symlink_to(tmp_path / "victim")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="metrics.jsonl is a link"):
        trainer.run(1)
    assert contents(tmp_path) == before
    metrics.unlink()
    trainer.run(1)
    assert trainer.step_count == 3


def test_a_run_folder_and_those_above_it_may_be_links(make_trainer, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "big")
    (tmp_path / "big" / "place").mkdir()
    (tmp_path / "big" / "run").symlink_to(tmp_path / "big" / "place")
    trainer = make_trainer(run_dir=tmp_path / "runs" / "run")
    trainer.run(1)
    trainer.save()
    assert resume(trainer, tmp_path / "big" / "place").step_count == 1


def test_a_file_beside_the_weights_harms_nothing_and_survives(make_trainer, tmp_path):
    run = tmp_path / "run"
    trainer = make_trainer(run_dir=run, save_every=1, keep=2, steps_per_eval=1, val_batches=1)
    trainer.run(2)
    for place in ("checkpoints/step-000002", "best"):
        (run / place / "model.gguf").write_text("mine")
        (run / place / "sub").mkdir()
    again = resume(trainer, run)
    assert again.step_count == 2 and any("left alone in step-000002" in event.message for event in again.history.events)
    assert ft.load_model(run / "checkpoints" / "step-000002").num_parameters
    again.run(3)
    kept = sorted(str(path.relative_to(run)) for path in run.rglob("kept-*/*"))
    assert "checkpoints/kept-step-000002/model.gguf" in kept and "checkpoints/kept-step-000002/sub" in kept
    assert (run / "best" / "model.gguf").exists() or "kept-best/model.gguf" in kept
    assert any("it is now kept-step-000002/model.gguf" in event.message for event in again.history.events)
    assert sorted(os.listdir(run / "checkpoints")) == ["kept-step-000002", "step-000004", "step-000005"]


def test_a_checkpoint_whose_manifest_cannot_be_read_keeps_its_files(make_trainer, tmp_path, monkeypatch):
    def fails(path):
        raise PermissionError(13, "Permission denied", str(path))

    trainer = make_trainer(run_dir=tmp_path / "run", iters=4, keep=1)
    trainer.step()
    trainer.save()
    before = contents(tmp_path / "run" / "checkpoints")
    monkeypatch.setattr("fulltune_nb.training.state._read_json", fails)
    with pytest.raises(CheckpointError, match="Permission denied"):
        trainer.save()
    assert contents(tmp_path / "run" / "checkpoints") == before


def test_rotation_removes_nothing_that_was_not_written_as_a_checkpoint(make_trainer, tmp_path):
    trainer, checkpoints = make_trainer(run_dir=tmp_path / "run", save_every=1, keep=1), tmp_path / "run" / "checkpoints"
    trainer.run(1)
    for name in ("step-000000", "step-000900", "left-step-000002", "epoch-3"):
        (checkpoints / name).mkdir(exist_ok=True)
        (checkpoints / name / "weights.bin").write_text("mine")
    before = contents(checkpoints)
    trainer.run(3)
    now = contents(checkpoints)
    assert all(now.get(name) == content for name, content in before.items() if not name.startswith("step-000001"))
    assert "step-000004" in now and "step-000001" not in now


def test_what_only_looks_like_something_left_by_a_killed_write_stays(make_trainer, tmp_path):
    trainer, run = make_trainer(run_dir=tmp_path / "run"), tmp_path / "run"
    trainer.run(1)
    trainer.save()
    for name in ("step-000000-mybackup", "step-000001-20240101", "step-000001-1a2b3c4d-old", "step-000001-1a2b3c4d"):
        name = f"checkpoints/.{name}"
        (run / name).mkdir()
        (run / name / "notes.txt").write_text("mine")
    for name in (".config-original.yaml", ".metrics-20240101.jsonl", ".result-version2.json"):
        (run / name).write_text("mine")
    before = contents(run)
    again = resume(trainer, run)
    now = contents(run)
    assert all(now[name] == content for name, content in before.items() if "/." in name or name.startswith("."))
    told = " ".join(event.message for event in again.history.events)
    assert "left .step-000000-mybackup alone" in told and "left .config-original.yaml alone" in told


# ---- folders of data and models


def test_links_out_of_a_data_folder_and_pipes_in_it_are_refused_by_name(tokenizer, tmp_path):
    folder, row = tmp_path / "data", '{"text": "hello"}\n'
    folder.mkdir()
    (tmp_path / "rows.jsonl").write_text(row)
    (folder / "train.jsonl").symlink_to(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl is a link out of the data folder, to .*load_data\(\{"):
        ft.load_data(folder, tokenizer)
    (folder / "train.jsonl").unlink()
    os.mkfifo(folder / "train.jsonl")
    with pytest.raises(DataError, match=r"train\.jsonl is a pipe"):
        ft.load_data(folder, tokenizer)
    (folder / "train.jsonl").unlink()
    (folder / "rows.jsonl").write_text(row)
    (folder / "train.jsonl").symlink_to("rows.jsonl")
    (tmp_path / "link").symlink_to(folder)
    assert len(ft.load_data(tmp_path / "link", tokenizer).train) == 1  # within the folder, through a link to it
    assert len(ft.load_data({"train": tmp_path / "rows.jsonl"}, tokenizer).train) == 1


def test_a_folder_for_the_package_datasets_is_looked_through_before_it_is_read(tokenizer, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "hello"}\n')
    os.mkfifo(tmp_path / "data" / "inner" / "test.jsonl")
    with pytest.raises(DataError, match=r"test\.jsonl is a pipe"):
        ft.load_data(f"hf:{tmp_path / 'data'}", tokenizer)


def test_a_pipe_in_a_model_folder_is_refused_by_name(make_lm, tmp_path):
    folder = make_lm().save(tmp_path / "base")
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(ModelError, match=r"generation_config\.json is a pipe"):
        ft.load_model(folder)


def test_what_cannot_be_read_at_a_resume_is_told_and_the_folder_let_go(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(run_dir=tmp_path / "run")
    trainer.run(1)
    lm, data = trainer.lm, trainer.data
    trainer.save()
    del trainer
    gc.collect()

    def denied(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="cannot be read: .*Permission denied"):
        patch.setattr("fulltune_nb.training.run.files_of_others", denied)
        ft.Trainer.resume(tmp_path / "run", lm, data)
    assert ft.Trainer.resume(tmp_path / "run", lm, data).step_count == 1
