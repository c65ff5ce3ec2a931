"""What a notebook was given, as checked settings."""

from __future__ import annotations

import dataclasses

import pytest

import fulltune_nb as ft
from fulltune_nb.experiments.execution import find_notebook
from fulltune_nb.experiments.parameters import OWN, given_names, parameter_names, read_experiment

FIELDS = [field.name for field in dataclasses.fields(ft.TrainConfig)]


@pytest.mark.parametrize("text, meant", [("false", False), ("False", False), ("true", True), (False, False), (True, True)])
def test_the_text_false_is_never_true(text, meant):
    assert read_experiment({"mask_prompt": text}).config.mask_prompt is meant


@pytest.mark.parametrize(
    "name, text, meant",
    [
        ("learning_rate", "1e-4", 1e-4),
        ("mask_prompt", "last", "last"),
        ("iters", "20", 20),
        ("iters", "1e3", 1000),
        ("epochs", "None", None),
        ("max_grad_norm", "none", None),
        ("optimizer_config", '{"betas": [0.9, 0.98]}', {"betas": (0.9, 0.98)}),
        ("train_only", "['*.mlp.*', '*.norm*']", ("*.mlp.*", "*.norm*")),
        ("train_only", "*.mlp.*", ("*.mlp.*",)),
        ("lr_schedule", "cosine", "cosine"),
        ("text_feature", "1", "1"),
        ("seed", None, 0),
    ],
)
def test_texts_as_papermill_passes_them_become_what_they_stand_for(name, text, meant):
    assert getattr(read_experiment({name: text}).config, name) == meant


@pytest.mark.parametrize(
    "name, value",
    [
        ("mask_prompt", "fasle"),
        ("mask_prompt", 1),
        ("mask_prompt", "1"),
        ("iters", "true"),
        ("iters", "many"),
        ("seed", True),
        ("optimizer_config", "[1]"),
        ("keep", "[3]"),
    ],
)
def test_what_a_setting_cannot_be_is_refused_by_the_config(name, value):
    with pytest.raises(ft.ConfigError, match=name):
        read_experiment({name: value})


@pytest.mark.parametrize("name, near", [("lerning_rate", "learning_rate"), ("Seed", "seed"), ("modle", "model"), ("rundir", "run_dir")])
def test_an_unknown_name_is_refused_with_the_nearest(name, near):
    with pytest.raises(ft.ConfigError, match=f"unknown parameter '{name}'.*'{near}'"):
        read_experiment({name: "x"})


def test_defaults_give_way_to_what_was_given():
    usual = {"iters": 150, "optimizer": "adamw", "optimizer_config": {"betas": [0.9, 0.98]}, "mask_prompt": True}
    config = read_experiment({"epochs": 2, "optimizer": "sgd"}, usual).config
    assert (config.iters, config.epochs, config.optimizer, config.optimizer_config, config.mask_prompt) == (None, 2, "sgd", {}, True)
    assert read_experiment({}, usual).config.iters == 150


def test_a_short_run_has_the_same_share_of_warm_up_as_the_defaults():
    usual = {"iters": 150, "warmup": 30}
    assert read_experiment({"iters": "20"}, usual).config.warmup == 4
    assert read_experiment({"iters": 600}, usual).config.warmup == 30
    assert read_experiment({"iters": 20, "warmup": 10}, usual).config.warmup == 10
    assert read_experiment({"iters": 20}).config.warmup == 0


def test_places_that_are_taken_are_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(ft.CheckpointError, match="already holds a run"):
        read_experiment({"run_dir": str(tmp_path)})
    with pytest.raises(ft.ConfigError, match="expected a new or empty folder"):
        read_experiment({"export_dir": str(tmp_path)})


def test_a_model_that_is_no_text_is_refused():
    with pytest.raises(ft.ConfigError, match="model: expected a text, got 3"):
        read_experiment({"model": 3})


def cells(*sources: str) -> dict:
    namespace: dict = {"In": ["", *sources], "Out": {}, "exit": None}
    for source in sources:
        exec(source, namespace)
    return namespace


def test_in_a_notebook_only_the_parameters_cells_count():
    namespace = cells("model: str = ''\nseed: int = 1", "# Parameters\nseed = 2\nlerning_rate = 1.0\n", "import os\nother = 3")
    assert given_names(namespace) == ["model", "seed", "lerning_rate"]
    with pytest.raises(ft.ConfigError, match="learning_rate"):
        read_experiment(namespace)


def test_a_cell_that_is_run_again_after_a_mistake_is_read_again():
    namespace = cells("lerning_rate: float = 1.0", "x = 3", "learning_rate: float = 0.5")
    assert read_experiment(namespace).config.learning_rate == 0.5


def test_without_a_run_dir_the_first_unused_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_experiment({}).run_dir == "runs/experiment"
    (tmp_path / "runs" / "experiment").mkdir(parents=True)
    assert read_experiment({}).run_dir == "runs/experiment-2"


def test_hostile_values_are_shown_escaped():
    shown = read_experiment({"model": "<script>alert(1)</script>", "run_dir": "<b>here"})._repr_html_()
    assert "<script>" not in shown and "<b>here" not in shown and "&lt;b&gt;here" in shown


def test_the_experiment_notebook_has_every_setting_as_a_parameter():
    assert parameter_names(find_notebook("10_experiment.ipynb")) == [*OWN, *FIELDS]


def test_papermill_itself_knows_all_of_its_parameters():
    from papermill import inspect_notebook

    assert list(inspect_notebook(str(find_notebook("10_experiment.ipynb")))) == [*OWN, *FIELDS]
