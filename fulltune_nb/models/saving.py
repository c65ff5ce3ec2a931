"""Writing weights: single files, and complete Hugging Face model folders.

Files are written beside their place, flushed to the disk and renamed, so that what stands under a name is always whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from fulltune_nb.errors import ModelError, WeightsError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import FAMILIES, ModelConfig
from fulltune_nb.models.loading import INDEX_FILE
from fulltune_nb.models.names import to_hf
from fulltune_nb.tensor_files import check_ending

SHARD_BYTES = 5_000_000_000
_DTYPE_NAMES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16"}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its ending; renamed to it when the block ends well, removed when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush_to_disk(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; a result is an ordinary one
        os.replace(temporary, path)
        _flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """A small text file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
                mx.save_safetensors(str(temporary), dict(tensors), metadata={"format": "mlx", **(metadata or {})})
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{path} could not be written: {error}. Check free space and permissions.") from error


def save_folder(
    folder: Path,
    model: Decoder,
    save_tokenizer: Callable[[str], Any] | None,
    generation_config: dict | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """A complete Hugging Face folder: `config.json`, weights, tokenizer files, `generation_config.json`.

    `config.json` is the source's own, with the tying of the embeddings and the dtype written out.

    Args:
        folder: new or empty.
        model: the weights.
        save_tokenizer: `tokenizer.save_pretrained`, or None.
        generation_config: written where given.
        texts: further files, by name.

    Raises:
        ModelError: the folder is not empty or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} is not an empty folder. A model is saved into a new or empty one, so that nothing is overwritten.")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = hf_tensors(model)
        _write_shards(folder, tensors)
        if save_tokenizer is not None:
            save_tokenizer(str(folder))
        if generation_config is not None:
            write_text(folder / "generation_config.json", json.dumps(generation_config, indent=2) + "\n")
        for name, text in (texts or {}).items():
            write_text(folder / name, text)
        config = _exported_config(model, next(iter(tensors.values())).dtype)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
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


def _write_shards(folder: Path, tensors: Mapping[str, mx.array]) -> None:
    shards = _split(tensors)
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


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
