"""The supported families, as data: a row names the mechanisms that the one decoder (`decoder.py`) builds from.

No code anywhere branches on a family's name: to add a family, add a row (and, where it needs one, a mechanism). `model_config.py`
reads a `config.json` by its row. Sizes come from `config.json` only; values that it may leave out take the default of the family's own
Hugging Face configuration class (`transformers/models/<family>/configuration_<family>.py`, 5.24).
"""

from __future__ import annotations

from fulltune_nb.models.family import ATTENTION, GATED, PLAIN, QKV, Experts, Family, Stack

# Our module names -> Hugging Face's, whole dotted segments; each family adds its own.
COMMON_NAMES = {
    "attention": "self_attn",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}

_POST_NORM_NAMES = {"attention_output_norm": "post_attention_layernorm", "mlp_output_norm": "post_feedforward_layernorm"}
_GEMMA_NAMES = {**_POST_NORM_NAMES, "post_attention_norm": "pre_feedforward_layernorm"}
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True, "head_dim": 256, "pad_token_id": 0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "num_key_value_heads": 4, "max_position_embeddings": 8192,
}  # fmt: skip
_GEMMA = {"norm": "rms_plus_one", "biases": {ATTENTION: "attention_bias"}, "scale_embeddings": True}
_GEMMA_2_AND_3 = {
    **_GEMMA, "block": "both", "query_size": "query_pre_attn_scalar", "activation": "hidden_activation", "names": _GEMMA_NAMES,
    "logit_cap": "final_logit_softcapping", "windows": "all_but_last_of_pattern",
    "refused": {"use_bidirectional_attention": "attention to what follows"},
}  # fmt: skip
_GRANITE = {
    "scale_embeddings": "embedding_multiplier", "residual_scale": "residual_multiplier", "attention_scale": "attention_multiplier",
    "logit_scale": "/logits_scaling",
}  # fmt: skip
_GRANITE_DEFAULTS = dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0)
_COHERE = {
    "norm": "layer_no_bias", "norm_eps": "layer_norm_eps", "block": "parallel", "biases": {ATTENTION: "attention_bias"},
    "interleaved": True, "logit_scale": "logit_scale",
}  # fmt: skip
_COHERE_DEFAULTS = {"tie_word_embeddings": True, "logit_scale": 0.0625, "layer_norm_eps": 1e-5, "pad_token_id": 0}
_GLM = {"fused": ("gate_up_proj",), "biases": {QKV: "attention_bias"}, "interleaved": True}
_GLM_DEFAULTS = {
    "attention_bias": True, "partial_rotary_factor": 0.5, "head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7,
    "pad_token_id": 151329, "max_position_embeddings": 131072,
}  # fmt: skip
_CORRECTED = {"scores": "sigmoid", "correction": 1, "groups": ("n_group", "topk_group"), "share_scale": "routed_scaling_factor"}
_ROUTED = {"count": "n_routed_experts", "shared_count": "n_shared_experts", "layers": "behind_dense"}
_SHARED_NAMES = {"router": "gate", "shared_expert": "shared_experts"}
_GROUP_DEFAULTS = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
_MISTRAL_DEFAULTS = {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_position_embeddings": 32768}
_QWEN_MOE_DEFAULTS = {**_QWEN_DEFAULTS, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None}
_YARN = {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0}

FAMILIES: dict[str, Family] = {
    "llama": Family(biases={ATTENTION: "attention_bias", GATED: "mlp_bias"}),
    "mistral": Family(windows="all", layer_types=False, defaults=_MISTRAL_DEFAULTS),
    "mixtral": Family(
        experts=Experts(count="num_local_experts", size="intermediate_size", normalised=True),
        windows="all",
        layer_types=False,
        names={"mlp": "block_sparse_moe", "router": "gate", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        defaults={
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "num_experts_per_tok": 2, "num_local_experts": 8,
            "max_position_embeddings": 131072,
        },
    ),
    "ministral": Family(windows="all", defaults=_MISTRAL_DEFAULTS),
    "ministral3": Family(
        windows="all",
        layer_types=False,
        defaults={
            "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "pad_token_id": 11, "max_position_embeddings": 262144,
            "sliding_window": None,
            "rope_parameters": {
                **_YARN, "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "qwen2": Family(
        biases={QKV: True},
        windows="from_max_window_layers",
        defaults={**_QWEN_DEFAULTS, "max_window_layers": 28, "num_key_value_heads": 32},
    ),
    "qwen2_moe": Family(
        experts=Experts(layers="every_sparse_step", shared_size="shared_expert_intermediate_size"),
        biases={QKV: "qkv_bias"},
        windows="every_other_below_max_window_layers",
        names={"router": "gate"},
        defaults={
            **_QWEN_MOE_DEFAULTS, "qkv_bias": True, "max_window_layers": 28, "num_key_value_heads": 16, "num_experts": 60,
            "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        },
    ),
    "qwen3": Family(
        biases={ATTENTION: "attention_bias"},
        qk_norm="head",
        windows="from_max_window_layers",
        defaults={**_QWEN_DEFAULTS, "max_window_layers": 28, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "qwen3_moe": Family(
        experts=Experts(layers="every_sparse_step"),
        biases={ATTENTION: "attention_bias"},
        qk_norm="head",
        windows="all",
        layer_types=False,
        names={"router": "gate"},
        defaults={
            **_QWEN_MOE_DEFAULTS, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        },
    ),
    "gemma": Family(
        **_GEMMA,
        activation_aliases={"gelu": "gelu_pytorch_tanh"},
        defaults={
            "tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16,
            "pad_token_id": 0, "max_position_embeddings": 8192,
        },
    ),
    "gemma2": Family(
        **_GEMMA_2_AND_3,
        score_cap="attn_logit_softcapping",
        defaults={
            **_GEMMA_DEFAULTS, "hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": Family(
        **_GEMMA_2_AND_3,
        qk_norm="head",
        local_theta="rope_local_base_freq",
        defaults={
            **_GEMMA_DEFAULTS, "hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 6, "rope_theta": 1e6,
            "rope_local_base_freq": 1e4, "max_position_embeddings": 131072,
        },
    ),
    "phi": Family(
        norm="layer",
        norm_eps="layer_norm_eps",
        block="parallel",
        mlp="plain",
        biases={(*ATTENTION, *PLAIN, "lm_head"): True},
        qk_norm="head",
        has_qk_norm="qk_layernorm",
        names={
            "o_proj": "dense", "up_proj": "fc1", "down_proj": "fc2", "norm": "final_layernorm",
            "q_norm": "q_layernorm", "k_norm": "k_layernorm",
        },
        defaults={"hidden_act": "gelu_new", "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    ),
    "phi3": Family(
        fused=("qkv_proj", "gate_up_proj"),
        windows="all",
        layer_types=False,
        rope_aliases={"su": "longrope", "yarn": "longrope"},
        defaults={
            "sliding_window": None, "rms_norm_eps": 1e-5, "pad_token_id": 32000, "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
    ),
    "olmo": Family(
        clip_qkv=True,
        norm="layer_no_params",
        norm_eps=1e-5,
        biases={ATTENTION: "attention_bias"},
        defaults={"pad_token_id": 1},
    ),
    "olmo2": Family(
        block="post",
        biases={ATTENTION: "attention_bias"},
        qk_norm="width",
        names=_POST_NORM_NAMES,
        defaults={"pad_token_id": 1, "rms_norm_eps": 1e-5},
    ),
    "olmo3": Family(
        block="post",
        biases={ATTENTION: "attention_bias"},
        qk_norm="width",
        windows="all_but_last_of_pattern",
        local_theta=5e5,
        names=_POST_NORM_NAMES,
        defaults={"pad_token_id": 1, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4, "rope_theta": 5e5},
    ),
    "olmoe": Family(
        experts=Experts(size="intermediate_size"),
        biases={ATTENTION: "attention_bias"},
        clip_qkv=True,
        qk_norm="width",
        names={"router": "gate"},
        defaults={
            "pad_token_id": 1, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
            "max_position_embeddings": 4096,
        },
    ),
    "smollm3": Family(
        biases={ATTENTION: "attention_bias", GATED: "mlp_bias"},
        windows="not_rotated",
        rotated="listed",
        defaults={
            "tie_word_embeddings": True, "num_key_value_heads": 4, "rope_theta": 2e6, "pad_token_id": 128004, "use_sliding_window": False,
            "no_rope_layer_interval": 4, "max_position_embeddings": 32768,
        },
    ),
    "granite": Family(**_GRANITE, biases={ATTENTION: "attention_bias", GATED: "mlp_bias"}, defaults=_GRANITE_DEFAULTS),
    "granitemoe": Family(
        **_GRANITE,
        experts=Experts(
            count="num_local_experts",
            size="intermediate_size",
            normalised=True,
            stacks=(
                Stack("input_linear.weight", ("gate_proj.weight", "up_proj.weight")), Stack("output_linear.weight", ("down_proj.weight",)),
            ),
        ),
        biases={ATTENTION: "attention_bias"},
        names={"mlp": "block_sparse_moe", "router": "router.layer"},
        defaults={**_GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "seed_oss": Family(
        biases={QKV: "attention_bias", ("o_proj",): "attention_out_bias", GATED: "mlp_bias"},
        defaults={"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8, "pad_token_id": 1, "max_position_embeddings": 524288},
    ),
    "cwm": Family(
        biases={GATED: "mlp_bias"},
        windows="all_but_first_of_pattern",
        defaults={
            "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": 8192, "sliding_window_pattern": 4,
            "rope_theta": 1e6, "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "arcee": Family(
        mlp="plain",
        biases={ATTENTION: "attention_bias", PLAIN: "mlp_bias"},
        defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    "starcoder2": Family(
        norm="layer",
        norm_eps="norm_epsilon",
        mlp="plain",
        biases={(*ATTENTION, *PLAIN): "use_bias"},
        windows="all",
        layer_types=False,
        names={"up_proj": "c_fc", "down_proj": "c_proj"},
        defaults={
            "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True, "sliding_window": None,
            "num_key_value_heads": 2, "max_position_embeddings": 4096,
        },
    ),
    "stablelm": Family(
        norm="layer",
        norm_eps="layer_norm_eps",
        parallel="use_parallel_residual",
        biases={QKV: "use_qkv_bias"},
        qk_norm="listed_heads",
        has_qk_norm="qk_layernorm",
        qk_norm_bias=False,
        names={"q_norm": "q_layernorm", "k_norm": "k_layernorm"},
        defaults={
            "use_parallel_residual": False, "use_qkv_bias": False, "qk_layernorm": False, "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25, "num_key_value_heads": 32, "max_position_embeddings": 4096,
        },
    ),
    "helium": Family(
        biases={QKV: "attention_bias", GATED: "mlp_bias"},
        interleaved=True,
        defaults={
            "head_dim": 128, "num_key_value_heads": 20, "rms_norm_eps": 1e-8, "rope_theta": 1e5, "pad_token_id": 3,
            "max_position_embeddings": 4096,
        },
    ),
    "ernie4_5": Family(
        biases={(*ATTENTION, *GATED): "use_bias"},
        interleaved=True,
        defaults={
            "head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "pad_token_id": 0,
            "tie_word_embeddings": True, "max_position_embeddings": 131072, "use_bias": False,
        },
    ),
    "ernie4_5_moe": Family(
        experts=Experts(
            count="moe_num_experts",
            chosen="moe_k",
            layers="every_interval_from_start_to_end",
            biased=False,
            correction=2,
            normalised=True,
            least_sum="moe_norm_min",
            shared_count="moe_num_shared_experts",
        ),
        biases={(*ATTENTION, *GATED, "lm_head"): "use_bias"},
        interleaved=True,
        names={**_SHARED_NAMES, "correction": "moe_statics"},
        left_aside=("model.mtp_", "mtp_"),
        defaults={
            "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "pad_token_id": 0, "tie_word_embeddings": True,
            "max_position_embeddings": 131072, "use_bias": False, "moe_intermediate_size": 1536, "moe_k": 6, "moe_num_experts": 64,
            "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1,
            "moe_norm_min": 1e-12,
        },
    ),
    "hunyuan_v1_dense": Family(
        biases={ATTENTION: "attention_bias"},
        qk_norm="head",
        qk_norm_after_rope=True,
        names={"q_norm": "query_layernorm", "k_norm": "key_layernorm"},
        defaults={"rms_norm_eps": 1e-5, "pad_token_id": 0},
    ),
    "nemotron": Family(
        norm="layer_plus_one",
        norm_eps="norm_eps",
        mlp="plain",
        biases={ATTENTION: "attention_bias", PLAIN: "mlp_bias"},
        defaults={"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "max_position_embeddings": 4096},
    ),
    "cohere": Family(
        **_COHERE,
        qk_norm="heads",
        has_qk_norm="use_qk_norm",
        defaults={**_COHERE_DEFAULTS, "rope_theta": 5e5, "max_position_embeddings": 8192},
    ),
    "cohere2": Family(
        **_COHERE,
        windows="all_but_last_of_pattern",
        rotated="windowed",
        defaults={**_COHERE_DEFAULTS, "sliding_window": 4096, "sliding_window_pattern": 4, "max_position_embeddings": 8192},
    ),
    "glm": Family(**_GLM, defaults=_GLM_DEFAULTS),
    "glm4": Family(
        **_GLM,
        block="both",
        names={"attention_output_norm": "post_self_attn_layernorm", "mlp_output_norm": "post_mlp_layernorm"},
        defaults=_GLM_DEFAULTS,
    ),
    "glm4_moe": Family(
        experts=Experts(**_CORRECTED, **_ROUTED),
        biases={QKV: "attention_bias"},
        qk_norm="head",
        has_qk_norm="use_qk_norm",
        names={**_SHARED_NAMES, "correction": "gate"},
        left_aside=("model.layers.{layers}.",),
        defaults={
            **_GROUP_DEFAULTS, "rope_scaling": None, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5,
            "use_qk_norm": False, "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128,
            "first_k_dense_replace": 1, "norm_topk_prob": True, "max_position_embeddings": 131072,
        },
    ),
    "dots1": Family(
        experts=Experts(**_CORRECTED, **_ROUTED),
        biases={ATTENTION: "attention_bias"},
        qk_norm="head",
        windows="from_max_window_layers",
        names={**_SHARED_NAMES, "correction": "gate"},
        defaults={
            **_GROUP_DEFAULTS, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 62, "moe_intermediate_size": 1408,
            "first_k_dense_replace": 0, "norm_topk_prob": False,
        },
    ),
    "exaone4": Family(
        block="post",
        qk_norm="head",
        windows="all_but_last_of_pattern",
        rotated="windowed_if_any",
        names=_POST_NORM_NAMES,
        defaults={"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
    ),
    "apertus": Family(
        mlp="plain",
        biases={ATTENTION: "attention_bias"},
        qk_norm="head",
        has_qk_norm="qk_norm",
        refused={"post_norm": "norms behind attention and mlp", "mlp_bias": "biases of the mlp"},
        names={"input_norm": "attention_layernorm", "post_attention_norm": "feedforward_layernorm"},
        buffers={"mlp.act_fn.beta": 0.5, "mlp.act_fn.eps": -1e-6},
        defaults={
            "hidden_act": "xielu", "rms_norm_eps": 1e-5, "rope_theta": 1.2e7, "pad_token_id": 3, "max_position_embeddings": 65536,
            "qk_norm": True, "post_norm": False,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1.2e7, "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "gpt_oss": Family(
        experts=Experts(
            count="num_local_experts",
            size="intermediate_size",
            normalised=True,
            stacks=(
                Stack("experts.gate_up_proj", ("gate_proj.weight", "up_proj.weight"), transposed=True, alternating=True),
                Stack("experts.gate_up_proj_bias", ("gate_proj.bias", "up_proj.bias"), alternating=True),
                Stack("experts.down_proj", ("down_proj.weight",), transposed=True),
                Stack("experts.down_proj_bias", ("down_proj.bias",)),
            ),
        ),
        biases={ATTENTION: "attention_bias", (*GATED, "router"): True},
        sinks=True,
        windows="all_but_last_of_pattern",
        gate="clamped_swiglu",
        defaults={
            "attention_bias": True, "head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1.5e5,
            "sliding_window": 128, "sliding_window_pattern": 2, "num_local_experts": 128, "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "max_position_embeddings": 131072,
            "rope_parameters": {**_YARN, "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096},
        },
    ),
}


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
