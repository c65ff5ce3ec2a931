"""Random small configurations of a family: every key that its configuration class in transformers has takes every value listed here.

To add a family, add it to `KNOWN`; a key of its class that no list below names fails a test.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbs_tests.models.model_cases import LLAMA3

LEFT_OUT = object()
"""Among the values of a key: the key is not in `config.json`."""
OWN, SHARED = "of its own", "hidden_size by heads"
"""`head_dim`: any; or the heads share the hidden size."""
SHORT = 16
"""Positions before rope is scaled; rows of the comparisons are longer."""
LONG = 128
"""Positions that no row of the comparisons reaches."""


@dataclass(frozen=True)
class Known:
    """What is known of a family beside its row."""

    checkpoints: str
    """Published models of this `model_type`."""
    values: Mapping[str, tuple] = field(default_factory=dict)
    """Values of keys, where they are other ones than in `VALUES`."""
    scalings: tuple[str, ...] = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
    """Of rope, that its configuration class takes."""


PARTIAL = {"partial_rotary_factor": (LEFT_OUT, 0.25, 0.5)}
WITHOUT_WINDOW = {"sliding_window": (None, 2, 5)}
PATTERN = {"sliding_window_pattern": (LEFT_OUT, 2, 3)}  # in published files, though not in the class
NO_HEAD_DIM = {"head_dim": (SHARED,)}  # transformers does not look at it everywhere, or asks for this one
SAME_ACTIVATION = {"hidden_act": (LEFT_OUT,)}

KNOWN: dict[str, Known] = {
    "llama": Known("Llama 1 to 3.3, TinyLlama, SmolLM 1 and 2, Vicuna"),
    "mistral": Known("Mistral 7B, Mistral Nemo, Mistral Small 2409 and 2501, Zephyr", {"sliding_window": (LEFT_OUT, None, 2, 5)}),
    "mixtral": Known("Mixtral 8x7B and 8x22B", WITHOUT_WINDOW),
    "qwen2": Known("Qwen 1.5, 2 and 2.5, QwQ, DeepSeek-R1-Distill-Qwen"),
    "gemma": Known("Gemma 1, CodeGemma", SAME_ACTIVATION),
    "phi": Known("Phi-1, 1.5 and 2", {**PARTIAL, **NO_HEAD_DIM}),
    "olmo": Known("OLMo 1"),
    "qwen3": Known("Qwen 3 dense: 0.6B to 32B"),
    "qwen3_moe": Known("Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder"),
    "qwen2_moe": Known("Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B"),
    "gemma2": Known("Gemma 2: 2B, 9B, 27B"),
    "gemma3_text": Known("Gemma 3: 270M, 1B, and the text part of 4B, 12B and 27B", PATTERN),
    "phi3": Known(
        "Phi-3 and 3.5 mini, medium; Phi-4, Phi-4-mini",
        {"partial_rotary_factor": (LEFT_OUT, 0.5, 0.75), **WITHOUT_WINDOW, **NO_HEAD_DIM}, scalings=("default", "longrope"),
    ),
    "olmo2": Known("OLMo 2: 1B to 32B"),
    "olmo3": Known("OLMo 3: 7B, 32B"),
    "olmoe": Known("OLMoE-1B-7B", NO_HEAD_DIM),
    "smollm3": Known("SmolLM3-3B"),
    "granite": Known("Granite 3.0 to 3.3 dense: 2B, 8B"),
    "granitemoe": Known("Granite 3.0 and 3.1: 1B-A400M, 3B-A800M"),
    "starcoder2": Known("StarCoder2: 3B, 7B, 15B", WITHOUT_WINDOW),
    "stablelm": Known("StableLM 2 1.6B and 12B, StableLM 3B", {**PARTIAL, **NO_HEAD_DIM}),
    "ministral": Known("Ministral 8B (2410)", {"sliding_window": (LEFT_OUT, 2, 5)}),
    "ministral3": Known("Ministral 3: text part of 3B, 8B, 14B", {**WITHOUT_WINDOW}, scalings=("llama_4_yarn",)),
    "seed_oss": Known("Seed-OSS-36B"),
    "cwm": Known("Code World Model 32B"),
    "helium": Known("Helium-1 2B", NO_HEAD_DIM),
    "ernie4_5": Known("ERNIE 4.5 0.3B"),
    "ernie4_5_moe": Known("ERNIE 4.5: 21B-A3B, 300B-A47B"),
    "hunyuan_v1_dense": Known("Hunyuan 0.5B, 1.8B, 4B, 7B", scalings=("default", "linear", "ntk_alpha")),
    "arcee": Known("AFM-4.5B"),
    "nemotron": Known("Minitron 4B and 8B, Nemotron-4", PARTIAL),
    "cohere": Known("Command-R, Aya 23 and Expanse"),
    "cohere2": Known("Command-R7B, Command-A", PATTERN),
    "glm": Known("GLM-4-9B-0414's forerunners: glm-4-9b-hf, glm-edge", PARTIAL),
    "glm4": Known("GLM-4-9B-0414, GLM-4-32B-0414, GLM-Z1", PARTIAL),
    "glm4_moe": Known("GLM-4.5, GLM-4.5-Air, GLM-4.6", PARTIAL),
    "dots1": Known("dots.llm1"),
    "exaone4": Known("EXAONE 4.0: 1.2B, 32B", {"sliding_window": (2, 5, None)}),
    "apertus": Known("Apertus: 8B, 70B", SAME_ACTIVATION),
    "gpt_oss": Known("gpt-oss-20b, gpt-oss-120b", SAME_ACTIVATION),
}  # fmt: skip

SIZES: dict[str, tuple] = {
    "vocab_size": (61, 50, 97),
    "intermediate_size": (12, 20, 40),
    "num_hidden_layers": (2, 3, 4),
    "num_attention_heads": (2, 4, 6),
    "num_key_value_heads": (1, 2, "all"),
    "max_position_embeddings": (LONG, SHORT),
    "moe_intermediate_size": (12, 20),
    "shared_expert_intermediate_size": (12, 20),
    "num_local_experts": (3, 4, 8),
    "num_experts": (3, 4, 8),
    "num_experts_per_tok": (1, 2, 3),
    "n_routed_experts": (8, 12),
    "n_shared_experts": (1, 2),
    "moe_num_experts": (3, 4, 8),
    "moe_num_shared_experts": (0, 1, 2),
    "moe_k": (1, 2, 3),
}
VALUES: dict[str, tuple] = {
    "tie_word_embeddings": (False, True),
    "pad_token_id": (LEFT_OUT, None, 3),
    "layer_norm_eps": (1e-6, 1e-5, 1e-2),
    "rms_norm_eps": (1e-6, 1e-5, 1e-2),
    "norm_eps": (1e-6, 1e-5, 1e-2),
    "norm_epsilon": (1e-6, 1e-5, 1e-2),
    "hidden_act": (LEFT_OUT, LEFT_OUT, "gelu_pytorch_tanh", "relu"),
    "hidden_activation": (LEFT_OUT, "gelu_pytorch_tanh"),
    "clip_qkv": (None, 0.5, 1.5),
    "sliding_window": (2, 5, 9),
    "use_sliding_window": (True, True, False),
    "max_window_layers": (0, 1, 2),
    "sliding_window_pattern": (LEFT_OUT, 2, 3),
    "layer_types": (LEFT_OUT, "random"),
    "no_rope_layers": (LEFT_OUT, "random"),
    "no_rope_layer_interval": (2, 3),
    "mlp_only_layers": ([], [0], [1]),
    "decoder_sparse_step": (1, 2),
    "norm_topk_prob": (False, True),
    "n_group": (1, 2),
    "topk_group": (1, 2),
    "first_k_dense_replace": (0, 1),
    "moe_layer_start_index": (0, 1),
    "moe_layer_end_index": (-1, 1),
    "moe_layer_interval": (1, 2),
    "moe_norm_min": (1e-12, 0.3),
    "use_parallel_residual": (False, True),
    # factors
    "embedding_multiplier": (1.0, 3.0),
    "residual_multiplier": (1.0, 0.22),
    "attention_multiplier": (1.0, 0.3),
    "logits_scaling": (1.0, 8.0),
    "routed_scaling_factor": (1.0, 2.5),
    "logit_scale": (1.0, 0.0625),
    "swiglu_alpha": (1.702, 1.2),
    "swiglu_limit": (7.0, 0.5),
    "query_pre_attn_scalar": (4, 24),
    "final_logit_softcapping": (None, 2.0),
    "attn_logit_softcapping": (None, 1.5),
    # biases and norms that may be there
    **dict.fromkeys(
        ("attention_bias", "attention_out_bias", "mlp_bias", "lm_head_bias", "qkv_bias", "use_bias", "use_qkv_bias", "qk_layernorm",
         "use_qk_norm"),
        (False, True),
    ),
}  # fmt: skip

INERT = {
    "hidden_size", "head_dim", "rope_parameters", "original_max_position_embeddings", "_sliding_window_pattern",  # chosen in `_case`
    "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "eod_token_id", "is_decoder", "pretraining_tp",
    "attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout", "hidden_dropout", "embedding_dropout", "classifier_dropout",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "input_jitter_noise",  # of the training loss, or noise
    "use_bidirectional_attention",  # no causal language model when true
    "num_nextn_predict_layers",  # for predicting several tokens at once
}  # fmt: skip
"""Keys of configuration classes that do not change what is computed, or are chosen by themselves."""


def class_keys(family: str) -> dict[str, Any]:
    """Key -> default, of the family's configuration class alone. Needs transformers."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    common = PretrainedConfig().to_dict().keys() - {"tie_word_embeddings", "pad_token_id"}
    return {key: value for key, value in CONFIG_MAPPING[family]().to_dict().items() if key not in common}


def cases_of(family: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` contents of a `config.json`, in the dialect of transformers 4 and 5 in turn; each of a key's values in as few as can be."""
    pick = random.Random(f"{family} {seed}")
    known, keys = KNOWN[family], class_keys(family)
    head_dim = (OWN, OWN, SHARED) if "head_dim" in keys else (SHARED, SHARED, OWN)
    values = {key: choices for key, choices in {**SIZES, **VALUES}.items() if key in keys}
    values = {**values, "head_dim": head_dim, **known.values, "scaling": known.scalings}
    columns = {key: _spread(pick, choices, count) for key, choices in values.items()}
    return [_case(family, keys, {key: column[i] for key, column in columns.items()}, i % 2 == 0, pick) for i in range(count)]


def plain_case(family: str) -> dict[str, Any]:
    """A small configuration that says nothing but sizes."""
    keys = class_keys(family)
    sizes = {key: choices[-1] for key, choices in SIZES.items() if key in keys}
    chosen = {**sizes, "num_hidden_layers": 7, "head_dim": SHARED, "max_position_embeddings": LONG, "scaling": KNOWN[family].scalings[0]}
    return _case(family, keys, chosen, False, random.Random(family))


PUBLISHED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "published_configs.json").read_text(encoding="utf-8"))
"""`config.json` of well-known checkpoints by their name, without what they say of images."""


def scaled_down(raw: dict[str, Any]) -> dict[str, Any]:
    """A published `config.json` with every flag it has, and sizes that compute in no time; several text models stand in `text_config`."""
    if "text_config" in raw:
        return {**raw, "text_config": scaled_down(raw["text_config"])}
    raw = json.loads(json.dumps(raw))
    kv_heads = min(2, raw.get("num_key_value_heads") or 2)
    heads = kv_heads * (raw["num_attention_heads"] // (raw.get("num_key_value_heads") or raw["num_attention_heads"]))
    layers = min(raw["num_hidden_layers"], 8 if {"sliding_window_pattern", "layer_types", "no_rope_layers"} & raw.keys() else 3)
    sizes = {
        "vocab_size": 97, "hidden_size": heads * 16, "head_dim": 16, "intermediate_size": 40, "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 20, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    most = {"sliding_window": 9}
    most |= dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 8)
    most |= dict.fromkeys(("num_experts_per_tok", "experts_per_token", "moe_k"), 3)
    raw |= {key: value for key, value in sizes.items() if raw.get(key) is not None}
    raw |= {key: min(raw[key], value) for key, value in most.items() if raw.get(key) is not None}
    raw |= {key: raw[key][:layers] for key in ("layer_types", "no_rope_layers") if key in raw}
    if (raw.get("rope_scaling") or {}).get("long_factor"):
        pairs = int(16 * raw.get("partial_rotary_factor", 1.0)) // 2
        raw["rope_scaling"] |= {key: raw["rope_scaling"][key][-pairs:] for key in ("short_factor", "long_factor")}
    return raw


def _spread(pick: random.Random, choices: tuple, count: int) -> list:
    """Each choice as often as the others, in random order."""
    column = [choice for _ in range(-(-count // len(choices))) for choice in pick.sample(choices, len(choices))][:count]
    pick.shuffle(column)
    return column


def _case(family: str, keys: Mapping[str, Any], chosen: dict[str, Any], old_dialect: bool, pick: random.Random) -> dict[str, Any]:
    scaling, fraction, head_dim = (chosen.pop(key, LEFT_OUT) for key in ("scaling", "partial_rotary_factor", "head_dim"))
    partial = "partial_rotary_factor" in KNOWN[family].values
    raw = {"model_type": family, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02}
    raw |= {key: value for key, value in chosen.items() if value is not LEFT_OUT}
    heads, layers = raw["num_attention_heads"], raw["num_hidden_layers"]
    sizes = (16, 24) if partial else (6, 8, 12)  # so that each share of them is even
    raw["hidden_size"] = heads * pick.choice(sizes)
    if head_dim == OWN:
        raw["head_dim"] = pick.choice(sizes)
    elif "head_dim" in keys:
        raw["head_dim"] = raw["hidden_size"] // heads
    if "topk_group" in raw:
        raw["topk_group"] = min(raw["topk_group"], raw["n_group"])
    if raw.get("num_key_value_heads") == "all":
        raw["num_key_value_heads"] = heads
    if "pad_token_id" not in raw and (keys["pad_token_id"] or 0) >= raw["vocab_size"]:
        raw["pad_token_id"] = None  # torch takes no padding token beyond the vocabulary
    windowed = raw.get("sliding_window") and raw.get("use_sliding_window", True)
    if raw.get("layer_types") == "random" or ("layer_types" in keys and raw.get("sliding_window", 1) is None):
        raw["layer_types"] = [pick.choice(("sliding_attention", "full_attention")) if windowed else "full_attention" for _ in range(layers)]
    if raw.get("no_rope_layers") == "random":
        raw["no_rope_layers"] = [pick.choice((0, 1)) for _ in range(layers)]
    share = keys["rope_parameters"].get("partial_rotary_factor", 1.0) if fraction is LEFT_OUT else fraction
    rotary_dim = int(raw.get("head_dim", raw["hidden_size"] // heads) * share)
    return raw | _rope(keys, scaling, rotary_dim, fraction, old_dialect, pick)


def _rope(keys: Mapping[str, Any], scaling: str, rotary_dim: int, fraction: Any, old_dialect: bool, pick: random.Random) -> dict[str, Any]:
    theta, of_windows = pick.choice((1e3, 1e4, 1e6)), pick.choice((1e3, 1e4))
    parameters = _scaling(scaling, rotary_dim, pick)
    top = {}
    if "original_max_position_embeddings" in keys:  # phi3 has it beside the scaling, not in it
        top["original_max_position_embeddings"] = parameters.pop("original_max_position_embeddings", SHORT)
    partial = {} if fraction is LEFT_OUT else {"partial_rotary_factor": fraction}
    by_kind = "sliding_attention" in keys["rope_parameters"]
    if old_dialect:
        two_bases = by_kind and keys["rope_parameters"]["sliding_attention"] != keys["rope_parameters"]["full_attention"]
        local = {"rope_local_base_freq": of_windows} if two_bases else {}
        return {**top, **partial, **local, "rope_theta": theta, "rope_scaling": None if scaling == "default" else parameters}
    parameters = {**parameters, **partial, "rope_theta": theta}
    if by_kind:
        parameters = {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": of_windows}}
    return {**top, "rope_parameters": parameters}


def _scaling(kind: str, rotary_dim: int, pick: random.Random) -> dict[str, Any]:
    """The parameters of a scaling of rope, those that may be left out too."""
    factors = [[round(pick.uniform(1, 4), 2) for _ in range(rotary_dim // 2)] for _ in range(2)]
    may_be_there = {
        "llama_4_yarn": ({}, {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}),
        "yarn": (
            {},
            {"beta_fast": 16.0, "beta_slow": 2.0},
            {"attention_factor": 0.8},
            {"mscale": 1.0, "mscale_all_dim": 0.7},
            {"truncate": False},
        ),
        "longrope": ({"factor": 4.0}, {"factor": 4.0, "attention_factor": 1.3}),
    }
    own = {
        "default": {},
        "linear": {"factor": 3.0},
        "llama3": LLAMA3,
        "yarn": {"factor": 4.0, "original_max_position_embeddings": SHORT},
        "dynamic": {"factor": 2.0},
        "ntk_alpha": {"rope_type": "dynamic", "factor": 1.0, "alpha": 50.0},
        "llama_4_yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SHORT, "llama_4_scaling_beta": 0.1},
        "longrope": {"original_max_position_embeddings": SHORT, "short_factor": factors[0], "long_factor": factors[1]},
    }
    return {"rope_type": kind, **own[kind], **pick.choice(may_be_there.get(kind, ({},)))}
