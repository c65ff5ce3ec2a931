"""`config.json` -> ModelConfig: well-known checkpoints, both dialects, defaults of the families, and what is refused."""

from __future__ import annotations

import json

import pytest
from mlx.utils import tree_flatten
from transformers import CONFIG_MAPPING

from fulltune_nb.errors import ModelError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import FAMILIES
from fulltune_nb.models.model_config import read_config
from nbs_tests.models.family_cases import KNOWN
from nbs_tests.models.model_cases import SMALL
from nbs_tests.models.real_configs import EXPECTED, ROTATIONS


def small(model_type: str, **changes):
    return {"model_type": model_type, **SMALL, **changes}


def without(raw: dict, *keys: str) -> dict:
    return {key: value for key, value in raw.items() if key not in keys}


@pytest.mark.parametrize("name", EXPECTED)
def test_configs_of_well_known_checkpoints_are_read(name):
    raw, _, expected = EXPECTED[name]
    config = read_config(raw)
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.rope.theta, config.rope.rotary_dim, config.rope.scaling) == ROTATIONS[name]
    assert config.raw == raw


@pytest.mark.parametrize("name", EXPECTED)
def test_models_of_well_known_checkpoints_have_the_published_number_of_parameters(name):
    raw, num_parameters, _ = EXPECTED[name]
    decoder = Decoder(read_config(raw))  # nothing is evaluated: arrays are lazy
    assert sum(array.size for _, array in tree_flatten(decoder.parameters())) == num_parameters


def test_the_tests_know_all_families():
    assert set(FAMILIES) == set(KNOWN)


# ---- what a config.json may leave out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (small("mistral"), {"windows": (4096, 4096)}),
        (small("mistral", sliding_window=None), {"windows": (None, None)}),
        (small("mixtral", num_local_experts=4), {"windows": (None, None), "num_experts_per_token": 2, "norm_eps": 1e-5}),
        (small("qwen2"), {"windows": (None, None)}),
        (small("qwen2", use_sliding_window=False, sliding_window=4, max_window_layers=0), {"windows": (None, None)}),
        (small("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1), {"windows": (None, 4)}),
        (small("qwen2", use_sliding_window=True), {"windows": (None, None)}),
        (
            small("qwen2", use_sliding_window=True, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
            {"windows": (4, None)},
        ),
        (small("llama", sliding_window=4), {"windows": (None, None)}),
        (small("gemma"), {"tie_word_embeddings": True, "head_dim": 256, "activation": "gelu_pytorch_tanh", "padding_id": 0}),
        (small("gemma", tie_word_embeddings=None), {"tie_word_embeddings": True}),
        (small("gemma", tie_word_embeddings=False), {"tie_word_embeddings": False}),
        (small("llama"), {"tie_word_embeddings": False, "norm_eps": 1e-6, "activation": "silu", "padding_id": None}),
        (small("llama", head_dim=None, num_key_value_heads=None), {"head_dim": 6, "num_kv_heads": 4}),
        (small("llama", pad_token_id=-1), {"padding_id": SMALL["vocab_size"] - 1}),
        (small("llama", pad_token_id=10**6), {"padding_id": None}),
        (small("llama", hidden_act="gelu_fast"), {"activation": "gelu_new"}),
        (without(small("olmo"), "num_key_value_heads"), {"num_kv_heads": 4, "norm_eps": 1e-5}),
        (small("phi", hidden_size=32), {"activation": "gelu_new", "norm_eps": 1e-5}),
    ],
)
def test_left_out_values_mean_what_they_mean_in_transformers(raw, expected):
    config = read_config(raw)
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_of_sizes_alone_means_what_the_configuration_class_of_transformers_fills_in(family):
    sizes = {"vocab_size": 300_000, "hidden_size": 2560, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 320}
    if family == "dots1":  # its class fills in no number of experts
        sizes |= {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2}
    filled = json.loads(CONFIG_MAPPING[family](**sizes).to_json_string(use_diff=False))
    assert read_config({"model_type": family, **sizes}) == read_config(filled)


@pytest.mark.parametrize(
    ("raw", "biased"),
    [
        (small("llama"), ""),
        (small("llama", attention_bias=True), "q_proj k_proj v_proj o_proj"),
        (small("llama", mlp_bias=True), "gate_proj up_proj down_proj"),
        (small("mistral", attention_bias=True), ""),
        (small("qwen2"), "q_proj k_proj v_proj"),
        (small("gemma", attention_bias=True), "q_proj k_proj v_proj o_proj"),
        (small("phi", hidden_size=32), "q_proj k_proj v_proj o_proj up_proj down_proj lm_head"),
        (small("olmo", attention_bias=True), "q_proj k_proj v_proj o_proj"),
    ],
)
def test_biases_stand_where_the_family_has_them(raw, biased):
    found = {name.split(".")[-2] for name, _ in tree_flatten(Decoder(read_config(raw)).parameters()) if name.endswith("_proj.bias")}
    assert found == set(biased.split()) - {"lm_head"}
    assert read_config(raw).biases == set(biased.split())


def test_the_sliding_window_is_the_smallest_of_any_layer():
    assert read_config(small("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)).sliding_window == 4
    assert read_config(small("llama")).sliding_window is None


def test_another_family_or_version_is_not_taken_for_a_misspelling():
    for name in ["qwen33", "phi9", "gemma-22", "llama_guard", "qwen2_xyz", *set(CONFIG_MAPPING).difference(FAMILIES)]:
        with pytest.raises(ModelError, match="is not supported. The supported families are .*llama") as caught:
            read_config({"model_type": name})
        assert "Did you mean" not in str(caught.value), name


def test_configs_that_compute_the_same_are_equal():
    assert read_config(small("llama", note="a")) == read_config(small("llama", note="b"))


# ---- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (small("lama"), "model_type is 'lama'.*Did you mean 'llama'"),
        (small("mistrall"), "Did you mean 'mistral'"),
        (small("Mistarl"), "Did you mean 'mistral'"),
        (small("deepseek_v3", kv_lora_rank=4), "It needs multi-head latent attention .MLA., which the decoder has not"),
        (small("qwen3_next", linear_num_value_heads=4), "It needs linear attention"),
        (small("lfm2", conv_L_cache=3), "It needs convolutions"),
        (small("gemma2", use_bidirectional_attention=True), "use_bidirectional_attention is True: attention to what follows"),
        (small("qwen3", use_sliding_window=True, layer_types=["full_attention", "linear_attention"]), "layer_types has 'linear_attention'"),
        (small("smollm3", no_rope_layers=[1]), "no_rope_layers has 1 entries, but num_hidden_layers is 2"),
        (small("gpt2"), "supported families are llama, mistral"),
        (without(small("llama"), "model_type"), "model_type is None"),
        ({**small("llama"), "model_type": ["llama"]}, "model_type is"),
        (small("llama", quantization_config={"quant_method": "gptq", "bits": 4}), "quantized.*gptq.*unquantized"),
        (small("llama", quantization={"group_size": 64, "bits": 4}), "quantized"),
        (without(small("llama"), "hidden_size"), "hidden_size must be a positive whole number, found None"),
        (small("llama", num_hidden_layers=0), "num_hidden_layers must be a positive whole number, found 0"),
        (small("llama", vocab_size="32000"), "vocab_size must be a positive whole number, found '32000'"),
        (small("llama", intermediate_size=True), "intermediate_size must be"),
        (small("llama", num_key_value_heads=3), "num_attention_heads .4. must be a multiple of num_key_value_heads .3."),
        (small("llama", hidden_act="swoosh"), "hidden_act is 'swoosh'; supported are"),
        (small("mixtral", num_local_experts=2, num_experts_per_tok=3), "num_experts_per_tok .3. is larger than num_local_experts .2."),
        (small("glm4_moe", head_dim=8, n_group=3), "n_group .3. and topk_group .1. do not fit 128 experts, of which a token gets 8"),
        (small("glm4_moe", head_dim=8, n_group=2, topk_group=3), "n_group .2. and topk_group .3. do not fit"),
        (small("glm4_moe", head_dim=8, n_group=32), "do not fit 128 experts"),  # four experts in the one group, and eight are wanted
        (small("glm4_moe", head_dim=8, n_group=128, topk_group=8), "have two experts or more"),
        (small("glm4_moe", head_dim=8, scoring_func="softmax"), "scoring_func is 'softmax', which is not supported; supported are sigmoid"),
        (small("mixtral", num_local_experts=0), "num_local_experts must be"),
        (small("qwen2", use_sliding_window=True, layer_types=["full_attention"]), "layer_types.*1.*num_hidden_layers.*2"),
        (small("mistral", sliding_window=-4), "sliding_window must be a positive whole number, found -4"),
        (small("llama", hidden_size=25), "hidden_size .25. must be a multiple of num_attention_heads .4."),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(raw, message):
    with pytest.raises(ModelError, match=message) as caught:
        read_config(raw, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")


@pytest.mark.parametrize("raw", [small("llama", quantization_config=None), small("llama", quantization={})])
def test_an_empty_quantization_entry_is_no_quantization(raw):
    assert read_config(raw).family == "llama"


def test_configuration_shows_itself_as_a_table_without_the_raw_file():
    config = read_config({**LLAMA_FOR_SHOW, "secret": "not shown"})
    shown = config._repr_html_()
    assert "num_kv_heads" in shown and "llama" in shown and "not shown" not in shown


LLAMA_FOR_SHOW = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
