"""What runs are ranked by: never by the test loss unasked, never across losses over other tokens, with means over seeds."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.experiments import result as results
from fulltune_nb.experiments.ranking import Ranking
from fulltune_nb.experiments.result import git_state
from fulltune_nb.experiments.runs import Run
from fulltune_nb.experiments.space import random_points
from fulltune_nb.experiments.table import Sweep


@pytest.fixture
def sweep_of(tmp_path):
    def make(*runs, **ranking):
        """A sweep of (parameters, result) each, all of them done."""
        made = []
        for number, (parameters, result) in enumerate(runs):
            run = Run(parameters, tmp_path / str(number), f"run {number}", status="done", attempt=1)
            run.run_dir.mkdir(parents=True)
            (run.run_dir / "result.json").write_text(json.dumps(result))
            made.append(run)
        return Sweep(made, tmp_path, ranking=Ranking(**ranking))

    return make


def report(loss, tokens=9, **more):
    return {"loss": loss, "tokens": tokens, **more}


@pytest.mark.parametrize(
    ("result", "name", "value"),
    [
        ({"test": report(2.0), "valid_last": report(1.0)}, "valid_loss", 1.0),  # as the trainer writes them
        ({"test": report(2.0), "valid_last": report(1.0)}, "test_loss", 2.0),
        ({"valid_loss": 3.0, "valid_last": report(2.0)}, "valid_loss", 3.0),
        ({"test_loss": 3.0}, "valid_loss", None),
        ({"after": report(4.0, split="valid")}, "valid_loss", 4.0),
        ({"after": report(4.0, split="test"), "valid_last": None}, "valid_loss", None),
        ({"after": 3, "valid_last": "x"}, "valid_loss", None),
        ({"steps": 4, "valid_last": report(2.0, step=0)}, "valid_loss", None),  # of the base
        ({"steps": 4, "valid_last": report(2.0, step=4)}, "valid_loss", 2.0),
        ({"exact_match": 0.5}, "exact_match", 0.5),
        ({"scores": {"sql": {"right": 0.25}}}, "scores.sql.right", 0.25),
        ({"exact_match": True}, "exact_match", None),
        ({"valid_loss": float("nan")}, "valid_loss", None),
    ],
)
def test_the_number_is_found_wherever_the_result_has_it(result, name, value):
    assert Ranking(name).value(result) == value


def test_the_best_run_has_the_lowest_validation_loss_though_another_has_the_lowest_test_loss(sweep_of):
    sweep = sweep_of(({"x": 1}, {"valid_loss": 2.0, "test_loss": 0.1}), ({"x": 2}, {"valid_loss": 1.0, "test_loss": 0.9}))
    assert [run.parameters["x"] for run in sweep] == [2, 1] and sweep.best is sweep[0]
    assert list(sweep.to_frame().columns)[:6] == ["x", "status", "valid_loss", "tokens", "seconds", "test_loss"]
    assert sweep.text().splitlines()[1].split() == ["x=2", "done", "1.0000", "0.9000"]


def test_a_named_number_ranks_and_the_highest_first_where_that_is_wanted(sweep_of):
    runs = [({"x": x}, {"valid_loss": x, "exact_match": x / 10}) for x in (1, 3, 2)]
    assert [run.parameters["x"] for run in sweep_of(*runs, name="exact_match", maximize=True)] == [3, 2, 1]


def test_without_a_validation_loss_nothing_is_best_and_what_there_is_is_named(sweep_of):
    sweep = sweep_of(({"x": 1}, {"test_loss": 2.0}), ({"x": 2}, {"test_loss": 1.0}))
    assert sweep.best is None
    assert "2 of 2 runs that are done have no valid_loss in result.json and are not ranked; they have test_loss" in sweep.text()


def test_losses_over_other_tokens_are_not_compared_without_a_word(sweep_of):
    runs = [
        ({"mask_prompt": mask, "seed": seed}, {"valid_loss": loss, "valid_last": report(loss, tokens)})
        for mask, seed, loss, tokens in ((True, 0, 0.5, 300), (False, 0, 0.3, 900), (True, 1, 0.4, 300), (False, 1, 0.2, 900))
    ]
    sweep = sweep_of(*runs)
    assert {tokens: [run.parameters["seed"] for run in group] for tokens, group in sweep.groups.items()} == {900: [1, 0], 300: [1, 0]}
    for shown in (sweep.text(), sweep._repr_html_()):
        assert "valid_loss is a mean over other tokens in some runs" in shown and "300 tokens" in shown and "900 tokens" in shown
    with pytest.raises(ft.ConfigError, match="which of 2 groups is the best"):
        _ = sweep.best
    assert Sweep([run for run in sweep if run.parameters["mask_prompt"]], sweep.out_dir).best.parameters["seed"] == 1


def test_runs_with_several_seeds_have_a_mean_and_a_standard_deviation(sweep_of):
    losses = {1e-3: (1.0, 2.0, 3.0), 1e-2: (1.5, 1.5, 1.2)}
    runs = [({"rate": rate, "seed": seed}, {"valid_loss": loss}) for rate, own in losses.items() for seed, loss in enumerate(own)]
    sweep = sweep_of(*runs)
    first, second = sweep.over_seeds()
    assert first["parameters"] == {"rate": 1e-2} and second["parameters"] == {"rate": 1e-3}
    assert (second["runs"], second["mean"], second["sd"]) == (3, 2.0, 1.0)
    assert first["sd"] == pytest.approx(np.std(losses[1e-2], ddof=1))
    assert "rate=0.001  3     2.0000" in sweep.text()
    assert "standard deviation" not in Sweep([run for run in sweep if run.parameters["seed"] == 0], sweep.out_dir).text()


def test_the_plots_have_a_point_for_each_run_whatever_the_values_are(sweep_of):
    hostile = "$<b>\n"
    values = [(1e-4, hostile, None), (1e-3, "adamw", [1, 2]), (1e-2, "adamw", {"low": True}), (1e-2, "lion", None)]
    runs = [({"rate": r, "optimizer": o, "other": x}, {"valid_loss": n}) for n, (r, o, x) in enumerate(values)]
    sweep = sweep_of(*runs)
    figure = sweep.plot_parameters()
    figure.canvas.draw()
    assert [ax.get_xlabel() for ax in figure.axes] == ["rate", "optimizer", "other"]
    assert [ax.get_xscale() for ax in figure.axes] == ["log", "linear", "linear"]
    assert all(len(ax.lines[1].get_xdata()) == 4 for ax in figure.axes)
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.0, 1.0, 2.5]  # means
    ax = sweep.plot_parallel()
    ax.figure.canvas.draw()
    best = max(ax.lines, key=lambda line: line.get_linewidth())
    assert [text.get_text() for text in ax.get_xticklabels()] == ["rate", "optimizer", "other", "valid_loss"]
    assert best.get_ydata()[0] == 0.0 and best.get_ydata()[-1] == 0.0  # the lowest rate, the lowest loss
    assert "valid_loss against each parameter" in sweep._repr_html_()


def test_plots_of_runs_without_a_value_say_so(sweep_of):
    sweep = sweep_of(({"rate": 1}, {}), ({"rate": 2}, {}))
    for ax in (sweep.plot_parameters().axes[0], sweep.plot_parallel()):
        assert [text.get_text() for text in ax.texts] == ["no run has a value yet"]


def test_random_points_lie_in_the_ranges_and_are_the_same_with_the_same_seed():
    space = {"rate": {"low": 1e-5, "high": 1e-1, "log": True}, "size": {"low": 1, "high": 64}, "optimizer": ["adamw", "lion"], "iters": 5}
    points = random_points(space, 200, seed=1)
    assert points == random_points(space, 200, seed=1) and points[:50] == random_points(space, 50, seed=1) != random_points(space, 50)
    assert {point["optimizer"] for point in points} == {"adamw", "lion"} and {point["iters"] for point in points} == {5}
    assert all(1e-5 <= p["rate"] <= 1e-1 and 1 <= p["size"] <= 64 and type(p["size"]) is int for p in points)
    assert 0.35 < sum(p["rate"] < 1e-3 for p in points) / 200 < 0.65  # half of the decades
    assert random_points({"beta": {"low": 0.99998, "high": 0.99999}}, 1)[0]["beta"] <= 0.99999  # though rounded


@pytest.mark.parametrize(
    ("space", "runs", "message"),
    [
        ({}, 1, "expected {name:"),
        ({"x": []}, 1, "x: expected choices"),
        ({"x": {"low": 0, "high": 1.0, "log": True}}, 1, "x: expected a range above 0"),
        ({"x": {"low": "1", "high": 2}}, 1, "x: expected a range"),
        ({"x": [object()]}, 1, "x: expected a number"),
        ({"x": [1, 2]}, 3, "expected 3 different points, of this space 2"),
        ({"x": [1, 2]}, 0, "runs: expected"),
    ],
)
def test_spaces_that_cannot_be_drawn_from_are_refused(space, runs, message):
    with pytest.raises(ft.ConfigError, match=message):
        random_points(space, runs)


def test_the_record_has_the_commit_and_whether_files_were_changed_since(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None
    commands = (["init", "-q"], ["add", "a"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "a"])
    (tmp_path / "a").write_text("1")
    for command in commands:
        subprocess.run(["git", *command], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert git_state() == {"commit": commit, "changed": False}
    (tmp_path / "a").write_text("2")
    assert git_state() == {"commit": commit, "changed": True}
    git = results._git
    monkeypatch.setattr(results, "_git", lambda *arguments: None if arguments[0] == "status" else git(*arguments))
    assert git_state() == {"commit": commit, "changed": None}  # as where git takes too long
