"""Checkpoints: a model folder with the optimizer's state and the run's position beside it, whole or not there at all.

A checkpoint is written into a folder of another name, flushed, described by a manifest with each file's sha256, and only
then renamed; an older one is removed after that. What stands under `checkpoints/step-...` is therefore always whole, and
can be loaded with `load_model` like any model folder.
"""

from __future__ import annotations

import hashlib
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
from fulltune_nb.models.loading import read_tensors
from fulltune_nb.models.saving import write_tensors, write_text

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer.json"
MANIFEST_FILE = "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_name(step: int) -> str:
    """`step-000100` for step 100."""
    return f"step-{step:06d}"


def write_checkpoint(
    folder: Path, save_model: Callable[[Path], Any], optimizer_arrays: Mapping[str, mx.array], state: Mapping[str, Any]
) -> Path:
    """Writes a checkpoint under its final name, replacing one of the same name.

    Args:
        folder: where it will stand.
        save_model: writes a model folder into the empty folder it is given.
        optimizer_arrays: the optimizer's state.
        state: everything else, as JSON values.

    Raises:
        CheckpointError: it cannot be written; what stood there before is untouched.
    """
    partial = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        partial.mkdir(parents=True)
        save_model(partial)
        if optimizer_arrays:
            write_tensors(partial / OPTIMIZER_FILE, optimizer_arrays)
        write_text(partial / STATE_FILE, json.dumps(state, allow_nan=False))
        manifest = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        write_text(partial / MANIFEST_FILE, json.dumps(manifest, indent=1))
        _replace_folder(partial, folder)
    except (OSError, FulltuneError) as error:
        raise CheckpointError(f"checkpoint {folder} could not be written: {error}. Earlier checkpoints are untouched.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _replace_folder(new: Path, place: Path) -> None:
    """Renames `new` to `place`; what stood there is set aside first and removed last."""
    aside = place.parent / f".{place.name}-{uuid.uuid4().hex[:8]}-old"
    if place.exists():
        os.rename(place, aside)
    os.rename(new, place)
    descriptor = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_NAME.fullmatch(path.name).group(1)))


def keep_newest(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the newest `keep`."""
    for path in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint, after every file has been compared with the manifest.

    Raises:
        CheckpointError: something is missing, damaged, or not what was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            if Path(name).name != name:
                raise CheckpointError(f"{folder}: the manifest names a file outside the folder: {name!r}.")
            if _sha256(folder / name) != digest:
                raise CheckpointError(f"{folder / name} is not the file that was written: its sha256 differs from the manifest's.")
        return json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: {error}") from error


def read_optimizer(folder: Path) -> dict[str, mx.array]:
    """The optimizer's arrays of a checkpoint, evaluated; empty where the optimizer keeps none."""
    path = folder / OPTIMIZER_FILE
    arrays = read_tensors(path) if path.exists() else {}
    mx.eval(list(arrays.values()))
    return arrays


def newest_whole(run_dir: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The newest checkpoint of a run that is whole.

    Returns:
        Its folder, its state, and for each newer one that had to be passed over, why.

    Raises:
        CheckpointError: there is none.
    """
    damaged = []
    for folder in reversed(list_checkpoints(run_dir / "checkpoints")):
        try:
            return folder, read_state(folder), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    passed_over = "".join(f"\n  {reason}" for reason in damaged)
    raise CheckpointError(f"No whole checkpoint in {run_dir / 'checkpoints'}. Give the run_dir of a run that was saved.{passed_over}")
