"""The files in a run's folder: what they are called, what others read of them without the lock, and which of them are ours."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fulltune_nb.errors import CheckpointError, listed
from fulltune_nb.files import FINDER_FILE, LEFT, check_ordinary, open_ordinary, write_text
from fulltune_nb.models.folder import load_folder_weights
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.models.parameters import Arrays, parameters_of
from fulltune_nb.training.history import History
from fulltune_nb.training.lock import LOCK_FILE, is_lock_file
from fulltune_nb.training.state import (
    BEST,
    CHECKPOINT_FILE,
    FOLDER_NAME,
    MANIFEST_FILE,
    STATE_FILE,
    check_files,
    list_checkpoints,
    names_in_manifest,
    new_decoder,
)

CONFIG_FILE, METRICS_FILE, EVENTS_FILE, RESULT_FILE = "config.yaml", "metrics.jsonl", "events.jsonl", "result.json"
CHECKPOINTS = "checkpoints"
CONFIG_HEADING = "# The settings of this run, written by fulltune_nb."
"""By it a run that ended before its first checkpoint is told from settings that somebody keeps in the folder."""
_REPORT = b'{"kind": "'
_ANY_CHECKPOINT = rf"(?:damaged-|left-|kept-)?{FOLDER_NAME}"
_LOSSES = {f"{split}_{what}" for split in ("train", "valid", "test") for what in ("loss", "perplexity")} | {"after"}  # in `result.json`
_OF_THE_SYSTEM = ("._", ".nfs")  # what a Mac keeps beside files on other disks, and NFS in place of open ones
_MAX_RESULT = 2**27  # bytes of a result that are read


# ---- reading


def holds_run(path: Path) -> bool:
    """Whether a run that has come beyond its very beginning is in a folder: it has a checkpoint, or reports of steps."""
    if list_checkpoints(path / CHECKPOINTS):
        return True
    try:
        with open_ordinary(path / METRICS_FILE) as file:
            return any(b'"kind": "step"' in line for line in file)
    except OSError:
        return False


def check_holds_no_run(path: Path) -> None:
    """
    Raises:
        CheckpointError: a run that has come beyond its very beginning is in the folder.
    """
    if holds_run(path):
        raise CheckpointError(
            f"{path} already holds a run. Go on with it by Trainer.resume({str(path)!r}), or by Trainer(..., resume=\"auto\");"
            " or give a new run_dir."
        )


def read_metrics(path: Path, name: str = METRICS_FILE) -> tuple[History, list[str]]:
    """The reports in the `metrics.jsonl` of a run's folder (or the events, by its name), for whoever looks at runs; nothing is locked.

    Returns:
        The reports, none where there is no such file; and notes on what was passed over: a line cut off by a crash, damaged ones, or
        the whole file where it cannot be read.
    """
    try:
        with open_ordinary(path / name) as file:
            history, bad = _reports(file)
    except FileNotFoundError:
        return History(), []
    except OSError as error:
        return History(), [f"{name} cannot be read: {error}"]
    if not bad:
        return history, []
    what = "1 line is no report and was" if len(bad) == 1 else f"{len(bad):,} lines are no reports and were"
    return history, [f"{name}: {what} passed over (line {listed(bad)})"]


def read_on(path: Path, begin: int) -> tuple[History, int]:
    """The reports in the `metrics.jsonl` of a run's folder from byte `begin` on, and where the next ones will begin: those of a run that
    is under way, whose last line may not be whole yet. Where the file is shorter by now, it is read from its begin."""
    try:
        with open_ordinary(path / METRICS_FILE) as file:
            begin = begin if begin <= os.fstat(file.fileno()).st_size else 0
            file.seek(begin)
            text = file.read()
    except OSError:
        return History(), begin
    whole = text[: text.rfind(b"\n") + 1]
    return _reports(whole.splitlines())[0], begin + len(whole)


def _reports(lines: Iterable[bytes]) -> tuple[History, list[int]]:
    """The reports, a line each, and the numbers of lines that are none."""
    history, bad = History(), []
    for number, line in enumerate(lines, 1):
        try:
            history += History.from_jsonable([json.loads(line)] if line.strip() else [])
        except (ValueError, RecursionError, CheckpointError):
            bad.append(number)
    return history, bad


def read_result(path: Path) -> dict[str, Any]:
    """What a `result.json` says; nothing where there is none, or it is not one."""
    try:
        with open_ordinary(path) as file:
            found = json.loads(file.read(_MAX_RESULT))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def best_is_older_than(step: int, run_dir: Path) -> bool:
    """Whether a run's `best/` is not there, or says that its weights are of an earlier step. Earlier versions did not say."""
    there = read_result(run_dir / BEST / STATE_FILE).get("step", step)
    return not (run_dir / BEST).is_dir() or (isinstance(there, int) and there < step)


def best_weights(run_dir: Path, lm: LanguageModel, step: int) -> Arrays | None:
    """Those of a run's `best/` by module path, where they are those of a step; `lm` is left as it is.

    Raises:
        CheckpointError: they are not what was written.
    """
    folder = run_dir / BEST
    if read_result(folder / STATE_FILE).get("step") != step:
        return None
    try:
        check_files(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is not what was written: {error}. The last weights are in {run_dir / CHECKPOINTS}.") from error
    model = new_decoder(lm)
    load_folder_weights(model, folder)
    return parameters_of(model)


def write_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """Writes `result.json` into a run's folder; what already stands there under other names stays, but for losses of other weights: of
    another step, or of a line that the run went back from.

    NaN and infinities, which JSON has not, become null.
    """
    path = folder / RESULT_FILE
    before = read_result(path)
    if any(before.get(name) != result.get(name, before.get(name)) for name in ("steps", "train_loss_last")):
        before = {name: value for name, value in before.items() if name not in _LOSSES}
    text = json.dumps({**before, **_finite(result)}, indent=1, allow_nan=False)
    write_text(path, text + "\n")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---- which are ours


def check_kinds(path: Path) -> None:
    """What a run reads and writes in its folder is never a link, a pipe or a device; the folder itself may be a link.

    Raises:
        CheckpointError: a name of a run's file or folder is there as something else.
    """
    try:
        for name in (CONFIG_FILE, METRICS_FILE, EVENTS_FILE, RESULT_FILE, LOCK_FILE):
            check_ordinary(path / name)
        for name in (CHECKPOINTS, BEST):
            check_ordinary(path / name, stat.S_IFDIR)
        for folder in (path / CHECKPOINTS).iterdir() if (path / CHECKPOINTS).is_dir() else ():
            if re.fullmatch(_ANY_CHECKPOINT, folder.name):
                check_ordinary(folder, stat.S_IFDIR)
    except OSError as error:
        raise CheckpointError(f"{error.strerror or error}. A run's folder holds its files itself: put it there, or remove it.") from error


def check_nothing_of_others(path: Path) -> None:
    """
    Raises:
        CheckpointError: the folder, of no run yet, holds something that a run would replace or write into.
    """
    others = [name for name, is_ours in _BEGUN.items() if (path / name).exists() and not is_ours(path / name)]
    if others:
        raise CheckpointError(
            f"{path} holds {listed(others)}, which no run that began there has written, and which a run would replace or add to. Nothing"
            " was changed. Move them elsewhere, or give a new run_dir."
        )


def _are_reports(path: Path) -> bool:
    """Whether each line begins as a report does, as far as it goes: a crash may have cut one off."""
    with open_ordinary(path) as file:
        return all(line.startswith(_REPORT) or _REPORT.startswith(line.rstrip()) for line in file)


def _is_config(path: Path) -> bool:
    with open_ordinary(path) as file:
        return file.readline(1000).rstrip() == CONFIG_HEADING.encode()


def _has_only_leavings(path: Path) -> bool:
    return all(folder.name == FINDER_FILE or re.fullmatch(_ANY_CHECKPOINT, folder.name) or is_leaving(folder) for folder in path.iterdir())


_BEGUN: dict[str, Callable[[Path], bool]] = {
    CONFIG_FILE: _is_config, METRICS_FILE: _are_reports, EVENTS_FILE: _are_reports, LOCK_FILE: is_lock_file,
    CHECKPOINTS: _has_only_leavings, RESULT_FILE: lambda path: False, BEST: lambda path: False,
}  # fmt: skip
"""What a run writes -> whether it is what one has left that ended before its first checkpoint. Those have no result yet."""


def is_leaving(path: Path) -> bool:
    """Whether what has the name of something left by a killed write is that.

    The names end in `.unfinished` or `-old` behind random letters and digits, as somebody's own names hardly do; a folder has a
    checkpoint's files in it and nothing else. Earlier versions wrote no `.unfinished`: there the letters have to look random.
    """
    left = LEFT.fullmatch(path.name)
    if left is None:
        return False
    is_folder = path.is_dir()
    if not left["kind"]:
        letters = "a-z" if is_folder else "a-f"
        if not re.fullmatch(rf"(?=.*\d)(?=.*[{letters}])[\d{letters}]+", left["random"]):
            return False
    return not is_folder or all(re.fullmatch(CHECKPOINT_FILE, file.name) or LEFT.fullmatch(file.name) for file in path.iterdir())


# ---- files of others in a checkpoint


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder was written as a checkpoint: it has a manifest, which names its other files."""
    return bool(names_in_manifest(folder))


def files_of_others(folder: Path) -> list[Path]:
    """What stands in a checkpoint's folder and was not written as part of it, such as somebody's notes, or a file made of its weights."""
    ours = {*names_in_manifest(folder), MANIFEST_FILE, FINDER_FILE}
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.name not in ours and not path.name.startswith(_OF_THE_SYSTEM))


def keep_files_of_others(folder: Path) -> list[str]:
    """Moves them out of a checkpoint that is to be removed or replaced, into `kept-<name>` beside it.

    Returns:
        A line for each.
    """
    place, moved = folder.with_name(f"kept-{folder.name}"), []
    for path in files_of_others(folder):
        place.mkdir(exist_ok=True)
        target, number = place / path.name, 1
        while os.path.lexists(target):
            number += 1
            target = place / f"{path.stem}-{number}{path.suffix}"
        os.rename(path, target)
        moved.append(f"{path.name} was in {folder.name}, which is removed or written anew; it is now {place.name}/{target.name}")
    return moved
