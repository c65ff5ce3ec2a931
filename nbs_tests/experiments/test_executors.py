"""Runs done by an executor: the same table wherever they are done, and what is lost with a worker is begun again."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

import fulltune_nb as ft
from fulltune_nb.experiments import executors, worker
from fulltune_nb.experiments.runs import Run
from nbs_tests.experiments.test_sweep import notebook_of, wait_for

STAND_IN = """
import json, pathlib, sys, threading, time, os
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(143)), daemon=True).start()
folder = pathlib.Path(sys.argv[1])
x = json.loads((folder / "request.json").read_text())["parameters"]["x"]
time.sleep(SECONDS if folder.name == "1" or SECONDS > 9 else 0)
(folder / "result.json").write_text(json.dumps({"valid_loss": x / 10, "date": os.environ["FULLTUNE_TEMPLATE_DATE"]}))
(folder / "outcome.json").write_text(json.dumps({"status": "done"}))
"""


@pytest.fixture
def stand_in(monkeypatch):
    """In the place of a kernel a short program; forked workers have it too."""

    def set_up(seconds=0.0):
        def start(folder, date, temporary):
            command = [sys.executable, "-c", STAND_IN.replace("SECONDS", str(seconds)), str(folder)]
            return subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "FULLTUNE_TEMPLATE_DATE": date})

        monkeypatch.setattr(worker, "_start", start)

    return set_up


class ProcessEach:
    """A process for each submitted run, as of Slurm; one that is killed leaves the others alone."""

    def __init__(self):
        self.pools = []

    def submit(self, function, *arguments):
        self.pools.append(ProcessPoolExecutor(1, multiprocessing.get_context("fork")))
        return self.pools[-1].submit(function, *arguments)


@pytest.fixture
def processes():
    made = ProcessEach()
    yield made
    for pool in made.pools:
        pool.shutdown()


def killing(monkeypatch, out: Path, attempts: int):
    """Has the workers of x=2's first attempts killed while they run."""
    ended = executors.Dispatcher.ended

    def instead(self, seconds=1.0):
        for number in range(1, attempts + 1):
            for path in out.glob(f"x=2*/{number}/begun"):
                if (text := path.read_text().split()) and not (path.parent / "killed").exists():
                    (path.parent / "killed").touch()
                    os.kill(int(text[1]), signal.SIGKILL)
        return ended(self, 0.05)

    monkeypatch.setattr(executors.Dispatcher, "ended", instead)


def test_runs_by_processes_and_by_threads_give_the_same_table(tmp_path, stand_in, processes):
    stand_in()
    notebook = notebook_of(tmp_path / "n.ipynb", "pass")
    one = ft.sweep(notebook, {"x": [3, 1, 2]}, tmp_path / "a")
    other = ft.sweep(notebook, {"x": [3, 1, 2]}, tmp_path / "b", executor=processes)
    assert len(one.done) == len(other.done) == 3 and len(processes.pools) == 3
    assert [row["valid_loss"] for row in one.rows()] == [row["valid_loss"] for row in other.rows()] == [0.1, 0.2, 0.3]
    assert {run.host for run in other} == {run.host for run in one} and other.best.host


def test_a_run_whose_worker_is_killed_is_marked_and_begun_again(tmp_path, stand_in, processes, monkeypatch):
    stand_in(seconds=1.0)
    killing(monkeypatch, tmp_path / "out", attempts=1)
    sweep = ft.sweep(notebook_of(tmp_path / "n.ipynb", "pass"), {"x": [1, 2]}, tmp_path / "out", executor=processes)
    assert len(sweep.done) == 2 and {run.parameters["x"]: run.attempt for run in sweep} == {1: 1, 2: 2}
    assert "x=2: attempt 1 was lost with its worker: BrokenProcessPool" in sweep.text()
    state = json.loads((sweep[1].folder / "state.json").read_text())
    assert state["status"] == "done" and len(state["lost"]) == 1


def test_a_run_that_loses_its_worker_three_times_has_failed(tmp_path, stand_in, processes, monkeypatch):
    stand_in(seconds=10.0)
    killing(monkeypatch, tmp_path / "out", attempts=3)
    sweep = ft.sweep(notebook_of(tmp_path / "n.ipynb", "pass"), {"x": [2]}, tmp_path / "out", executor=processes)
    assert sweep[0].status == "failed" and sweep[0].attempt == 3 and "attempt 3 was lost with its worker" in sweep[0].reason


def test_an_executor_that_takes_no_more_ends_the_sweep_with_its_reason(tmp_path):
    class Closed:
        def submit(self, *_):
            raise RuntimeError("cannot schedule new futures after shutdown")

    sweep = ft.sweep(notebook_of(tmp_path / "n.ipynb", "pass"), {"x": [1, 2]}, tmp_path / "out", executor=Closed())
    assert [run.status for run in sweep] == ["failed", "not started"] and "after shutdown" in sweep[0].reason


def test_an_interrupt_ends_runs_that_an_executor_has(tmp_path, stand_in, processes, monkeypatch):
    stand_in(seconds=60.0)

    def interrupted(self, seconds=1.0):
        wait_for(lambda: list((tmp_path / "out").glob("x=1*/1/begun")))
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(executors.Dispatcher, "ended", interrupted)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ft.sweep(notebook_of(tmp_path / "n.ipynb", "pass"), {"x": [1]}, tmp_path / "out", executor=processes)
    state = json.loads(next((tmp_path / "out").glob("x=1*/state.json")).read_text())
    assert (state["status"], state["reason"]) == ("failed", "interrupted") and time.monotonic() - started < 30


def test_an_interrupt_cancels_what_waits_and_kills_nothing_that_runs(tmp_path, stand_in, monkeypatch):
    stand_in(seconds=60.0)
    cancelled = []

    class Engine(ProcessEach):
        """Whose cancel kills, as scancel of a running job."""

        def submit(self, function, *arguments):
            future = Future() if self.pools else super().submit(function, *arguments)
            monkeypatch.setattr(future, "cancel", lambda: cancelled.append(arguments[0]) or future.set_exception(OSError("killed")))
            return future

    def interrupted(self, seconds=1.0):
        wait_for(lambda: list((tmp_path / "out").glob("x=1*/1/begun")))
        monkeypatch.setattr(executors.Dispatcher, "ended", ended)
        raise KeyboardInterrupt

    ended, engine = executors.Dispatcher.ended, Engine()
    monkeypatch.setattr(executors.Dispatcher, "ended", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ft.sweep(notebook_of(tmp_path / "n.ipynb", "pass"), {"x": [1, 2]}, tmp_path / "out", executor=engine)
    engine.pools[0].shutdown()
    assert [Path(attempt).parent.name[:3] for attempt in cancelled] == ["x=2"]


INTERRUPTED = """
import os, sys
from concurrent.futures import ProcessPoolExecutor
import fulltune_nb as ft
from fulltune_nb.experiments import worker
from nbs_tests.experiments.test_executors import STAND_IN
import subprocess
worker._start = lambda folder, date, place: subprocess.Popen(
    [sys.executable, "-c", STAND_IN.replace("SECONDS", "60"), str(folder)], stdin=subprocess.PIPE, start_new_session=True)
import multiprocessing
with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
    ft.sweep({notebook!r}, {{"x": [1, 2, 3, 4, 5, 6]}}, {out!r}, executor=pool)
"""


def test_ctrl_c_with_a_pool_of_processes_leaves_no_run_queued(tmp_path):
    out, notebook = tmp_path / "out", notebook_of(tmp_path / "n.ipynb", "pass")
    program = INTERRUPTED.format(notebook=str(notebook), out=str(out))
    sweep = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list(out.glob("*/1/begun"))) == 2)
    time.sleep(0.5)
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does: the sweep and the pool's processes
    assert sweep.wait(60) != 0
    states = [json.loads(path.read_text()) for path in out.glob("*/state.json")]
    assert [state["status"] for state in states] == ["failed"] * 6 and {state["attempt"] for state in states} == {1}


def test_a_run_that_begins_while_it_is_cancelled_is_waited_for_or_never_begins(tmp_path, stand_in, monkeypatch):
    stand_in(seconds=60.0)
    begun = []

    class Racing(Future):
        """Which a worker takes in the very moment in which it is cancelled, as one of Dask's may."""

        def cancel(self):
            begun.append(worker.work(*self.arguments))
            return super().cancel()

    class Engine:
        def submit(self, function, *arguments):
            future = Racing()
            future.arguments = arguments
            return future

    def interrupted(self, seconds=1.0):
        monkeypatch.setattr(executors.Dispatcher, "ended", ended)
        raise KeyboardInterrupt

    ended = executors.Dispatcher.ended
    monkeypatch.setattr(executors.Dispatcher, "ended", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ft.sweep(notebook_of(tmp_path / "n.ipynb", "pass"), {"x": [1]}, tmp_path / "out", executor=Engine())
    assert ["begun_before" in outcome for outcome in begun] == [True]  # no process was started that nobody waits for
    state = json.loads(next((tmp_path / "out").glob("x=1*/state.json")).read_text())
    assert (state["status"], state["attempt"]) == ("failed", 1)


def attempt_of(folder: Path) -> Path:
    (folder / "1").mkdir()
    (folder / "1" / "request.json").write_text(json.dumps({"parameters": {"x": 1}}))
    return folder / "1"


def test_a_worker_does_not_write_into_an_attempt_that_another_has_begun(tmp_path, stand_in):
    stand_in()
    attempt = attempt_of(tmp_path)
    assert worker.work(str(attempt), "2026-11-30")["code"] == 0
    assert str(os.getpid()) in worker.work(str(attempt), "2026-11-30")["begun_before"]  # Dask's nanny repeats by itself


def test_an_executors_own_repetition_becomes_a_new_attempt(tmp_path, stand_in):
    stand_in()

    class Twice:
        def submit(self, function, *arguments):
            function(*arguments)
            future = Future()
            future.set_result(function(*arguments))
            return future

    sweep = ft.sweep(notebook_of(tmp_path / "n.ipynb", "pass"), {"x": [1]}, tmp_path / "out", executor=Twice())
    assert sweep[0].attempt == 3 and sweep[0].status == "failed" and "had begun it and is gone" in sweep[0].reason


def test_a_worker_whose_sweep_is_silent_or_says_stop_ends_its_run(tmp_path, stand_in, monkeypatch):
    stand_in(seconds=60.0)
    monkeypatch.setattr(worker, "_LOOKS_WITHOUT_A_BEAT", 2)
    (tmp_path / "heartbeat").write_text("7\n")
    assert worker.work(str(attempt_of(tmp_path)), "2026-11-30", worker.OF_ITS_OWN, str(tmp_path / "heartbeat"))["code"] == 143
    (tmp_path / "b").mkdir()
    (attempt := attempt_of(tmp_path / "b")).joinpath("stop").touch()
    assert worker.work(str(attempt), "2026-11-30")["code"] == -15


def test_an_attempt_that_did_not_end_is_told_to_when_the_next_one_begins(tmp_path):
    run = Run({"x": 1}, tmp_path / "x=1", "x=1")
    first = run.begin(tmp_path / "n.ipynb", "", [])
    again = Run({"x": 1}, tmp_path / "x=1", "x=1")
    again.recall()
    second = again.begin(tmp_path / "n.ipynb", "", [])
    (second / "outcome.json").write_text("{}")
    third = again.begin(tmp_path / "n.ipynb", "", [])
    assert [(attempt / "stop").exists() for attempt in (first, second, third)] == [True, False, False] and not again.stops


def test_what_cannot_submit_is_refused(tmp_path):
    with pytest.raises(ft.ConfigError, match="executor: expected something with submit.* got int"):
        ft.sweep(notebook_of(tmp_path / "n.ipynb", "pass"), {"x": [1]}, tmp_path / "out", executor=3)


def installed(name):
    missing = importlib.util.find_spec(name) is None and not os.environ.get("CI")
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{name} is not installed; it is in CI"))


@pytest.mark.ci
@pytest.mark.parametrize("name", [installed("submitit"), installed("distributed")])
def test_submitit_and_dask_run_the_notebook_itself(tmp_path, name):
    code = "_ = pathlib.Path(run_dir, 'result.json').write_text(json.dumps({'valid_loss': x / 10}))"
    notebook = notebook_of(tmp_path / "n.ipynb", "import json, pathlib\npathlib.Path(run_dir).mkdir()", code)
    if name == "submitit":
        import submitit

        executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
        sweep = ft.sweep(notebook, {"x": [2, 1]}, tmp_path / "out", executor=executor)
    else:
        from dask.distributed import Client, LocalCluster

        quiet = {"local_directory": tmp_path, "dashboard_address": None}
        with LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster, Client(cluster) as client:
            sweep = ft.sweep(notebook, {"x": [2, 1]}, tmp_path / "out", executor=client.get_executor())
    assert [run.parameters["x"] for run in sweep.done] == [1, 2]
