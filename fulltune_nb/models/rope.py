"""Rotary position embedding (Su et al. 2021), with the scalings of Hugging Face's `modeling_rope_utils.py`.

Dimension letters: B rows, T tokens, C head_dim, R rotated dimensions (R <= C).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from fulltune_nb.cpu import on_cpu
from fulltune_nb.errors import ModelError
from fulltune_nb.model_json import CONFIG, MOST, checked_value

Rotation = dict[str, mx.array | float]
"""What queries and keys are turned by: `cos` and `sin` (..., T, R/2); or, for MLX's kernel on a GPU, `wavelengths` (R/2,), tokens a
radian, `offset` (), the first token's place, and `factor`, what is multiplied by. `growth` (..., T, 1) is what queries are multiplied by,
where there is such a thing."""


@dataclass(frozen=True)
class RopeConfig:
    """`theta`: base wavelength; `rotary_dim`: R, the `fraction` of C that the config gives; `scaling`: a key of `_NEEDED`, with its
    `parameters`; `interleaved`: pairs are neighbours, not one of the first half and one of the second; `query_growth`: see `_growth`."""

    theta: float
    rotary_dim: int
    fraction: float = 1.0
    scaling: str = "default"
    parameters: tuple[tuple[str, Any], ...] = ()
    interleaved: bool = False
    query_growth: tuple[float, float] | None = None

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on how long the text is."""
        return self.scaling in ("dynamic", "longrope")

    @property
    def switches_at(self) -> int | None:
        """The length in tokens beyond which a text has other frequencies, at all its places; None: there is none."""
        return int(dict(self.parameters)["original_max_position_embeddings"]) if self.scaling == "longrope" else None

    def reach(self, positions: int) -> int:
        """Tokens of the longest text that a model made for so many positions can tell apart by this rotation."""
        parameters = dict(self.parameters)
        if self.scaling not in ("linear", "dynamic", "yarn"):  # of the others `positions` is what they reach
            return positions
        reached = parameters["factor"] * parameters.get("original_max_position_embeddings", positions)
        return max(positions, int(min(reached, MOST)))


_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "ntk_alpha": ("alpha",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_OPTIONAL = {
    "dynamic": ("max_position_embeddings",),
    "ntk_alpha": ("factor",),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor", "max_position_embeddings"),
}
_OF_THE_MODEL = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "max_position_embeddings", "llama_4_scaling_beta")


def read_ropes(
    values: Mapping[str, Any],
    head_dim: int,
    where: str,
    local_theta: float | None = None,
    interleaved: bool = False,
    aliases: Mapping[str, str] | None = None,
) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of layers that see everything, and of those with a window; one and the same without `local_theta`.

    Reads both dialects: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before).

    Args:
        values: `config.json` over its family's defaults.
        head_dim: C.
        where: the file, for messages.
        local_theta: base of the layers with a window, where they have their own.
        interleaved: as in `RopeConfig`.
        aliases: other names of scalings.

    Raises:
        ModelError: a scaling that is not supported, one lacking a parameter or with an unknown one, or different ones for different
            layers where the family has one.
    """
    old, new = values.get("rope_scaling"), values.get("rope_parameters")
    for given in (old, new):
        if given and not isinstance(given, Mapping):
            raise ModelError(f"{where}: rope_scaling and rope_parameters must be objects, found {given!r}.")
    read = partial(_read, values, head_dim, where, interleaved, aliases or {})
    if local_theta is None:
        rope = read(_of_all_layers(old or new or {}, where), values["rope_theta"])
        return rope, rope
    kinds = dict(new or {})
    if kinds and not kinds.keys() <= {"full_attention", "sliding_attention"}:
        raise ModelError(f"{where}: rope_parameters must have full_attention and sliding_attention, found {', '.join(kinds)}.")
    everywhere = {**(kinds.get("full_attention") or {}), **(old or {})}
    return read(everywhere, values["rope_theta"]), read(kinds.get("sliding_attention") or {}, local_theta)


def _of_all_layers(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One set of parameters, also where they are given by kind of layer and agree."""
    if not given or not all(isinstance(value, Mapping) for value in given.values()):
        return dict(given)
    kinds = list(given.values())
    if any(kind != kinds[0] for kind in kinds):
        raise ModelError(f"{where}: rope_parameters differ between kinds of layers ({list(given)}), which is not supported.")
    return dict(kinds[0])


def _read(
    values: Mapping[str, Any], head_dim: int, where: str, interleaved: bool, aliases: Mapping[str, str], given: dict[str, Any], theta: float
) -> RopeConfig:
    scaling = given.get("rope_type") or given.get("type") or "default"
    scaling = aliases.get(scaling, scaling)
    if scaling == "dynamic" and given.get("alpha"):  # HunYuan: a fixed base, whatever the length
        scaling = "ntk_alpha"
    if scaling not in _NEEDED:
        names = ", ".join(name for name in _NEEDED if name != "ntk_alpha")
        raise ModelError(f"{where}: rope scaling {scaling!r} is not supported; supported are {names}.")
    known = {key for keys in (*_NEEDED.values(), *_OPTIONAL.values(), _OF_THE_MODEL) for key in keys}
    if unknown := [key for key in given if key not in known]:
        raise ModelError(f"{where}: the parameters of rope have {', '.join(unknown)}, which is not understood.")
    given = {key: checked_value(CONFIG, key, value, where) for key, value in given.items()}
    parameters = {**given, "max_position_embeddings": values["max_position_embeddings"]}
    if scaling in ("llama3", "yarn", "longrope"):
        if stated := values.get("original_max_position_embeddings"):  # beside the parameters it wins over theirs, as in transformers
            parameters["original_max_position_embeddings"] = stated
        parameters.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    if scaling == "yarn" and parameters.get("factor") is None:
        parameters["factor"] = parameters["max_position_embeddings"] / parameters["original_max_position_embeddings"]
    if missing := [key for key in _NEEDED[scaling] if parameters.get(key) is None]:
        raise ModelError(f"{where}: rope scaling {scaling!r} needs {', '.join(missing)}.")
    theta = parameters.get("rope_theta", theta)
    fraction = parameters.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * fraction)
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ModelError(f"{where}: {fraction} of head_dim {head_dim} gives {rotary_dim} rotated dimensions; an even number is needed.")
    if scaling in ("dynamic", "ntk_alpha") and rotary_dim == 2:
        raise ModelError(f"{where}: rope scaling {scaling!r} needs more than 2 rotated dimensions.")
    if scaling == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        raise ModelError(f"{where}: low_freq_factor ({low}) must be smaller than high_freq_factor ({high}).")
    keys = (*_NEEDED[scaling], *(key for key in _OPTIONAL.get(scaling, ()) if parameters.get(key) is not None))
    kept = tuple((key, _value(key, parameters[key], rotary_dim, where)) for key in keys)
    beta = parameters.get("llama_4_scaling_beta")
    growth = (float(beta), float(parameters["original_max_position_embeddings"])) if beta else None
    return RopeConfig(float(theta), rotary_dim, fraction, scaling, kept, interleaved, growth)


def _value(key: str, value: Any, rotary_dim: int, where: str) -> Any:
    if key not in ("short_factor", "long_factor"):
        return value if isinstance(value, bool) else float(value)
    if not isinstance(value, (list, tuple)) or len(value) != rotary_dim // 2:
        found = f"{len(value)} numbers" if isinstance(value, (list, tuple)) else repr(value)
        raise ModelError(f"{where}: {key} of rope must be a list of {rotary_dim // 2} numbers, found {found}.")
    return tuple(map(float, value))


def scaling_of(config: RopeConfig) -> dict[str, Any]:
    """The `rope_scaling` that says what a rotation's scaling is."""
    kept = {key: list(value) if isinstance(value, tuple) else value for key, value in config.parameters}
    kept.pop("max_position_embeddings", None)  # stands beside it
    if config.query_growth:
        kept["llama_4_scaling_beta"] = config.query_growth[0]
    if "original_max_position_embeddings" in kept:  # a count: readers check that it is whole
        kept["original_max_position_embeddings"] = int(kept["original_max_position_embeddings"])
    return {"rope_type": "dynamic" if config.scaling == "ntk_alpha" else config.scaling, **kept}


# ---- frequencies -----------------------------------------------------------------------------------------------------------------


def inverse_frequencies(config: RopeConfig, is_long: bool = False) -> np.ndarray:
    """Radians a token for each pair of dimensions: (R/2,) float32. `is_long`: those of texts longer than the model's original length."""
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    parameters = dict(config.parameters)
    theta = config.theta
    if config.scaling == "ntk_alpha":
        theta *= parameters["alpha"] ** (config.rotary_dim / (config.rotary_dim - 2))
    frequencies = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    if config.scaling == "linear":
        return frequencies / np.float32(parameters["factor"])
    if config.scaling == "llama3":
        return _llama3(frequencies, **parameters)
    if config.scaling == "yarn":
        return _yarn(frequencies, config)
    if config.scaling == "longrope":
        return frequencies / np.array(parameters["long_factor" if is_long else "short_factor"], dtype=np.float32)
    return frequencies


def _llama3(
    frequencies: np.ndarray, factor: float, low_freq_factor: float, high_freq_factor: float, original_max_position_embeddings: float
) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (`_compute_llama3_parameters`)."""
    wavelengths = 2 * math.pi / frequencies
    blend = (original_max_position_embeddings / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / factor + blend * frequencies).astype(np.float32)


def _yarn(frequencies: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Dimensions that turn often within the original length are kept, those that turn seldom stretched (Peng et al. 2023)."""
    parameters, size = dict(config.parameters), config.rotary_dim

    def dimension(turns: float) -> float:
        """The one that turns so often within the original length."""
        length = parameters["original_max_position_embeddings"]
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    stretched = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    return (frequencies / np.float32(parameters["factor"]) * stretched + frequencies * (1 - stretched)).astype(np.float32)


def attention_factor(config: RopeConfig) -> float:
    """What cosines and sines are multiplied by: 1 but for yarn and longrope."""
    parameters = dict(config.parameters)
    given = parameters.get("attention_factor")
    if config.scaling not in ("yarn", "longrope") or given is not None:
        return 1.0 if given is None else given
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or parameters["max_position_embeddings"] / original
    if factor <= 1:
        return 1.0
    if config.scaling == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return (0.1 * parameters["mscale"] * math.log(factor) + 1) / (0.1 * parameters["mscale_all_dim"] * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


# ---- tables ----------------------------------------------------------------------------------------------------------------------


class Rope:
    """A rotation with what does not depend on the text computed beforehand.

    Args:
        config: of it.
        by_place: scores depend on where queries and keys stand, not on their distance alone: norms follow the rotation.
    """

    def __init__(self, config: RopeConfig, by_place: bool = False):
        self.config = config
        self._by_place = by_place or config.by_length or config.query_growth is not None
        self._frequencies, self._factor = _finite(inverse_frequencies(config)), attention_factor(config)
        self._long = _finite(inverse_frequencies(config, is_long=True)) if config.scaling == "longrope" else None

    def rotation(self, offset: int, length: int, segments: mx.array | None = None, lengths: mx.array | None = None) -> Rotation:
        """For positions `offset ... offset + length - 1`, or with segments (B, T), where it matters, for each one's own: (B, 1, T, R/2).

        So too with `lengths` (B,), the tokens of each row without its padding, where frequencies depend on them.
        """
        config = self.config
        places, tokens = mx.arange(offset, offset + length), mx.array([offset + length])
        consecutive = segments is None or not self._by_place
        if not consecutive:
            places, tokens = (part[:, None] for part in places_within(segments))  # (B, 1, T)
        elif lengths is not None:
            tokens = lengths[:, None, None]  # (B, 1, 1)
        frequencies = self._of_length(tokens[..., None]) if config.by_length else self._frequencies
        if consecutive and frequencies.size == config.rotary_dim // 2 and not on_cpu():
            found = {"wavelengths": 1.0 / frequencies.reshape(-1), "offset": mx.array(offset), "factor": self._factor}
        else:
            found = rotation_table(frequencies, places, self._factor)
        return found if config.query_growth is None else found | {"growth": _growth(places, *config.query_growth)}

    def _of_length(self, tokens: mx.array) -> mx.array:
        """Frequencies (..., R/2) of texts of so many tokens (..., 1)."""
        config, parameters = self.config, dict(self.config.parameters)
        if config.scaling == "longrope":
            return mx.where(tokens > parameters["original_max_position_embeddings"], self._long, self._frequencies)
        # dynamic: the base grows with the text (`_compute_dynamic_ntk_parameters`)
        factor, most = parameters["factor"], parameters["max_position_embeddings"]
        longer = mx.maximum(tokens.astype(mx.float32), most) * (factor / most) - (factor - 1)
        base = config.theta * longer ** (config.rotary_dim / (config.rotary_dim - 2))
        return 1.0 / base ** (mx.arange(0, config.rotary_dim, 2, dtype=mx.float32) / config.rotary_dim)


def _finite(frequencies: np.ndarray) -> mx.array:
    """
    Raises:
        ModelError: the settings of the rotation give no numbers that can be computed with.
    """
    if not np.isfinite(frequencies).all():
        raise ModelError("The config.json's settings of rope (theta, scaling) give frequencies that are no finite numbers. Get it again.")
    return mx.array(frequencies)


def rotation_table(frequencies: mx.array, places: mx.array, factor: float = 1.0) -> Rotation:
    """`cos` and `sin`, times `factor`, at positions (..., T), whose frequencies are (..., R/2): two arrays (..., T, R/2), float32.

    Computed once a forward pass and shared by all layers.
    """
    angles = places[..., None].astype(mx.float32) * frequencies
    table = {"cos": mx.cos(angles), "sin": mx.sin(angles)}
    return table if factor == 1.0 else {name: part * factor for name, part in table.items()}


def places_within(segments: mx.array) -> tuple[mx.array, mx.array]:
    """Each token's position in its own segment, from 0, and the segment's length: (B, T) -> two arrays (B, T)."""
    same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    return mx.tril(same, -1).sum(axis=-1), same.sum(axis=-1)


def _growth(places: mx.array, beta: float, original: float) -> mx.array:
    """What queries are multiplied by at positions (..., T) beyond the original length (Llama 4): (..., T, 1)."""
    return (1 + beta * mx.log(1 + mx.floor(places / original)))[..., None]


@partial(mx.compile, shapeless=False)
def _rotate_halves(first: mx.array, second: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    return first * cos - second * sin, second * cos + first * sin


def rotate(x: mx.array, rotation: Rotation, interleaved: bool = False) -> mx.array:
    """Rotates the first R of C dimensions of x (B, heads, T, C): in pairs of the first and the second half, as most Hugging Face
    checkpoints have them, or of neighbours."""
    if "wavelengths" in rotation:
        return _rotate_in_a_kernel(x, rotation, interleaved)
    cos, sin = (rotation[name].astype(x.dtype) for name in ("cos", "sin"))
    half = cos.shape[-1]
    rest = [x[..., 2 * half :]] if x.shape[-1] > 2 * half else []
    if interleaved:
        pairs = mx.stack(_rotate_halves(x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2], cos, sin), axis=-1)
        turned = pairs.reshape(*x.shape[:-1], 2 * half)
        return mx.concatenate([turned, *rest], axis=-1) if rest else turned
    return mx.concatenate([*_rotate_halves(x[..., :half], x[..., half : 2 * half], cos, sin), *rest], axis=-1)


def _rotate_in_a_kernel(x: mx.array, rotation: Rotation, interleaved: bool) -> mx.array:
    """MLX's kernel computes in float32 and rounds what comes out."""
    wavelengths, factor = rotation["wavelengths"], rotation["factor"]
    size = 2 * wavelengths.size
    if factor != 1.0 and size < x.shape[-1]:  # only what is turned is multiplied
        turned = _rotate_in_a_kernel(x[..., :size], rotation, interleaved)
        return mx.concatenate([turned, x[..., size:]], axis=-1)
    scaled = x if factor == 1.0 else x * factor
    return mx.fast.rope(scaled, size, traditional=interleaved, base=None, scale=1.0, offset=rotation["offset"], freqs=wavelengths)
