"""A trainer's state as JSON values and arrays: gathering it, taking it up again, and finding the run of a folder.

What a trainer is, apart from model, data and settings: how far it has come (epoch and place in it follow from that), the state
of its optimizer, the factor on its learning rate, its count of validation losses, MLX's random state, and its history.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from fulltune_nb.data.dataset import DataSet, load_data
from fulltune_nb.errors import CheckpointError, DataError
from fulltune_nb.language_model import LanguageModel, load_model
from fulltune_nb.models.families import read_config
from fulltune_nb.models.loading import load_folder_weights, read_json
from fulltune_nb.training.checkpoint import newest_whole, read_optimizer, set_aside
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.history import History
from fulltune_nb.training.run_directory import CONFIG_FILE, RunDirectory
from fulltune_nb.training.versions import package_versions

if TYPE_CHECKING:
    from fulltune_nb.training.trainer import Trainer

_PACKAGES = ("fulltune_nb", "mlx", "numpy", "transformers", "tokenizers")
_CHANGE_NO_WEIGHT = {
    "steps_per_report", "steps_per_eval", "val_batches", "test_batches", "save_every", "keep", "on_save_error", "patience",
}  # fmt: skip
"""Settings that may change within a run: they say what is looked at and kept."""


def versions() -> dict[str, str]:
    """What a run's numbers depend on besides its settings: packages, Python, the kind of machine."""
    machine = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    return machine | package_versions(_PACKAGES)


# ---------------------------------------------------------------- gathering and taking up


def random_state() -> list[int]:
    """MLX's random state of this thread, as two whole numbers."""
    return np.array(mx.random.state[0]).tolist()


def set_random_state(state: list[int]) -> None:
    """Takes back what `random_state` gave."""
    mx.random.seed((state[0] << 32) | state[1])


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Everything but arrays and data, as JSON values."""
    per_epoch = trainer.steps_per_epoch
    return {
        "step": trainer.step_count,
        "position": {"epoch": trainer.step_count // per_epoch, "step_in_epoch": trainer.step_count % per_epoch},
        "rate_factor": trainer._rate.factor,
        "learning_rate": trainer.learning_rate,
        "patience": trainer.patience.to_dict(),
        "random": random_state(),
        "optimizer_steps_before": trainer.optimizer_steps_before,
        "backward": trainer.backward,
        "config": trainer.config.to_dict(),
        "model_source": trainer.lm.source,
        "data": {"source": trainer.data.source, "fingerprint": trainer.data.fingerprint},
        "versions": versions(),
        "history": trainer.history.to_jsonable(),
    }


def take_up(trainer: Trainer, state: Mapping[str, Any], optimizer_arrays: dict[str, mx.array]) -> None:
    """Makes a trainer with the weights of `state` stand where it stood.

    Raises:
        CheckpointError: the optimizer's arrays do not fit, or an entry of the history is none; nothing is changed.
    """
    history = History.from_jsonable(state["history"])
    if state["step"] > trainer.total_steps:
        raise CheckpointError(
            f"the state is that of step {state['step']:,}, but the run has {trainer.total_steps:,} steps in all. Give more iters or epochs."
        )
    trainer._optimizers.load_state_arrays(optimizer_arrays)
    trainer.journal.history[:] = history
    trainer.step_count = state["step"]
    trainer.lm.torn = None
    trainer.optimizer_steps_before = state["optimizer_steps_before"]
    trainer._rate.factor = state["rate_factor"]
    trainer.patience.load(state["patience"])
    set_random_state(state["random"])
    if trainer._directory:
        trainer._directory.rewrite_metrics(trainer.history)


# ---------------------------------------------------------------- the run of a folder


def resume_run(
    kind: type[Trainer],
    run_dir: str | os.PathLike,
    lm: LanguageModel | None,
    data: DataSet | str | os.PathLike | None,
    force: bool,
) -> Trainer:
    """A trainer at the newest whole checkpoint of a run; see `Trainer.resume`."""
    directory = RunDirectory.open(Path(run_dir).expanduser())
    try:
        folder, state, damaged = newest_whole(directory.path)
        notes = list(directory.notes)
        config = _config_of(directory.path, TrainConfig.from_dict(state["config"]), force, notes)
        _note_versions(state["versions"], notes)
        lm = _model_of(folder, state["model_source"], lm, force, notes)
        data = _data_of(data, state["data"], lm, config, force, notes)
        trainer = kind.__new__(kind)
        trainer._set_up(lm, data, config, force, _backward_of(state, config))
        trainer.journal.directory = directory
        take_up(trainer, state, read_optimizer(folder))
        for path, why in damaged.items():
            notes.append(f"passed over a damaged checkpoint, now called {_put_away(path)}: {why}")
    except BaseException:
        directory.close()
        raise
    trainer._upkeep.saved_step = trainer.step_count
    for note in (*notes, f"resumed at step {trainer.step_count} from {folder}"):
        trainer.journal.event(trainer.step_count, "resume", note)
    return trainer


def _backward_of(state: Mapping[str, Any], config: TrainConfig) -> str | None:
    """What "auto" chose when the run began: chosen again with other memory about, it might differ, and so would the last digits."""
    same = all(getattr(config, name) == state["config"].get(name) for name in ("backward", "memory"))
    return state["backward"] if same else None


def _put_away(folder: Path) -> str:
    """Out of the way of the checkpoints to come, but not lost."""
    try:
        return set_aside(folder, "damaged").name
    except OSError:
        return folder.name


def _config_of(run_dir: Path, stored: TrainConfig, force: bool, notes: list[str]) -> TrainConfig:
    """The settings to go on with: those of the checkpoint, with what may have been changed in the run's `config.yaml`."""
    path = run_dir / CONFIG_FILE
    if not path.exists():
        notes.append(f"{path} is missing; the settings stored in the checkpoint are used")
        return stored
    now = TrainConfig.from_yaml(path)
    before, after = stored.to_dict(), now.to_dict()
    free = _CHANGE_NO_WEIGHT | ({"iters", "epochs"} if stored.lr_schedule in (None, "constant") else set())
    changed = {name: f"{name} was {before[name]!r} and is {after[name]!r}" for name in before if before[name] != after[name]}
    matters = [text for name, text in changed.items() if name not in free]
    if matters and not force:
        raise CheckpointError(
            f"{path} has changed in a way that matters since the run was last saved: {'; '.join(matters)}. Put it back, give"
            " force=True to go on with the new settings, or begin a run of its own with trainer.fork(run_dir, ...)."
        )
    if changed:
        notes.append(f"settings changed in {path.name}: {'; '.join(changed.values())}")
    return now


def _note_versions(stored: Mapping[str, Any], notes: list[str]) -> None:
    now = versions()
    changed = [f"{name} was {str(stored[name])[:40]}, is {now[name]}" for name in now if name in stored and stored[name] != now[name]]
    if changed:
        notes.append(f"not the same versions as when the run was saved, so its numbers may differ in the last digits: {'; '.join(changed)}")


def _model_of(folder: Path, source: str | None, lm: LanguageModel | None, force: bool, notes: list[str]) -> LanguageModel:
    if lm is None:
        lm = load_model(folder)
        lm.source = source
        return lm
    path = folder / "config.json"
    stored = read_config(read_json(path), str(path))
    differences = [
        f"{name} was {value!r} and is {getattr(lm.config, name)!r}"
        for name, value in vars(stored).items()
        if name != "raw" and value != getattr(lm.config, name)
    ]
    if differences:
        message = f"the model given is not the one of the run: {'; '.join(differences)}"
        if not force:
            raise CheckpointError(f"{message}. Give the same model or none, or force=True to go on with this one.")
        notes.append(message)
    load_folder_weights(lm.model, folder)
    return lm


def _data_of(
    data: DataSet | str | os.PathLike | None,
    stored: Mapping[str, Any],
    lm: LanguageModel,
    config: TrainConfig,
    force: bool,
    notes: list[str],
) -> DataSet:
    if data is None and stored["source"] is None:
        raise CheckpointError("The run's data was in memory, so it is not stored. Pass it again: Trainer.resume(run_dir, data=data).")
    if data is None and not Path(stored["source"]).is_dir():
        raise CheckpointError(
            f"The run's data was in {stored['source']}, where there is no folder now. Pass its new place or the data itself:"
            " Trainer.resume(run_dir, data='new/place')."
        )
    if data is None or isinstance(data, (str, os.PathLike)):
        data = load_data(stored["source"] if data is None else data, lm.tokenizer, config=config)
    if not isinstance(data, DataSet):
        raise DataError(f"data: expected what load_data returns, or a folder, got {type(data).__name__}.")
    check_same_data(data, stored, force, notes)
    return data


def check_same_data(data: DataSet, stored: Mapping[str, Any], force: bool, notes: list[str]) -> None:
    """
    Raises:
        CheckpointError: the data trains otherwise than the data of the run, and `force` is False; where it is True, a note is added.
    """
    if data.fingerprint == stored["fingerprint"]:
        return
    message = f"the data differs from what the run began with (fingerprint {data.fingerprint[:12]}, then {stored['fingerprint'][:12]})"
    if not force:
        raise CheckpointError(f"{message}. Give the same rows, settings and tokenizer, or force=True to go on with these.")
    notes.append(message)
