"""The supported families, as data, and the reading of `config.json` into a `ModelConfig`.

A family is a row naming mechanisms that the one decoder (`decoder.py`) builds from. No code anywhere branches on a
family's name: to add a family, add a row (and, where it needs one, a mechanism). Sizes come from `config.json` only;
values that a `config.json` may leave out take the default of the family's own Hugging Face configuration class
(`transformers/models/<family>/configuration_<family>.py`, 5.23).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import mlx.nn as nn

from fulltune_nb.cpu import fast_math as cpu_math
from fulltune_nb.errors import ModelError, misspelt
from fulltune_nb.html import facts
from fulltune_nb.models.dequantize import without_quantization
from fulltune_nb.models.rope import RopeConfig, read_rope

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
ATTENTION_PROJECTIONS = (*ATTENTION_INPUTS, "o_proj")
GATED_MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
PLAIN_MLP_PROJECTIONS = ("up_proj", "down_proj")

# Our module names -> Hugging Face's, whole dotted segments; each family adds its own.
COMMON_NAMES = {
    "attention": "self_attn",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}


ACTIVATIONS = {
    "silu": cpu_math.silu,
    "swish": cpu_math.silu,
    "gelu": nn.gelu,
    "gelu_new": cpu_math.gelu_tanh,
    "gelu_pytorch_tanh": cpu_math.gelu_tanh,
    "relu": nn.relu,
}
"""`hidden_act` -> the function of one array."""
GATED_ACTIVATIONS = {
    "silu": cpu_math.swiglu, "swish": cpu_math.swiglu, "gelu_new": cpu_math.geglu, "gelu_pytorch_tanh": cpu_math.geglu,
}
"""`hidden_act` -> `act(gate) * up` in one function (Shazeer 2020), where there is one."""


@dataclass(frozen=True)
class Family:
    """One row: which mechanisms a family is made of."""

    norm: str
    """`"rms"`, `"rms_plus_one"` (scale is 1 + weight), `"layer"` (weight and bias) or `"layer_no_params"`."""
    norm_eps: str | float
    """Key in `config.json`, or the number itself where the family fixes it."""
    block: str = "pre"
    """`"pre"`: norm, attention, add, norm, mlp, add. `"parallel"`: one norm feeds attention and mlp, both are added."""
    mlp: str = "gated"
    """`"gated"`, `"plain"` or `"moe"` (a router over gated experts)."""
    biases: Mapping[tuple[str, ...], str | bool] = field(default_factory=dict)
    """Projections -> True, or the key of `config.json` that says whether they have a bias."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(hidden_size)."""
    windows: str = "none"
    """Which layers have the sliding window: `"none"`, `"all"` or `"by_layer"` (Qwen2's rule)."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Our segment -> the family's segment, over `COMMON_NAMES`."""
    activation_aliases: Mapping[str, str] = field(default_factory=dict)
    """Values of `hidden_act` that mean another function in this family."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key means when `config.json` leaves it out."""


FAMILIES: dict[str, Family] = {
    "llama": Family(
        norm="rms",
        norm_eps="rms_norm_eps",
        biases={ATTENTION_PROJECTIONS: "attention_bias", GATED_MLP_PROJECTIONS: "mlp_bias"},
    ),
    "mistral": Family(
        norm="rms",
        norm_eps="rms_norm_eps",
        windows="all",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "mixtral": Family(
        norm="rms",
        norm_eps="rms_norm_eps",
        mlp="moe",
        windows="all",
        names={"mlp": "block_sparse_moe", "router": "gate", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "num_experts_per_tok": 2, "num_local_experts": 8},
    ),
    "qwen2": Family(
        norm="rms",
        norm_eps="rms_norm_eps",
        biases={ATTENTION_INPUTS: True},
        windows="by_layer",
        defaults={"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32},
    ),
    "gemma": Family(
        norm="rms_plus_one",
        norm_eps="rms_norm_eps",
        biases={ATTENTION_PROJECTIONS: "attention_bias"},
        scale_embeddings=True,
        activation_aliases={"gelu": "gelu_pytorch_tanh"},
        defaults={
            "tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16,
            "pad_token_id": 0,
        },
    ),
    "phi": Family(
        norm="layer",
        norm_eps="layer_norm_eps",
        block="parallel",
        mlp="plain",
        biases={(*ATTENTION_PROJECTIONS, *PLAIN_MLP_PROJECTIONS, "lm_head"): True},
        names={
            "o_proj": "dense", "up_proj": "fc1", "down_proj": "fc2", "norm": "final_layernorm",
            "q_norm": "q_layernorm", "k_norm": "k_layernorm",
        },
        defaults={"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    ),
    "olmo": Family(
        norm="layer_no_params",
        norm_eps=1e-5,
        biases={ATTENTION_PROJECTIONS: "attention_bias"},
        defaults={"pad_token_id": 1},
    ),
}

COMMON_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 1e4,
    "max_position_embeddings": 2048,
    "pad_token_id": None,
}
_SAME_ACTIVATION = {  # other names that transformers has for the same functions
    "gelu_fast": "gelu_new", "gelu_accurate": "gelu_new", "gelu_python_tanh": "gelu_new", "gelu_python": "gelu",
}
_NOT_NULL = ("tie_word_embeddings", "hidden_act", "rope_theta", "max_position_embeddings")
_MOST_LAYERS = 100_000  # no model comes near; beyond it, a damaged file would fill the memory
_EXPERT_KEYS = ("num_local_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class ModelConfig:
    """What the decoder is built from. Sizes are counts of elements; `raw` is `config.json` as it was read."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: str
    norm_eps: float
    block: str
    mlp: str
    activation: str
    biases: frozenset[str]
    embed_scale: float | None
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    """For each layer, how many last tokens (itself included) a token sees; None means all."""
    rope: RopeConfig
    qk_norm: bool = False
    clip_qkv: float | None = None
    padding_id: int | None = None
    """The token whose row of the embedding the input does not train, as with torch's `Embedding(padding_idx=...)`."""
    num_experts: int = 0
    num_experts_per_token: int = 0
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sliding_window(self) -> int | None:
        """The smallest window of any layer, in tokens; None where every layer sees everything."""
        return min((window for window in self.windows if window is not None), default=None)

    def _repr_html_(self) -> str:
        rows = [(f.name, ", ".join(sorted(v)) if isinstance(v := getattr(self, f.name), frozenset) else v) for f in fields(self) if f.repr]
        return facts("What the decoder is built from", rows)


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Reads a Hugging Face `config.json`, in either dialect, into a `ModelConfig`.

    Raises:
        ModelError: the family is not supported, the checkpoint is quantized, or a size is missing or impossible.
    """
    family_name = raw.get("model_type")
    if not isinstance(family_name, str) or family_name not in FAMILIES:
        from transformers import CONFIG_MAPPING  # late: only an error needs it

        hint = "" if str(family_name) in CONFIG_MAPPING else misspelt(family_name, FAMILIES)  # a family of its own is not misspelt
        supported = f"The supported families are {', '.join(FAMILIES)}. {hint}".rstrip()
        raise ModelError(f"{where}: model_type is {family_name!r}, which is not supported. {supported}")
    raw = without_quantization(raw, where)
    family = FAMILIES[family_name]
    values = _with_defaults(family, raw)
    sizes = {
        name: _size(values, key, where)
        for name, key in (
            ("vocab_size", "vocab_size"), ("hidden_size", "hidden_size"), ("intermediate_size", "intermediate_size"),
            ("num_layers", "num_hidden_layers"), ("num_heads", "num_attention_heads"),
        )
    }
    num_kv_heads, head_dim = _head_sizes(values, sizes["hidden_size"], sizes["num_heads"], where)
    experts, chosen = (_size(values, key, where) for key in _EXPERT_KEYS) if family.mlp == "moe" else (0, 0)
    if chosen > experts:
        raise ModelError(f"{where}: num_experts_per_tok ({chosen}) is larger than num_local_experts ({experts}).")
    return ModelConfig(
        family=family_name,
        **sizes,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=values["max_position_embeddings"],
        norm=family.norm,
        norm_eps=float(values[family.norm_eps]) if isinstance(family.norm_eps, str) else family.norm_eps,
        block=family.block,
        mlp=family.mlp,
        activation=_activation(family, values, where),
        biases=_biases(family, values),
        embed_scale=sizes["hidden_size"] ** 0.5 if family.scale_embeddings else None,
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        windows=_windows(family, values, sizes["num_layers"], where),
        rope=read_rope(values, head_dim, where),
        qk_norm=bool(values.get("qk_layernorm", False)),
        clip_qkv=values.get("clip_qkv"),
        padding_id=_padding_id(values, sizes["vocab_size"]),
        num_experts=experts,
        num_experts_per_token=chosen,
        raw=dict(raw),
    )


def _size(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{where}: {key} must be a positive whole number, found {value!r}.")
    most = _MOST_LAYERS if key == "num_hidden_layers" else 2**31 - 1
    if value > most:
        raise ModelError(f"{where}: {key} is {value:,}; at most {most:,} can be. Get the file again.")
    return value


def _activation(family: Family, values: Mapping[str, Any], where: str) -> str:
    aliases = {**_SAME_ACTIVATION, **family.activation_aliases}
    name = aliases.get(values["hidden_act"], values["hidden_act"])
    if name not in ACTIVATIONS:
        raise ModelError(f"{where}: hidden_act is {name!r}; supported are {', '.join(ACTIVATIONS)}.")
    return name


def _padding_id(values: Mapping[str, Any], vocab_size: int) -> int | None:
    padding_id = values["pad_token_id"]
    if not isinstance(padding_id, int) or not -vocab_size <= padding_id < vocab_size:
        return None
    return padding_id % vocab_size  # torch counts a negative one from the end


def _with_defaults(family: Family, raw: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {**COMMON_DEFAULTS, **family.defaults}
    values = {**defaults, **raw}
    return {**values, **{key: defaults[key] for key in _NOT_NULL if values[key] is None}}


def _head_sizes(values: Mapping[str, Any], hidden_size: int, num_heads: int, where: str) -> tuple[int, int]:
    """How many key/value heads, and elements in each head."""
    num_kv_heads = _size(values, "num_key_value_heads", where) if values.get("num_key_value_heads") else num_heads
    if num_heads % num_kv_heads:
        raise ModelError(f"{where}: num_attention_heads ({num_heads}) must be a multiple of num_key_value_heads ({num_kv_heads}).")
    if values.get("head_dim"):
        return num_kv_heads, _size(values, "head_dim", where)
    if hidden_size % num_heads:
        raise ModelError(
            f"{where}: hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads}) where head_dim is not given."
        )
    return num_kv_heads, hidden_size // num_heads


def _biases(family: Family, values: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(
        projection
        for projections, switch in family.biases.items()
        for projection in projections
        if (values.get(switch) if isinstance(switch, str) else switch)
    )


def _windows(family: Family, values: Mapping[str, Any], num_layers: int, where: str) -> tuple[int | None, ...]:
    """`layer_types` wins where it is written; before it existed, Qwen2 gave the window to layers from `max_window_layers` on."""
    if family.windows == "none" or values.get("sliding_window") is None or not values.get("use_sliding_window", True):
        return (None,) * num_layers
    window = _size(values, "sliding_window", where)
    if family.windows == "all":
        return (window,) * num_layers
    if layer_types := values.get("layer_types"):
        if len(layer_types) != num_layers:
            raise ModelError(f"{where}: layer_types has {len(layer_types)} entries, but num_hidden_layers is {num_layers}.")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    return tuple(window if layer >= values["max_window_layers"] else None for layer in range(num_layers))


# Tensor names: ours (the module tree of `decoder.py`) and Hugging Face's.


def to_hf(name: str, family: str) -> str:
    """Our parameter name as the family's Hugging Face checkpoints write it.

    Renames act on whole dotted segments: `layers.0.attention.o_proj.weight` of Phi becomes
    `model.layers.0.self_attn.dense.weight`.
    """
    renames = {**COMMON_NAMES, **FAMILIES[family].names}
    renamed = ".".join(renames.get(segment, segment) for segment in name.split("."))
    return renamed if renamed.startswith("lm_head.") else f"model.{renamed}"


def hf_names(names: list[str], family: str) -> dict[str, str]:
    """Hugging Face's name -> our name, for the given parameters of a model."""
    return {to_hf(name, family): name for name in names}
