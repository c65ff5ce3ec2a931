"""Callbacks that send a run's numbers elsewhere: `trainer.run(callbacks=[Tensorboard("logs")])`.

`metrics.jsonl` in the run's folder always has everything; these are for those who watch several runs in one place. Each package
is optional and imported when the logger is made, so that a missing one is told before the training.

A callback hears of one `run`. What happens between two of them, such as another learning rate, a single `step()` or an evaluation, is heard
by a logger that is attached: `Tensorboard("logs").attach(trainer)`; it is then not passed to `run` as well.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from pathlib import Path
from typing import Any

from fulltune_nb.errors import ConfigError, optional_import
from fulltune_nb.files import absolute
from fulltune_nb.training.callbacks import Attachable

__all__ = ["MLflow", "SwanLab", "Tensorboard", "Trackio", "Wandb", "numbers_of"]


def numbers_of(report: Any) -> dict[str, float]:
    """What is sent of a report, by name: `train/loss`, `valid/loss` and so on; without what is not finite, which is no point of a curve."""
    group = report.split if report.kind_of_report == "eval" else "train"
    skipped = ("kind", "step", "split", "event", "message", "time")
    values = {f"{group}/{name}": value for name, value in report.to_dict().items() if name not in skipped}
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}


class _Logger(Attachable):
    """One point a report, at its step; an event as a text. A subclass says how to `open`, `write` and `close`.

    A run that is paused and goes on, or several calls of `run`, write into the same log; `close()` ends it, and a later report
    begins another.
    """

    package: str
    extra: str

    def __init__(self) -> None:
        with optional_import(type(self).__name__, self.extra):
            self._library = importlib.import_module(self.package)
        self._begun = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'open' if self._begun else 'not open'})"

    def on_start(self, trainer: Any, target: int = 0) -> None:
        """Begins the log, with the settings."""
        if not self._begun:
            self.open(trainer.config.to_dict(), trainer.run_dir)
            self._begun = True

    def on_step(self, trainer: Any, report: Any) -> None:
        """A point for each number of the report."""
        self.on_start(trainer)
        self.write(numbers_of(report), report.step)

    on_eval = on_step

    def on_event(self, trainer: Any, event: Any) -> None:
        """The event as a text."""
        self.on_start(trainer)
        self.note(f"{event.kind}: {event.message}", event.step)

    def note(self, text: str, step: int) -> None:
        """A text, where the service has a place for it."""


class _Tracker(_Logger):
    """A service with the calls `init`, `log` and `finish`."""

    def __init__(self, project: str = "fulltune_nb", name: str | None = None, **settings: Any):
        """
        Args:
            project: the runs that belong together.
            name: of this run; the run folder's where left out.
            settings: passed on to the service's `init`.

        Raises:
            MissingDependencyError: the package is not installed; the message names the command.
            ConfigError: no project's name.
        """
        if not isinstance(project, str) or not project.strip():
            raise ConfigError(f"project: expected a name, got {project!r}.")
        super().__init__()
        self._settings = {"project": project, "name": name, **settings}

    def open(self, config: dict[str, Any], run_dir: Path | None) -> None:
        """Begins the service's run."""
        name = self._settings["name"] or (run_dir.name if run_dir else None)
        self._run = self._library.init(**{**self._settings, "name": name, "config": config})

    def write(self, numbers: dict[str, float], step: int) -> None:
        """One call of `log`."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Ends the service's run."""
        if self._begun:
            self._run.finish()
            self._begun = False


class Wandb(_Tracker):
    """Sends a run to Weights & Biases; `mode="offline"` keeps it on this machine."""

    package = extra = "wandb"

    def open(self, config: dict[str, Any], run_dir: Path | None) -> None:
        """Begins the run, and has its curves drawn over the optimizer's step."""
        super().open(config, run_dir)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, numbers: dict[str, float], step: int) -> None:
        """One call of `log`. The step is among the values: an evaluation comes after its step, and wandb's own steps only grow."""
        self._run.log({**numbers, "step": step})


class Trackio(_Tracker):
    """Sends a run to trackio, which keeps it on this machine unless told otherwise."""

    package = extra = "trackio"


class SwanLab(_Tracker):
    """Sends a run to SwanLab; `mode="local"` or `"offline"` keeps it on this machine."""

    package = extra = "swanlab"


class MLflow(_Tracker):
    """Sends a run to MLflow: to the server that `tracking_uri=` or `MLFLOW_TRACKING_URI` names, else to where MLflow keeps runs itself.

    `project` is MLflow's experiment. The run is addressed by its id, so that another one, which the program has under way, is left alone.
    """

    package = extra = "mlflow"

    def open(self, config: dict[str, Any], run_dir: Path | None) -> None:
        """Begins the run, with the settings as its parameters."""
        settings = dict(self._settings)
        project, name = settings.pop("project"), settings.pop("name") or (run_dir.name if run_dir else None)
        client = self._library.MlflowClient(**settings)
        found = client.get_experiment_by_name(project)
        experiment = found.experiment_id if found is not None else client.create_experiment(project)
        self._client, self._run_id = client, client.create_run(experiment, run_name=name).info.run_id
        for key, value in config.items():
            client.log_param(self._run_id, key, value)

    def write(self, numbers: dict[str, float], step: int) -> None:
        """A metric for each number."""
        for name, value in numbers.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def close(self) -> None:
        """Ends the run."""
        if self._begun:
            self._client.set_terminated(self._run_id)
            self._begun = False


class Tensorboard(_Logger):
    """Writes event files for TensorBoard: `tensorboard --logdir runs`."""

    package = "tensorboard.compat.proto.event_pb2"
    extra = "tensorboard"

    def __init__(self, log_dir: str | os.PathLike | None = None):
        """
        Args:
            log_dir: a folder for the event files; None: `tensorboard` in the run's folder.

        Raises:
            MissingDependencyError: tensorboard is not installed; the message names the command.
        """
        super().__init__()
        self._log_dir = None if log_dir is None else absolute(log_dir)

    def open(self, config: dict[str, Any], run_dir: Path | None) -> None:
        """Opens the file, and writes the settings as a text."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = self._log_dir or (run_dir / "tensorboard" if run_dir else None)
        if folder is None:
            raise ConfigError("Tensorboard: the trainer has no run_dir, so there is no place for the files. Give Tensorboard(log_dir).")
        self._writer = EventFileWriter(str(folder))
        self.note("\n".join(f"    {name}: {value!r}" for name, value in config.items()), 0, "config")  # indented: code, not markup

    def write(self, numbers: dict[str, float], step: int) -> None:
        """A scalar for each number."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]), step)

    def note(self, text: str, step: int, tag: str = "events") -> None:
        """A text, in TensorBoard's tab of texts."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)]), step)

    def _add(self, summary: Any, step: int) -> None:
        self._writer.add_event(self._library.Event(wall_time=time.time(), step=step, summary=summary))

    def on_end(self, trainer: Any) -> None:
        """What was written is there to read when `run` returns."""
        if self._begun:
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self._begun:
            self._writer.close()
            self._begun = False
