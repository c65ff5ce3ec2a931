"""Reading a `config.json` by the row of its family into a `ModelConfig`, which the decoder is built from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from fulltune_nb.errors import ModelError, misspelt
from fulltune_nb.html import facts
from fulltune_nb.model_json import CONFIG, MOST, checked_value, reading
from fulltune_nb.models.activations import ACTIVATIONS, CLAMPED_GATES, SAME_ACTIVATION, XIELU
from fulltune_nb.models.dequantize import without_quantization
from fulltune_nb.models.families import FAMILIES
from fulltune_nb.models.family import Experts, Family, Switch
from fulltune_nb.models.rope import RopeConfig, read_ropes

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
_SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
}  # fmt: skip
_SHARED = (
    "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "quantization", "quantization_config",
)
"""Settings of a multimodal model that are its text part's too, where that has none of its own."""
_NOT_NULL = ("tie_word_embeddings", "hidden_act", "rope_theta", "max_position_embeddings")
_COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MOST = {"num_hidden_layers": 100_000, **dict.fromkeys(_COUNTS_OF_EXPERTS, 10_000)}  # of what modules are made of; no model comes near

WINDOWED: dict[str, Callable[[int, Mapping[str, Any]], bool]] = {
    "all": lambda layer, values: True,
    "from_max_window_layers": lambda layer, values: layer >= values["max_window_layers"],
    "every_other_below_max_window_layers": lambda layer, values: layer % 2 == 0 and layer < values["max_window_layers"],
    "all_but_last_of_pattern": lambda layer, values: (layer + 1) % values["sliding_window_pattern"] != 0,
    "all_but_first_of_pattern": lambda layer, values: layer % values["sliding_window_pattern"] != 0,
    "not_rotated": lambda layer, values: not _listed_rotations(values)[layer],
}
"""`Family.windows` -> whether a layer (from 0) has the window, where no `layer_types` say so."""
WITH_EXPERTS: dict[str, Callable[[int, Mapping[str, Any]], bool]] = {
    "all": lambda layer, values: True,
    "every_sparse_step": lambda layer, values: (layer + 1) % (values["decoder_sparse_step"] or 1) == 0
    and layer not in (values["mlp_only_layers"] or ()),
    "behind_dense": lambda layer, values: layer >= (values["first_k_dense_replace"] or 0),
    "every_interval_from_start_to_end": lambda layer, values: (layer + 1) % values["moe_layer_interval"] == 0
    and values["moe_layer_start_index"] <= layer
    and (values["moe_layer_end_index"] == -1 or layer <= values["moe_layer_end_index"]),
}
"""`Experts.layers` -> whether a layer (from 0) has experts."""
COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts")
"""Two names of one setting; transformers writes either."""
_ROUTING = {"scoring_func": ("sigmoid", "noaux_tc"), "topk_method": ("noaux_tc",)}
"""Keys that published files have beside a correction of the router -> the values that mean what is computed here."""
_KINDS = ("full_attention", "sliding_attention")
_ELSEWHERE = {
    "kv_lora_rank": "multi-head latent attention (MLA)",
    "linear_num_value_heads": "linear attention",
    "linear_attn_config": "linear attention",
    "conv_L_cache": "convolutions",
    "ssm_cfg": "state space layers",
    "mamba_d_state": "state space layers",
    "state_size": "state space layers",
    "attn_type_list": "linear attention",
    "audio_config": "audio input",
    "is_encoder_decoder": "an encoder",
    "n_positions": "learned positions",
}
"""Keys of families that are not here -> the mechanism that they need."""


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
    """A key of `ACTIVATIONS` or `CLAMPED_GATES`, or `XIELU`."""
    activation_numbers: tuple[float, ...]
    """What a clamped gate needs."""
    biases: frozenset[str]
    fused: frozenset[str]
    embed_scale: float | None
    residual_scale: float | None
    attention_scale: float
    logit_scale: float | None
    score_cap: float | None
    logit_cap: float | None
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    """For each layer, how many last tokens (itself included) a token sees; None means all."""
    rope: RopeConfig
    """Of layers that see everything."""
    ropes: tuple[RopeConfig | None, ...]
    """For each layer; None: it has no positions."""
    qk_norm: str
    qk_norm_kind: str
    qk_norm_after_rope: bool
    sinks: bool
    clip_qkv: float | None = None
    padding_id: int | None = None
    """The token whose row of the embedding the input does not train, as with torch's `Embedding(padding_idx=...)`."""
    with_experts: tuple[bool, ...] = ()
    """For each layer, whether it has them."""
    num_experts: int = 0
    num_experts_per_token: int = 0
    expert_size: int = 0
    """`intermediate_size` of each."""
    expert_biases: bool = True
    """Whether each has those of `biases`."""
    shared_expert_size: int = 0
    shared_expert_gate: bool = False
    scores: str = "softmax"
    correction: int = 0
    groups: tuple[int, int] = (1, 1)
    """How many groups the experts stand in, and how many a token may choose in."""
    normalised_shares: bool = True
    least_sum: float = 0.0
    share_scale: float | None = None
    part_of: str | None = field(default=None, compare=False)
    """`model_type` of the multimodal model that this is the text part of."""
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    keys_read: frozenset[str] = field(default=frozenset(), repr=False, compare=False)
    """Keys of `config.json` that were looked at."""

    @cached_property
    def by_length(self) -> bool:
        """Whether a token's rotation depends on how long its text is: `dynamic` and `longrope`."""
        return any(rope is not None and rope.by_length for rope in self.ropes)

    @property
    def sliding_window(self) -> int | None:
        """The smallest window of any layer, in tokens; None where every layer sees everything."""
        return min((window for window in self.windows if window is not None), default=None)

    @property
    def positions(self) -> int | None:
        """Tokens of the longest text that the model was made for, by scaled rotations too; None where `config.json` does not say."""
        stated = self.raw.get("max_position_embeddings")
        return self.rope.reach(stated) if isinstance(stated, int) and stated > 0 else None

    def _repr_html_(self) -> str:
        rows = [(f.name, ", ".join(sorted(v)) if isinstance(v := getattr(self, f.name), frozenset) else v) for f in fields(self) if f.repr]
        return facts("What the decoder is built from", rows)


class _Values(dict):
    """The content of a `config.json` over its family's defaults; remembers which keys were asked for."""

    def __init__(self, family: Family, raw: Mapping[str, Any], where: str):
        defaults = {**COMMON_DEFAULTS, **family.defaults}
        super().__init__({**defaults, **raw})
        self.update({key: defaults[key] for key in _NOT_NULL if dict.get(self, key) is None})
        self.read: set[str] = set()
        self.given = raw.keys()
        self.where = where

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return checked_value(CONFIG, key, super().__getitem__(key), self.where)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return checked_value(CONFIG, key, super().get(key, default), self.where)

    def number(self, key: str) -> float | None:
        """The number under a key; None where there is no key, no number, or a 1 that changes nothing."""
        value = self.get(key) if key else None
        return None if value is None or value == 1 else float(value)

    def switch(self, switch: Switch) -> bool:
        """True, False, or what stands under a key."""
        return bool(self.get(switch)) if isinstance(switch, str) else switch


def read_config(raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Reads a Hugging Face `config.json`, in either dialect, into a `ModelConfig`; of a multimodal model that of its text part.

    Raises:
        ModelError: the family is not supported, the checkpoint is quantized, a size is missing or impossible, or a setting turns on what
            the family's row has not.
    """
    with reading(where):
        return _read(raw, where)


def _read(raw: Mapping[str, Any], where: str) -> ModelConfig:
    part_of, raw = text_part(raw)
    family = _family(raw, where)
    raw = without_quantization(raw, where)
    values = _Values(family, raw, where)
    if on := next((key for key in family.refused if values.get(key)), None):
        raise ModelError(f"{where}: {on} is {values[on]!r}: {family.refused[on]}, which is not supported.")
    sizes = {name: _size(values, key, where) for name, key in _SIZES.items()}
    layers = sizes["num_layers"]
    num_kv_heads, head_dim = _head_sizes(values, sizes["hidden_size"], sizes["num_heads"], where)
    windows = _windows(family, values, layers, where)
    rope, ropes = _ropes(family, values, head_dim, windows, where)
    gate, gate_keys = CLAMPED_GATES.get(family.gate, (None, ()))
    return ModelConfig(
        family=str(raw["model_type"]),
        **sizes,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=values["max_position_embeddings"],
        norm=family.norm,
        norm_eps=float(values[family.norm_eps]) if isinstance(family.norm_eps, str) else family.norm_eps,
        block="parallel" if values.switch(family.parallel) else family.block,
        mlp=family.mlp,
        activation=family.gate if gate else _activation(family, values, where),
        activation_numbers=tuple(float(values[key]) for key in gate_keys),
        biases=frozenset(name for names, switch in family.biases.items() if values.switch(switch) for name in names),
        fused=frozenset(family.fused),
        embed_scale=sizes["hidden_size"] ** 0.5 if family.scale_embeddings is True else values.number(family.scale_embeddings or ""),
        **_scales(family, values, head_dim),
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        windows=windows,
        rope=rope,
        ropes=ropes,
        qk_norm=family.qk_norm if family.qk_norm and values.switch(family.has_qk_norm) else "",
        qk_norm_kind=family.norm if family.qk_norm_bias else "layer_no_bias",
        qk_norm_after_rope=family.qk_norm_after_rope,
        sinks=family.sinks,
        clip_qkv=values.get("clip_qkv") if family.clip_qkv else None,
        padding_id=_padding_id(values, sizes["vocab_size"]),
        **_experts(family.experts, values, layers, where),
        part_of=part_of,
        raw=dict(raw),
        keys_read=frozenset(values.read),
    )


def text_part(raw: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """Of a multimodal `config.json` its `model_type`, and its text part as a `config.json` of its own; None and itself of any other."""
    text, whole = raw.get("text_config"), raw.get("model_type")
    if _is_supported(whole) or not isinstance(text, Mapping) or not _is_supported(text.get("model_type")):
        return None, raw
    from transformers import CONFIG_MAPPING  # late: few models need it
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    own = CONFIG_MAPPING[text["model_type"]]
    sizes = {key: getattr(own(), key) for key in _SIZES.values() if text.get(key) is None}  # it may leave out even these
    shared = {key: raw[key] for key in _SHARED if raw.get(key) is not None}
    tying = {key: raw[key] for key in ("tie_word_embeddings",) if key in raw}  # there the whole model's setting counts
    return str(whole), {**shared, **text, **sizes, **tying, "architectures": [CLASSES[text["model_type"]]]}


def _is_supported(model_type: Any) -> bool:
    return isinstance(model_type, str) and model_type in FAMILIES


def _family(raw: Mapping[str, Any], where: str) -> Family:
    name = raw.get("model_type")
    if not _is_supported(name):
        from transformers import CONFIG_MAPPING  # late: only an error needs it

        hint = "" if str(name) in CONFIG_MAPPING else misspelt(name, FAMILIES)  # a family of its own is not misspelt
        needs = ", ".join(sorted({what for key, what in _ELSEWHERE.items() if raw.get(key)}))
        needed = f" It needs {needs}, which the decoder has not." if needs else ""
        supported = f"The supported families are {', '.join(FAMILIES)}. {hint}".rstrip()
        raise ModelError(f"{where}: model_type is {name!r}, which is not supported.{needed} {supported}")
    return FAMILIES[name]


def _size(values: Mapping[str, Any], key: str, where: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"{where}: {key} must be a positive whole number, found {value!r:.80}.")
    most = _MOST.get(key, MOST)
    if value > most:
        raise ModelError(f"{where}: {key} is {value:,}; at most {most:,} can be. Get the file again.")
    return value


def _activation(family: Family, values: _Values, where: str) -> str:
    aliases = {**SAME_ACTIVATION, **family.activation_aliases}
    given = values[family.activation]
    name = aliases.get(given, given)
    if name not in ACTIVATIONS and not (name == XIELU and family.mlp == "plain"):
        raise ModelError(f"{where}: {family.activation} is {name!r}; supported are {', '.join(ACTIVATIONS)}.")
    return name


def _padding_id(values: _Values, vocab_size: int) -> int | None:
    padding_id = values["pad_token_id"]
    if not isinstance(padding_id, int) or not -vocab_size <= padding_id < vocab_size:
        return None
    return padding_id % vocab_size  # torch counts a negative one from the end


def _head_sizes(values: _Values, hidden_size: int, num_heads: int, where: str) -> tuple[int, int]:
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


def _scales(family: Family, values: _Values, head_dim: int) -> dict[str, float | None]:
    divisor = values.number(family.logit_scale[1:]) if family.logit_scale.startswith("/") else None
    factor = None if family.logit_scale.startswith("/") else values.number(family.logit_scale)
    size = values[family.query_size] if family.query_size else head_dim
    return {
        "residual_scale": values.number(family.residual_scale),
        "attention_scale": float(values[family.attention_scale]) if family.attention_scale else 1.0 / math.sqrt(size),
        "logit_scale": factor if divisor is None else 1.0 / divisor,
        "score_cap": float(cap) if family.score_cap and (cap := values.get(family.score_cap)) else None,
        "logit_cap": float(cap) if family.logit_cap and (cap := values.get(family.logit_cap)) else None,
    }


def _windows(family: Family, values: _Values, layers: int, where: str) -> tuple[int | None, ...]:
    """`layer_types` win where they are written and the family looks at them; else its rule says which layers have the window."""
    if family.windows == "none" or not values.get("sliding_window") or not values.get("use_sliding_window", True):
        return (None,) * layers
    window = _size(values, "sliding_window", where)
    kinds = values.get("layer_types") if family.layer_types else None
    if not kinds:
        return tuple(window if WINDOWED[family.windows](layer, values) else None for layer in range(layers))
    values.get("sliding_window_pattern")  # read: the kinds say what it says
    if len(kinds) != layers:
        raise ModelError(f"{where}: layer_types has {len(kinds)} entries, but num_hidden_layers is {layers}.")
    if other := next((kind for kind in kinds if kind not in _KINDS), None):
        raise ModelError(f"{where}: layer_types has {other!r}, which is not supported; supported are {', '.join(_KINDS)}.")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _listed_rotations(values: _Values) -> list[bool]:
    """For each layer, whether `no_rope_layers` says that it has positions (1, for all its name)."""
    layers, interval = values["num_hidden_layers"], values["no_rope_layer_interval"]
    listed = values.get("no_rope_layers")
    return [bool(one) for one in listed] if listed else [(layer + 1) % interval != 0 for layer in range(layers)]


def _ropes(
    family: Family, values: _Values, head_dim: int, windows: tuple[int | None, ...], where: str
) -> tuple[RopeConfig, tuple[RopeConfig | None, ...]]:
    """The rotation of layers that see everything, and that of each layer."""
    local_theta = values[family.local_theta] if isinstance(family.local_theta, str) else family.local_theta
    rope, local = read_ropes(values, head_dim, where, local_theta, family.interleaved, family.rope_aliases)
    rotated = [True] * len(windows)
    if family.rotated == "listed":
        rotated = _listed_rotations(values)
        if len(rotated) != len(windows):
            raise ModelError(f"{where}: no_rope_layers has {len(rotated)} entries, but num_hidden_layers is {len(windows)}.")
    elif family.rotated == "windowed" or family.rotated == "windowed_if_any" and values.get("sliding_window"):
        rotated = [window is not None for window in windows]
    return rope, tuple((rope if window is None else local) if on else None for window, on in zip(windows, rotated, strict=True))


def _experts(experts: Experts | None, values: _Values, layers: int, where: str) -> dict[str, Any]:
    if experts is None:
        return {"with_experts": (False,) * layers}
    key = next((key for key in (experts.count, *COUNTS_OF_EXPERTS) if key in values.given), experts.count)
    of_token = next((key for key in (experts.chosen, "num_experts_per_tok") if key in values.given), experts.chosen)
    count, chosen, size = (_size(values, one, where) for one in (key, of_token, experts.size))
    if chosen > count:
        raise ModelError(f"{where}: {of_token} ({chosen}) is larger than {key} ({count}).")
    return {
        "with_experts": tuple(WITH_EXPERTS[experts.layers](layer, values) for layer in range(layers)),
        "num_experts": count,
        "num_experts_per_token": chosen,
        "expert_size": size,
        "expert_biases": experts.biased,
        "shared_expert_size": _shared_size(experts, values, size, where),
        "shared_expert_gate": experts.shared_size is not None,
        "scores": experts.scores,
        "correction": experts.correction,
        "groups": _groups(experts, values, count, chosen, where),
        "normalised_shares": values.switch(experts.normalised),
        "least_sum": float(values[experts.least_sum]) if experts.least_sum else 0.0,
        "share_scale": values.number(experts.share_scale),
    }


def _shared_size(experts: Experts, values: _Values, size: int, where: str) -> int:
    """`intermediate_size` of the expert that sees every token; 0: there is none."""
    if experts.shared_size:
        return _size(values, experts.shared_size, where)
    return size * _size(values, experts.shared_count, where) if experts.shared_count and values.get(experts.shared_count) else 0


def _groups(experts: Experts, values: _Values, count: int, chosen: int, where: str) -> tuple[int, int]:
    """How many groups the experts stand in, and how many of them a token may choose in; (1, 1) where it may choose in all."""
    if experts.groups is None:
        return 1, 1
    for key, known in _ROUTING.items():
        if values.get(key) not in (None, *known):
            raise ModelError(f"{where}: {key} is {values[key]!r}, which is not supported; supported are {', '.join(known)}.")
    groups, best = (_size(values, key, where) if values.get(key) else 1 for key in experts.groups)
    if best > groups or count % groups or count < 2 * groups or chosen > count // groups * best:
        of_groups, of_best = experts.groups
        raise ModelError(
            f"{where}: {of_groups} ({groups}) and {of_best} ({best}) do not fit {count} experts, of which a token gets {chosen}: groups are"
            " of one size and have two experts or more, and those that a token chooses in have enough of them."
        )
    return (groups, best) if best < groups else (1, 1)
