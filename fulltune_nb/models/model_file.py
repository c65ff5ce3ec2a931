"""Model files: the weights of a fine-tuned model in one file, and what says which model they belong to.

A `.safetensors` file carries these texts itself; beside `model.npz` stands `model.npz.json`. While an npz is replaced, the small file also
has `replaces`, the texts of the earlier npz and what that one is known by: whenever a process is killed, a file has its own texts.

    base_model    the folder (absolute) or hub id whose config.json and tokenizer belong to the weights
    dtype         of the weights, such as "float32"
    data_format   of the rows trained on: "chat", "completions" or "text"
    mask_prompt   "true" where the loss was on the answers only, "last" where on the last one of each row, else "false"
    template_date the date in the rows trained on, where the chat template writes one
    eos_token_id  JSON list of the token ids that end an answer, those that were trained among them
    stop_strings  JSON list of the texts that do; left out where there are none
    fulltune_nb   the version that wrote it
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fulltune_nb.errors import ConfigError, ModelError, WeightsError
from fulltune_nb.files import FINDER_FILE, flush_to_disk, is_empty, put_in_place, unfinished_folder, write_text
from fulltune_nb.model_json import read_json
from fulltune_nb.models.folder import check_not_source, fill_folder, hf_tensors
from fulltune_nb.models.language_model import LanguageModel, load_model, valid_ends
from fulltune_nb.system_info import package_versions
from fulltune_nb.tensor_files import check_ending, check_regular_file, safetensors_metadata, write_tensors

EXPORT_NOTE = "fulltune_nb.json"
"""File in an exported model folder that says what it was trained on, and which files were written."""
_REPLACES = "replaces"


def metadata_path(path: Path) -> Path:
    """The small file beside an npz."""
    return path.with_name(path.name + ".json")


def save_model_file(
    path: Path, lm: LanguageModel, data_format: str | None = None, mask_prompt: bool | str | None = None, template_date: str | None = None
) -> None:
    """Writes all weights under their Hugging Face names, and where they come from.

    Args:
        path: the file; its ending says which kind.
        lm: the model.
        data_format: of the rows trained on.
        mask_prompt: whether the loss was on the answers only, or on the "last" of each row.
        template_date: the date that the chat template wrote into the rows.

    Raises:
        WeightsError: another ending, a weights file of the source model, or the file cannot be written.
    """
    check_model_file(path, lm)
    metadata = {"dtype": lm.dtype, "fulltune_nb": package_versions(["fulltune_nb"])["fulltune_nb"]}
    if lm.source is not None:
        folder = Path(lm.source).expanduser()
        metadata["base_model"] = os.path.abspath(folder) if folder.exists() else lm.source
    if data_format is not None:
        metadata["data_format"] = data_format
    if mask_prompt is not None:
        metadata["mask_prompt"] = str(mask_prompt).lower()
    if template_date is not None:
        metadata["template_date"] = template_date
    for name, ends in (("eos_token_id", lm.stop_ids), ("stop_strings", lm.stop_strings)):
        if ends:
            metadata[name] = json.dumps(ends)
    with with_metadata(path, metadata):
        write_tensors(path, hf_tensors(lm.model), metadata)


def check_model_file(path: Path, lm: LanguageModel) -> None:
    """
    Raises:
        WeightsError: writing the file would replace the source model's weights, or add to them.
    """
    source = Path(lm.source).expanduser() if lm.source else None
    if source is None or not source.is_dir() or path.suffix != ".safetensors":
        return
    if os.path.realpath(path.parent) == os.path.realpath(source) and (path.exists() or path.name.startswith("model")):
        raise WeightsError(f"{path} would overwrite, or be taken for, the weights of the source model {lm.source}. Name another place.")


@contextmanager
def with_metadata(path: Path, metadata: dict[str, str]) -> Iterator[None]:
    """Around the writing of a model file: the texts beside an npz; a safetensors file has them in itself already.

    Raises:
        WeightsError: the small file cannot be written.
    """
    if path.suffix != ".npz":
        yield
        return
    is_new = not os.path.exists(metadata_path(path))
    earlier = {_REPLACES: {"weights": _identity(path), "texts": _texts_beside(path)}} if os.path.exists(path) else {}
    try:
        _write_beside(path, {**metadata, **earlier})
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # the error that led here is the one to report
                metadata_path(path).unlink()
        raise
    if earlier or not metadata:
        _write_beside(path, metadata)


def _write_beside(path: Path, texts: dict[str, Any]) -> None:
    beside = metadata_path(path)
    try:
        write_text(beside, json.dumps(texts, indent=2) + "\n") if texts else beside.unlink(missing_ok=True)
    except OSError as error:
        raise WeightsError(f"{beside} could not be written: {error}. Check free space and permissions.") from error


def _texts_beside(path: Path) -> dict[str, str]:
    try:
        return read_metadata(path)
    except WeightsError:
        return {}


def _identity(path: Path) -> str | None:
    """What one npz is told from another by, without reading its tensors: names, sizes and checksums; None where it is no npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [(entry.filename, entry.file_size, entry.CRC) for entry in archive.infolist()]
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return None
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """What a model file says about itself; empty where it says nothing.

    Raises:
        WeightsError: the file, or the small one beside it, is broken.
    """
    check_ending(path)
    check_regular_file(path)
    if path.suffix == ".safetensors":
        return safetensors_metadata(path)
    beside = metadata_path(path)
    if not beside.exists():
        return {}
    try:
        texts = read_json(beside)
    except ModelError as error:
        raise WeightsError(f"{error} Remove it and name the model with --model.") from error
    earlier = texts.pop(_REPLACES, None)
    if isinstance(earlier, dict) and isinstance(earlier.get("texts"), dict) and earlier.get("weights") == _identity(path):
        texts = earlier["texts"]  # a process was killed before the new npz stood there
    return {key: str(value) for key, value in texts.items()}


def load_with_model_file(model: str | None, path: Path | None, dtype: str | None = None, dequantize: bool = False) -> LanguageModel:
    """A model, with the weights of a model file where one is given.

    Args:
        model: folder or hub id; None takes the one that the model file names.
        path: the model file.
        dtype: `"float32"` or `"bfloat16"`; None takes the model file's, else the checkpoint's own.
        dequantize: as in `load_model`.

    Raises:
        ConfigError: no model is named anywhere, or the one that the file names is gone.
        ModelError, WeightsError: as in `load_model`.
    """
    metadata = {} if path is None else read_metadata(path)
    named = model
    if model is None:
        model = metadata.get("base_model")
        if model is None:
            what = "No model is named." if path is None else f"{path} does not say which model its weights belong to."
            raise ConfigError(f"{what} Name a folder or a hub id with --model.")
        if Path(model).is_absolute() and not Path(model).exists():
            raise ConfigError(f"{path} was trained from {model}, which is not there any more. Name its place with --model.")
    if dtype is None and metadata.get("dtype") in ("float32", "bfloat16"):
        dtype = metadata["dtype"]
    try:
        lm = load_model(model, path, dtype, dequantize)
        lm.add_ends(*_ends(metadata))
        return lm
    except WeightsError as error:
        base = metadata.get("base_model")
        if named is None or base is None or os.path.realpath(base) == os.path.realpath(os.path.expanduser(named)):
            raise
        text = f"{error}\n{path} was trained from {base}, and --model is {named}. Name another --model-file, or the model it belongs to."
        raise WeightsError(text) from error


def _ends(metadata: Mapping[str, str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop ids and stop strings that a model file names; what is no list of such is none."""
    found = []
    for name, kind in (("eos_token_id", int), ("stop_strings", str)):
        try:
            values = json.loads(metadata.get(name, "[]"))
        except (ValueError, RecursionError):
            values = []
        found.append(valid_ends(values, kind) if isinstance(values, list) else ())
    return found[0], found[1]


def export_folder(lm: LanguageModel, wanted: Path, note: dict[str, Any]) -> Path:
    """Writes a complete model folder beside its place and moves it there when it is whole.

    An earlier export that nobody has changed is replaced. Anything else that stands there stays, and a number is added to the
    name: nothing is lost.

    Args:
        lm: the model.
        wanted: the folder's place.
        note: what to keep in `EXPORT_NOTE`, beside the list of files.

    Returns:
        The place it got.

    Raises:
        ModelError: it cannot be written.
    """
    lm.check_whole()
    try:
        with unfinished_folder(wanted) as new:
            check_not_source(new, lm.source, "The folder")
            fill_folder(new, lm.model, lm.tokenizer, **lm.beside_weights())
            write_text(new / EXPORT_NOTE, json.dumps({**note, "files": _sizes(new)}, indent=2) + "\n")
            place, number = wanted, 1
            while place.exists() and not _is_unchanged_export(place):
                number += 1
                place = wanted.with_name(f"{wanted.name}-{number}")
            flush_to_disk(new)
            put_in_place(new, place)
            return place
    except OSError as error:
        raise ModelError(f"{wanted} could not be written: {error}. Check free space and permissions.") from error


def _sizes(folder: Path) -> dict[str, int]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (EXPORT_NOTE, FINDER_FILE))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(paths)}


def _is_unchanged_export(folder: Path) -> bool:
    """Whether a folder holds what was exported there and nothing else, or nothing at all."""
    return folder.is_dir() and (is_empty(folder) or _export_note(folder).get("files") == _sizes(folder))


def _export_note(folder: Path) -> dict[str, Any]:
    """What an exported folder says of itself; empty where it says nothing."""
    try:
        return read_json(folder / EXPORT_NOTE)
    except ModelError:
        return {}


def trained_format(lm: LanguageModel, path: Path | None) -> str | None:
    """Format of the rows that the weights were trained on, where the model file or the exported folder says so."""
    source = _export_note(Path(lm.source or "").expanduser()) if path is None else read_metadata(path)
    return source.get("data_format")
