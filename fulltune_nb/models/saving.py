"""Writing weights: single files, and complete Hugging Face model folders.

Files are written beside their place, flushed to the disk and renamed, so that what stands under a name is always whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from fulltune_nb.errors import ModelError, WeightsError
from fulltune_nb.files import Checksum, atomic_path, begin_checksum, flush_to_disk, is_within, write_parts, write_text
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import FAMILIES, ModelConfig
from fulltune_nb.models.loading import INDEX_FILE
from fulltune_nb.models.names import to_hf
from fulltune_nb.tensor_files import check_ending

SHARD_BYTES = 5_000_000_000
_CODES = {
    mx.float64: "F64", mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.complex64: "C64", mx.bool_: "BOOL",
    mx.int64: "I64", mx.int32: "I32", mx.int16: "I16", mx.int8: "I8",
    mx.uint64: "U64", mx.uint32: "U32", mx.uint16: "U16", mx.uint8: "U8",
}  # fmt: skip
_DTYPE_NAMES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}


def hf_tensors(model: Decoder) -> dict[str, mx.array]:
    """The model's arrays under their Hugging Face names."""
    return {to_hf(name, model.config.family): array for name, array in tree_flatten(model.parameters())}


def write_tensors(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Tensors into a `.safetensors` or `.npz` file, atomically.

    bfloat16 stands in an npz as `mx.savez` writes it, which `mx.load` reads back; numpy alone does not know it.

    Raises:
        WeightsError: another ending, or the file cannot be written.
    """
    check_ending(path)
    try:
        with atomic_path(path) as temporary:
            if path.suffix == ".npz":
                mx.savez(str(temporary), **tensors)
            else:
                write_parts(temporary, _safetensors(tensors, metadata))
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{path} could not be written: {error}. Check free space and permissions.") from error


def begin_checksum_of(tensors: Mapping[str, mx.array]) -> Checksum:
    """The SHA-256 of the safetensors file that `write_tensors` makes of these tensors, computed in a thread from now on."""
    return begin_checksum(_safetensors(tensors))


def _safetensors(tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> list[bytes | memoryview]:
    """What a safetensors file consists of. `mx.save_safetensors` would leave no way to a checksum but reading the file again."""
    mx.eval(list(tensors.values()))
    return [_header(tensors, {"format": "mlx", **(metadata or {})}), *map(_bytes_of, tensors.values())]


def _header(tensors: Mapping[str, mx.array], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        offsets = [offset, offset + array.nbytes]
        header[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(array: mx.array) -> memoryview:
    """An array's bytes in C order; its own memory where it lies there in that order, a copy where not."""
    known = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array  # numpy knows no bfloat16
    return memoryview(np.ascontiguousarray(np.asarray(known)).reshape(-1).view(np.uint8))


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


def save_folder(
    folder: Path,
    model: Decoder,
    save_tokenizer: Callable[[str], Any] | None,
    generation_config: dict | None = None,
    texts: Mapping[str, str] | None = None,
    with_checksums: bool = False,
) -> dict[str, Checksum]:
    """A complete Hugging Face folder: `config.json`, weights, tokenizer files, `generation_config.json`.

    `config.json` is the source's own, with the tying of the embeddings and the dtype written out.

    Args:
        folder: new or empty.
        model: the weights.
        save_tokenizer: writes the tokenizer's files into the folder of that path, or None.
        generation_config: written where given.
        texts: further files, by name.
        with_checksums: whether they are computed; that holds the weights' memory until it is done.

    Returns:
        File name -> SHA-256 of the files with weights, each of which may still be being computed; empty without checksums.

    Raises:
        ModelError: the folder is not empty or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} is not an empty folder. A model is saved into a new or empty one, so that nothing is overwritten.")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = hf_tensors(model)
        written = _write_shards(folder, tensors)
        checksums = {name: begin_checksum_of(shard) for name, shard in written.items()} if with_checksums else {}
        if save_tokenizer is not None:
            save_tokenizer(str(folder))
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
    except BaseException as error:  # an interrupt too leaves no half-written model that looks like one
        _remove_contents(folder, and_itself=made)
        if isinstance(error, OSError):
            raise ModelError(f"{folder} could not be written: {error}. Check free space and permissions.") from error
        raise


def _remove_contents(folder: Path, and_itself: bool) -> None:
    with suppress(OSError):  # the error that led here is the one to report
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        if and_itself:
            folder.rmdir()


def _exported_config(model: Decoder, dtype: mx.Dtype) -> dict[str, Any]:
    config = {**model.config.raw, "tie_word_embeddings": model.config.tie_word_embeddings}
    for key, value in _left_out(model.config).items():
        if config.get(key) is None:
            config[key] = value
    written = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]  # the dialect of the source
    config.update({key: _DTYPE_NAMES[dtype] for key in written})
    return config


def _left_out(config: ModelConfig) -> dict[str, Any]:
    """What readers with other defaults, or of the older dialect only (mlx-lm), need to see written out."""
    rope, family = config.rope, FAMILIES[config.family]
    values = {"num_key_value_heads": config.num_kv_heads, "rope_theta": rope.theta}
    if isinstance(family.norm_eps, str):
        values[family.norm_eps] = config.norm_eps
    if config.head_dim * config.num_heads != config.hidden_size or "head_dim" in family.defaults:
        values["head_dim"] = config.head_dim
    if rope.fraction != 1.0 or "partial_rotary_factor" in family.defaults:
        values["partial_rotary_factor"] = rope.fraction
    if rope.scaling != "default":
        whole = {"original_max_position_embeddings": int}  # a count: readers check that it is whole
        parameters = {key: whole.get(key, float)(value) for key, value in rope.parameters}
        values["rope_scaling"] = {"rope_type": rope.scaling, **parameters}
    return values


def _write_shards(folder: Path, tensors: Mapping[str, mx.array]) -> dict[str, Mapping[str, mx.array]]:
    """The weights' files. Returns what stands in each."""
    shards = _split(tensors)
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0])
        return {"model.safetensors": shards[0]}
    weight_map, written = {}, {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard)
        written[name] = shard
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return written


def _split(tensors: Mapping[str, mx.array]) -> list[dict[str, mx.array]]:
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    return shards
