"""A full disk, or one that cannot be written to, at each write: a clear error, the checkpoint before whole, no litter."""

import contextlib
import errno
import functools
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import fulltune_nb as ft
from fulltune_nb.errors import CheckpointError, FulltuneError, ModelError
from fulltune_nb.models.model_file import export_folder, save_model_file
from fulltune_nb.training import state
from fulltune_nb.training.run import RunDirectory, read_metrics
from fulltune_nb.training.state import list_checkpoints, read_state
from nbs_tests.training.conftest import make_rows
from nbs_tests.training.test_interrupts import run_script
from nbs_tests.training.test_resuming import MASKED

CALLS = [(os, name) for name in ("fsync", "replace", "rename", "mkdir", "open", "write")]


@pytest.fixture
def fail_at(monkeypatch):
    """`fail_at(n, number)`: from now on the n-th call that writes anything fails; returns a list that then holds its name."""

    def arm(n, number):
        count, failed = [0], []

        def failing(function, name):
            def call(*arguments, **options):
                if name == "open" and not arguments[1] & os.O_CREAT:
                    return function(*arguments, **options)
                count[0] += 1
                if count[0] == n:
                    failed.append(name)
                    raise OSError(number, os.strerror(number))
                return function(*arguments, **options)

            return call

        monkeypatch.undo()
        for place, name in CALLS:
            monkeypatch.setattr(place, name, failing(getattr(place, name), name))
        return failed

    return arm


def litter(folder):
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "again"),
    [(errno.ENOSPC, False), pytest.param(errno.EROFS, True, marks=pytest.mark.ci)],
    ids=["disk full, new checkpoint", "read-only, the same step again"],
)
def test_whatever_write_of_a_checkpoint_fails_the_one_before_is_whole(make_trainer, tmp_path, fail_at, monkeypatch, number, again):
    run = tmp_path / "run"
    trainer = make_trainer(run_dir=run, keep=100)
    trainer.run(2)
    trainer.save()
    if not again:
        trainer.step()
    failures = set()
    for n in range(1, 1000):
        before = [path.name for path in list_checkpoints(run / "checkpoints")]
        failed = fail_at(n, number)
        try:
            trainer.save()
        except CheckpointError as error:
            assert os.strerror(number) in str(error) and "checkpoint" in str(error)
        finally:
            monkeypatch.undo()
        if not failed:
            break
        failures.add(failed[0])
        after = [path.name for path in list_checkpoints(run / "checkpoints")]
        assert set(before) <= set(after) and not litter(run), failed
        for folder in list_checkpoints(run / "checkpoints"):
            read_state(folder)
        for new in set(after) - set(before):  # its last flush failed: it is whole, but may not outlast a power cut
            shutil.rmtree(run / "checkpoints" / new)
    assert n > 20 and {"fsync", "replace", "mkdir", "open", "write"} <= failures


@pytest.mark.parametrize("name", ["best", "metrics", "result", "model file", "export", "new run", "snapshot"])
def test_whatever_other_write_fails_is_an_error_that_names_the_file(make_trainer, make_lm, make_data, tmp_path, fail_at, monkeypatch, name):
    run = tmp_path / "run"
    trainer = make_trainer(run_dir=run, iters=2)
    trainer.run()
    counter, best = iter(range(10_000)), RunDirectory.create(tmp_path / "best", trainer.config)
    works = {
        "best": lambda: best.save_best(trainer.lm, 1),
        "metrics": lambda: trainer.evaluate("valid"),
        "result": lambda: trainer.evaluate("test"),
        "model file": lambda: save_model_file(tmp_path / "model.npz", trainer.lm),
        "export": lambda: export_folder(trainer.lm, tmp_path / "out", {}),
        "new run": lambda: ft.Trainer(make_lm(), trainer.data, trainer.config, tmp_path / f"new{next(counter)}"),
        "snapshot": lambda: trainer.snapshot(tmp_path / f"snapshot{next(counter)}"),
    }
    works[name]()
    stride = 5 if name in ("best", "export", "snapshot") else 1  # many writes, all of them a checkpoint's too, tested above
    for n in range(1, 1000, stride):
        failed = fail_at(n, errno.ENOSPC)
        try:
            works[name]()
        except FulltuneError as error:
            assert "No space left" in str(error) and str(tmp_path) in str(error)
        else:
            assert not failed or failed[0] in ("rename", "mkdir"), failed  # the export goes under another name; the folder is there
        finally:
            monkeypatch.undo()
        if name == "new run":
            gc.collect()
        assert not litter(tmp_path), failed
        if not failed:
            break
    assert n > 1


@pytest.mark.parametrize("limit", [1_000, 100_000, 300_000])
def test_a_limit_on_the_size_of_files_stops_the_run_with_an_error_and_it_goes_on_later(make_trainer, make_data, tmp_path, limit, capsys):
    # capsys: what is printed goes into memory, and not into a file that the limit is for too
    straight, trainer = make_trainer(), make_trainer(run_dir=tmp_path / "run", save_every=2)
    straight.run()
    trainer.run(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large|Unable to write|No space"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not litter(tmp_path / "run")
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    assert resumed.step_count == 2
    resumed.run()
    assert [r.loss for r in resumed.history.steps] == [r.loss for r in straight.history.steps]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_stops_the_run_or_not_as_configured(make_trainer, tmp_path, monkeypatch, policy):
    trainer = make_trainer(run_dir=tmp_path / "run", save_every=2, on_save_error=policy, steps_per_eval=2)
    trainer.run(2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    if policy == "stop":
        with pytest.raises(CheckpointError, match="No space left"):
            trainer.run()
        assert trainer.step_count == 4
    else:
        trainer.run(3)
        assert trainer.step_count == 5
        failed = [event for event in trainer.history.events if event.kind == "save_failed"]
        assert failed and "No space left" in failed[0].message and "Earlier checkpoints are untouched" in failed[0].message
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000000", "step-000002"]
    monkeypatch.undo()
    trainer.run()
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-000008"


def test_the_best_weights_that_could_not_be_written_are_written_when_the_run_goes_on(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(run_dir=tmp_path / "run", steps_per_eval=2, iters=4)
    trainer.run(1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(CheckpointError, match="No space left"):
            trainer.run(1)
    assert trainer.state == "failed" and trainer.patience.best_loss == trainer.history.evals[-1].loss and trainer.step_count == 2
    next(trainer.steps())
    best = ft.load_model(tmp_path / "run" / "best")
    assert ft.Trainer(best, trainer.data, trainer.config).evaluate("valid").loss == pytest.approx(trainer.patience.best_loss, rel=1e-6)


def fails_at(monkeypatch, name):
    """Checkpoints are written, but not into the folder of a name."""
    real = state.put_in_place

    def put(new, place):
        if place.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(new, place)

    monkeypatch.setattr(state, "put_in_place", put)


def test_best_weights_that_could_not_be_written_are_by_the_next_save_or_a_resume(make_trainer, make_data, tmp_path, monkeypatch):
    for again in ("save", "resume"):
        run = tmp_path / again
        trainer = make_trainer(run_dir=run, steps_per_eval=2, save_every=2, on_save_error="continue")
        with monkeypatch.context() as patch:
            fails_at(patch, "best")
            trainer.run(2)
        assert not (run / "best").exists()
        if again == "save":
            trainer.save()
        else:
            del trainer
            gc.collect()
            next(ft.Trainer.resume(run, data=make_data(10, **MASKED)).steps())
        assert json.loads((run / "best" / "trainer.json").read_text())["step"] == 2
        first, best = (run / place / "model.safetensors" for place in ("checkpoints/step-000002", "best"))
        assert first.read_bytes() == best.read_bytes()


def test_best_weights_that_are_gone_when_there_is_room_are_told(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(run_dir=tmp_path / "run", steps_per_eval=2, iters=4, on_save_error="continue")
    with monkeypatch.context() as patch:
        fails_at(patch, "best")
        trainer.run(3)
    told = [event.message for event in trainer.history.events if event.kind == "save_failed"]
    assert len(told) == 2 and told[1].startswith("best/ has not the weights of step 2, whose validation loss is the lowest")


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_metrics_that_cannot_be_written_are_told_and_written_later(make_trainer, tmp_path, policy, monkeypatch):
    trainer = make_trainer(run_dir=tmp_path / "run", on_save_error=policy)
    trainer.run(2)
    path = tmp_path / "run" / "metrics.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("fulltune_nb.training.run.append_line", fail_with(errno.ENOSPC))
        if policy == "stop":
            with pytest.raises(CheckpointError, match=r"metrics.jsonl could not be written: .*No space left"):
                trainer.run(2)
            assert trainer.step_count == 3
        else:
            trainer.run(2)
            told = [event for event in trainer.history.events if event.kind == "save_failed"]
            assert len(told) == 1 and "metrics.jsonl" in told[0].message
    trainer.run(1)
    written = sum(report.kind_of_report != "event" for report in trainer.history)
    assert len(path.read_text().splitlines()) == written


def test_a_tokenizer_that_cannot_be_written_is_told_and_the_run_goes_on_as_configured(make_lm, make_data, tmp_path, monkeypatch):
    lm, data = make_lm(), make_data(10, **MASKED)
    config = ft.TrainConfig(iters=2, batch_size=4, mask_prompt=True, on_save_error="continue")
    trainer = ft.Trainer(lm, data, config, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(type(lm.tokenizer), "save_pretrained", raising(Exception("No space left on device (os error 28)")))
        trainer.run()
        with pytest.raises(CheckpointError, match=r"step-000002 could not be written: the tokenizer could not be written .*No space left"):
            trainer.save()
        with pytest.raises(ModelError, match="the tokenizer could not be written .*No space left"):
            lm.save(tmp_path / "out")
    assert trainer.done and os.listdir(tmp_path) == ["run"] and not litter(tmp_path)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == [] and trainer.save().is_dir()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(run_dir=tmp_path / "run")
    trainer.run(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(CheckpointError, match=r"a checkpoint needs [\d,]+ bytes, .* has 1,000 free"):
        trainer.save()
    assert not litter(tmp_path / "run")


@contextlib.contextmanager
def as_ordinary_user():
    """Root may write into any folder; inside this block nobody's rights count."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_directory(make_trainer):
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # pytest's own folders cannot even be entered by others
        os.chmod(place, 0o755)
        checkpoints = Path(place) / "run" / "checkpoints"
        trainer = make_trainer(run_dir=Path(place) / "run", iters=2)
        trainer.run(1)
        checkpoints.chmod(0o555)
        with as_ordinary_user(), pytest.raises(CheckpointError, match=r"step-000001 could not be written: .*Permission denied"):
            trainer.save()
        assert os.listdir(checkpoints) == ["step-000000"]
        read_state(checkpoints / "step-000000")
        checkpoints.chmod(0o755)
        trainer.run()
        assert list_checkpoints(checkpoints)[-1].name == "step-000002" and not litter(Path(place))


def small_disk(place, size):
    """Mounts a file system of its own; skips the test where that is not allowed."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be made here")


def test_a_folder_that_becomes_read_only_and_writable_again(make_trainer, tmp_path):
    straight, trainer = make_trainer(), make_trainer(run_dir=tmp_path / "run", save_every=2)
    straight.run()
    trainer.run(2)
    place = tmp_path / "run" / "checkpoints"
    uses = {
        "a checkpoint": trainer.save,
        "steps": trainer.run,
        "a snapshot": functools.partial(trainer.snapshot, place / "snapshot"),
        "a fork": functools.partial(trainer.fork, place / "fork"),
        "a new run": functools.partial(make_trainer, run_dir=place / "other"),
    }
    try:
        # root may write into any folder, but not where a read-only mount stands
        for mount in (["--bind", str(place), str(place)], ["-o", "remount,bind,ro", str(place)]):
            if shutil.which("mount") is None or subprocess.run(["mount", *mount], capture_output=True).returncode:
                pytest.skip("nothing can be mounted here")
        for name, use in uses.items():
            with pytest.raises(CheckpointError, match="Read-only file system"):
                use()
            assert sorted(place.iterdir()) == [place / "step-000000", place / "step-000002"], name
    finally:
        subprocess.run(["umount", "-l", str(place)], capture_output=True)
    trainer.run()
    assert [r.loss for r in trainer.history.steps] == [r.loss for r in straight.history.steps]
    assert list_checkpoints(place)[-1].name == "step-000008" and not litter(tmp_path / "run")


def test_a_small_disk_that_fills_up(make_lm, tokenizer, tmp_path):
    place = tmp_path / "disk"
    small_disk(place, "19m")
    try:
        config = ft.TrainConfig(iters=40, batch_size=2, save_every=1, keep=40)
        trainer = ft.Trainer(make_lm(), ft.load_data({"train": make_rows(6)}, tokenizer), config, place / "run")
        with pytest.raises(CheckpointError, match="No space left"):
            trainer.run()
        whole = list_checkpoints(place / "run" / "checkpoints")
        assert whole and not litter(place)
        assert read_state(whole[-1])["step"] == len(whole) - 1
        with pytest.raises((ModelError, CheckpointError)):
            (place / "filler").write_bytes(b"") or trainer.save()
    finally:
        del trainer
        gc.collect()
        subprocess.run(["umount", "-l", str(place)], capture_output=True)


def test_a_full_disk_refuses_to_go_back_or_to_resume_before_anything_is_changed(make_trainer, tmp_path, monkeypatch):
    """The living trainer goes on with its own weights and optimizer afterwards, not with a mixture."""
    straight = make_trainer()
    straight.run(4)
    trainer = make_trainer(run_dir=tmp_path / "run")
    start = trainer.snapshot()
    trainer.run(2)
    trainer.save()
    trainer.run(1)
    for refused in (lambda: trainer.restore(start), lambda: ft.Trainer.resume(tmp_path / "run", trainer.lm, trainer.data)):
        monkeypatch.setattr(os, "fsync", fail_with(errno.ENOSPC))
        with pytest.raises(CheckpointError, match="metrics.jsonl could not be written"):
            refused()
        monkeypatch.undo()
    gc.collect()
    trainer.run(1)
    assert [r.loss for r in trainer.history.steps] == [r.loss for r in straight.history.steps]
    steps = [r.step for r in read_metrics(tmp_path / "run")[0].steps]
    assert steps == [1, 2, 3, 4] and trainer.step_count == 4


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which(os.environ.get("CC", "cc")), reason="the shim is for Linux and a compiler")
def test_some_calls_of_a_save_and_an_export_fail_one_at_a_time():
    """All of them, and those of a resume: `python -m nbs_tests.benchmarks.failing_calls`."""
    some = ["--scenarios", "checkpoint", "export", "reports", "--ways", "0", "--every", "12", "--first", "5"]
    done = run_script("failing_calls", *some)
    assert done.returncode == 0 and "something was wrong after 0" in done.stdout, done.stdout + done.stderr


def fail_with(number):
    return raising(OSError(number, os.strerror(number)))


def raising(error):
    def call(*arguments, **options):
        raise error

    return call
