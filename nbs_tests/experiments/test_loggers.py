"""Loggers: callbacks that send a run's numbers elsewhere."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import types
from importlib.machinery import ModuleSpec

import pytest

import fulltune_nb as ft
from fulltune_nb import tiny
from fulltune_nb.experiments.loggers import MLflow, SwanLab, Tensorboard, Trackio, Wandb, numbers_of

INSTALLED_IN_CI = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None and not os.environ.get("CI"), reason="tensorboard is not installed; it is in CI"
)
SERVICES = {"wandb": Wandb, "trackio": Trackio, "swanlab": SwanLab}
LOGGERS = {**SERVICES, "mlflow": MLflow, "tensorboard": Tensorboard}


class Service(types.ModuleType):
    """A small stand-in for wandb or trackio: `init` gives a run with `log` and `finish`."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # who asks whether it is installed asks for that
        self.calls = []

    def init(self, **settings):
        self.calls.append(("init", settings))
        tell = self.calls.append
        return types.SimpleNamespace(
            log=lambda values, step=None: tell(("log", {"step": step, **values})),
            finish=lambda: tell(("finish", {})),
            define_metric=lambda name, step_metric=None: tell(("define", {name: step_metric})),
        )


@pytest.fixture(scope="module")
def trainer_of():
    def make(run_dir=None):
        lm = ft.load_model(tiny.BASE_MODEL)
        config = ft.TrainConfig(iters=2, batch_size=2, mask_prompt=True)
        data = ft.load_data(tiny.text_to_sql(train=8, valid=2, test=2), lm.tokenizer, config=config)
        return ft.Trainer(lm, data, config, run_dir=run_dir)

    return make


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_gets_the_settings_once_and_every_report(name, trainer_of, monkeypatch):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    logger, trainer = SERVICES[name](project="p", mode="offline"), trainer_of()
    assert repr(logger) == f"{SERVICES[name].__name__}(not open)"
    trainer.run(1, callbacks=[logger])
    trainer.run(callbacks=[logger])  # the same log goes on
    logger.close()
    defined = [values for kind, values in service.calls if kind == "define"]
    assert defined == ([{"step": None}, {"*": "step"}] if name == "wandb" else [])  # wandb counts by itself, unless told
    kinds = [kind for kind, _ in service.calls if kind != "define"]
    assert kinds == ["init", *["log"] * 4, "finish"]  # validation, step, step, validation
    assert service.calls[0][1]["config"]["iters"] == 2 and service.calls[0][1]["mode"] == "offline"
    steps = [values for kind, values in service.calls if kind == "log" and "train/loss" in values]
    assert [values["step"] for values in steps] == [1, 2]
    assert steps[0]["train/loss"] == trainer.history.steps[0].loss
    assert sum("valid/perplexity" in values for kind, values in service.calls) == 2


class Tracking(types.ModuleType):
    """A small stand-in for mlflow: a client that keeps what it is told."""

    def __init__(self):
        super().__init__("mlflow")
        self.__spec__ = ModuleSpec("mlflow", None)
        self.experiments, self.params, self.metrics, self.ended = {"old": "7"}, {}, [], []

    def MlflowClient(self, **settings):
        assert settings == {"tracking_uri": "somewhere"}
        known = self.experiments
        return types.SimpleNamespace(
            get_experiment_by_name=lambda name: types.SimpleNamespace(experiment_id=known[name]) if name in known else None,
            create_experiment=lambda name: known.setdefault(name, "8"),
            create_run=lambda experiment, run_name: types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"{experiment}/{run_name}")),
            log_param=lambda run, key, value: self.params.update({(run, key): value}),
            log_metric=lambda run, key, value, step: self.metrics.append((run, key, value, step)),
            set_terminated=self.ended.append,
        )


@pytest.mark.parametrize(("project", "experiment"), [("old", "7"), ("new", "8")])
def test_mlflow_gets_parameters_and_metrics_of_one_run(project, experiment, trainer_of, monkeypatch):
    tracking = Tracking()
    monkeypatch.setitem(sys.modules, "mlflow", tracking)
    logger, trainer = MLflow(project=project, name="mine", tracking_uri="somewhere"), trainer_of()
    trainer.run(1, callbacks=[logger])
    trainer.run(callbacks=[logger])  # the same run goes on
    logger.close()
    logger.close()
    run = f"{experiment}/mine"
    assert tracking.params[(run, "iters")] == 2 and tracking.ended == [run]
    losses = [(value, step) for where, name, value, step in tracking.metrics if name == "train/loss" and where == run]
    assert losses == [(report.loss, report.step) for report in trainer.history.steps]
    assert sum(name == "valid/loss" for _, name, _, _ in tracking.metrics) == 2


def test_mlflow_itself_reads_the_curves_back(trainer_of, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "runs").as_uri()
    logger, trainer = MLflow(project="p", tracking_uri=uri), trainer_of(tmp_path / "mine")
    trainer.run(callbacks=[logger])
    logger.close()
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.search_runs([client.get_experiment_by_name("p").experiment_id])[0]
    found = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.value, metric.step) for metric in found] == [(report.loss, report.step) for report in trainer.history.steps]
    assert (run.info.run_name, run.info.status, run.data.params["iters"]) == ("mine", "FINISHED", "2")


def test_an_attached_logger_hears_of_what_happens_between_two_runs(trainer_of, monkeypatch):
    service = Service("trackio")
    monkeypatch.setitem(sys.modules, "trackio", service)
    trainer = trainer_of()
    heard = []
    logger = Trackio().attach(trainer)
    monkeypatch.setattr(logger, "note", lambda text, step: heard.append((step, text.split(":")[0])))
    trainer.run(1)
    trainer.set_learning_rate(3e-5)
    trainer.evaluate("test")
    trainer.step()
    logger.detach()
    trainer.set_learning_rate(2e-5)
    assert heard == [(1, "learning_rate")]
    logged = [values for kind, values in service.calls if kind == "log"]
    assert [values["step"] for values in logged if "train/loss" in values] == [1, 2]
    assert sum("test/loss" in values for values in logged) == 1


@pytest.mark.parametrize("package", LOGGERS)
def test_a_missing_package_is_told_with_the_command_that_installs_it(package, monkeypatch):
    for name in [package, *(module for module in sys.modules if module.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ft.errors.MissingDependencyError, match=rf"{package}.*pip install 'fulltune_nb\[{package}\]'"):
        LOGGERS[package]()


def test_what_is_not_finite_is_no_point_of_a_curve():
    numbers = numbers_of(ft.EvalReport("valid", 3, math.nan, math.inf, 9, 0.5))
    assert numbers == {"valid/tokens": 9.0, "valid/seconds": 0.5}


def test_a_project_needs_a_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Service("wandb"))
    with pytest.raises(ft.ConfigError, match="project"):
        Wandb(project="")


@INSTALLED_IN_CI
def test_tensorboard_reads_the_curves_back(trainer_of, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(tmp_path / "run")
    logger = Tensorboard()
    trainer.run(callbacks=[logger])
    logger.close()
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("train/loss")] == [1, 2]
    assert read.Scalars("train/loss")[0].value == pytest.approx(trainer.history.steps[0].loss)
    assert [event.step for event in read.Scalars("valid/loss")] == [0, 2]
    assert "iters: 2" in read.Tensors("config")[0].tensor_proto.string_val[0].decode()


@INSTALLED_IN_CI
def test_tensorboard_without_a_place_for_its_files_is_refused(trainer_of):
    with pytest.raises(ft.ConfigError, match="log_dir"):
        trainer_of().run(callbacks=[Tensorboard()])
