"""The state of a run: one value, which is a snapshot in memory, a checkpoint on the disk, and what a trainer takes up again.

A checkpoint is whole or not there: it is written beside its place, flushed, and renamed; its manifest holds a sha256 of each file.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fulltune_nb.errors import CheckpointError, FulltuneError
from fulltune_nb.files import (
    absolute,
    check_space,
    flush_to_disk,
    is_empty,
    put_in_place,
    remove_folder,
    sha256_of,
    unfinished_folder,
    write_text,
)
from fulltune_nb.html import facts, human_bytes, printable
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.folder import check_not_source, fill_folder, load_folder_weights
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.models.parameters import Arrays, parameters_of, put_parameters
from fulltune_nb.system_info import arithmetic, package_versions
from fulltune_nb.tensor_files import begin_checksum_of, read_tensors, write_tensors
from fulltune_nb.tokenizer import FILES, bytes_to_save
from fulltune_nb.training.history import EvalReport, Event, History
from fulltune_nb.training.schedule import NEXT, PEAK, RateSet, read_rates

OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE = "optimizer.safetensors", "trainer.json", "manifest.json"
BEST = "best"
FOLDER_NAME = r"step-\d{6,}"
CHECKPOINT_FILE = r"(generation_)?config\.json|model.*\.safetensors(\.index\.json)?|.*\.(model|tiktoken)|additional_chat_templates|"
CHECKPOINT_FILE += "|".join(map(re.escape, (OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE, *FILES)))
"""The names of the files that are written into a checkpoint, or read from one; a regular expression."""
_SMALL_FILES = 2**24  # bytes kept free for the history and the like
_MAX_JSON = 2**30  # bytes of a manifest or a state that are read


def versions() -> dict[str, str]:
    """What a run's numbers depend on besides its settings: packages, Python, the machine, and what it multiplies with."""
    machine = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    return machine | package_versions(("fulltune_nb", "mlx", "numpy", "transformers", "tokenizers")) | arithmetic()


def other_arithmetic(then: Mapping[str, Any]) -> list[str]:
    """A note where versions or arithmetic are not those of a state, its `versions`; else nothing."""
    now = versions()
    changed = [f"{name} was {str(then[name])[:100]}, is {now[name]}" for name in now if name in then and then[name] != now[name]]
    in_tf32, was_in_tf32 = (state.get("float32 products") == "TF32" for state in (now, then))
    digits = "in the last digits" if in_tf32 == was_in_tf32 else "from the fourth digit on"
    what = f"numbers may differ {digits}, and more as steps add up: not the same versions or arithmetic as when this was saved"
    return [f"{what}: {'; '.join(changed)}"] if changed else []


def random_state() -> list[int]:
    """MLX's random state of this thread, as two whole numbers."""
    return np.array(mx.random.state[0]).tolist()


def set_random_state(state: list[int]) -> None:
    """Takes back what `random_state` gave."""
    mx.random.seed((state[0] << 32) | state[1])


def copy_of(lm: LanguageModel) -> LanguageModel:
    """The same model with weights of its own."""
    model = new_decoder(lm)
    put_parameters(model, copied(parameters_of(lm.model)))
    other = LanguageModel(model, lm.tokenizer, lm.source, lm.generation_config)
    other.dequantized = lm.dequantized
    return other


def new_decoder(lm: LanguageModel) -> Decoder:
    """One of the same shape; MLX's random state does not notice its initial values."""
    random = random_state()
    model = Decoder(lm.config)
    set_random_state(random)
    return model


def copied(arrays: Arrays) -> Arrays:
    """The same in memory of their own, bit for bit: updates are made in place."""
    copies = {name: mx.where(mx.array(True), array, array) for name, array in arrays.items()}
    mx.eval(list(copies.values()))
    return copies


@dataclass
class Patience:
    """The best validation loss so far, and how many evaluations have passed without a better one."""

    limit: int | None
    """Evaluations without improvement after which training stops; None for never."""
    best_loss: float = math.inf
    """In nats; inf before the first evaluation."""
    waited: int = 0
    """Evaluations since the best one."""
    last_step: int = -1
    """The step evaluated last, so that none is evaluated twice; -1 before the first."""

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


@dataclass(frozen=True)
class TrainerState:
    """All that a run needs to go on bit for bit from a step. The data is named, not held; the tokenizer stands in the model's folder.

    Attributes:
        step: optimizer steps taken.
        history: every report up to then.
        rate_factor: what the schedule's rates are multiplied by.
        patience: `Patience.to_dict()`.
        random: MLX's random state.
        optimizer_steps_before: steps taken before the optimizer was begun anew, in a fork.
        origin: what the run was begun with, as JSON values: `config`, `model_source`, `dequantized` (how its weights had been quantized),
            `data` (source and fingerprint), `versions`, `backward`, `rates_to_come`; and for readers of the file, `position` and
            `learning_rate`.
        optimizer_arrays: the optimizer's state by name.
        weights: by module path; empty where the model holds them.
    """

    step: int
    history: History
    rate_factor: float
    patience: dict[str, Any]
    random: list[int]
    optimizer_steps_before: int
    origin: dict[str, Any]
    optimizer_arrays: Arrays = field(default_factory=dict)
    weights: Arrays = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (*self.weights.values(), *self.optimizer_arrays.values()))

    def copied(self) -> TrainerState:
        """The same with arrays of its own, which training on does not change."""
        return replace(self, optimizer_arrays=copied(self.optimizer_arrays), weights=copied(self.weights))

    def to_json(self) -> dict[str, Any]:
        """All but the arrays, as JSON values: the `trainer.json` of a checkpoint."""
        own = {name: getattr(self, name) for name in ("step", "rate_factor", "patience", "random", "optimizer_steps_before")}
        return {**own, **self.origin, "history": self.history.to_jsonable()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], optimizer_arrays: Arrays, weights: Arrays | None = None) -> TrainerState:
        """The state that `to_json` gave, with its arrays.

        Raises:
            CheckpointError: an entry of the history is none.
        """
        own = {name: values[name] for name in ("step", "rate_factor", "patience", "random", "optimizer_steps_before")}
        origin = {name: value for name, value in values.items() if name not in own and name != "history"}
        history = History.from_jsonable(values["history"])
        return cls(**own, history=history, origin=origin, optimizer_arrays=optimizer_arrays, weights=weights or {})


@dataclass(frozen=True, repr=False)
class Snapshot:
    """A trainer's state at one step, to go back to with `trainer.restore`. Training on does not change it.

    Attributes:
        step: optimizer steps taken.
        path: its folder; None for one in memory.
        nbytes: size of weights and optimizer state, in bytes.
        state: what is held in memory; None where it is in the folder.
    """

    step: int
    path: Path | None
    nbytes: int
    state: TrainerState | None = field(default=None, compare=False)

    @classmethod
    def take(cls, state: TrainerState, lm: LanguageModel, folder: str | os.PathLike | None) -> Snapshot:
        """Of a state whose weights the model holds: in a new or empty folder; None: in memory.

        Raises:
            CheckpointError: it cannot be written.
        """
        if folder is None:
            return cls(state.step, None, state.nbytes, state.copied())
        path = absolute(folder)
        if path.exists() and not is_empty(path):
            raise CheckpointError(f"{path} is not an empty folder. A snapshot is written into a new or empty one.")
        check_not_source(path, lm.source, "The snapshot's folder")
        write_checkpoint(path, lm, state)
        return cls(state.step, path, state.nbytes)

    def __repr__(self) -> str:
        return f"Snapshot(step {self.step}, {human_bytes(self.nbytes)}, {printable(self.path or 'in memory')})"

    def _repr_html_(self) -> str:
        return facts(f"Snapshot of step {self.step:,}", [("size", human_bytes(self.nbytes)), ("place", self.path or "in memory")])


# ---- a state on the disk


def checkpoint_name(step: int) -> str:
    """`step-000100` for step 100."""
    return f"step-{step:06d}"


def write_checkpoint(
    folder: Path,
    lm: LanguageModel,
    state: TrainerState | None = None,
    about: Mapping[str, Any] | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Writes a checkpoint under its final name, replacing one of the same name.

    Args:
        folder: where it will stand.
        lm: the weights, those of the state, and the tokenizer.
        state: the optimizer's arrays and everything else; None for the weights alone.
        about: JSON values to keep with weights alone.
        check: called again when all is written: raises where it must not be put in place any more.

    Raises:
        CheckpointError: it cannot be written; what stood there before is untouched.
    """
    optimizer_arrays = state.optimizer_arrays if state else {}
    arrays = [*parameters_of(lm.model).values(), *optimizer_arrays.values()]
    needed = sum(array.nbytes for array in arrays) + bytes_to_save(lm.tokenizer) + _SMALL_FILES
    try:
        check_space(folder.parent, needed, "a checkpoint")
        with unfinished_folder(folder) as partial:
            _write_files(partial, lm, state, about or {}, optimizer_arrays)
            flush_to_disk(partial)
            check()
            put_in_place(partial, folder)
    except (OSError, FulltuneError) as error:
        why = str(error).rstrip(".")
        raise CheckpointError(
            f"checkpoint {folder} could not be written: {why}. Earlier checkpoints are untouched. Make room or correct the permissions;"
            " then save again."
        ) from error


def _write_files(folder: Path, lm: LanguageModel, state: TrainerState | None, about: Mapping[str, Any], optimizer_arrays: Arrays) -> None:
    # The largest file's checksum takes longest, so it is begun before anything is written.
    checksums = {OPTIMIZER_FILE: begin_checksum_of(optimizer_arrays)} if optimizer_arrays else {}
    # What a run goes on from keeps the tokenizer as it is: another EOS might make other tokens of its data.
    ends = () if state else lm.trained_ends
    checksums |= fill_folder(folder, lm.model, lm.tokenizer, lm.generation_config, ends=ends, with_checksums=True)
    if optimizer_arrays:
        write_tensors(folder / OPTIMIZER_FILE, optimizer_arrays)
    write_text(folder / STATE_FILE, json.dumps(state.to_json() if state else about, allow_nan=False))
    manifest = {path.name: checksums[path.name]() if path.name in checksums else sha256_of(path) for path in sorted(folder.iterdir())}
    write_text(folder / MANIFEST_FILE, json.dumps(manifest, indent=1))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if re.fullmatch(FOLDER_NAME, path.name) and path.is_dir() and not path.is_symlink())
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def set_aside(folder: Path, why: str) -> Path:
    """Gives a checkpoint another name, `<why>-step-000100`, so that it counts no more; one of that name is removed."""
    place = folder.with_name(f"{why}-{folder.name}")
    if place.exists():
        remove_folder(place)
    os.rename(folder, place)
    flush_to_disk(place.parent)
    return place


def names_in_manifest(folder: Path) -> set[str]:
    """The files that were written as a checkpoint's, but for the manifest; none where the folder was not written as one.

    Raises:
        OSError: there is a manifest, and it cannot be read, which says nothing of what is in it.
    """
    with suppress(FileNotFoundError, NotADirectoryError, ValueError):
        manifest = _read_json(folder / MANIFEST_FILE)
        return set(manifest) if isinstance(manifest, dict) and STATE_FILE in manifest else set()
    return set()


def newest_whole(run_dir: Path) -> tuple[Path, dict[str, Any], dict[Path, str]]:
    """The newest checkpoint of a run that is whole.

    Returns:
        Its folder, its state, and for each newer one that had to be passed over, why.

    Raises:
        CheckpointError: there is none, or the newest cannot be read, which says nothing of what is in it.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(run_dir / "checkpoints")):
        try:
            return folder, read_state(folder), damaged
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):
                raise
            damaged[folder] = str(error)
    passed_over = "".join(f"\n  {reason}" for reason in damaged.values())
    raise CheckpointError(f"No whole checkpoint in {run_dir / 'checkpoints'}. Give the run_dir of a run that was saved.{passed_over}")


def read_checkpoint(folder: Path, lm: LanguageModel) -> TrainerState:
    """A checkpoint with its weights, without touching the model: they may turn out not to fit.

    Raises:
        CheckpointError: it is not whole.
    """
    values, model = read_state(folder), new_decoder(lm)
    load_folder_weights(model, folder)
    return TrainerState.from_json(values, read_optimizer(folder), parameters_of(model))


def read_optimizer(folder: Path) -> dict[str, mx.array]:
    """The optimizer's arrays of a checkpoint, evaluated; empty where there is no file of them."""
    path = folder / OPTIMIZER_FILE
    arrays = read_tensors(path) if path.exists() else {}
    mx.eval(list(arrays.values()))
    return arrays


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after every file has been compared with the manifest.

    Raises:
        CheckpointError: something is missing, damaged, or not what was written.
    """
    try:
        check_files(folder)
        state = _read_json(folder / STATE_FILE)
    except OSError as error:
        what = "It may be whole all the same: make it readable, or move it away to go on from an earlier one"
        raise CheckpointError(f"{folder} cannot be read: {error}. {what}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}") from error
    problem = _state_problem(state)
    if problem is None and re.fullmatch(FOLDER_NAME, folder.name) and state["step"] != step_of(folder):
        problem = f"it says step {state['step']}, its folder's name says another"
    if problem is not None:
        raise CheckpointError(f"{folder / STATE_FILE} is not the state of a run: {problem}. Go back to an earlier checkpoint.")
    return state


def evaluated_since(state: Mapping[str, Any], written: History) -> list[dict[str, Any]]:
    """What was evaluated at a checkpoint's step after the checkpoint, as JSON values; `written` are the reports in `metrics.jsonl`.

    A validation that `patience` has not counted is left out: the run does it again.
    """
    at_step = [report for report in written.evals if report.step == state["step"]]
    known = [report for report in at_step if report.split != "valid" or state["patience"]["last_step"] == report.step]
    return [entry for entry in map(EvalReport.to_dict, known) if entry not in state["history"]]


_RATE_SET = re.compile(rf"({NEXT}|{PEAK}) changed from \S+ to (\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


def set_by_hand_since(state: Mapping[str, Any], events: Sequence[Event]) -> tuple[dict[int, RateSet], list[str]]:
    """What was set by hand after a checkpoint, and is not in its state; `events` are those in `events.jsonl`, oldest first.

    Returns:
        Learning rates, by the step count at which each was set; and notes.
    """
    rates = read_rates(state.get("rates_to_come", {}))
    known, notes, gone_back = History.from_jsonable(state["history"]).events, [], False
    begin = 0 if not known else events.index(known[-1]) + 1 if known[-1] in events else len(events)
    for event in events[begin:]:
        found = _RATE_SET.fullmatch(event.message) if event.kind == "learning_rate" else None
        if event.kind == "restore":
            notes.append(f"after this checkpoint the run {event.message}; nothing of that was saved, so it goes on from the checkpoint")
            rates, gone_back = {}, True
        elif found and gone_back:
            notes.append(f"the {found[1]} was set to {found[2]} by hand at step {event.step} of what was not saved: set it again")
        elif found and event.step >= state["step"]:
            rates = {step: other for step, other in rates.items() if step < event.step} | {event.step: (found[1], float(found[2]))}
    again = "by hand after this checkpoint: it is set so again there"
    return rates, notes + [f"the {what} was set to {rate!r} at step {step} {again}" for step, (what, rate) in rates.items()]


def check_files(folder: Path) -> None:
    """Compares a checkpoint's files with its manifest.

    Raises:
        CheckpointError: one differs, is a link, is missing, the manifest names others, or leaves one out that would be read.
        OSError, ValueError: the manifest, or a file, cannot be read.
    """
    manifest = _read_json(folder / MANIFEST_FILE)
    if not isinstance(manifest, dict) or not manifest or not all(isinstance(digest, str) for digest in manifest.values()):
        raise CheckpointError(f"{folder / MANIFEST_FILE} is not a list of files and their sha256.")
    for name in manifest:
        if os.path.basename(name) != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
            raise CheckpointError(f"{folder / MANIFEST_FILE} names a file outside the folder: {name!r}. Nothing was read.")
    there = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST_FILE}
    if missing := sorted(manifest.keys() - there):
        raise CheckpointError(f"{folder} lacks files that its manifest names: {', '.join(missing[:5])}.")
    if unknown := sorted(name for name in there - manifest.keys() if re.fullmatch(CHECKPOINT_FILE, name)):
        raise CheckpointError(f"{folder} has files that its manifest does not name: {', '.join(unknown[:5])}. Move them elsewhere.")
    for name, digest in manifest.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is a link or no file at all; a checkpoint holds its files itself. Nothing of it was read.")
        if sha256_of(path) != digest:
            raise CheckpointError(f"{path} is not the file that was written: its sha256 differs from the manifest's.")


def _read_json(path: Path) -> Any:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is missing, or a link or no file")
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, more than the {_MAX_JSON:,} that are read")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from error


_STATE_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,), "rate_factor": (int, float), "patience": (dict,), "config": (dict,), "model_source": (str, type(None)),
    "data": (dict,), "history": (list,), "random": (list,), "versions": (dict,), "optimizer_steps_before": (int,),
    "backward": (str,),
}  # fmt: skip


def _state_problem(state: Any) -> str | None:
    if not isinstance(state, dict):
        return f"expected a JSON object, found a {type(state).__name__}"
    for name, types in _STATE_TYPES.items():
        if name not in state:
            return f"{name!r} is missing"
        if not isinstance(state[name], types) or isinstance(state[name], bool):
            return f"{name!r} is {str(state[name])[:60]!r}"
    if state["backward"] not in ("whole", "layerwise"):
        return f"'backward' is {state['backward'][:60]!r}"
    if read_rates(state.get("rates_to_come", {})) is None:
        return f"'rates_to_come' is {str(state['rates_to_come'])[:60]!r}"
    if not isinstance(state.get("dequantized"), (str, type(None))):  # runs of earlier versions do not have it
        return f"'dequantized' is {str(state['dequantized'])[:60]!r}"
    if state["step"] < 0:
        return f"'step' is {state['step']}"
    if len(state["random"]) != 2 or not all(isinstance(half, int) and 0 <= half < 2**32 for half in state["random"]):
        return f"'random' is {str(state['random'])[:60]}"
    if not isinstance(state["data"].get("fingerprint"), str) or not isinstance(state["data"].get("source"), (str, type(None))):
        return "'data' has no fingerprint or a wrong source"
    patience = state["patience"]
    counts = (patience.get("waited"), patience.get("last_step"))
    if not isinstance(patience.get("best_loss", ""), (int, float, type(None))) or not all(isinstance(count, int) for count in counts):
        return f"'patience' is {str(state['patience'])[:60]}"
    return None
