"""Rotary position embedding (Su et al. 2021), with the scalings of Hugging Face's `modeling_rope_utils.py`.

Dimension letters: T tokens, C head_dim, R rotated dimensions (R <= C).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from fulltune_nb.errors import ModelError


@dataclass(frozen=True)
class RopeConfig:
    """`theta`: base wavelength; `rotary_dim`: R, the `fraction` of C that the config gives; `scaling`: `"default"`, `"linear"` or
    `"llama3"` with its `parameters`."""

    theta: float
    rotary_dim: int
    fraction: float = 1.0
    scaling: str = "default"
    parameters: tuple[tuple[str, float], ...] = ()


_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_rope(values: Mapping[str, Any], head_dim: int, where: str) -> RopeConfig:
    """Reads both dialects: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before).

    Raises:
        ModelError: a scaling that is not supported, one lacking a parameter, or different ones for different layers.
    """
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}  # where both are, transformers takes the first
    if not isinstance(given, Mapping):
        raise ModelError(f"{where}: rope_scaling and rope_parameters must be objects, found {given!r}.")
    parameters: dict[str, Any] = dict(given)
    if parameters and all(isinstance(value, Mapping) for value in parameters.values()):
        kinds = list(parameters.values())
        if any(kind != kinds[0] for kind in kinds):
            raise ModelError(f"{where}: rope_parameters differ between kinds of layers ({list(parameters)}), which is not supported.")
        parameters = dict(kinds[0])
    scaling = parameters.get("rope_type") or parameters.get("type") or "default"
    if scaling not in _NEEDED:
        raise ModelError(f"{where}: rope scaling {scaling!r} is not supported; supported are {', '.join(_NEEDED)}.")
    if scaling == "llama3" and values.get("max_position_embeddings"):  # as transformers fills it in
        stated = values.get("original_max_position_embeddings") or values["max_position_embeddings"]
        parameters.setdefault("original_max_position_embeddings", stated)
    if missing := [key for key in _NEEDED[scaling] if parameters.get(key) is None]:
        raise ModelError(f"{where}: rope scaling {scaling!r} needs {', '.join(missing)}.")
    theta = parameters.get("rope_theta", values["rope_theta"])
    fraction = parameters.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * fraction)
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ModelError(f"{where}: {fraction} of head_dim {head_dim} gives {rotary_dim} rotated dimensions; an even number is needed.")
    return RopeConfig(float(theta), rotary_dim, fraction, scaling, tuple((key, float(parameters[key])) for key in _NEEDED[scaling]))


def inverse_frequencies(config: RopeConfig) -> np.ndarray:
    """Radians a token for each pair of dimensions: (R/2,) float32."""
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    frequencies = (1.0 / np.power(np.float32(config.theta), exponents)).astype(np.float32)
    parameters = dict(config.parameters)
    if config.scaling == "linear":
        return frequencies / np.float32(parameters["factor"])
    if config.scaling == "llama3":
        return _llama3(frequencies, **parameters)
    return frequencies


def _llama3(
    frequencies: np.ndarray, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_position_embeddings: float
) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (`_compute_llama3_parameters`)."""
    wavelengths = 2 * math.pi / frequencies
    blend = (original_max_position_embeddings / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / factor + blend * frequencies).astype(np.float32)


def rotation_table(frequencies: mx.array, offset: int, length: int) -> tuple[mx.array, mx.array]:
    """Cosines and sines for positions `offset ... offset + length - 1`: two arrays (T, R/2), float32.

    Computed once a forward pass and shared by all layers.
    """
    angles = mx.arange(offset, offset + length, dtype=mx.float32)[:, None] * frequencies
    return mx.cos(angles), mx.sin(angles)


@partial(mx.compile, shapeless=False)
def _rotate_halves(first: mx.array, second: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    return first * cos - second * sin, second * cos + first * sin


def rotate(x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
    """Rotates the first R of C dimensions of x (..., T, C), in the half-split layout of Hugging Face checkpoints."""
    cos, sin = (part.astype(x.dtype) for part in table)
    half = cos.shape[-1]
    parts = [*_rotate_halves(x[..., :half], x[..., half : 2 * half], cos, sin)]
    if x.shape[-1] > 2 * half:
        parts.append(x[..., 2 * half :])
    return mx.concatenate(parts, axis=-1)
