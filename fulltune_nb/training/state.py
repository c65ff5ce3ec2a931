"""Going back to an earlier state of a trainer, and branching a run: snapshots in memory or on the disk, and forks."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from fulltune_nb.data.dataset import DataSet, load_data
from fulltune_nb.errors import CheckpointError, ConfigError, DataError, TornStepError, TrainingError
from fulltune_nb.html import facts, human_bytes
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.folder import check_not_source, load_folder_weights, read_config_file
from fulltune_nb.models.language_model import LanguageModel, load_model
from fulltune_nb.system_info import package_versions
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.history import History
from fulltune_nb.training.run import CONFIG_FILE, RunDirectory, newest_whole, read_optimizer, read_state, save_model, set_aside

if TYPE_CHECKING:
        from fulltune_nb.training.trainer import Trainer

# -- patience: Keeping count of validation losses: which is the best, and when to stop

class Patience:
    """The best validation loss so far, and how many evaluations have passed without a better one.

    Attributes:
        limit: evaluations without improvement after which training stops; None for never.
        best_loss: in nats; inf before the first evaluation.
        waited: evaluations since the best one.
        last_step: the step evaluated last, so that none is evaluated twice; -1 before the first.
    """

    def __init__(self, limit: int | None):
        self.limit = limit
        self.best_loss = math.inf
        self.waited = 0
        self.last_step = -1

    def improved(self, step: int, loss: float) -> bool:
        """Counts an evaluation; True where it is the best so far."""
        self.last_step = step
        if loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            return True
        self.waited += 1
        return False

    @property
    def at_end(self) -> bool:
        """Whether training should stop."""
        return self.limit is not None and self.waited >= self.limit

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `load` takes them back."""
        best = self.best_loss if math.isfinite(self.best_loss) else None
        return {"best_loss": best, "waited": self.waited, "last_step": self.last_step}

    def load(self, values: dict[str, Any]) -> None:
        """Takes back what `to_dict` gave."""
        self.best_loss = math.inf if values["best_loss"] is None else values["best_loss"]
        self.waited, self.last_step = values["waited"], values["last_step"]


# -- torn: A step that fails: whole again where nothing was updated yet, torn where some weights are new and so

def step_failed(trainer: Trainer, error: BaseException) -> None:
    """To be called where a step was left by `error`, which the caller raises again when this returns.

    Raises:
        TornStepError: `error`, its cause, came when a part of the weights had been updated. Not in the place of what is no
            `Exception`: an interrupt stays one, and the next use of the trainer raises this.
    """
    trainer.optimizers.abandon_step()
    trainer.lm.torn = torn_reason(trainer, error)
    if trainer.lm.torn and isinstance(error, Exception):
        raise TornStepError(trainer.lm.torn) from error


def check_whole(trainer: Trainer) -> None:
    """
    Raises:
        TornStepError: some weights are new and some old.
    """
    if reason := torn_reason(trainer):
        raise TornStepError(trainer.lm.torn or reason)


def torn_reason(trainer: Trainer, error: BaseException | None = None) -> str | None:
    """Why the weights are of no use, if a step was broken off between its first and its last update; else None.

    Args:
        error: what broke it off.
    """
    if trainer.optimizers.step == trainer.step_count - trainer.optimizer_steps_before:
        return None
    why = f", by {type(error).__name__}{f': {error}' if str(error) else ''}" if error else ""
    back = f"Trainer.resume({str(trainer.run_dir)!r})" if trainer.run_dir else "trainer.restore(a snapshot), or a new trainer"
    return (
        f"Step {trainer.step_count + 1} was broken off in the middle of its update{why}. Some weights are new and some old, so they are"
        f" neither trained on, nor used, nor saved. What is on the disk is whole: go on with {back}."
    )


# -- resuming: A trainer's state as JSON values and arrays: gathering it, taking it up again, and finding the run o

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
    trainer.history[:] = history
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
        trainer._directory = directory
        take_up(trainer, state, read_optimizer(folder))
        for path, why in damaged.items():
            notes.append(f"passed over a damaged checkpoint, now called {_put_away(path)}: {why}")
    except BaseException:
        directory.close()
        raise
    trainer._upkeep.saved_step = trainer.step_count
    for note in (*notes, f"resumed at step {trainer.step_count} from {folder}"):
        trainer.event("resume", note)
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
    now = TrainConfig.from_yaml(path).fill_from(stored)
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
    stored = read_config_file(folder / "config.json")
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


# -- snapshots: Going back to an earlier state of a trainer, and branching a run: snapshots in memory or on the disk

_NEW_SCHEDULE = {"learning_rate", "lr_schedule", "warmup"}
_NEW_OPTIMIZER = {"optimizer", "optimizer_config", "train_only", "freeze"}


@dataclass(frozen=True, repr=False)
class Snapshot:
    """A trainer's state at one step, to go back to with `trainer.restore`. Training on does not change it.

    Attributes:
        step: optimizer steps taken.
        path: its folder; None for one in memory.
        nbytes: size of weights and optimizer state, in bytes.
    """

    step: int
    path: Path | None
    nbytes: int
    weights: dict[str, mx.array] = field(default_factory=dict, compare=False)
    optimizer_arrays: dict[str, mx.array] = field(default_factory=dict, compare=False)
    state: dict[str, Any] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        return f"Snapshot(step {self.step}, {human_bytes(self.nbytes)}, {self.path or 'in memory'})"

    def _repr_html_(self) -> str:
        return facts(f"Snapshot of step {self.step:,}", [("size", human_bytes(self.nbytes)), ("place", self.path or "in memory")])


class Branching:
    """The part of a trainer that goes back and branches off."""

    def snapshot(self: Trainer, folder: str | os.PathLike | None = None) -> Snapshot:
        """The present state, to go back to with `restore`.

        Args:
            folder: new or empty; the snapshot is a checkpoint there. None keeps it in memory, which takes as many bytes as weights
                and optimizer state.

        Raises:
            CheckpointError: it cannot be written.
        """
        return _take(self, folder)

    def restore(self: Trainer, snapshot: Snapshot | str | os.PathLike, force: bool = False) -> None:
        """Goes back, or forward, to a snapshot; history included. Training goes on from there bit for bit as it did then.

        Args:
            snapshot: what `snapshot` returned, here or in a fork, or the folder of a checkpoint.
            force: even though the data is not that of the snapshot.

        Raises:
            CheckpointError: it is damaged or does not fit; nothing is changed.
        """
        _put_back(self, snapshot, force)
        self._upkeep.forget()

    def fork(self: Trainer, run_dir: str | os.PathLike | None = None, **changes: Any) -> Trainer:
        """A trainer of its own that goes on from here with other settings, beside this one; the model is copied.

        Args:
            run_dir: a new folder for it; None writes nothing.
            changes: settings by name, such as `learning_rate=3e-5`. With another optimizer, that begins anew.

        Raises:
            ConfigError: a setting that cannot be changed to that.
            CheckpointError: `run_dir` already holds a run, or cannot be written.
        """
        return _branch(self, run_dir, changes)


def _take(trainer: Trainer, folder: str | os.PathLike | None) -> Snapshot:
    check_whole(trainer)
    weights, arrays = dict(tree_flatten(trainer.lm.model.parameters())), trainer._optimizers.state_arrays()
    nbytes = sum(array.nbytes for array in (*weights.values(), *arrays.values()))
    if folder is None:
        return Snapshot(trainer.step_count, None, nbytes, _copies(weights), _copies(arrays), state_of(trainer))
    path = Path(folder).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} is not an empty folder. A snapshot is written into a new or empty one.")
    check_not_source(path, trainer.lm.source, "The snapshot's folder")
    save_model(path, trainer.lm, arrays, state_of(trainer))
    return Snapshot(trainer.step_count, path, nbytes)


def _copies(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """In memory of their own, bit for bit: updates are made in place."""
    copied = {name: mx.where(mx.array(True), array, array) for name, array in arrays.items()}
    mx.eval(list(copied.values()))
    return copied


def _put_back(trainer: Trainer, snapshot: Snapshot | str | os.PathLike, force: bool) -> None:
    if isinstance(snapshot, (str, os.PathLike)):
        snapshot = Snapshot(-1, Path(snapshot).expanduser(), 0)
    if not isinstance(snapshot, Snapshot):
        raise TrainingError(f"restore takes what snapshot() returned, or the folder of a checkpoint; got {type(snapshot).__name__}.")
    state = snapshot.state if snapshot.path is None else read_state(snapshot.path)
    notes: list[str] = []
    check_same_data(trainer.data, state["data"], force, notes)
    if snapshot.path is None:
        weights, arrays = _copies(snapshot.weights), _copies(snapshot.optimizer_arrays)
    else:
        weights, arrays = _weights_of(snapshot.path, trainer.lm), read_optimizer(snapshot.path)
    _check_shapes(trainer, weights)
    here = trainer.step_count
    take_up(trainer, state, arrays)
    trainer.lm.model.update(tree_unflatten(list(weights.items())))
    mx.eval(trainer.lm.model.parameters())
    trainer.event("restore", "; ".join([f"went back from step {here} to step {trainer.step_count}", *notes]))


def _weights_of(folder: Path, lm: LanguageModel) -> dict[str, mx.array]:
    """A folder's weights by our names, without touching the model: they may turn out not to fit."""
    random = random_state()
    model = Decoder(lm.config)
    set_random_state(random)
    load_folder_weights(model, folder)
    return dict(tree_flatten(model.parameters()))


def _check_shapes(trainer: Trainer, weights: dict[str, mx.array]) -> None:
    own = {name: (array.shape, array.dtype) for name, array in tree_flatten(trainer.lm.model.parameters())}
    if own != {name: (array.shape, array.dtype) for name, array in weights.items()}:
        raise CheckpointError("the snapshot is of a model of another shape or dtype. Restore snapshots of this trainer, or of forks of it.")


def _branch(trainer: Trainer, run_dir: str | os.PathLike | None, changes: dict[str, Any]) -> Trainer:
    check_whole(trainer)
    config = trainer.config.replace(**changes)
    random = random_state()
    lm = _copy_of(trainer.lm)
    set_random_state(random)  # the new model drew initial values, which the run must not notice
    state, arrays = state_of(trainer), _copies(trainer._optimizers.state_arrays())
    other = type(trainer)(lm, trainer.data, config)
    if config.total_steps(other.steps_per_epoch) < trainer.step_count:
        raise ConfigError(f"the fork would have {other.total_steps} steps in all, but {trainer.step_count} are taken. Give more iters.")
    if changes.keys() & _NEW_SCHEDULE:
        state["rate_factor"] = 1.0
    if changes.keys() & _NEW_OPTIMIZER:
        arrays, state["optimizer_steps_before"] = other._optimizers.state_arrays(), trainer.step_count
    take_up(other, state, arrays)
    if run_dir is not None:
        other._write_into(RunDirectory.create(run_dir, config, lm.source))
    what = ", ".join(f"{name}={value!r}" for name, value in changes.items()) or "nothing changed"
    fresh = "; the optimizer begins anew" if changes.keys() & _NEW_OPTIMIZER else ""
    other.event("fork", f"branched off {trainer.run_dir or 'a run'} at step {other.step_count}: {what}{fresh}")
    if other.run_dir:
        other.save()
    return other


def _copy_of(lm: LanguageModel) -> LanguageModel:
    model = Decoder(lm.config)
    model.update(tree_unflatten(list(_copies(dict(tree_flatten(lm.model.parameters()))).items())))
    return LanguageModel(model, lm.tokenizer, lm.source, lm.generation_config)
