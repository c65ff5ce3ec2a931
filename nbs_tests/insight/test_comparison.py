"""Runs are compared from what their folders say, whole or damaged."""

from __future__ import annotations

import json

import pytest

import fulltune_nb as ft
from nbs_tests.insight.conftest import HOSTILE, assert_harmless


@pytest.fixture
def runs(make_trainer, tmp_path):
    """Folders of two short runs with other rates and batch sizes."""
    folders = []
    for name, settings in (("a", {"learning_rate": 1e-3}), ("b", {"learning_rate": 3e-3, "batch_size": 2})):
        trainer = make_trainer(run_dir=tmp_path / name, iters=4, steps_per_eval=2, **settings)
        trainer.run()
        folders.append((tmp_path / name, trainer))
    return folders


def test_results_and_differences_are_those_of_the_runs(runs):
    (a, first), (b, second) = runs
    (b / "result.json").write_text(json.dumps({"test": {"loss": 1.5}, "note": "n", "list": [1], "config": {"x": 1}}))
    found = ft.compare([a, str(b)])
    assert found.differences == {"learning_rate": [1e-3, 3e-3], "batch_size": [4, 2]}
    assert found.results["last_loss"] == [trainer.history.steps[-1].loss for trainer in (first, second)]
    assert found.results["best_valid_loss"] == [min(r.loss for r in t.history.evals) for t in (first, second)]
    assert found.results["result.test.loss"] == [None, 1.5] and "result.list" not in found.results
    assert found.to_frame()["config.batch_size"].tolist() == [4, 2] and found.to_frame()["run"].tolist() == ["a", "b"]
    found.plot().figure.canvas.draw()
    assert len(found.plot().lines) == 4
    assert [text.get_text() for text in found.plot().get_legend().get_texts()] == ["a, training", "a, valid", "b, training", "b, valid"]


def test_the_table_is_in_words_and_marks_the_lowest_loss(runs):
    (a, _), (b, _) = runs
    found = ft.compare([a, b])
    shown = found._repr_html_()
    assert 'src="data:image/png' in shown, "for front ends that do not show the chart"
    assert "best validation loss" in shown and "best_valid_loss" not in shown and "Peak learning rate." in shown
    losses = found.results["best_valid_loss"]
    assert f"{min(losses):.4g} ✓ lowest" in shown and f"{max(losses):.4g} ✓" not in shown


def test_what_result_json_says_again_is_shown_once(runs):
    found = ft.compare([folder for folder, _ in runs])
    assert found.results["result.steps"] == [4, 4]
    shown = found._repr_html_()
    assert "model source" not in shown and "more entries of result.json" in shown, "what is the same in all runs is counted"
    assert "result.steps" not in shown and "result.peak" not in shown and ", perplexity, by result.json" in shown


def test_a_test_of_earlier_weights_is_not_the_runs(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", iters=2)
    trainer.evaluate("test")
    trainer.run()
    assert ft.compare([tmp_path / "run"]).results["test_loss"] == [None]
    after = trainer.evaluate("test")
    assert ft.compare([tmp_path / "run"]).results["test_loss"] == [after.loss]


def test_trainers_can_be_compared_too(make_trainer):
    one, other = make_trainer(seed=1), make_trainer(seed=2)
    one.step()
    found = ft.compare([one, other])
    assert found.differences == {"seed": [1, 2]} and found.results["steps"] == [1, 0]
    assert "Comparison(2 runs" in repr(found) and "trainer 1" in found._repr_html_()


def test_runs_can_be_given_under_names_of_ones_own(runs, make_trainer):
    (a, _), _ = runs
    found = ft.compare({"from a folder": a, "in memory": make_trainer(iters=2)})
    assert [run.name for run in found.runs] == ["from a folder", "in memory"] and len(found.runs[0].history.steps) == 4
    with pytest.raises(ft.ConfigError, match="expected a list of run folders"):
        ft.compare({})


def test_runs_of_one_name_are_told_apart_by_their_folders(runs, tmp_path):
    (a, _), _ = runs
    twin = tmp_path / "other" / "a"
    twin.mkdir(parents=True)
    (twin / "config.yaml").write_text("seed: 3\n")
    found = ft.compare([a, twin])
    assert [run.name for run in found.runs] == [f"{tmp_path.name}/a", "other/a"]
    assert "metrics.jsonl is missing" in found._repr_html_()


def test_damaged_files_are_passed_over_and_noted(runs):
    (a, first), (b, _) = runs
    with (a / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st\n[]\n\n{"kind": "later"}\n')
    (a / "config.yaml").write_text("a: [")
    (a / "result.json").write_text("[1]")
    found = ft.compare([a, b])
    assert found.results["steps"][0] == 4 and len(found.runs[0].history) == len(first.history)
    notes = " ".join(found.runs[0].notes)
    assert "metrics.jsonl: 3 lines are no reports and were passed over" in notes
    assert "config.yaml cannot be read" in notes and "result.json cannot be read" in notes


def test_what_holds_no_run_is_refused(tmp_path):
    for wrong, error in ((tmp_path, ft.CheckpointError), (tmp_path / "none", ft.CheckpointError)):
        with pytest.raises(error, match="run_dir"):
            ft.compare([wrong])
    for wrong in ("runs/a", [], 3):
        with pytest.raises(ft.ConfigError, match="list of run folders"):
            ft.compare(wrong)


def test_hostile_files_are_only_text(tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({HOSTILE: HOSTILE, "seed": HOSTILE}))
    (tmp_path / "result.json").write_text(json.dumps({HOSTILE: HOSTILE, "peak_memory": HOSTILE}))
    other = tmp_path / "b"
    other.mkdir()
    (other / "config.yaml").write_text("seed: 3\n")
    found = ft.compare([tmp_path, other])
    found.runs[0].name = HOSTILE
    page = found._repr_html_()
    assert page.count("<img") == 1 and page.endswith(found._tables_html()), "its own picture, before the tables"
    assert_harmless(found._tables_html())
    found.plot().figure.canvas.draw()
