"""The folder of a run: settings, reports, events, checkpoints, the best weights; writing it, and finding the run of a folder again.

    run_dir/config.yaml       the settings
    run_dir/metrics.jsonl     one line a report of a step or an evaluation
    run_dir/events.jsonl      one line an event, of everything that ever happened to the run
    run_dir/checkpoints/      step-000000/, step-000100/, ...: model folders with the optimizer's state and the run's position
    run_dir/best/             a model folder: the weights with the lowest validation loss
    run_dir/result.json       what came out, when the run is done
    run_dir/run.lock          there while a process has the run in its hands
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from fulltune_nb.chat_template import CHATML
from fulltune_nb.data.dataset import DataSet, load_data
from fulltune_nb.data.read import is_there
from fulltune_nb.data.rows import split_named
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.errors import CheckpointError, ConfigError, DataError, ModelError, listed
from fulltune_nb.files import absolute, append_line, flush_to_disk, remove_folder, tidy, wait_for_removals, write_text
from fulltune_nb.models.folder import check_not_source, load_folder_weights, read_config_file
from fulltune_nb.models.language_model import LanguageModel, load_model
from fulltune_nb.settings import names_of
from fulltune_nb.tokenizer import TEMPLATE
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.history import EvalReport, Event, History, StepReport
from fulltune_nb.training.lock import RunLock
from fulltune_nb.training.objective import Loss, name_of
from fulltune_nb.training.plan import step_batches
from fulltune_nb.training.run_files import (  # noqa: F401  some of it is imported from here, by notebooks too
    CHECKPOINTS,
    CONFIG_FILE,
    CONFIG_HEADING,
    EVENTS_FILE,
    METRICS_FILE,
    RESULT_FILE,
    best_is_older_than,
    best_weights,
    check_holds_no_run,
    check_kinds,
    check_nothing_of_others,
    files_of_others,
    holds_run,
    is_checkpoint,
    is_leaving,
    keep_files_of_others,
    read_metrics,
    read_result,
    write_result,
)
from fulltune_nb.training.schedule import spans_the_run
from fulltune_nb.training.state import (
    BEST,
    FOLDER_NAME,
    TrainerState,
    checkpoint_name,
    evaluated_since,
    list_checkpoints,
    newest_whole,
    other_arithmetic,
    read_optimizer,
    set_aside,
    set_by_hand_since,
    step_of,
    write_checkpoint,
)

Entry = StepReport | EvalReport | Event
_CHANGE_NO_WEIGHT = {
    "steps_per_report", "steps_per_eval", "val_batches", "test_batches", "save_every", "keep", "on_save_error", "patience",
    "shard_optimizer", "load_best",
}  # fmt: skip
"""Settings that may change within a run: they say what is looked at and kept."""


# ---- writing a run


class RunDirectory:
    """Writes one run's files. Made by `create` or `open`, which lock the folder.

    Whatever cannot be written is a `CheckpointError`; what stood there before is untouched.

    Attributes:
        path: the folder.
        lock: says whether a later trainer of this process has taken the folder over.
        notes: what was found and put right when it was opened.
    """

    def __init__(self, path: Path):
        check_kinds(path)
        self.path = path
        self.lock = RunLock(path)
        self._unwritten: list[Entry] = []
        self.notes = [self.lock.note] if self.lock.note else []
        try:
            self.notes += tidy(self.path / CHECKPOINTS, rf"(damaged-|left-)?{FOLDER_NAME}", is_leaving)
            self.notes += tidy(self.path, "best|metrics|events|result|config|run", is_leaving)
        except OSError as error:
            self.notes.append(f"what a killed write left could not be removed: {error}")

    @classmethod
    def create(cls, path: str | os.PathLike, config: TrainConfig, source: str | None = None) -> RunDirectory:
        """A folder for a new run.

        Args:
            path: new, or without anything in it that a run would replace.
            config: the settings.
            source: folder of the source model, which must not be written to.

        Raises:
            CheckpointError: it holds a run, or files of others under the names of a run's; cannot be made; or lies in the source model's
                folder.
        """
        path = absolute(path)
        try:
            check_not_source(path, source, "run_dir")
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
            check_kinds(path)
            check_nothing_of_others(path)
            directory = cls(path)
            try:
                check_holds_no_run(path)
                check_nothing_of_others(path)  # somebody may have come between
                directory.write_config(config)
                (path / METRICS_FILE).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
                if made:
                    flush_to_disk(path.parent)
            except BaseException:
                directory.close()
                raise
        except (OSError, ModelError) as error:
            raise CheckpointError(f"run_dir {path} cannot be made: {error}") from error
        directory.lock.keep()
        return directory

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The folder of a run that is to go on; what killed writes left there is put right.

        Raises:
            CheckpointError: there is none, another process has it, or it cannot be written to.
        """
        if not (path / CHECKPOINTS).is_dir():  # of somebody else: nothing is touched
            raise CheckpointError(f"No whole checkpoint in {path / CHECKPOINTS}: there is no such folder. Give the run_dir of a run.")
        return cls(path)

    def close(self) -> None:
        """Lets go of the folder, or gives it back to the trainer that had it before."""
        wait_for_removals()  # whoever opens it next would find folders half removed
        self.lock.release()

    @contextmanager
    def _writing(self, path: Path, otherwise: str = "Checkpoints are untouched.") -> Iterator[None]:
        """All that is written into the folder, or removed from it, is so within this block, which first looks whether it is still ours."""
        self.lock.check()
        check_kinds(self.path)
        try:
            yield
        except (OSError, ConfigError) as error:
            self.lock.check()  # it may have gone meanwhile
            raise CheckpointError(f"{path} could not be written: {error}. {otherwise}") from error

    def last_checkpoint(self) -> Path | None:
        """The newest, or None where the run was never saved."""
        return next(reversed(list_checkpoints(self.path / CHECKPOINTS)), None)

    def save_checkpoint(self, lm: LanguageModel, state: TrainerState, keep: int) -> Path:
        """Writes the checkpoint of a state whose weights the model holds, then removes all but the newest `keep`.

        Of checkpoints of later steps, which a trainer that went back has left, the last is set aside as `left-step-...`. Only what was
        written as a checkpoint is removed; of other files in it `notes` tells where they are then.
        """
        folder = self.path / CHECKPOINTS
        written = folder / checkpoint_name(state.step)
        self._write_model(written, lm, state)
        with self._writing(folder, f"{written} is written, but older checkpoints could not be removed."):
            ours = [path for path in list_checkpoints(folder) if is_checkpoint(path)]
            later = [path for path in ours if step_of(path) > state.step]
            if later:
                left_before = [path for path in folder.iterdir() if re.fullmatch(f"left-{FOLDER_NAME}", path.name)]
                self._keep_files_of_others(folder / f"left-{later[-1].name}")
                kept = set_aside(later[-1], "left")
                self._remove([*later[:-1], *(path for path in left_before if path != kept and is_checkpoint(path))])
            self._remove([path for path in ours if step_of(path) <= state.step][:-keep])
        return written

    def save_best(self, lm: LanguageModel, step: int) -> None:
        """Makes the present weights, those of a step, the best ones."""
        self._write_model(self.path / BEST, lm, about={"step": step})

    def _write_model(
        self, folder: Path, lm: LanguageModel, state: TrainerState | None = None, about: Mapping[str, Any] | None = None
    ) -> None:
        def check() -> None:
            self.lock.check()
            self._keep_files_of_others(folder)

        with self._writing(folder):
            write_checkpoint(folder, lm, state, about, check)

    def _remove(self, checkpoints: Iterable[Path]) -> None:
        for path in checkpoints:
            self.lock.check()
            self._keep_files_of_others(path)
            remove_folder(path)

    def _keep_files_of_others(self, checkpoint: Path) -> None:
        self.notes += keep_files_of_others(checkpoint)

    def take_notes(self) -> list[str]:
        """What there is to tell since the last call."""
        notes, self.notes = self.notes, []
        return notes

    def append(self, entry: Entry) -> None:
        """One line into `metrics.jsonl`, or `events.jsonl`, handed to the system at once; if not, with the next one that can be."""
        self._unwritten.append(entry)
        while self._unwritten:
            path = self.path / (EVENTS_FILE if isinstance(self._unwritten[0], Event) else METRICS_FILE)
            with self._writing(path, "Checkpoints are untouched. Make room; then go on."):
                append_line(path, json.dumps(self._unwritten[0].to_dict(), allow_nan=False), on_disk=path.name == EVENTS_FILE)
            del self._unwritten[0]

    def rewrite_metrics(self, history: Iterable[Entry]) -> None:
        """Makes `metrics.jsonl` say what the history says: a resumed run drops what came after its checkpoint."""
        lines = [json.dumps(entry.to_dict(), allow_nan=False) + "\n" for entry in history if not isinstance(entry, Event)]
        with self._writing(self.path / METRICS_FILE):
            write_text(self.path / METRICS_FILE, "".join(lines))
        self._unwritten = [entry for entry in self._unwritten if isinstance(entry, Event)]

    def write_config(self, config: TrainConfig) -> None:
        """The settings that the run goes on with."""
        with self._writing(self.path / CONFIG_FILE):
            config.to_yaml(self.path / CONFIG_FILE, CONFIG_HEADING)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """What came out, into `result.json`."""
        with self._writing(self.path / RESULT_FILE):
            write_result(self.path, result)


# ---- the run of a folder


class StoredRun:
    """The run of a folder, at its newest whole checkpoint; locked. What of model, data and settings goes with it is found here.

    Args:
        run_dir: the folder given to the `Trainer` that began the run.
        force: go on even though data, model or settings differ from what the run began with.

    Attributes:
        directory: the folder.
        checkpoint: the checkpoint's folder.
        notes: what the user should hear about how it was found.
        rates: learning rates that were set by hand after the checkpoint, by step count.

    Raises:
        CheckpointError: no whole checkpoint, or another process has the run in its hands.
    """

    def __init__(self, run_dir: str | os.PathLike, force: bool):
        self.directory, self._force = RunDirectory.open(absolute(run_dir)), force
        try:
            self._read()
        except OSError as error:
            self.directory.close()
            raise CheckpointError(f"{self.directory.path} cannot be read: {error}. Make it readable; nothing of it was changed.") from error
        except BaseException:
            self.directory.close()
            raise

    def _read(self) -> None:
        self.checkpoint, self._state, self._damaged = newest_whole(self.directory.path)
        self._state["history"] += evaluated_since(self._state, read_metrics(self.directory.path)[0])
        self.notes, self._has_weights, self._other_template = self.directory.take_notes(), True, False
        if others := files_of_others(self.checkpoint):
            self.notes.append(f"left alone in {self.checkpoint.name}, as no part of it: {listed([path.name for path in others])}")
        self.rates, by_hand = set_by_hand_since(self._state, read_metrics(self.directory.path, EVENTS_FILE)[0].events)
        self.notes += [*other_arithmetic(self._state["versions"]), *by_hand]

    def __enter__(self) -> StoredRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.directory.close()

    def config(self, given: TrainConfig | None = None) -> TrainConfig:
        """The settings to go on with: those given, or those of the run's `config.yaml`.

        Raises:
            CheckpointError: they differ from the checkpoint's in a way that matters.
        """
        stored, path = TrainConfig.from_dict(self._state["config"]), self.directory.path / CONFIG_FILE
        if given is None and not path.exists():
            self.notes.append(f"{path} is missing; the settings stored in the checkpoint are used")
            return stored
        now, place = (given, "the config given") if given is not None else (TrainConfig.from_yaml(path).fill_from(stored), path)
        before, after = stored.to_dict(), now.to_dict()
        free = _CHANGE_NO_WEIGHT | (set() if spans_the_run(stored.lr_schedule, stored.warmup) else {"iters", "epochs"})
        free |= {name for name in names_of(DataSettings) if before[name] is None}  # of later versions; the data itself is compared
        changed = {name: f"{name} was {before[name]!r} and is {after[name]!r}" for name in before if before[name] != after[name]}
        matters = [text for name, text in changed.items() if name not in free]
        if matters and not self._force:
            raise CheckpointError(
                f"{place} has changed in a way that matters since the run was last saved: {'; '.join(matters)}. Put it back, give"
                " force=True (--force) to go on with the new settings, or begin a run of its own with trainer.fork(run_dir, ...)."
            )
        if changed:
            self.notes.append(f"settings changed in {CONFIG_FILE if given is None else 'the config given'}: {'; '.join(changed.values())}")
        return now

    def model(self, lm: LanguageModel | None) -> LanguageModel:
        """The model of the run: the one given, which `put_weights` gives the checkpoint's, or a new one that has them.

        Raises:
            CheckpointError: the one given is another model.
        """
        if lm is None:
            lm = load_model(self.checkpoint)
            lm.source, lm.dequantized = self._state["model_source"], self._state.get("dequantized")
            return lm
        self._put_template(lm)
        stored = read_config_file(self.checkpoint / "config.json")
        differences = [
            f"{part.name} was {value!r} and is {now!r}"
            for part in fields(stored)
            if part.compare and (value := getattr(stored, part.name)) != (now := getattr(lm.config, part.name))
        ]
        if differences:
            message = f"the model given is not the one of the run: {'; '.join(differences)}"
            if not self._force:
                raise CheckpointError(f"{message}. Give the same model or none, or force=True (--force) to go on with this one.")
            self.notes.append(message)
        self._has_weights = False
        return lm

    def _put_template(self, lm: LanguageModel) -> None:
        """A tokenizer without a template of its own gets the one that the run gave it when it began, which need not be today's."""
        path, now = self.checkpoint / TEMPLATE, lm.tokenizer.chat_template
        if now in (None, CHATML) and path.is_file() and (stored := path.read_text(encoding="utf-8")) != now:
            lm.tokenizer.chat_template, self._other_template = stored, True

    def put_weights(self, lm: LanguageModel, data: DataSet, config: TrainConfig) -> None:
        """Gives the model the checkpoint's weights, where it has not got them. The last thing, so that a refusal leaves it as it is.

        Raises:
            CheckpointError: the run would be shorter than it has come, or cannot be written to.
        """
        check_long_enough(config.total_steps(step_batches(data.train, config).steps_per_epoch), self._state["step"])
        self.directory.rewrite_metrics(History.from_jsonable(self._state["history"]))  # a full disk is found out here
        if not self._has_weights:
            load_folder_weights(lm.model, self.checkpoint)
            lm.dequantized = self._state.get("dequantized", lm.dequantized)

    def check_loss(self, loss: Loss | None) -> None:
        """
        Raises:
            CheckpointError: it is not the loss of the run, by its name.
        """
        then, now = self._state.get("loss"), name_of(loss)
        if then != now and not self._force:
            raise CheckpointError(
                f"the run was trained with loss={str(then)[:80]}, and here it is {now}. A function cannot be stored: pass the same again,"
                " or force=True to go on with another."
            )
        if then != now:
            self.notes.append(f"loss was {str(then)[:80]} and is {now}")

    def of_its_day(self, config: TrainConfig, data: DataSet) -> TrainConfig:
        """The config with the run's date in place of the one of today, where it has that from the data, and the data from the clock."""
        date = self._state["config"].get("template_date")
        return config.replace(template_date=date) if date is not None and data.date_is_todays else config

    def data(self, data: DataSet | str | os.PathLike | Mapping[str, Any] | None, lm: LanguageModel, config: TrainConfig) -> DataSet:
        """The run's data: as given, or from the folder it was in.

        Raises:
            CheckpointError: it is not there, or trains otherwise than the data of the run.
        """
        source = self._state["data"]["source"]
        if data is None and source is None:
            raise CheckpointError("The run's data was in memory, so it is not stored. Pass it again: Trainer.resume(run_dir, data=data).")
        if data is None and not is_there(source):
            raise CheckpointError(
                f"The run's data was in {source}, where there is no folder now. Pass its new place or the data itself:"
                " Trainer.resume(run_dir, data='new/place')."
            )
        if data is None or isinstance(data, (str, os.PathLike, Mapping)):
            data = load_data(source if data is None else data, lm.tokenizer, config=config)
        if not isinstance(data, DataSet):
            raise DataError(f"data: expected what load_data returns, or a folder, got {type(data).__name__}.")
        date = config.template_date
        other_day = date is not None and data.date_is_todays and data.settings.template_date != date
        other_template = self._other_template and data.fingerprint != self._state["data"]["fingerprint"]  # loaded with that of today
        if (other_day or other_template) and data.load_again is not None:
            data = data.load_again(date)
        days = _other_days(data, date)
        fewer = _as_read_before(data, self._state["data"]["fingerprint"])
        if fewer is not data:
            data = fewer
            self.notes.append(f"the run began with {', '.join(data.splits)} alone, and goes on so: files of other names were not read then")
        self.notes += check_same_data(data, self._state["data"], self._force, days)
        return data

    def backward(self, config: TrainConfig) -> str | None:
        """How the run began to compute gradients: chosen again with other memory about, it might differ, and so would the last digits.
        None: the settings now say otherwise."""
        same = all(getattr(config, name) == self._state["config"].get(name) for name in ("backward", "memory"))
        return self._state["backward"] if same else None

    def state(self) -> TrainerState:
        """Where the run stands; the weights are in the model already."""
        return TrainerState.from_json(self._state, read_optimizer(self.checkpoint))

    def put_damaged_away(self) -> None:
        """Gives newer checkpoints that are damaged another name, out of the way of those to come."""
        for path, why in self._damaged.items():
            try:
                place = set_aside(path, "damaged").name
            except OSError:
                place = path.name
            self.notes.append(f"passed over a damaged checkpoint, now called {place}: {why}")


def _other_days(data: DataSet, date: str | None) -> str:
    """What the date in the rows has to do with it, where they are not those of a run with `date`."""
    if date not in (None, data.settings.template_date):
        return f", in rows with the date {data.settings.template_date} where the run has {date}: load_data(..., template_date={date!r})"
    if date is None and data.date_is_todays:  # a run of an earlier version, which kept none
        return ", in rows with the date of today: load_data(..., template_date=...) gives them that of the run's first day"
    return ""


def check_long_enough(total_steps: int, step: int) -> None:
    """
    Raises:
        CheckpointError: a run of so many steps has no such step.
    """
    if step > total_steps:
        raise CheckpointError(
            f"the state is that of step {step:,}, but the run has {total_steps:,} steps in all. Give more iters or epochs."
        )


def _as_read_before(data: DataSet, fingerprint: str) -> DataSet:
    """The data of that fingerprint, where it is this one without splits whose files have other names than the split.

    Earlier versions did not read these (`validation.jsonl` for `valid.jsonl`).
    """
    stems = {name: split[0].source.partition(".")[0] for name, split in data.splits.items() if len(split)}
    others = [name for name, stem in stems.items() if stem != name and split_named(stem) == name]
    if not others or data.fingerprint == fingerprint:
        return data
    fewer = copy.copy(data)
    fewer.__dict__.pop("fingerprint", None)
    for name in others:
        setattr(fewer, name, None)
    return fewer if fewer.fingerprint == fingerprint else data


def check_same_data(data: DataSet, stored: Mapping[str, Any], force: bool, why: str = "") -> list[str]:
    """A note where the data trains otherwise than the data of the run, and `force` is True. `why` is what is known of the reason.

    Raises:
        CheckpointError: `force` is False.
    """
    if data.fingerprint == stored["fingerprint"]:
        return []
    message = f"the data differs from what the run began with (fingerprint {data.fingerprint[:12]}, then {stored['fingerprint'][:12]}){why}"
    if not force:
        raise CheckpointError(f"{message}. Give the same rows, settings and tokenizer, or force=True (--force) to go on with these.")
    return [message]
