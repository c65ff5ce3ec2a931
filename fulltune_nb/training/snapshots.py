"""Going back to an earlier state of a trainer, and branching a run: snapshots in memory or on the disk, and forks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from fulltune_nb.errors import CheckpointError, ConfigError, TrainingError
from fulltune_nb.html import facts, human_bytes
from fulltune_nb.language_model import LanguageModel
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.loading import load_folder_weights
from fulltune_nb.models.saving import check_not_source
from fulltune_nb.training.checkpoint import read_optimizer, read_state
from fulltune_nb.training.resuming import check_same_data, random_state, set_random_state, state_of, take_up
from fulltune_nb.training.run_directory import RunDirectory, save_model
from fulltune_nb.training.torn import check_whole

if TYPE_CHECKING:
    from fulltune_nb.training.trainer import Trainer

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
    trainer.journal.event(trainer.step_count, "restore", "; ".join([f"went back from step {here} to step {trainer.step_count}", *notes]))


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
        other.journal.attach(RunDirectory.create(run_dir, config, lm.source))
    what = ", ".join(f"{name}={value!r}" for name, value in changes.items()) or "nothing changed"
    fresh = "; the optimizer begins anew" if changes.keys() & _NEW_OPTIMIZER else ""
    other.journal.event(other.step_count, "fork", f"branched off {trainer.run_dir or 'a run'} at step {other.step_count}: {what}{fresh}")
    if other.run_dir:
        other.save()
    return other


def _copy_of(lm: LanguageModel) -> LanguageModel:
    model = Decoder(lm.config)
    model.update(tree_unflatten(list(_copies(dict(tree_flatten(lm.model.parameters()))).items())))
    return LanguageModel(model, lm.tokenizer, lm.source, lm.generation_config)
