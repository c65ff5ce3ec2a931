"""Many runs of one notebook: what fails stays, what is done is not repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import nbformat
import psutil
import pytest

import fulltune_nb as ft
from fulltune_nb.data.settings import DATE_VARIABLE
from fulltune_nb.experiments import parameters as points
from fulltune_nb.experiments.runs import Run
from fulltune_nb.experiments.table import Sweep

WORK = """
import json, os, pathlib
folder = pathlib.Path(run_dir); folder.mkdir(parents=True)
(folder / "pid").write_text(str(os.getpid()))
if x in (3, 7):
    raise ValueError(f"{x} cannot be <b>had</b>")
report = {"kind": "eval", "split": "valid", "perplexity": 1.0, "tokens": 9, "seconds": 0.1}
lines = [{**report, "step": s, "loss": x / (s + 1)} for s in range(3)]
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
_ = (folder / "result.json").write_text(json.dumps({"valid_loss": x / 10, "test_loss": -x}))
"""


def notebook_of(path: Path, *sources: str, parameters: str = 'x: int = 1\nname: str = ""\nrun_dir: str = ""') -> Path:
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, sources)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.mark.ci
def test_of_twelve_runs_two_fail_by_design_and_only_these_are_repeated(tmp_path):
    notebook_of(tmp_path / "n.ipynb", WORK)
    grid = "grid: {x: [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]}"
    (tmp_path / "sweep.yaml").write_text(f"notebook: n.ipynb\nout_dir: {tmp_path}/out\njobs: 3\n{grid}\nfixed: {{name: a}}\n")
    command = [sys.executable, "-m", "fulltune_nb.sweep", str(tmp_path / "sweep.yaml")]
    first = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert first.returncode == 1 and first.stderr == ""
    assert "12 runs" in first.stdout and "10 done, 2 failed" in first.stdout
    pids = {path: path.read_text() for path in (tmp_path / "out").glob("*/*/run/pid")}
    assert len(set(pids.values())) == 12  # each a process of its own
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 1 and "10 of them done before" in again.stdout
    new = set((tmp_path / "out").glob("*/*/run/pid")) - set(pids)
    assert {path.parents[1].name for path in new} == {"2"} and len(new) == 2
    assert all(path.read_text() == text for path, text in pids.items())
    shown = ft.sweep(tmp_path / "n.ipynb", {"x": [12, 11, 10, 9, 8, 6, 5, 4, 2, 1], "name": "a"}, tmp_path / "out")  # nothing left to run
    assert [run.parameters["x"] for run in shown] == [1, 2, 4, 5, 6, 8, 9, 10, 11, 12] and shown.best is shown[0]
    reasons = [line for line in again.stdout.splitlines() if line.startswith("failed: ")]
    assert len(reasons) == 2 and all("ValueError: " in line and "cannot be <b>had</b>" in line for line in reasons)
    page = (tmp_path / "out" / "sweep.html").read_text("utf-8")
    assert "cannot be &lt;b&gt;had" in page and "<b>" not in page and "data:image/png" in page


def test_the_table_is_sorted_by_loss_and_ends_with_failures_and_what_was_not_started(tmp_path):
    runs = []
    for number, (status, loss) in enumerate([("failed", None), ("done", 2.0), ("not started", None), ("done", None), ("done", 1.0)]):
        run = Run(
            {"x": number}, tmp_path / str(number), f"x={number}", status=status, attempt=1, reason="bad" if status == "failed" else ""
        )
        if loss is not None:
            run.attempt_folder.mkdir(parents=True)
            (run.attempt_folder / "result.json").write_text(json.dumps({"after": {"loss": loss, "split": "valid"}}))
        runs.append(run)
    sweep = Sweep(runs, tmp_path)
    assert [run.parameters["x"] for run in sweep] == [4, 1, 3, 0, 2]
    assert "5 runs" in repr(sweep) and "3 done, 1 failed, 1 not started" in repr(sweep) and "\n" not in repr(sweep)
    assert list(sweep.to_frame()["valid_loss"])[:2] == [1.0, 2.0] and "failed: x=0: bad" in sweep.text()


def test_damaged_files_of_a_run_are_named_in_the_table(tmp_path):
    run = Run({"x": 1}, tmp_path, "x=1", status="done", attempt=1)
    run.run_dir.mkdir(parents=True)
    report = {"kind": "eval", "split": "valid", "step": 0, "loss": 1.0, "perplexity": 1.0, "tokens": 9, "seconds": 0.1}
    (run.run_dir / "metrics.jsonl").write_text(f'{{"kind"\n{json.dumps(report)}\n')
    (run.run_dir / "result.json").write_text('{"test_loss": 1.0')
    sweep = Sweep([run], tmp_path)
    assert len(run.history) == 1
    for shown in (sweep.text(), sweep._repr_html_()):
        assert "x=1: metrics.jsonl: 1 line is no report and was passed over (line 1)" in shown
        assert f"x=1: {run.run_dir / 'result.json'} is no result" in shown


@pytest.mark.ci
def test_a_cell_that_exits_or_a_process_that_is_killed_is_a_failure_that_stops_nobody(tmp_path, monkeypatch):
    code = "import os, signal\n" + "if x == 1: raise SystemExit(0)\n" + "if x == 2: os.kill(os.getpid(), signal.SIGKILL)"
    notebook = notebook_of(tmp_path / "n.ipynb", "import sys\nif x == 1: exit()", code, "y = 1")
    sweep = ft.sweep(notebook, {"x": [1, 2, 3]}, tmp_path / "out", jobs=3)
    reasons = {run.parameters["x"]: run.reason for run in sweep.failed}
    assert sorted(reasons) == [1, 2] and [run.parameters["x"] for run in sweep.done] == [3]
    assert "kernel died" in reasons[2] and reasons[1]


@pytest.mark.ci
def test_runs_side_by_side_have_temporary_folders_of_their_own(tmp_path):
    code = "import pathlib, tempfile, time\npathlib.Path(run_dir).with_name('folder').write_text(tempfile.gettempdir())\ntime.sleep(3)"
    sweep = ft.sweep(notebook_of(tmp_path / "n.ipynb", code), {"x": [1, 2]}, tmp_path / "out", jobs=2)
    folders = {path.read_text() for path in (tmp_path / "out").glob("*/*/folder")}
    assert len(sweep.done) == 2 and len(folders) == 2 and not any(Path(folder).exists() for folder in folders)


@pytest.mark.ci
def test_runs_one_after_the_other_use_the_temporary_folder_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    code = "import pathlib, tempfile\npathlib.Path(run_dir).with_name('folder').write_text(tempfile.gettempdir())"
    sweep = ft.sweep(notebook_of(tmp_path / "n.ipynb", code), {"x": [1]}, tmp_path / "out")
    assert len(sweep.done) == 1 and [p.read_text() for p in (tmp_path / "out").glob("*/*/folder")] == [str(tmp_path / "tmp")]
    assert not list((tmp_path / "tmp").glob("fulltune_nb-sweep-*"))


def test_all_runs_have_the_day_on_which_the_sweep_began(tmp_path, monkeypatch):
    days, start = [], subprocess.Popen
    process = [sys.executable, "-c", "pass"]

    def start_another(command, **options):
        days.append(options["env"][DATE_VARIABLE])
        return start(process, stdin=options["stdin"])

    monkeypatch.setattr(subprocess, "Popen", start_another)
    notebook = notebook_of(tmp_path / "n.ipynb", "pass")
    for day, grid in (("2026-11-29", [1, 2]), ("2026-11-30", [3])):
        monkeypatch.setenv(DATE_VARIABLE, day)
        ft.sweep(notebook, {"x": grid}, tmp_path / "out")
    assert days == ["2026-11-29"] * 3


@pytest.mark.ci
def test_stop_on_failure_starts_no_further_run(tmp_path, capsys):
    notebook = notebook_of(tmp_path / "n.ipynb", "1 / 0")
    sweep = ft.sweep(notebook, [{"x": 1}, {"x": 2}, {"x": 3}], tmp_path / "out", stop_on_failure=True)
    assert [run.status for run in sweep] == ["failed", "not started", "not started"] and "ZeroDivisionError" in sweep[0].reason
    out = capsys.readouterr().out
    assert "[1/3] failed: x=1" in out and "2 not started" in out
    assert not list((tmp_path / "out").glob("x=2*/*"))


@pytest.mark.ci
def test_an_interrupt_ends_what_is_running_and_the_next_call_begins_it_anew(tmp_path):
    code = "import pathlib, time\npathlib.Path(run_dir + '.started').touch()\ntime.sleep(60 if x else 0)"
    notebook = notebook_of(tmp_path / "n.ipynb", code)
    code = f"import fulltune_nb as ft; ft.sweep({str(notebook)!r}, {{'x': [0, 1]}}, {str(tmp_path / 'out')!r}, jobs=2)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while "[1/2] done" not in process.stdout.readline():
        assert time.monotonic() < deadline
    while not list((tmp_path / "out").glob("x=1*/1/run.started")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    state = json.loads(next((tmp_path / "out").glob("x=1*/state.json")).read_text())
    assert state["status"] == "failed" and state["reason"] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGHUP, marks=pytest.mark.ci)])
def test_a_sweep_that_ends_has_its_runs_saved_and_takes_them_with_it(tmp_path, number):
    code = """
import os, pathlib, psutil, signal, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(run_dir + ".saved").touch(), os._exit(0)))
pathlib.Path(run_dir + ".pids").write_text(f"{os.getpid()} {os.getppid()}")
time.sleep(60)
"""
    notebook = notebook_of(tmp_path / "n.ipynb", code)
    (tmp_path / "sweep.yaml").write_text(f"notebook: {notebook}\nout_dir: {tmp_path}/out\ngrid: {{x: [1, 2]}}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "fulltune_nb.sweep", str(tmp_path / "sweep.yaml")],
        stdout=subprocess.DEVNULL,
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),  # also where the tests run under nohup
    )
    wait_for(lambda: [path for path in (tmp_path / "out").glob("x=1*/1/run.pids") if path.read_text()])
    pids = [int(pid) for pid in next((tmp_path / "out").glob("x=1*/1/run.pids")).read_text().split()]
    with pytest.raises(ft.ConfigError, match="sweep: out_dir .* is in use by a sweep or search"):
        ft.sweep(notebook, {"x": [3]}, tmp_path / "out")
    process.send_signal(number)
    assert process.wait(30) == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert list((tmp_path / "out").glob("x=1*/1/run.saved")) and not list((tmp_path / "out").glob("x=2*/1"))


def wait_for(what, seconds=30):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "grid, message",
    [
        ({"y": [1]}, "has no parameter 'y'"),
        ([], "nothing to run"),
        ({"x": []}, "nothing to run"),
        ([{"x": 1}, {"x": 1}], "runs 1 and 2"),
        ("x", "expected {name: "),
        ([1], "list of dicts"),
        ({"x": [object()]}, "x: expected a number"),
        ({"x": [float("nan")]}, "x: expected"),
        ({"a b": [1]}, "no parameter's name"),
        ([{"naem": "a"}], "Did you mean 'name'"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(tmp_path, grid, message):
    with pytest.raises(ft.ConfigError, match=message):
        ft.sweep(notebook_of(tmp_path / "n.ipynb", "1"), grid, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_jobs_and_notebooks_that_cannot_be_used_are_refused(tmp_path):
    notebook = notebook_of(tmp_path / "n.ipynb", "1")
    for jobs in (0, True, 1.5, "2"):
        with pytest.raises(ft.ConfigError, match="jobs: expected a whole number"):
            ft.sweep(notebook, {"x": [1]}, tmp_path / "out", jobs)
    with pytest.raises(ft.ConfigError, match="none.ipynb"):
        ft.sweep("none.ipynb", {"x": [1]}, tmp_path / "out")
    (tmp_path / "bad.ipynb").write_text("{}")
    with pytest.raises(ft.ConfigError, match="bad.ipynb"):
        ft.sweep(tmp_path / "bad.ipynb", {"x": [1]}, tmp_path / "out")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "untagged.ipynb")
    with pytest.raises(ft.ConfigError, match="no cell tagged 'parameters'"):
        ft.sweep(tmp_path / "untagged.ipynb", {"x": [1]}, tmp_path / "out")


def test_folder_names_are_safe_and_the_same_whatever_the_order():
    hostile = {"name": "../../<b> ☃\n" + "x" * 200, "x": 1}
    name = points.folder_name(hostile)
    assert Path(name).name == name and name.isascii() and len(name) < 80 and not name.startswith(".")
    assert points.digest({"a": 1, "b": 2}) == points.digest({"b": 2, "a": 1}) != points.digest({"a": 1, "b": 2.5})


YAML = [
    ("notebook: n.ipynb\nout_dir: o\ngird: {x: [1]}", r"s.yaml:3: unknown setting 'gird'. Did you mean 'grid'"),
    ("notebook: n.ipynb\nout_dir: o", "found none"),
    ("notebook: n.ipynb\nout_dir: o\ngrid: {x: 1}\nruns: []", "found grid and runs"),
    ("notebook: n.ipynb\nout_dir: o\nrandom: {rnus: 2}", "random: unknown setting 'rnus'. Did you mean 'runs'"),
    ("notebook: n.ipynb\nout_dir: o\nrandom: {runs: 2, space: {x: {low: 2, high: 1}}}", "x: expected a range"),
    ("notebook: n.ipynb\nout_dir: o\ngrid: {x: 1}\nrank_by: 3", "rank_by: expected the name"),
    ("out_dir: o\ngrid: {x: 1}", "notebook: expected a path"),
    ("notebook: n.ipynb\nout_dir: o\nruns: 3", "s.yaml:3: runs: expected a list"),
    ("notebook: n.ipynb\nout_dir: o\ngrid: {x: 1}\nstop_on_failure: 'false'", "stop_on_failure: expected True or False"),
]


@pytest.mark.parametrize("text, message", YAML)
def test_mistakes_in_the_file_are_named_and_end_with_code_2(tmp_path, capsys, text, message):
    import importlib
    import re

    command = importlib.import_module("fulltune_nb.sweep.__main__")
    (tmp_path / "s.yaml").write_text(text)
    assert command.main([str(tmp_path / "s.yaml")]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_in_a_notebook_a_table_changes_in_place(tmp_path, monkeypatch):
    from fulltune_nb.experiments.sweep import ProgressTable

    shown = []

    class Handle:
        def update(self, html):
            shown.append(html.data)

    monkeypatch.setattr("IPython.display.display", lambda html, display_id: shown.append(html.data) or Handle())
    runs = [Run({"x": 1}, tmp_path / "1", "x=<i>"), Run({"x": 2}, tmp_path / "2", "x=2", status="done")]
    table = ProgressTable(runs)
    runs[0].status, runs[0].reason = "failed", "<script>"
    table.update(runs[0])
    table.end(Sweep(runs, tmp_path))
    assert "1 waiting" in shown[0] and "1 failed" in shown[1] and "Failures" in shown[-1]
    assert not any("<script>" in text or "<i>" in text for text in shown)


def test_a_run_under_way_tells_its_step_its_loss_and_the_time_left(tmp_path, monkeypatch, capsys):
    from fulltune_nb.experiments.sweep import ProgressLines

    run = Run({"x": 1}, tmp_path, "x=1", status="running", attempt=1)
    (tmp_path / "1" / "run").mkdir(parents=True)
    assert run.outcome() == ""
    (tmp_path / "1" / "run" / "metrics.jsonl").write_text('{"kind": "step", "step": 7, "epoch": 0.1, "loss": 2.5, "tokens": 3}\n{"kind"')
    assert run.outcome() == "step 7, loss 2.500"
    log = "x\nstep 20/500: loss 0.25, lr 1.0e-03, 9 tokens/s, peak 69.57 MB, 1:26 left\nstep 20/500: valid loss 0.2, perplexity 1.2\n"
    (tmp_path / "1" / "log.txt").write_text(log)
    assert run.outcome() == "step 20/500, loss 0.25, 1:26 left"
    monkeypatch.setattr("fulltune_nb.experiments.sweep._LINE_SECONDS", 0.0)
    ProgressLines([run]).update()
    assert "running: x=1: step 20/500, loss 0.25, 1:26 left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "kernel", "kind"),
    [("", True, "ProgressTable"), ("", False, "ProgressLines"), ("plain", True, "ProgressLines"), ("off", True, "Progress")],
)
def test_where_the_progress_is_shown(tmp_path, monkeypatch, wanted, kernel, kind):
    from fulltune_nb.experiments.sweep import progress_of

    monkeypatch.setattr("fulltune_nb.panels.progress.in_kernel", lambda: kernel)
    monkeypatch.setenv("FULLTUNE_PROGRESS", wanted)
    assert type(progress_of([Run({"x": 1}, tmp_path, "x=1")])).__name__ == kind


def test_the_functions_name_stays_the_functions_when_the_command_is_imported():
    code = "import fulltune_nb as ft, fulltune_nb.sweep, fulltune_nb.sweep.__main__; assert ft.sweep.__name__ == 'sweep'"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).returncode == 0


@pytest.mark.ci
def test_the_experiment_notebook_in_a_sweep_of_the_real_thing(tmp_path):
    grid = [{"iters": 3, "val_batches": 1, "learning_rate": 1e-3}, {"iters": 3, "val_batches": 1, "learning_rate": "fast"}]
    sweep = ft.sweep("10_experiment.ipynb", grid, tmp_path / "out", jobs=2)
    best = sweep.best
    assert len(sweep.done) == 1 and best.result["test_loss"] < best.result["before"]["loss"] and best.result["config"]["iters"] == 3
    assert [len(run.history.steps) for run in sweep.done] == [3] and "learning_rate" in sweep.failed[0].reason
    cells = nbformat.read(best.executed, as_version=4).cells
    assert not [output for cell in cells for output in cell.get("outputs", []) if output.get("name") == "stderr"]
    assert os.path.isdir(best.run_dir / "checkpoints") and threading.active_count() >= 1
