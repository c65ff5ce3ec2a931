"""What a family's row can say: the mechanisms that the one decoder is built from, by the field's names for them.

The rows are in `families.py`. What a row does not say is Llama's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

QKV = ("q_proj", "k_proj", "v_proj")
ATTENTION = (*QKV, "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
PLAIN = ("up_proj", "down_proj")

Switch = str | bool
"""True, False, or the key of `config.json` that says which."""


@dataclass(frozen=True)
class Stack:
    """A tensor of the file that holds what all experts of a layer have: (experts, rows, columns), or (experts, rows).

    In memory each expert has its own, so that it is computed, updated and let go by itself.
    """

    name: str
    """In the layer's mlp, such as `"input_linear.weight"`."""
    parts: tuple[str, ...]
    """The expert's own tensors, whose rows follow one another in it, such as `("gate_proj.weight", "up_proj.weight")`."""
    transposed: bool = False
    """The file has each expert's matrix as (columns, rows)."""
    alternating: bool = False
    """The rows of the parts take turns: one of the first, one of the second, and so on."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in the MLP's place; each key is one of `config.json`."""

    count: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    size: str = "moe_intermediate_size"
    """`intermediate_size` of one expert."""
    layers: str = "all"
    """Which layers have them: a name in `model_config.WITH_EXPERTS`."""
    biased: bool = True
    """Whether they have the biases that the family's mlp has."""
    scores: str = "softmax"
    """How an expert's share is made of the router's product: `"softmax"` over all experts, or `"sigmoid"` of each by itself."""
    correction: int = 0
    """Dimensions of a tensor of numbers, one an expert, that are added to the shares where experts are chosen and nowhere else: 1 (E,), or
    2 (1, E). It is never trained. 0: none."""
    groups: tuple[str, str] | None = None
    """Keys of how many groups the experts stand in, and in how many of them a token may choose: those with the best two experts."""
    normalised: Switch = "norm_topk_prob"
    """Whether the shares of the chosen experts sum up to one."""
    least_sum: str = ""
    """Key of what their sum is taken to be at least, before they are divided by it."""
    share_scale: str = ""
    """Key of the number that the shares are multiplied by at the end."""
    shared_size: str | None = None
    """`intermediate_size` of an expert that sees every token, with a gate of its own (a sigmoid)."""
    shared_count: str | None = None
    """How many experts see every token, without a gate; they are one of so many times `size`."""
    stacks: tuple[Stack, ...] = ()


@dataclass(frozen=True)
class Family:
    """One row: which mechanisms a family is made of."""

    norm: str = "rms"
    """`"rms"`, `"rms_plus_one"` (scale is 1 + weight), `"layer"` (weight and bias), `"layer_plus_one"` (1 + weight, and bias),
    `"layer_no_bias"` or `"layer_no_params"`."""
    norm_eps: str | float = "rms_norm_eps"
    """Key in `config.json`, or the number itself where the family fixes it."""
    block: str = "pre"
    """`"pre"`: norm, attention, add, norm, mlp, add. `"post"`: attention, norm, add, mlp, norm, add. `"both"`: with norms before and
    behind. `"parallel"`: one norm feeds attention and mlp, both are added."""
    parallel: Switch = False
    """Whether the block is `"parallel"`, where that is a setting."""
    mlp: str = "gated"
    """`"gated"` or `"plain"`."""
    experts: Experts | None = None
    fused: tuple[str, ...] = ()
    """Projections that are one tensor: `"qkv_proj"`, `"gate_up_proj"`."""
    biases: Mapping[tuple[str, ...], Switch] = field(default_factory=dict)
    """Projections -> whether they have a bias."""
    qk_norm: str = ""
    """Norm of queries and keys: `"head"` (the same for each head), `"heads"` (each head's own, in one tensor), `"listed_heads"` (each
    head's own, in a tensor each), `"width"` (over all heads together), `""` (none)."""
    has_qk_norm: Switch = True
    """Whether there is one, where that is a setting."""
    qk_norm_bias: bool = True
    """False: it has none, though the family's norm has."""
    qk_norm_after_rope: bool = False
    clip_qkv: bool = False
    """Queries, keys and values are kept within `clip_qkv`, where it is set."""
    scale_embeddings: Switch = False
    """Multiply embeddings by sqrt(hidden_size), or by the number under this key."""
    residual_scale: str = ""
    """Key of the number that what attention and mlp add is multiplied by."""
    attention_scale: str = ""
    """Key of the number that products of queries and keys are multiplied by, instead of 1 / sqrt(head_dim)."""
    query_size: str = ""
    """Key of the number that stands for head_dim in it."""
    logit_scale: str = ""
    """Key of the number that logits are multiplied by; with a `/` before it, divided."""
    score_cap: str = ""
    """Key of c, where products of queries and keys become c tanh(products / c)."""
    logit_cap: str = ""
    """The same for logits."""
    sinks: bool = False
    """Each head has a further, learned score that takes its share of the attention and gives nothing."""
    windows: str = "none"
    """Which layers have the sliding window where no `layer_types` say so: a name in `model_config.WINDOWED`, or `"none"`."""
    layer_types: bool = True
    """Whether `layer_types` are looked at."""
    rotated: str = "all"
    """Which layers have positions: `"all"`; `"windowed"`; `"windowed_if_any"`, all where none has a window; `"listed"` in
    `no_rope_layers` with a 1, by default all but each `no_rope_layer_interval`-th."""
    interleaved: bool = False
    """Rotated are neighbours, not the first half with the second."""
    local_theta: str | float | None = None
    """Layers with a window are rotated by this base, or the one under this key, and without scaling."""
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    """Values of `rope_type` that mean another one in this family."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Our segment -> the family's segment, over `COMMON_NAMES`."""
    left_aside: tuple[str, ...] = ()
    """Prefixes of tensors of a checkpoint that are for predicting several tokens at once; `{layers}` is the number of layers."""
    buffers: Mapping[str, float] = field(default_factory=dict)
    """Constants that a checkpoint holds as tensors of each layer: name in the layer -> value."""
    activation: str = "hidden_act"
    """Its key."""
    gate: str = ""
    """An entry of `activations.CLAMPED_GATES` in place of the activation: how the gate and what it opens become one."""
    activation_aliases: Mapping[str, str] = field(default_factory=dict)
    """Values of it that mean another function in this family."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Keys that must not be set -> what they would turn on."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key means when `config.json` leaves it out."""
