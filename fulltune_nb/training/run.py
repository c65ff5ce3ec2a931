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

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
from mlx.utils import tree_flatten

from fulltune_nb.errors import CheckpointError, ConfigError, FulltuneError, ModelError
from fulltune_nb.files import (
    Checksum,
    append_line,
    check_space,
    flush_to_disk,
    put_in_place,
    remove_folder,
    sha256_of,
    tidy,
    wait_for_removals,
    write_text,
)
from fulltune_nb.models.folder import check_not_source, save_folder
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.tensor_files import begin_checksum_of, read_tensors, write_tensors
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.history import EvalReport, Event, History, StepReport

# -- run_lock: One run directory, one trainer: a lock that its process holds, and that ends with the process howeve

LOCK_FILE = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: weakref.WeakValueDictionary[tuple[int, int], RunLock] = weakref.WeakValueDictionary()  # by the file's device and number


class RunLock:
    """The lock of a run directory. Let go by `release`, when nothing refers to it any more, or when the process ends.

    A trainer of the same process that takes the directory up again, as when a cell is run twice, takes the lock over; `check`
    then tells the one before.

    Args:
        folder: the run directory, which exists.

    Attributes:
        note: what to tell about a process that ended without letting go; None where there was none.
        is_ours: False once a later trainer of this process has taken it over.

    Raises:
        CheckpointError: another process holds it, or the file cannot be written.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_FILE
        self.note: str | None = None
        self.is_ours = True
        try:
            descriptor = self._open()
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}. Give a run_dir that can be written to.") from error
        self._release = weakref.finalize(self, _let_go, descriptor, self.path, os.getpid())
        status = os.fstat(descriptor)
        _held[status.st_dev, status.st_ino] = self

    def _open(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if (before := self._of_this_process(descriptor)) is not None:
                    before.is_ours = False
                    os.close(descriptor)
                    descriptor = before._hand_over()
                    return descriptor
                owner = _owner(descriptor)
                self._lock(descriptor, owner)
                if not self._is_at_its_place(descriptor):
                    os.close(descriptor)  # its holder let go and removed it in this moment
                    continue
                if owner:
                    self.note = f"taken over from {_describe(owner)}, which ended without letting go"
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, (json.dumps(_this_process()) + "\n").encode(), 0)
                return descriptor
            except BaseException:
                os.close(descriptor)
                raise

    def _of_this_process(self, descriptor: int) -> RunLock | None:
        status = os.fstat(descriptor)
        before = _held.get((status.st_dev, status.st_ino))
        return before if before is not None and before._release.alive and before._release.peek()[2][2] == os.getpid() else None

    def _hand_over(self) -> int:
        return self._release.detach()[2][0]

    def _lock(self, descriptor: int, owner: dict[str, Any]) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS and not _may_be_alive(owner):
                return
            if error.errno not in (*_NO_LOCKS, errno.EWOULDBLOCK, errno.EACCES):
                raise
            gone = f" If that process is gone, remove {self.path}." if error.errno in _NO_LOCKS else ""
            raise CheckpointError(
                f"{self.path.parent} is in use by {_describe(owner)}. Two runs never share a run_dir: end that process (in a notebook,"
                f" shut its kernel down), or give another run_dir.{gone}"
            ) from None

    def _is_at_its_place(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """
        Raises:
            CheckpointError: a later trainer of this process has taken the directory over.
        """
        if not self.is_ours:
            raise CheckpointError(
                f"{self.path.parent} has been taken up by a later trainer of this process; go on with that one."
            )

    def release(self) -> None:
        """Lets go; nothing happens where that is done already."""
        self._release()


def _let_go(descriptor: int, path: Path, process: int) -> None:
    if os.getpid() != process:  # a forked child has the parent's lock before it, not one of its own
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass
    os.close(descriptor)


def _this_process() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _owner(descriptor: int) -> dict[str, Any]:
    """What the file says; empty where it says nothing that can be read."""
    try:
        owner = json.loads(os.pread(descriptor, 10_000, 0))
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {str(owner.get('host'))[:80]}, which holds it since {str(owner.get('since'))[:40]}"


def _may_be_alive(owner: dict[str, Any]) -> bool:
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        return abs(psutil.Process(owner["process"]).create_time() - owner["process_started"]) < 1
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


# -- checkpoint: Checkpoints: a model folder with the optimizer's state and the run's position beside it, whole or no

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer.json"
MANIFEST_FILE = "manifest.json"
FOLDER_NAME = r"step-\d{6,}"
_NAME = re.compile(r"step-(\d{6,})")
_SMALL_FILES = 2**24  # bytes kept free for the tokenizer, the history and the like
_MAX_JSON = 2**30  # bytes of a manifest or a state that are read


def checkpoint_name(step: int) -> str:
    """`step-000100` for step 100."""
    return f"step-{step:06d}"


def write_checkpoint(
    folder: Path,
    save_model: Callable[[Path], Mapping[str, Checksum]],
    model_bytes: int,
    optimizer_arrays: Mapping[str, mx.array],
    state: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint under its final name, replacing one of the same name.

    Args:
        folder: where it will stand.
        save_model: writes a model folder into the empty folder it is given and returns the checksums (by file name) of what
            it has them for.
        model_bytes: size of the weights.
        optimizer_arrays: the optimizer's state, of any dtypes.
        state: everything else, as JSON values.

    Raises:
        CheckpointError: it cannot be written; what stood there before is untouched.
    """
    partial = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        needed = model_bytes + sum(array.nbytes for array in optimizer_arrays.values()) + _SMALL_FILES
        check_space(folder.parent, needed, "a checkpoint")
        partial.mkdir(parents=True)
        # The largest file's checksum takes longest, so it is begun before anything is written.
        of_optimizer = {OPTIMIZER_FILE: begin_checksum_of(optimizer_arrays)} if optimizer_arrays else {}
        checksums = {**save_model(partial), **of_optimizer}
        if optimizer_arrays:
            write_tensors(partial / OPTIMIZER_FILE, optimizer_arrays)
        write_text(partial / STATE_FILE, json.dumps(state, allow_nan=False))
        manifest = {path.name: _sha256(path, checksums.get(path.name)) for path in sorted(partial.iterdir())}
        write_text(partial / MANIFEST_FILE, json.dumps(manifest, indent=1))
        flush_to_disk(partial)
        put_in_place(partial, folder)
    except (OSError, FulltuneError) as error:
        raise CheckpointError(
            f"checkpoint {folder} could not be written: {error}. Earlier checkpoints are untouched. Make room or correct the permissions;"
            " then save again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _sha256(path: Path, known: Checksum | None) -> str:
    return sha256_of(path) if known is None else known()


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(_NAME.fullmatch(folder.name).group(1))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def keep_newest(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the newest `keep`."""
    for path in list_checkpoints(folder)[:-keep]:
        remove_folder(path)


def leave_later(folder: Path, step: int) -> None:
    """Sets the newest checkpoint of a later step aside as `left-step-...`; other later ones, and what was left before, go."""
    later = [path for path in list_checkpoints(folder) if step_of(path) > step]
    if not later:
        return
    before = [path for path in folder.iterdir() if _NAME.fullmatch(path.name.removeprefix("left-")) and path.name.startswith("left-")]
    kept = set_aside(later[-1], "left")
    for path in [*later[:-1], *(path for path in before if path != kept)]:
        remove_folder(path)


def set_aside(folder: Path, why: str) -> Path:
    """Gives a checkpoint another name, `<why>-step-000100`, so that it counts no more; one of that name is removed."""
    place = folder.with_name(f"{why}-{folder.name}")
    put_in_place(folder, place)
    return place


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after every file has been compared with the manifest.

    Raises:
        CheckpointError: something is missing, damaged, or not what was written.
    """
    try:
        check_files(folder)
        state = _read_json(folder / STATE_FILE)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}") from error
    problem = _state_problem(state)
    if problem is None and _NAME.fullmatch(folder.name) and state["step"] != step_of(folder):
        problem = f"it says step {state['step']}, its folder's name says another"
    if problem is not None:
        raise CheckpointError(f"{folder / STATE_FILE} is not the state of a run: {problem}. Go back to an earlier checkpoint.")
    return state


def check_files(folder: Path) -> None:
    """Compares a checkpoint's files with its manifest.

    Raises:
        CheckpointError: one differs, is a link, is missing in the folder or in the manifest, or the manifest names others.
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
    if unknown := sorted(there - manifest.keys()):
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


def read_optimizer(folder: Path) -> dict[str, mx.array]:
    """The optimizer's arrays of a checkpoint, evaluated; empty where the optimizer keeps none."""
    path = folder / OPTIMIZER_FILE
    arrays = read_tensors(path) if path.exists() else {}
    mx.eval(list(arrays.values()))
    return arrays


def newest_whole(run_dir: Path) -> tuple[Path, dict[str, Any], dict[Path, str]]:
    """The newest checkpoint of a run that is whole.

    Returns:
        Its folder, its state, and for each newer one that had to be passed over, why.

    Raises:
        CheckpointError: there is none.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(run_dir / "checkpoints")):
        try:
            return folder, read_state(folder), damaged
        except CheckpointError as error:
            damaged[folder] = str(error)
    passed_over = "".join(f"\n  {reason}" for reason in damaged.values())
    raise CheckpointError(f"No whole checkpoint in {run_dir / 'checkpoints'}. Give the run_dir of a run that was saved.{passed_over}")


# -- run_directory: The folder of a run: settings, reports, events, checkpoints, the best weights

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
        return save_folder(place, lm.model, lm.tokenizer, lm.generation_config, with_checksums=True)

    return write_checkpoint(folder, save, size, optimizer_arrays, state)
