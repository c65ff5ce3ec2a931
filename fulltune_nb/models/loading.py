"""Reading a Hugging Face model folder: `config.json` and safetensors, and model files laid on top.

Nothing from a checkpoint is executed: no `trust_remote_code`, no pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from fulltune_nb.errors import ModelError, WeightsError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import ModelConfig, read_config
from fulltune_nb.models.names import hf_names
from fulltune_nb.tensor_files import UNREADABLE, check_ending, check_weights_file

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
_MAX_JSON = 100_000_000  # bytes of a config or an index that are read
_SHOWN = 10  # tensors named in an error message
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # buffers that older checkpoints stored; recomputed here


def resolve_model_path(model: str) -> Path:
    """A local folder, or the local copy of a hub repository (downloaded with the hub's own progress bar).

    Raises:
        ModelError: neither a folder nor a repository that can be reached.
    """
    path = Path(model).expanduser()
    if path.exists():
        if path.is_file():
            raise ModelError(f"{path} is a file; a model folder or a hub id is needed. Pass a weights file as model_file instead.")
        return path
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") > 1:
        raise ModelError(f"No model folder at {path}. Check the path, or name a hub repository like 'mistralai/Mistral-7B-v0.1'.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # model*: some repositories hold the weights a second time, as consolidated.safetensors
    patterns = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelError(f"{model!r} is neither a folder here nor a valid hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model!r} is not a folder here, and it could not be had from the hub: {error}\nCheck the name and the network, log in"
            " with `hf auth login` for gated models, or download the folder elsewhere and pass its path."
        ) from error


def load_decoder(folder: Path, dtype: str | None = None) -> Decoder:
    """The model of a folder, weights evaluated in memory.

    Args:
        folder: holds `config.json` and `model.safetensors` or its shards.
        dtype: `"float32"` or `"bfloat16"`; None keeps the checkpoint's, except float16, which becomes float32.

    Raises:
        ModelError: no or unreadable `config.json`, an unsupported family, weights in a form that is not read.
        WeightsError: tensors missing, unexpected or mis-shaped.
    """
    target = _target_dtype(dtype)
    check_links(folder)
    config = _config_of(folder / "config.json")
    arrays = _read_folder(folder)
    for setting, count in (("num_hidden_layers", config.num_layers), ("num_local_experts", config.num_experts)):
        if count > len(arrays):  # before that many layers are made
            raise ModelError(f"{folder / 'config.json'}: {setting} is {count:,}, but the weights have only {len(arrays):,} tensors.")
    if _has_own_head(config, arrays):  # the weights win over config.json, as in transformers
        config = replace(config, tie_word_embeddings=False)
    model = Decoder(config)
    assign_tensors(model, arrays, str(folder), target)
    return model


def _config_of(path: Path) -> ModelConfig:
    raw = read_json(path)
    try:
        return read_config(raw, str(path))
    except ModelError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, IndexError, RecursionError) as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise ModelError(f"{path} has a setting of the wrong kind: {why}. Get the file again.") from error


def check_links(folder: Path) -> None:
    """A model folder's files are in it; only the hub's cache may hold them as links, to the blobs beside its snapshots.

    Raises:
        ModelError: a file of the folder is a link to somewhere else.
    """
    inside = Path(os.path.realpath(folder))
    blobs = inside.parent.parent / "blobs"
    for path in folder.iterdir() if folder.is_dir() else ():
        target = Path(os.path.realpath(path)) if path.is_symlink() else None
        if target is not None and not target.is_dir() and not target.is_relative_to(inside) and not target.is_relative_to(blobs):
            raise ModelError(f"{path} is a link out of the model folder, to {target}. Nothing was read. Put the file itself there.")


def load_folder_weights(model: Decoder, folder: Path, dtype: mx.Dtype | None = None) -> None:
    """Fills the model with a folder's weights.

    Raises:
        ModelError: weights in a form that is not read.
        WeightsError: tensors missing, unexpected or mis-shaped; the model is as before.
    """
    check_links(folder)
    assign_tensors(model, _read_folder(folder), str(folder), dtype)


def _read_folder(folder: Path) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    for path in weight_files(folder):
        arrays.update(read_tensors(path))
    return arrays


def _has_own_head(config: ModelConfig, arrays: Mapping[str, mx.array]) -> bool:
    """Whether tensors of a model that should be tied bring a head that is not the embedding."""
    both_there = config.tie_word_embeddings and _EMBEDDING in arrays and _HEAD in arrays
    return both_there and not mx.array_equal(arrays[_EMBEDDING], arrays[_HEAD]).item()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is no file. A Hugging Face model folder has a JSON file there.")
        if path.exists() and path.stat().st_size > _MAX_JSON:
            raise ModelError(f"{path} has {path.stat().st_size:,} bytes; at most {_MAX_JSON:,} are read. It is not the file it should be.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        here = ", ".join(sorted(p.name for p in path.parent.iterdir())[:_SHOWN]) if path.parent.is_dir() else "nothing"
        raise ModelError(f"{path} is missing. A Hugging Face model folder has it; found here: {here or 'nothing'}.") from error
    except ModelError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {str(error)[:300]}. Get the file again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, found a {type(content).__name__}.")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the single file, or the shards its index names.

    Raises:
        ModelError: none there (with the reason where other formats are), or an index that names files outside the folder.
    """
    index, single = folder / INDEX_FILE, folder / "model.safetensors"
    if single.exists():  # before the index, as transformers looks
        return [single]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index} has no weight_map.")
        names = sorted({str(name) for name in weight_map.values()})
        if bad := [name for name in names if Path(name).name != name or "\\" in name or not name.endswith(".safetensors")]:
            what = f"{index} names files outside its folder, or no .safetensors files"
            raise ModelError(f"{what}: {str(bad[:_SHOWN])[:300]}. Nothing was read. Get the index again.")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise ModelError(f"{folder} lacks {len(missing)} of {len(names)} shards of its index: {missing[:_SHOWN]}. Download them.")
        return [folder / name for name in names]
    if pickled := sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*")):
        raise ModelError(
            f"{folder} has its weights only as {', '.join(pickled[:_SHOWN])}. These are pickle files, which can run code when they are"
            " opened, so they are not read. Get the safetensors version, or convert with transformers: from_pretrained, save_pretrained."
        )
    raise ModelError(
        f"{folder} has neither model.safetensors nor {INDEX_FILE}. A hub repository that offers pytorch_model.bin alone is not read:"
        " pickle files can run code when they are opened. Convert it with transformers: from_pretrained, save_pretrained."
    )


def read_tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a `.safetensors` or `.npz` file, not evaluated yet.

    Raises:
        WeightsError: the file cannot be read, is damaged, or has another ending. Pickled objects in an npz are refused.
    """
    check_ending(path)
    if not path.exists():
        raise WeightsError(f"No weights file at {path}.")
    try:
        check_weights_file(path)  # before MLX sees it: its own reader trusts what a header says
        arrays = mx.load(str(path))
    except UNREADABLE as error:
        why = str(error).removeprefix(f"{path}: ").removeprefix(f"{path} ")
        if why.startswith("cannot be read as"):
            raise
        raise WeightsError(f"{path} cannot be read as {path.suffix[1:]}: {why} If it is cut short, copy it again.") from error
    return dict(arrays)


def assign_tensors(
    model: Decoder,
    arrays: MutableMapping[str, mx.array],
    where: str,
    dtype: mx.Dtype | None = None,
    partial: bool = False,
    keep_dtypes: bool = False,
) -> None:
    """Puts tensors with Hugging Face names into the model, after all names and shapes have been checked.

    Args:
        model: the decoder to fill.
        arrays: Hugging Face name -> array; emptied on the way, so that no tensor is in memory in two dtypes for long.
        where: file or folder, for messages.
        dtype: what they become; None keeps float32 and bfloat16 and makes other ones (float16, float64) float32.
        partial: a file that holds only some of the tensors is fine.
        keep_dtypes: each becomes what the model's tensor of its name is now, whatever `dtype` says.

    Raises:
        WeightsError: tensors missing, unexpected or mis-shaped; nothing was changed.
    """
    ours = dict(tree_flatten(model.parameters()))
    names = hf_names(list(ours), model.config.family)
    given = {name: array for name, array in arrays.items() if not name.endswith(_NOT_WEIGHTS)}
    if model.config.tie_word_embeddings and _HEAD in given:
        if _has_own_head(model.config, given):
            raise WeightsError(f"{where} has an lm_head.weight that differs from its embeddings, but the model's head is tied to them.")
        given[_EMBEDDING] = given.pop(_HEAD)  # the same values; some checkpoints name only the head
    missing = [] if partial else sorted(set(names) - set(given))
    unexpected = sorted(set(given) - set(names))
    mis_shaped = [
        f"{name}: {tuple(array.shape)} instead of {tuple(ours[names[name]].shape)}"
        for name, array in given.items()
        if name in names and array.shape != ours[names[name]].shape
    ]
    if missing or unexpected or mis_shaped:
        raise WeightsError(_tensor_problems(where, missing, unexpected, mis_shaped))
    if not_float := [f"{name}: {array.dtype}" for name, array in given.items() if not mx.issubdtype(array.dtype, mx.floating)]:
        raise WeightsError(f"{where}: floating-point weights are needed, found {_listed(not_float)}.")
    arrays.clear()
    for name in list(given):
        array = given.pop(name)
        own = array.dtype if array.dtype in DTYPES.values() else mx.float32
        array = array.astype(ours[names[name]].dtype if keep_dtypes else dtype or own)
        mx.eval(array)  # read now: the file may be replaced later, and lazy arrays cannot cross threads
        _assign(model, names[name], array)


def load_model_file(model: Decoder, path: Path) -> None:
    """Lays a model file (Hugging Face names, every tensor of the model) over the weights, in their dtypes.

    Raises:
        WeightsError: unreadable, or tensors missing, unexpected or mis-shaped; the model is as before.
    """
    assign_tensors(model, read_tensors(path), str(path), keep_dtypes=True)


def _assign(model: Decoder, name: str, array: mx.array) -> None:
    *parents, last = name.split(".")
    module: Any = model
    for part in parents:
        module = module[int(part)] if part.isdigit() else module[part]
    module[last] = array


def _target_dtype(dtype: str | None) -> mx.Dtype | None:
    if dtype in (None, *DTYPES):
        return DTYPES[dtype] if dtype else None
    reason = " Updates and gradients underflow in float16; it is not trained here." if dtype == "float16" else ""
    raise ModelError(f"dtype must be one of {', '.join(DTYPES)} or None (the checkpoint's own), found {dtype!r}.{reason}")


def _tensor_problems(where: str, missing: list[str], unexpected: list[str], mis_shaped: list[str]) -> str:
    lines = [f"{where} does not fit the model its config.json describes:"]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mis_shaped)):
        if names:
            lines.append(f"  {len(names)} tensors {title}: {_listed(names)}")
    return "\n".join(lines)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
