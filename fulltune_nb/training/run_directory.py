"""The folder of a run: settings, reports, events, checkpoints, the best weights.

    run_dir/config.yaml       the settings
    run_dir/metrics.jsonl     one line a report of a step or an evaluation
    run_dir/events.jsonl      one line an event, of everything that ever happened to the run
    run_dir/checkpoints/      step-000000/, step-000100/, ...: see checkpoint.py
    run_dir/best/             a model folder: the weights with the lowest validation loss
    run_dir/result.json       what came out, when the run is done: see result.py
    run_dir/run.lock          there while a process has the run in its hands: see run_lock.py
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from fulltune_nb.errors import CheckpointError, ConfigError, ModelError
from fulltune_nb.files import Checksum, append_line, flush_to_disk, tidy, wait_for_removals, write_text
from fulltune_nb.language_model import LanguageModel
from fulltune_nb.models.saving import check_not_source, save_folder
from fulltune_nb.tokenizer_files import save_tokenizer
from fulltune_nb.training.checkpoint import (
    FOLDER_NAME,
    checkpoint_name,
    keep_newest,
    leave_later,
    list_checkpoints,
    write_checkpoint,
)
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.history import EvalReport, Event, History, StepReport
from fulltune_nb.training.run_lock import RunLock

CONFIG_FILE, METRICS_FILE, EVENTS_FILE, RESULT_FILE = "config.yaml", "metrics.jsonl", "events.jsonl", "result.json"
Entry = StepReport | EvalReport | Event
_LINES_NAMED = 5


def holds_run(path: Path) -> bool:
    """Whether a run that has come beyond its very beginning is in a folder: it has a checkpoint, or reports of steps."""
    if list_checkpoints(path / "checkpoints"):
        return True
    try:
        with (path / METRICS_FILE).open("rb") as file:
            return any(b'"kind": "step"' in line for line in file)
    except OSError:
        return False


def read_metrics(path: Path) -> tuple[History, list[str]]:
    """The reports in the `metrics.jsonl` of a run's folder, for whoever looks at runs; nothing is locked.

    Returns:
        The reports, none where there is no such file; and notes on what was passed over: a line cut off by a crash, damaged ones, or
        the whole file where it cannot be read.
    """
    history, bad = History(), []
    try:
        with (path / METRICS_FILE).open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    history += History.from_jsonable([json.loads(line)] if line.strip() else [])
                except (ValueError, RecursionError, CheckpointError):
                    bad.append(number)
    except FileNotFoundError:
        return history, []
    except OSError as error:
        return history, [f"{METRICS_FILE} cannot be read: {error}"]
    if not bad:
        return history, []
    lines = ", ".join(map(str, bad[:_LINES_NAMED])) + (f" and {len(bad) - _LINES_NAMED:,} more" if len(bad) > _LINES_NAMED else "")
    what = "1 line is no report and was" if len(bad) == 1 else f"{len(bad):,} lines are no reports and were"
    return history, [f"{METRICS_FILE}: {what} passed over (line {lines})"]


class RunDirectory:
    """Writes one run's files. Made by `create` or `open`, which lock the folder.

    Attributes:
        path: the folder.
        notes: what was found and put right when it was opened.
    """

    def __init__(self, path: Path, lock: RunLock):
        self.path = path
        self.notes = [lock.note] if lock.note else []
        self._lock = lock
        self._unwritten: list[Entry] = []

    @classmethod
    def create(cls, path: str | os.PathLike, config: TrainConfig, source: str | None = None) -> RunDirectory:
        """A folder for a new run.

        Args:
            path: new, or without a run in it.
            config: the settings.
            source: folder of the source model, which must not be written to.

        Raises:
            CheckpointError: it already holds a run, cannot be made, or lies in the source model's folder.
        """
        path = Path(path).expanduser()
        try:
            check_not_source(path, source, "run_dir")
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            lock = RunLock(path)
            if holds_run(path):
                lock.release()
                raise CheckpointError(f"{path} already holds a run. Go on with it by Trainer.resume({str(path)!r}), or give a new run_dir.")
            config.to_yaml(path / CONFIG_FILE)
            (path / METRICS_FILE).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
            if made:
                flush_to_disk(path.parent)
        except (OSError, ConfigError, ModelError) as error:
            raise CheckpointError(f"run_dir {path} cannot be made: {error}") from error
        directory = cls(path, lock)
        directory._tidy()
        return directory

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The folder of a run that is to go on; what killed writes left there is put right.

        Raises:
            CheckpointError: there is none, another process has it, or it cannot be written to.
        """
        if not path.is_dir():
            raise CheckpointError(f"No whole checkpoint in {path / 'checkpoints'}: there is no such folder. Give the run_dir of a run.")
        directory = cls(path, RunLock(path))
        directory._tidy()
        return directory

    def _tidy(self) -> None:
        try:
            self.notes += tidy(self.path / "checkpoints", rf"(damaged-|left-)?{FOLDER_NAME}")
            self.notes += tidy(self.path, "best|metrics|events|result|config")
        except OSError as error:
            self.notes.append(f"what a killed write left could not be removed: {error}")

    def close(self) -> None:
        """Lets go of the folder."""
        wait_for_removals()  # whoever opens it next would find folders half removed
        self._lock.release()

    @property
    def is_ours(self) -> bool:
        """Whether no later trainer of this process has taken the folder over."""
        return self._lock.is_ours

    def checkpoints(self) -> list[Path]:
        """The checkpoints there, oldest first."""
        return list_checkpoints(self.path / "checkpoints")

    def has_checkpoint(self, step: int) -> bool:
        """Whether the state after a step is saved."""
        return (self.path / "checkpoints" / checkpoint_name(step)).is_dir()

    def save_checkpoint(self, lm: LanguageModel, optimizer_arrays: Mapping[str, mx.array], state: dict[str, Any], keep: int) -> Path:
        """Writes the checkpoint of `state["step"]`, then removes all but the newest `keep`.

        Of checkpoints of later steps, which a trainer that went back has left, the last is set aside as `left-step-...`.

        Raises:
            CheckpointError: it cannot be written; earlier ones are untouched.
        """
        self._lock.check()
        folder = self.path / "checkpoints" / checkpoint_name(state["step"])
        save_model(folder, lm, optimizer_arrays, state)
        try:
            leave_later(self.path / "checkpoints", state["step"])
            keep_newest(self.path / "checkpoints", keep)
        except OSError as error:
            raise CheckpointError(f"{folder} is written, but older checkpoints could not be removed: {error}") from error
        return folder

    def save_best(self, lm: LanguageModel) -> None:
        """Makes the present weights the best ones.

        Raises:
            CheckpointError: they cannot be written; the former best ones are untouched.
        """
        self._lock.check()
        save_model(self.path / "best", lm, {}, {})

    def append(self, entry: Entry) -> None:
        """One line into `metrics.jsonl`, or `events.jsonl`, handed to the system at once.

        Raises:
            CheckpointError: it cannot be written. It is written with the next one that can be.
        """
        self._lock.check()
        self._unwritten.append(entry)
        while self._unwritten:
            path = self.path / (EVENTS_FILE if isinstance(self._unwritten[0], Event) else METRICS_FILE)
            try:
                append_line(path, json.dumps(self._unwritten[0].to_dict(), allow_nan=False))
            except OSError as error:
                if not self.path.exists():
                    raise CheckpointError(
                        f"{self.path} is gone: it was deleted or moved while the run went on, and its checkpoints with it."
                        " trainer.save() makes it anew, with a checkpoint of now; then go on."
                    ) from error
                raise CheckpointError(f"{path} could not be written: {error}. Checkpoints are untouched. Make room; then go on.") from error
            del self._unwritten[0]

    def rewrite_metrics(self, history: Iterable[Entry]) -> None:
        """Makes `metrics.jsonl` say what the history says: a resumed run drops what came after its checkpoint.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._lock.check()
        entries = [entry.to_dict() for entry in history if not isinstance(entry, Event)]
        self.write_text(METRICS_FILE, "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries))
        self._unwritten = [entry for entry in self._unwritten if isinstance(entry, Event)]

    def write_text(self, name: str, text: str) -> None:
        """A file of the run, atomically.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._lock.check()
        try:
            write_text(self.path / name, text)
        except OSError as error:
            raise CheckpointError(f"{self.path / name} could not be written: {error}. Checkpoints are untouched.") from error


def save_model(folder: Path, lm: LanguageModel, optimizer_arrays: Mapping[str, mx.array], state: Mapping[str, Any]) -> Path:
    """A checkpoint of a language model; see `write_checkpoint`."""
    size = sum(array.nbytes for _, array in tree_flatten(lm.model.parameters()))

    def save(place: Path) -> dict[str, Checksum]:
        return save_folder(place, lm.model, partial(save_tokenizer, lm.tokenizer), lm.generation_config, with_checksums=True)

    return write_checkpoint(folder, save, size, optimizer_arrays, state)
