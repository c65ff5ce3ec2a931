"""A search by Optuna: twenty trials, hopeless ones pruned, resumed after a kill."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys

import pytest

import fulltune_nb as ft
from fulltune_nb.experiments import worker
from fulltune_nb.experiments.search import STORAGE
from nbs_tests.experiments.test_sweep import notebook_of, wait_for

INSTALLED = importlib.util.find_spec("optuna") is not None
WITH_OPTUNA = pytest.mark.skipif(not INSTALLED and not os.environ.get("CI"), reason="optuna is not installed; it is in CI")
SPACE = {"x": {"low": 0.0, "high": 10.0}, "name": ["a", ["b", 1]], "steps": 6}

# In the place of a kernel: a run whose validation loss is (x - 3)**2 at its end, a step at a time
STAND_IN = """
import json, pathlib, sys, threading, time, os
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(143)), daemon=True).start()
folder = pathlib.Path(sys.argv[1])
given = json.loads((folder / "request.json").read_text())["parameters"]
pathlib.Path(given["run_dir"]).mkdir()
for step in range(1, given["steps"] + 1):
    loss = (given["x"] - 3) ** 2 + 1 / step
    report = {"kind": "eval", "split": "valid", "step": step, "loss": loss, "perplexity": 1.0, "tokens": 9, "seconds": 0.1}
    with pathlib.Path(given["run_dir"], "metrics.jsonl").open("a") as file:
        file.write(json.dumps(report) + "\\n")
    time.sleep(SECONDS if given["x"] > 5 else 0)
if given["x"] > 9.5:
    (folder / "outcome.json").write_text(json.dumps({"status": "failed", "reason": "too large"}))
    sys.exit(1)
(pathlib.Path(given["run_dir"]) / "result.json").write_text(json.dumps({"valid_loss": loss}))
(folder / "outcome.json").write_text(json.dumps({"status": "done"}))
"""


def use_stand_in(seconds: float) -> None:
    def start(folder, date, temporary):
        return subprocess.Popen([sys.executable, "-c", STAND_IN.replace("SECONDS", str(seconds)), str(folder)], stdin=subprocess.PIPE)

    worker._start = start


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_start", None)
    use_stand_in(0.0)
    return notebook_of(tmp_path / "n.ipynb", "pass", parameters='x: float = 1\nname: str = ""\nsteps: int = 1\nrun_dir: str = ""')


@WITH_OPTUNA
def test_a_search_finds_the_best_values_and_more_trials_go_on_with_it(notebook, tmp_path):
    found = ft.search(notebook, SPACE, tmp_path / "out", trials=6)
    again = ft.search(notebook, SPACE, tmp_path / "out", trials=9)
    assert len(found) == 6 and len(again) == 9 and {run.folder for run in found} < {run.folder for run in again}
    assert all(0 <= run.parameters["x"] <= 10 and run.parameters["name"] in ("a", ["b", 1]) for run in again)
    assert {run.parameters["steps"] for run in again} == {6}
    assert again.best.result["valid_loss"] == min(run.result["valid_loss"] for run in again.done)
    assert again.study.best_value == again.best.result["valid_loss"]
    assert all(run.attempt == 1 for run in again)  # nothing was repeated
    with pytest.raises(ft.ConfigError, match="space: the search in .* was begun with"):
        ft.search(notebook, {**SPACE, "steps": 5}, tmp_path / "out")


@WITH_OPTUNA
def test_hopeless_trials_are_pruned_and_told(notebook, tmp_path, capsys):
    import optuna

    use_stand_in(3.0)

    class Behind(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return float(trial.params["x"]) > 5

    sampler = optuna.samplers.RandomSampler(seed=5)
    space = {"x": SPACE["x"], "steps": 6}
    found = ft.search(notebook, space, tmp_path / "out", trials=4, jobs=4, sampler=sampler, pruner=Behind())
    assert len(found.done) == 2 and all(run.parameters["x"] < 5 for run in found.done)
    assert len(found.pruned) == 2 and all(run.parameters["x"] > 5 for run in found.pruned)
    assert all(run.attempt_folder.is_dir() and run.reason.startswith("at step ") for run in found.pruned)
    out = capsys.readouterr().out
    assert "2 done, 2 pruned, 0 failed" in out and f"pruned: {found.pruned[0].label}: at step" in out
    assert "lay behind" in found._repr_html_()
    states = [trial.state.name for trial in found.study.trials]
    assert states.count("PRUNED") == states.count("COMPLETE") == 2
    shown = ft.search(notebook, space, tmp_path / "out", trials=4)  # all are there already
    assert len(shown.pruned) == 2 and len(shown.done) == 2


@WITH_OPTUNA
def test_a_trial_that_fails_is_told_to_optuna_and_counts(notebook, tmp_path):
    found = ft.search(notebook, {**SPACE, "x": {"low": 9.6, "high": 10.0}}, tmp_path / "out", trials=2)
    assert [run.status for run in found] == ["failed", "failed"] and found.best is None and "too large" in found[0].reason
    assert [trial.user_attrs["reason"] for trial in found.study.trials] == ["too large", "too large"]


@WITH_OPTUNA
def test_another_number_can_be_the_highest_and_then_nothing_is_pruned(notebook, tmp_path):
    found = ft.search(notebook, SPACE, tmp_path / "out", trials=3, rank_by="valid_perplexity", maximize=True)
    assert len(found) == 3 and found.best is None  # no run has it, and each trial says so
    assert "Nothing was pruned" in found.text() and "no valid_perplexity in result.json" in str(found.study.trials[0].user_attrs)


KILLED = """
import fulltune_nb as ft
from nbs_tests.experiments.test_search import SPACE, use_stand_in
use_stand_in(0.3)
ft.search({notebook!r}, SPACE, {out!r}, trials=20, jobs=2)
"""


@pytest.mark.long
@WITH_OPTUNA
def test_twenty_trials_resumed_after_a_kill(notebook, tmp_path):
    out = tmp_path / "a?b#c%20"  # nothing of which a URL may take for its own
    process = subprocess.Popen([sys.executable, "-c", KILLED.format(notebook=str(notebook), out=str(out))], stdout=subprocess.DEVNULL)
    wait_for(lambda: len(list(out.glob("*/1/outcome.json"))) >= 4, seconds=180)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/1/run/result.json")}
    found = ft.search(notebook, SPACE, out, trials=20, jobs=2)
    ended = [trial for trial in found.study.trials if trial.state.name in ("COMPLETE", "PRUNED") or "reason" in trial.user_attrs]
    assert len(ended) == 20 and len(found) == 20 and (out / STORAGE).is_file()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # what was done is not done again
    cut_off = [trial.params for trial in found.study.trials if trial.state.name == "FAIL" and "reason" not in trial.user_attrs]
    assert 1 <= len(cut_off) <= 2 and all(any(trial.params == params for trial in ended) for params in cut_off if params)
    assert {run.status for run in found} <= {"done", "pruned", "failed"}


@pytest.mark.ci
@WITH_OPTUNA
def test_a_search_runs_the_notebook_itself_and_keeps_every_executed_one(tmp_path):
    space = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "iters": 4, "steps_per_eval": 1, "val_batches": 1}
    found = ft.search("10_experiment.ipynb", space, tmp_path / "out", trials=3)
    assert len(found) == 3 and all(run.executed.is_file() for run in found)
    assert found.best.result["config"]["learning_rate"] == found.best.parameters["learning_rate"]


@pytest.mark.skipif(INSTALLED, reason="optuna is installed")
def test_without_optuna_the_command_to_install_it_is_named(notebook, tmp_path):
    with pytest.raises(ft.errors.MissingDependencyError, match=r"pip install 'fulltune_nb\[optuna\]'"):
        ft.search(notebook, SPACE, tmp_path / "out")


@WITH_OPTUNA
def test_trials_of_the_same_values_share_a_pruned_run(notebook, tmp_path):
    import optuna

    use_stand_in(0.5)

    class Behind(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return float(trial.params["x"]) > 5

    sampler = optuna.samplers.RandomSampler(seed=0)
    found = ft.search(notebook, {"x": [6, 1], "steps": 9}, tmp_path / "out", trials=6, jobs=2, sampler=sampler, pruner=Behind())
    states = [(trial.params["x"], trial.state.name) for trial in found.study.trials]
    assert set(states) == {("6", "PRUNED"), ("1", "COMPLETE")} and states.count(("6", "PRUNED")) > 1
    assert [run.parameters["x"] for run in found.pruned] == [6] and found.pruned[0].attempt == 1  # once, for all of them


def test_a_growing_file_of_metrics_is_read_on_from_where_it_ended(tmp_path):
    from fulltune_nb.training.run_files import read_on

    path, steps = tmp_path / "metrics.jsonl", lambda found: [report.step for report in found.evals]
    line = '{"kind": "eval", "split": "valid", "step": %d, "loss": 1.0, "perplexity": 1.0, "tokens": 9, "seconds": 0.1}\n'
    assert read_on(tmp_path, 0) == ([], 0)
    path.write_text(line % 1 + line[:9])
    found, end = read_on(tmp_path, 0)
    assert steps(found) == [1] and end == len(line % 1)
    path.write_text(line % 1 + "no report\n" + line % 2)
    found, end = read_on(tmp_path, end)
    assert steps(found) == [2] and end == path.stat().st_size
    path.write_text(line % 3)  # begun anew
    assert steps(read_on(tmp_path, end)[0]) == [3]


@WITH_OPTUNA
def test_a_folder_in_use_is_told_in_a_searchs_own_name(notebook, tmp_path):
    from fulltune_nb.experiments.sweep import own_folder

    with own_folder(tmp_path / "out"), pytest.raises(ft.ConfigError, match="search: out_dir .* is in use by a sweep or search"):
        ft.search(notebook, SPACE, tmp_path / "out")
