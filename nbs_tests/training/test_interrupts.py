"""Signals during a run: it ends at a whole step, saved; a second one stops at once and leaves what is on the disk whole."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.errors import TrainingError
from fulltune_nb.training.signals import ENDING, StoppedAtOnce, Termination, interrupts_deferred
from fulltune_nb.training.state import list_checkpoints, read_state
from nbs_tests.training.conftest import make_rows
from nbs_tests.training.test_resuming import MASKED
from nbs_tests.training.test_trainer import weights_of


class AtStep:
    """Sends signals in the middle of a step, where the trainer tells of it."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step(self, trainer, report):
        if report.step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.fixture
def terminations():
    """Where SIGTERM and SIGHUP go when a run has let go of them."""
    arrived = []
    before = {number: signal.signal(number, lambda number, frame: arrived.append(number)) for number in ENDING}
    yield arrived
    for number, handler in before.items():
        signal.signal(number, handler)


def newest(run_dir):
    return list_checkpoints(run_dir / "checkpoints")[-1].name


@pytest.mark.parametrize(
    ("number", "sigint"),
    [(signal.SIGTERM, signal.default_int_handler), (signal.SIGTERM, signal.SIG_IGN), (signal.SIGHUP, signal.default_int_handler)],
    ids=["SIGTERM", "SIGTERM, SIGINT turned off", "SIGHUP"],
)
def test_a_signal_that_ends_processes_ends_the_run_at_a_whole_step_saved(make_trainer, make_data, tmp_path, terminations, number, sigint):
    straight, trainer = make_trainer(), make_trainer(run_dir=tmp_path / "run")
    straight.run()
    at_save, before = [], signal.signal(signal.SIGINT, sigint)

    class Saved:
        def on_save(self, trainer, path):
            at_save.append((path.name, list(terminations)))

    try:
        trainer.run(callbacks=[AtStep(3, number, number), Saved()])
    finally:
        signal.signal(signal.SIGINT, before)
    assert trainer.interrupted and trainer.step_count == 3 and newest(tmp_path / "run") == "step-000003"
    assert at_save[-1] == ("step-000003", []) and terminations == [number]  # only when it is saved
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    resumed.run()
    assert [r.loss for r in resumed.history.steps] == [r.loss for r in straight.history.steps]


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_that_somebody_has_turned_off_stays_off(make_trainer, number):
    before = signal.signal(number, signal.SIG_IGN)  # as nohup does with SIGHUP
    try:
        trainer = make_trainer()
        trainer.run(callbacks=[AtStep(3, number)])
        assert trainer.done and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_second_sigint_stops_at_once_and_a_broken_step_is_never_saved(make_trainer, make_data, tmp_path):
    straight, trainer = make_trainer(), make_trainer(run_dir=tmp_path / "run", save_every=2)
    straight.run()
    trainer.run(3)
    update, updated = trainer.optimizers.update_tensors, []

    def broken_off(model, gradients, rows):
        update(model, gradients, rows)
        updated.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        updated.append(2)

    trainer.optimizers.update_tensors = broken_off
    with pytest.raises(StoppedAtOnce):
        trainer.run()
    assert updated == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for use in (trainer.save, trainer.run, trainer.snapshot, trainer.fork):
        with pytest.raises(TrainingError, match=r"Step 4 was broken off .*Trainer.resume"):
            use()
    assert newest(tmp_path / "run") == "step-000002"
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(10, **MASKED))
    resumed.run()
    assert [r.loss for r in resumed.history.steps] == [r.loss for r in straight.history.steps]
    assert all(np.array_equal(array, weights_of(straight)[name]) for name, array in weights_of(resumed).items())


def test_a_snapshot_repairs_a_trainer_whose_step_was_broken_off(make_trainer):
    straight, trainer = make_trainer(), make_trainer()
    straight.run()
    trainer.run(3)
    snapshot = trainer.snapshot()
    trainer.optimizers.step += 1  # as an update leaves it that does not come to its end
    with pytest.raises(TrainingError, match="restore"):
        trainer.run()
    trainer.restore(snapshot)
    trainer.run()
    assert [r.loss for r in trainer.history.steps] == [r.loss for r in straight.history.steps]


def test_an_interrupt_during_a_checkpoint_waits_for_it(make_trainer, tmp_path):
    class AtSave:
        def on_save(self, trainer, path):
            if path.name == "step-000004":
                os.kill(os.getpid(), signal.SIGINT)

    saves = []

    class Count:
        def on_save(self, trainer, path):
            saves.append(path.name)

    trainer = make_trainer(run_dir=tmp_path / "run", save_every=2)
    trainer.run(callbacks=[AtSave(), Count()])
    assert trainer.interrupted and trainer.step_count == 4
    assert saves == ["step-000000", "step-000002", "step-000004"]  # not written a second time for the pause


def test_an_interrupt_between_deferral_and_its_end_is_not_lost():
    termination = Termination()
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        termination.watch()
        with pytest.raises(KeyboardInterrupt):
            with interrupts_deferred():
                os.kill(os.getpid(), signal.SIGTERM)
                inner = True
        assert inner and termination.arrived
        with pytest.raises(KeyboardInterrupt):
            with interrupts_deferred():  # the block from before has left nothing behind
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        termination.leave()
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", ENDING)
def test_the_command_saves_the_model_file_too_when_it_is_ended(make_lm, tmp_path, number):
    base = make_lm().save(tmp_path / "base")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(10)))
    command = [sys.executable, "-m", "fulltune_nb.full", "--train", "--model", str(base), "--data", "data", "--iters", "1000000"]
    command += ["--run-dir", "run", "--steps-per-report", "1"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "FULLTUNE_PROGRESS": "plain"}
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=partial(take_terminal, theirs)
    ) as process:
        os.close(theirs)
        seen = b""
        while b"step 3/" not in seen and process.poll() is None:
            seen += os.read(ours, 1000)
        if number == signal.SIGHUP:
            os.close(ours)  # the connection drops: the system sends SIGHUP, and what is printed from then on is an error
            rest = "--resume goes on from here"
        else:
            process.send_signal(number)
            rest = read_to_end(ours)
        process.wait(60)
    assert process.returncode == 128 + number, rest
    assert "--resume goes on from here" in rest and (tmp_path / "model.npz").exists()
    newest_folder = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert read_state(newest_folder)["step"] >= 3


def take_terminal(descriptor):
    """Makes it the terminal of a session of this process, which hears of its end also where the tests run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.setsid()
    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


def read_to_end(terminal):
    parts = []
    with contextlib.suppress(OSError):  # Linux's way to say that nobody writes there any more
        while part := os.read(terminal, 1000):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def run_script(name, *arguments):
    command = [sys.executable, "-m", f"nbs_tests.benchmarks.{name}", *arguments]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2], env=environment)


@pytest.mark.ci
@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="the script forks, which Metal does not bear")
def test_a_run_killed_at_random_instants_goes_on_bit_for_bit():
    done = run_script("killed_runs", "--kills", "5", "--seed", "1")
    assert done.returncode == 0 and "5 of 5 kills survived" in done.stdout, done.stdout + done.stderr


@pytest.mark.ci
@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="the script forks, which Metal does not bear")
def test_a_run_interrupted_at_random_instants_is_always_that_of_a_whole_step():
    done = run_script("interrupted_runs", "--interrupts", "2", "--seed", "1")
    assert done.returncode == 0 and done.stdout.count("2 of 2 interrupts") == 3, done.stdout + done.stderr


def test_an_evaluation_that_an_interrupt_came_upon_is_not_done_again(make_trainer, make_data, tmp_path):
    class Interrupts:
        def on_eval(self, trainer, report):
            if report.step == 2:
                raise KeyboardInterrupt

    trainer = make_trainer(run_dir=tmp_path / "run", steps_per_eval=2)
    trainer.run(callbacks=[Interrupts()])
    assert trainer.interrupted and trainer.step_count == 2
    resumed = ft.Trainer.resume(tmp_path / "run", data=trainer.data)
    for one in (trainer, resumed):
        assert one.patience.last_step == 2
    del trainer
    resumed.run(2)
    assert [report.step for report in resumed.history.evals] == [0, 2, 4]
    assert (tmp_path / "run" / "best").is_dir()
