"""Checkpoints: a model folder with the optimizer's state and the run's position beside it, whole or not there at all.

A checkpoint is written into a folder of another name, flushed, described by a manifest with each file's sha256, and only
then renamed; an older one is removed after that. What stands under `checkpoints/step-...` is therefore always whole, and
can be loaded with `load_model` like any model folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from fulltune_nb.errors import CheckpointError, FulltuneError
from fulltune_nb.files import Checksum, check_space, flush_to_disk, put_in_place, remove_folder, sha256_of, write_text
from fulltune_nb.models.loading import read_tensors
from fulltune_nb.models.saving import begin_checksum_of, write_tensors

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
