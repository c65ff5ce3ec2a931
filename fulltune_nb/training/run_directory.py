"""The folder of a run: settings, metrics, checkpoints, the best weights; and taking a run up again from it.

    run_dir/config.yaml       the settings
    run_dir/metrics.jsonl     one line a report or event
    run_dir/checkpoints/      step-000000/, step-000100/, ...: see checkpoint.py
    run_dir/best/             a model folder: the weights with the lowest validation loss
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from fulltune_nb.data.dataset import DataSet, load_data
from fulltune_nb.errors import CheckpointError
from fulltune_nb.language_model import LanguageModel, load_model
from fulltune_nb.models.loading import load_folder_weights
from fulltune_nb.models.saving import write_text
from fulltune_nb.training.checkpoint import checkpoint_name, keep_newest, list_checkpoints, newest_whole, read_optimizer, write_checkpoint
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.history import EvalReport, Event, History, StepReport


class RunDirectory:
    """Writes one run's files."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: str | os.PathLike, config: TrainConfig) -> RunDirectory:
        """A folder for a new run.

        Raises:
            CheckpointError: it already holds one, or it cannot be made.
        """
        path = Path(path).expanduser()
        if list_checkpoints(path / "checkpoints") or (path / "metrics.jsonl").exists():
            raise CheckpointError(f"{path} already holds a run. Go on with it by Trainer.resume({str(path)!r}), or give a new run_dir.")
        try:
            path.mkdir(parents=True, exist_ok=True)
            config.to_yaml(path / "config.yaml")
        except OSError as error:
            raise CheckpointError(f"run_dir {path} cannot be made: {error}") from error
        return cls(path)

    def checkpoints(self) -> list[Path]:
        """The checkpoints there, oldest first."""
        return list_checkpoints(self.path / "checkpoints")

    def save_checkpoint(self, lm: LanguageModel, optimizer_arrays: Mapping[str, mx.array], state: dict[str, Any], keep: int) -> Path:
        """Writes the checkpoint of `state["step"]`, then removes all but the newest `keep`."""
        folder = self.path / "checkpoints" / checkpoint_name(state["step"])
        write_checkpoint(folder, lm.save, optimizer_arrays, state)
        keep_newest(self.path / "checkpoints", keep)
        return folder

    def save_best(self, lm: LanguageModel) -> None:
        """Makes the present weights the best ones."""
        write_checkpoint(self.path / "best", lm.save, {}, {})

    def append_metrics(self, report: StepReport | EvalReport | Event) -> None:
        """One line into `metrics.jsonl`, handed to the system at once."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(report.to_dict(), allow_nan=False) + "\n")

    def rewrite_metrics(self, history: History) -> None:
        """Makes `metrics.jsonl` say what the history says: a resumed run drops what came after its checkpoint."""
        lines = "".join(json.dumps(values, allow_nan=False) + "\n" for values in history.to_jsonable())
        write_text(self.path / "metrics.jsonl", lines)


@dataclass(frozen=True)
class Restored:
    """What a checkpoint gives back."""

    folder: Path
    directory: RunDirectory
    lm: LanguageModel
    data: DataSet
    config: TrainConfig
    state: dict[str, Any]
    optimizer_arrays: dict[str, mx.array]
    notes: list[str]


def restore(run_dir: Path, lm: LanguageModel | None, data: DataSet | None, force: bool) -> Restored:
    """Reads the newest whole checkpoint of a run; see `Trainer.resume`."""
    folder, state, notes = newest_whole(run_dir)
    config = TrainConfig.from_dict(state["config"])
    if lm is None:
        lm = load_model(folder)
        lm.source = state["model_source"]
    else:
        load_folder_weights(lm.model, folder)
    data = _same_data(data, state["data"], lm, config, force, notes)
    return Restored(folder, RunDirectory(run_dir), lm, data, config, state, read_optimizer(folder), notes)


def _same_data(
    data: DataSet | None, stored: Mapping[str, Any], lm: LanguageModel, config: TrainConfig, force: bool, notes: list[str]
) -> DataSet:
    if data is None:
        if stored["source"] is None:
            raise CheckpointError("The run's data was in memory, so it is not stored. Pass it again: Trainer.resume(run_dir, data=data).")
        data = load_data(stored["source"], lm.tokenizer, config=config)
    if data.fingerprint != stored["fingerprint"]:
        message = f"the data differs from what the run began with (fingerprint {data.fingerprint[:12]}, then {stored['fingerprint'][:12]})"
        if not force:
            raise CheckpointError(f"{message}. Give the same rows and settings, or force=True to go on with these.")
        notes.append(message)
    return data
