"""Quantized checkpoints: what is said of them, and their weights turned back into ordinary ones.

Three layouts are read: MLX's (`name.weight` of packed integers with `name.scales`, and `name.biases` where the quantization is affine),
of any group size and number of bits, which may differ from tensor to tensor; and MXFP4 as OpenAI published gpt-oss (`name_blocks` and
`name_scales`). How many bits a tensor has and how large its groups are follows from its shapes and the width that the model gives it.

Sources: `mx.quantize`; `mlx_lm.utils.load_model`; `transformers/integrations/mxfp4.py`; OCP Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from fulltune_nb.errors import ModelError, WeightsError

_KEYS = ("quantization", "quantization_config")  # MLX's key in `config.json`, and that of transformers
_AFFINE_BITS, _AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_FLOAT_MODES = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}  # bits of a number and numbers in a group; the scales are bytes
_PIECE = 2**19  # numbers that are in memory in float32 at a time


def without_quantization(raw: Mapping[str, Any], where: str, dequantize: bool = False) -> dict[str, Any]:
    """A `config.json` as that of an unquantized model.

    Args:
        raw: what the file holds; the settings may also stand in its `text_config`.
        where: its path, for messages.
        dequantize: whether the weights will be turned back.

    Raises:
        ModelError: the checkpoint is quantized, and it is not asked to turn it back, or not known how.
    """
    found = _settings(raw)
    if found is None:
        return dict(raw)
    method = quantization_of(raw)
    if method is None:
        raise ModelError(
            f"{where}: the checkpoint is quantized ({str(found)[:300]}). Full fine-tuning changes every weight, and quantized weights"
            " cannot take small updates. Use the original, unquantized checkpoint; only MLX's quantization and MXFP4 can be turned back."
        )
    if not dequantize:
        raise ModelError(
            f"{where}: the checkpoint is quantized ({method}). Full fine-tuning changes every weight, and quantized weights cannot take"
            " small updates. load_model(..., dequantize=True), or --dequantize, turns them into bfloat16; the original, unquantized"
            " checkpoint is the better start where it can be had."
        )
    plain = {key: value for key, value in raw.items() if key not in _KEYS}
    if isinstance(inner := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in inner.items() if key not in _KEYS}
    return plain


def quantization_of(raw: Mapping[str, Any]) -> str | None:
    """The quantization that a `config.json` tells of, in words, where it is one that can be turned back."""
    settings = _settings(raw)
    if not isinstance(settings, Mapping):
        return None
    method = settings.get("quant_method")
    if method is None and {"group_size", "bits"} <= settings.keys():
        mixed = ", mixed" if any(isinstance(own, Mapping) for own in settings.values()) else ""
        return f"MLX, {settings.get('mode', 'affine')}, {settings['bits']} bits, groups of {settings['group_size']}{mixed}"
    return "MXFP4" if method == "mxfp4" else None


def _settings(raw: Mapping[str, Any]) -> Any:
    """What a `config.json` says of its quantization; None where it is not quantized."""
    inner = raw.get("text_config")
    places = [raw, inner] if isinstance(inner, Mapping) else [raw]
    return next((place[key] for place in places for key in _KEYS if place.get(key)), None)


@dataclass(frozen=True)
class _Packed:
    """One quantized tensor, not read yet. Leading axes are those of the tensor it stands for."""

    codes: mx.array
    """(..., width * bits / 32) uint32."""
    scales: mx.array
    """(..., width / group size), a float, or a byte in the modes of `_FLOAT_MODES`."""
    biases: mx.array | None = None
    """As the scales; affine quantization has them."""
    swapped: bool = False
    """The last two axes are the other way round than in the model's tensor."""


def is_quantized(names: Iterable[str]) -> bool:
    """Whether tensors of these names are parts of quantized ones."""
    return any(name.endswith((".scales", "_scales")) for name in names)


def dequantized(
    arrays: MutableMapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]], dtype: mx.Dtype, where: str
) -> dict[str, mx.array]:
    """The tensors of a quantized checkpoint as ordinary ones.

    A number is computed in float32 and rounded once. Not more than one tensor is in memory twice.

    Args:
        arrays: by name, as they were read; emptied on the way.
        shapes: of the model's tensors, by name.
        dtype: what quantized tensors become; the others stay as they are.
        where: for messages.

    Raises:
        WeightsError: a quantized tensor that the model does not have, or whose shapes fit no quantization.
    """
    packed = _take_packed(arrays)
    result = dict(arrays)
    arrays.clear()
    for name in list(packed):
        tensor = packed.pop(name)
        if name not in shapes:
            raise WeightsError(f"{where}: {name} is quantized, and the model that its config.json describes has no such tensor.")
        shape = shapes[name]
        shape = (*shape[:-2], *shape[:-3:-1]) if tensor.swapped else shape
        result[name] = _unpacked(tensor, shape, dtype, f"{where}: {name}")
    return result


def _take_packed(arrays: MutableMapping[str, mx.array]) -> dict[str, _Packed]:
    """The quantized tensors by the name of the tensor each stands for; their parts are taken out of the arrays."""
    packed = {}
    for name in list(arrays):
        base = name.removesuffix(".scales")
        if base != name and f"{base}.weight" in arrays:
            packed[f"{base}.weight"] = _Packed(arrays.pop(f"{base}.weight"), arrays.pop(name), arrays.pop(f"{base}.biases", None))
        base = name.removesuffix("_scales")
        if base != name and f"{base}_blocks" in arrays:  # bytes, 16 a group
            blocks = arrays.pop(f"{base}_blocks")
            whole = blocks.dtype == mx.uint8 and blocks.shape[-1:] == (16,) and blocks.size
            packed[base] = _Packed(blocks.flatten(-2).view(mx.uint32) if whole else blocks, arrays.pop(name), swapped=True)
    return packed


def _unpacked(tensor: _Packed, shape: tuple[int, ...], dtype: mx.Dtype, what: str) -> mx.array:
    """Evaluated, in `dtype`; `shape` is that of the tensor as it was packed."""
    bits, group_size, mode = _kind(tensor, shape, what)
    parts = [part.reshape(-1, part.shape[-1]) for part in (tensor.codes, tensor.scales, tensor.biases) if part is not None]
    mx.eval(parts)
    rows, width = parts[0].shape[0], shape[-1]
    found = mx.zeros((rows, width), dtype)
    step = max(1, _PIECE // width)
    for begin in range(0, rows, step):
        codes, *others = (part[begin : begin + step] for part in parts)
        others = [part if part.dtype == mx.uint8 else part.astype(mx.float32) for part in others]
        piece = mx.dequantize(codes, *others, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32)
        found[begin : begin + step] = piece.astype(dtype)
        mx.eval(found)
    found = found.reshape(shape)
    return found.swapaxes(-1, -2) if tensor.swapped else found


def _kind(tensor: _Packed, shape: tuple[int, ...], what: str) -> tuple[int, int, str]:
    """Bits, group size and MLX's mode."""
    parts = [part for part in (tensor.codes, tensor.scales, tensor.biases) if part is not None]
    if all(part.shape[:-1] == shape[:-1] and part.size for part in parts) and tensor.codes.dtype == mx.uint32:
        width, packed, groups = shape[-1], tensor.codes.shape[-1] * 32, tensor.scales.shape[-1]
        bits, group_size = packed // width, width // groups
        fits = packed == bits * width and width == groups * group_size
        if fits and tensor.biases is None and tensor.scales.dtype == mx.uint8 and (bits, group_size) in _FLOAT_MODES:
            return bits, group_size, _FLOAT_MODES[bits, group_size]
        fits = fits and bits in _AFFINE_BITS and group_size in _AFFINE_GROUPS
        if fits and parts[-1] is tensor.biases and all(part.shape[-1] == groups and _is_float(part) for part in parts[1:]):
            return bits, group_size, "affine"
    found = ", ".join(f"{part.shape} {part.dtype}" for part in parts)
    raise WeightsError(
        f"{what} should be of shape {shape}, and its parts ({found}) are no quantization of that: expected are 2 to 8 bits in groups of 32,"
        " 64 or 128 with scales and biases, or MXFP4, MXFP8 or NVFP4 with scales of one byte. Get the files again."
    )


def _is_float(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)
