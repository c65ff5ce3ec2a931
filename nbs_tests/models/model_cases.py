"""Small model configurations, which the committed fixtures stand for; random ones for live checks are made by `family_cases.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "gemma", "phi", "olmo")
VOCAB = 61
IDS_SHAPE = (2, 27)
"""Rows and tokens of the ids that logits and gradients are computed on: longer than every window below."""
PROMPT_LENGTH, NEW_TOKENS = 5, 64

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _case(model_type: str, **changes: Any) -> dict[str, Any]:
    merged = {"model_type": model_type, **SMALL, **changes}
    return {key: value for key, value in merged.items() if value != "left out"}


CASES: dict[str, dict[str, Any]] = {
    # As transformers 4 wrote it (Llama 3.1): rope_theta and rope_scaling.
    "llama_llama3_old_dialect": _case(
        "llama", attention_bias=True, mlp_bias=True, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}
    ),
    "llama_linear_tied": _case(
        "llama", head_dim=8, tie_word_embeddings=True, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "llama_default_one_kv_head": _case("llama", num_key_value_heads=1, rms_norm_eps=1e-5, rope_theta=1e4, rope_scaling=None),
    "mistral_window": _case("mistral", sliding_window=6, rope_theta=1e4),
    "mistral_no_window": _case("mistral", sliding_window=None, head_dim=10, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "mistral_window_tied": _case("mistral", sliding_window=2, tie_word_embeddings=True),
    "mixtral_top2_of_4": _case("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None, rope_theta=1e6),
    "mixtral_window_top1": _case("mixtral", num_local_experts=3, num_experts_per_tok=1, sliding_window=5, hidden_size=16, head_dim=6),
    "mixtral_all_experts_tied": _case(
        "mixtral", num_local_experts=2, num_experts_per_tok=2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    "qwen2_window_by_layer": _case(
        "qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=True,
        rope_theta=1e6,
    ),
    "qwen2_layer_types": _case(
        "qwen2", use_sliding_window=True, sliding_window=7, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "qwen2_window_off": _case("qwen2", use_sliding_window=False, sliding_window=4, max_window_layers=0, num_key_value_heads=4),
    "gemma_wide_heads": _case("gemma", head_dim=16, num_key_value_heads=1, hidden_act="gelu", rope_theta=1e4),
    "gemma_untied_bias": _case("gemma", head_dim=6, tie_word_embeddings=False, attention_bias=True, hidden_act="gelu_pytorch_tanh"),
    "phi_old_dialect": _case("phi", num_key_value_heads=4, partial_rotary_factor=0.4, hidden_size=40, rope_theta=1e4, rope_scaling=None),
    "phi_qk_norm": _case(
        "phi", hidden_size=32, qk_layernorm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    ),
    "phi_tied_default_rotary": _case("phi", hidden_size=32, tie_word_embeddings=True, num_key_value_heads="left out"),
    "olmo_clipped": _case("olmo", clip_qkv=0.6, num_key_value_heads=4),
    "olmo_grouped_tied_bias": _case("olmo", attention_bias=True, tie_word_embeddings=True, rope_theta=5e5, clip_qkv=None),
}


def random_ids(raw: dict[str, Any], shape: tuple[int, int], seed: int) -> np.ndarray:
    """Token ids, int32."""
    return np.random.default_rng(seed).integers(0, raw["vocab_size"], shape, dtype=np.int32)
