"""Hugging Face model folders: reading one, laying a model file over the weights, and writing one.

Weights come from safetensors files only. Files are written beside their place, flushed to the disk and renamed, so that what stands under
a name is always whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from fulltune_nb.errors import ModelError, WeightsError, listed, readable
from fulltune_nb.files import (
    Checksum,
    check_own_file,
    flush_to_disk,
    has_to_stay,
    is_empty,
    is_within,
    put_in_place,
    unfinished_folder,
    write_text,
)
from fulltune_nb.html import printable
from fulltune_nb.model_json import read_json, reading
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.dequantize import dequantized, is_quantized, without_quantization
from fulltune_nb.models.families import FAMILIES, hf_names, to_hf
from fulltune_nb.models.file_layout import from_file, is_stacked, text_tensors, to_file, without_further_predictions
from fulltune_nb.models.model_config import COMMON_DEFAULTS, ModelConfig, read_config
from fulltune_nb.models.parameters import buffers_of, holder_of, parameters_of
from fulltune_nb.models.rope import scaling_of
from fulltune_nb.models.unread_keys import check_unread
from fulltune_nb.tensor_files import begin_checksum_of, read_tensors, write_tensors
from fulltune_nb.tokenizer import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
SHARD_BYTES = 5_000_000_000
_PACKED = 4  # numbers that a byte of quantized weights holds at most
_SHOWN = 10  # tensors named in an error message
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # buffers that older checkpoints stored; recomputed here


# ---- reading -------------------------------------------------------------------------------------------------------------------


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

    # model*: some repositories hold the weights a second time, as consolidated.safetensors. README.md names the licence.
    patterns = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model", "*.txt", "README.md"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except HFValidationError as error:
        raise ModelError(f"{model!r} is neither a folder here nor a valid hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{model!r} is not a folder here, and it could not be had from the hub: {error}\nCheck the name and the network, log in"
            " with `hf auth login` for gated models, or download the folder elsewhere and pass its path."
        ) from error


def load_decoder(folder: Path, dtype: str | None = None, dequantize: bool = False) -> Decoder:
    """The model of a folder, weights evaluated in memory.

    Args:
        folder: holds `config.json` and `model.safetensors` or its shards.
        dtype: `"float32"` or `"bfloat16"`; None keeps the checkpoint's, except float16, which becomes float32. A quantized one becomes
            bfloat16.
        dequantize: turn quantized weights (MLX's, MXFP4) into ordinary ones, a tensor at a time.

    Raises:
        ModelError: no or unreadable `config.json`, an unsupported family, weights in a form that is not read.
        WeightsError: tensors missing, unexpected or mis-shaped.
    """
    target = _target_dtype(dtype)
    check_links(folder)
    where = str(folder / "config.json")
    config = read_config_file(folder / "config.json", dequantize)
    check_unread(config, where)
    arrays = _unstacked(_read_folder(folder, config), config)
    _check_sizes(config, arrays, where)
    if _has_own_head(config, arrays):  # the weights win over config.json, as in transformers
        config = replace(config, tie_word_embeddings=False)
    elif config.part_of and _HEAD not in arrays:  # multimodal models have settings that contradict each other
        config = replace(config, tie_word_embeddings=True)
    with reading(where):
        model = Decoder(config)
    if dequantize and is_quantized(arrays):
        target = target or mx.bfloat16
        shapes = {to_hf(name, config.family): array.shape for name, array in parameters_of(model).items()}
        shapes |= {name: array.shape for name, array in hf_tensors(model).items()}  # mlx-lm has experts apart, others stacked
        arrays = dequantized(arrays, shapes, target, str(folder))
    assign_tensors(model, arrays, str(folder), target)
    return model


def _check_sizes(config: ModelConfig, arrays: Mapping[str, mx.array], where: str) -> None:
    """Compares the sizes with the tensors as they are, before a decoder of that size is made.

    Raises:
        ModelError: a size is larger than these tensors can be of.
    """
    experts = 0 if is_stacked(config) else config.num_experts
    for setting, count in (("num_hidden_layers", config.num_layers), ("the number of experts", experts)):
        if count > len(arrays):
            raise ModelError(f"{where}: {setting} is {count:,}, but the weights have only {len(arrays):,} tensors.")
    most, width = _PACKED * max((array.nbytes for array in arrays.values()), default=0), config.hidden_size
    rows = {
        "vocab_size": config.vocab_size,
        "head_dim times num_attention_heads": config.head_dim * config.num_heads,
        "head_dim times num_key_value_heads": config.head_dim * config.num_kv_heads,
        "intermediate_size": 0 if all(config.with_experts) else config.intermediate_size,
        "the size of an expert": config.expert_size,
        "the size of the shared expert": config.shared_expert_size,
        "the number of experts": config.num_experts if is_stacked(config) else 0,
    }
    for setting, count in rows.items():
        if count * width > most:
            raise ModelError(
                f"{where}: {setting} is {count:,} and hidden_size {width:,}; no tensor of the weights has so many numbers. The file and the"
                " weights are not of one model. Get them again."
            )


def read_config_file(path: Path, dequantize: bool = False) -> ModelConfig:
    """A `config.json`; that of a quantized checkpoint as if it were not, where its weights will be dequantized.

    Raises:
        ModelError: as in `read_json` and `read_config`.
    """
    with reading(str(path)):
        return read_config(without_quantization(read_json(path), str(path), dequantize), str(path))


def check_links(folder: Path) -> None:
    """A model folder's files are in it; only the hub's cache may hold them as links, to the blobs beside its snapshots.

    Raises:
        ModelError: a file of the folder is a link to somewhere else, or no file at all.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            check_own_file(path, "the model folder")
        except OSError as error:
            raise ModelError(f"{error.strerror}. Nothing was read. Put the file itself there.") from error


def load_folder_weights(model: Decoder, folder: Path) -> None:
    """Fills the model with a folder's weights.

    Raises:
        ModelError: weights in a form that is not read.
        WeightsError: tensors missing, unexpected or mis-shaped; the model is as before.
    """
    with readable(folder):
        check_links(folder)
        assign_tensors(model, _read_folder(folder, model.config), str(folder))


def _read_folder(folder: Path, config: ModelConfig) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    for path in weight_files(folder):
        arrays.update(read_tensors(path))
    arrays, aside = without_further_predictions(arrays, config)
    if aside:
        warnings.warn(
            printable(
                f"{folder} also predicts several tokens at once: {len(aside):,} tensors for it ({listed(aside, 2)}) are left aside."
                " They are neither trained nor saved."
            ),
            stacklevel=4,
        )
    if config.part_of is None:
        return arrays
    arrays, others = text_tensors(arrays)
    if others:
        parts = ", ".join(f"{part} ({count:,} tensors)" for part, count in others.items())
        warnings.warn(
            printable(
                f"{folder} holds a multimodal model, {config.part_of}. Its text part is loaded, as {config.family}, and is saved as that."
                f" Left aside: {parts}."
            ),
            stacklevel=4,
        )
    return arrays


_STACKED = re.compile(r"(.+)\.(?:switch_mlp|experts)\.((?:gate|up|down)_proj\..+)")


def _unstacked(arrays: dict[str, mx.array], config: ModelConfig) -> dict[str, mx.array]:
    """Experts that mlx-lm stacked, (E, ...) for each of their tensors, one by one as in Hugging Face's checkpoints."""
    for name in list(arrays):
        found = _STACKED.fullmatch(name)
        if found and arrays[name].shape[:1] == (config.num_experts,):
            stack = arrays.pop(name)
            for number in range(config.num_experts):
                own = to_hf(f"experts.{number}.{found[2]}", config.family).removeprefix("model.")
                arrays[f"{found[1]}.{own}"] = stack[number]
    return arrays


def _has_own_head(config: ModelConfig, arrays: Mapping[str, mx.array]) -> bool:
    """Whether tensors of a model that should be tied bring a head that is not the embedding."""
    both_there = config.tie_word_embeddings and _EMBEDDING in arrays and _HEAD in arrays
    return both_there and not mx.array_equal(arrays[_EMBEDDING], arrays[_HEAD]).item()


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


def assign_tensors(
    model: Decoder, arrays: MutableMapping[str, mx.array], where: str, dtype: mx.Dtype | None = None, keep_dtypes: bool = False
) -> None:
    """Puts tensors with Hugging Face names into the model, after all names and shapes have been checked.

    Args:
        model: the decoder to fill.
        arrays: Hugging Face name -> array; emptied on the way, so that no tensor is in memory in two dtypes for long.
        where: file or folder, for messages.
        dtype: what they become, but for buffers; None keeps float32 and bfloat16 and makes other ones (float16, float64) float32.
        keep_dtypes: each becomes what the model's tensor of its name is now, whatever `dtype` says.

    Raises:
        WeightsError: tensors missing, unexpected or mis-shaped; nothing was changed.
    """
    ours = parameters_of(model)
    names = hf_names(list(ours), model.config.family)
    given = from_file({name: array for name, array in arrays.items() if not name.endswith(_NOT_WEIGHTS)}, model.config)
    if model.config.tie_word_embeddings and _HEAD in given:
        if _has_own_head(model.config, given):
            raise WeightsError(f"{where} has an lm_head.weight that differs from its embeddings, but the model's head is tied to them.")
        given[_EMBEDDING] = given.pop(_HEAD)  # the same values; some checkpoints name only the head
    problems = {
        "missing": sorted(names.keys() - given.keys()),
        "unexpected": sorted(given.keys() - names.keys()),
        "of another shape": [
            f"{name}: {tuple(array.shape)} instead of {tuple(ours[names[name]].shape)}"
            for name, array in given.items()
            if name in names and array.shape != ours[names[name]].shape
        ],
    }
    if lines := [f"  {len(found)} tensors {what}: {listed(found, _SHOWN)}" for what, found in problems.items() if found]:
        raise WeightsError("\n".join([f"{where} does not fit the model its config.json describes:", *lines]))
    if not_float := [f"{name}: {array.dtype}" for name, array in given.items() if not mx.issubdtype(array.dtype, mx.floating)]:
        raise WeightsError(f"{where}: floating-point weights are needed, found {listed(not_float, _SHOWN)}.")
    arrays.clear()
    buffers = buffers_of(model)
    for name in list(given):
        array = given.pop(name)
        own = array.dtype if array.dtype in DTYPES.values() else mx.float32
        target = own if names[name] in buffers else dtype or own
        array = array.astype(ours[names[name]].dtype if keep_dtypes else target)
        mx.eval(array)  # read now: the file may be replaced later, and lazy arrays cannot cross threads
        module, key = holder_of(model, names[name])
        module[key] = array


def load_model_file(model: Decoder, path: Path) -> None:
    """Lays a model file (Hugging Face names, every tensor of the model) over the weights, in their dtypes.

    Raises:
        WeightsError: unreadable, or tensors missing, unexpected or mis-shaped; the model is as before.
    """
    assign_tensors(model, read_tensors(path), str(path), keep_dtypes=True)


def _target_dtype(dtype: str | None) -> mx.Dtype | None:
    if dtype in (None, *DTYPES):
        return DTYPES[dtype] if dtype else None
    reason = " Updates and gradients underflow in float16; it is not trained here." if dtype == "float16" else ""
    raise ModelError(f"dtype must be one of {', '.join(DTYPES)} or None (the checkpoint's own), found {dtype!r}.{reason}")


# ---- writing -------------------------------------------------------------------------------------------------------------------


def hf_tensors(model: Decoder) -> dict[str, mx.array]:
    """The model's arrays as its family's checkpoints have them, by their Hugging Face names."""
    return to_file({to_hf(name, model.config.family): array for name, array in parameters_of(model).items()}, model.config)


def check_not_source(path: str | os.PathLike, source: str | None, what: str) -> None:
    """
    Args:
        path: where something will be written.
        source: the folder a model was loaded from; None, or a hub id, has nothing to be overwritten.
        what: that it is, for the message.

    Raises:
        ModelError: the path is that folder, or lies in it.
    """
    folder = Path(source).expanduser() if source else None
    if folder is not None and folder.is_dir() and is_within(Path(path).expanduser(), folder):
        raise ModelError(f"{what} {path} is the source model's folder {source}, or lies in it. Name another place.")


def save_folder(folder: Path, model: Decoder, tokenizer: PreTrainedTokenizerBase | None, **more: Any) -> None:
    """A complete Hugging Face folder: `config.json`, weights, tokenizer files, `generation_config.json`.

    It is written beside its place and moved there when it is whole. An empty folder that has to stay is filled in place,
    `config.json` last: without it, nothing takes the folder for a model.

    Args:
        folder: new or empty.
        model, tokenizer, more: as in `fill_folder`.

    Raises:
        ModelError: the folder is not empty or cannot be written.
    """
    if folder.exists() and not is_empty(folder):
        begun = folder.is_dir() and not (folder / "config.json").exists() and any(folder.glob("model*.safetensors"))
        what = ": it has weights but no config.json, as when a process that saves there is killed" if begun else ""
        raise ModelError(f"{folder} is not an empty folder{what}. A model is saved into a new or empty one; nothing is overwritten.")
    write, place = partial(fill_folder, model=model, tokenizer=tokenizer, **more), Path(os.path.realpath(folder))
    try:
        if place.exists() and has_to_stay(place):
            _fill_or_empty(place, write)
            return
        with unfinished_folder(place) as new:
            if place.exists():
                shutil.copystat(place, new)
            write(new)
            flush_to_disk(new)
            put_in_place(new, place)
    except OSError as error:
        raise ModelError(f"{folder} could not be written: {error}. Check free space and permissions.") from error


def _fill_or_empty(folder: Path, write: Callable[[Path], Any]) -> None:
    try:
        write(folder)
    except BaseException:  # an interrupt too leaves no half-written model that looks like one
        with suppress(OSError):  # the error that led here is the one to report
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        raise


def fill_folder(
    folder: Path,
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: dict | None = None,
    texts: Mapping[str, str] | None = None,
    ends: Sequence[int] = (),
    with_checksums: bool = False,
) -> dict[str, Checksum]:
    """Writes the files of `save_folder` into an empty folder, in place.

    Args:
        folder: empty.
        model: the weights.
        tokenizer: written where given.
        generation_config: written where given.
        texts: further files, by name.
        ends: token ids that were trained to end turns: the tokenizer's EOS is made one of them, as in `save_tokenizer`.
        with_checksums: whether they are computed; that holds the weights' memory until it is done.

    Returns:
        File name -> SHA-256 of the files with weights, each of which may still be being computed; empty without checksums.

    Raises:
        OSError, ModelError, WeightsError: something cannot be written.
    """
    tensors = hf_tensors(model)
    written = _write_shards(folder, tensors)
    checksums = {name: begin_checksum_of(shard) for name, shard in written.items()} if with_checksums else {}
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder, ends)
        for path in folder.iterdir():
            if path.is_file() and path.name not in written:
                flush_to_disk(path)
    if generation_config is not None:
        write_text(folder / "generation_config.json", json.dumps(generation_config, indent=2) + "\n")
    for name, text in (texts or {}).items():
        write_text(folder / name, text)
    config = _exported_config(model, next(iter(tensors.values())).dtype)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return checksums


def _exported_config(model: Decoder, dtype: mx.Dtype) -> dict[str, Any]:
    family = FAMILIES[model.config.family]
    defaults = {key: value for key, value in {**COMMON_DEFAULTS, **family.defaults}.items() if key in model.config.keys_read}
    written = {key: value for key, value in defaults.items() if value is not None and not re.match("rope_|partial_|sliding_window_p", key)}
    config = {**written, **model.config.raw, "tie_word_embeddings": model.config.tie_word_embeddings}
    for key, value in _left_out(model.config).items():
        if config.get(key) is None or key == "rope_theta":  # beside `rope_parameters` another one may stand, without effect
            config[key] = value
    written = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]  # the dialect of the source
    config.update(dict.fromkeys(written, str(dtype).removeprefix("mlx.core.")))
    return config


def _left_out(config: ModelConfig) -> dict[str, Any]:
    """What readers with other defaults, or of the older dialect only (mlx-lm), need to see written out."""
    rope, family = config.rope, FAMILIES[config.family]
    values = {"num_key_value_heads": config.num_kv_heads, "rope_theta": rope.theta}
    if isinstance(family.norm_eps, str):
        values[family.norm_eps] = config.norm_eps
    if config.head_dim * config.num_heads != config.hidden_size or "head_dim" in family.defaults or family.experts:
        values["head_dim"] = config.head_dim
    if rope.fraction != 1.0 or "partial_rotary_factor" in family.defaults:
        values["partial_rotary_factor"] = rope.fraction
    if isinstance(family.local_theta, str):
        local = (own.theta for own in config.ropes if own not in (None, rope))
        values[family.local_theta] = next(local, family.defaults[family.local_theta])
    if family.experts:
        values[family.experts.count] = config.num_experts
        values |= {"mlp_only_layers": []} if "mlp_only_layers" in family.defaults else {}
    if "rope_parameters" in family.defaults:
        values["rope_parameters"] = {"rope_theta": rope.theta, **scaling_of(rope)}
    if rope.scaling != "default" or "rope_scaling" in family.defaults:
        values["rope_scaling"] = scaling_of(rope) if rope.scaling != "default" else None
    return values


def _write_shards(folder: Path, tensors: Mapping[str, mx.array]) -> dict[str, dict[str, mx.array]]:
    """The weights' files, and an index where they are several. Returns the tensors of each file."""
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    count = len(shards)
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)] if count > 1 else ["model.safetensors"]
    written = dict(zip(files, shards, strict=True))
    for file, shard in written.items():
        write_tensors(folder / file, shard)
    if count > 1:
        total = sum(array.nbytes for array in tensors.values())
        weight_map = {name: file for file, shard in written.items() for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return written
