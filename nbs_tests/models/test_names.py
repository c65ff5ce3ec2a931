"""Tensor names: ours and those of the Hugging Face checkpoints."""

from __future__ import annotations

import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import hf_names, to_hf
from fulltune_nb.models.model_config import read_config
from nbs_tests.models.model_cases import CASES, FIXTURES


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("llama", "embed_tokens.weight", "model.embed_tokens.weight"),
        ("llama", "norm.weight", "model.norm.weight"),
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("llama", "layers.11.attention.q_proj.bias", "model.layers.11.self_attn.q_proj.bias"),
        ("mistral", "layers.0.input_norm.weight", "model.layers.0.input_layernorm.weight"),
        ("qwen2", "layers.0.post_attention_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("gemma", "layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.gate_proj.weight"),
        ("mixtral", "layers.3.mlp.router.weight", "model.layers.3.block_sparse_moe.gate.weight"),
        ("mixtral", "layers.3.mlp.experts.7.gate_proj.weight", "model.layers.3.block_sparse_moe.experts.7.w1.weight"),
        ("mixtral", "layers.3.mlp.experts.7.down_proj.weight", "model.layers.3.block_sparse_moe.experts.7.w2.weight"),
        ("mixtral", "layers.3.mlp.experts.7.up_proj.weight", "model.layers.3.block_sparse_moe.experts.7.w3.weight"),
        ("phi", "layers.0.attention.o_proj.weight", "model.layers.0.self_attn.dense.weight"),
        ("phi", "layers.0.attention.q_norm.bias", "model.layers.0.self_attn.q_layernorm.bias"),
        ("phi", "layers.0.mlp.up_proj.bias", "model.layers.0.mlp.fc1.bias"),
        ("phi", "layers.0.mlp.down_proj.weight", "model.layers.0.mlp.fc2.weight"),
        ("phi", "norm.bias", "model.final_layernorm.bias"),
        ("phi", "lm_head.bias", "lm_head.bias"),
        ("olmo", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_names_are_those_of_the_familys_checkpoints(family, ours, theirs):
    assert to_hf(ours, family) == theirs


def test_renames_act_on_whole_segments():
    assert to_hf("layers.0.input_norm.weight", "phi") == "model.layers.0.input_layernorm.weight"  # not ...input_final_layernorm
    assert to_hf("normal.up_projection.weight", "phi") == "model.normal.up_projection.weight"


@pytest.mark.parametrize("case", CASES)
def test_all_tensors_of_a_checkpoint_have_a_place_in_the_model(case):
    """The names in the fixtures are those that transformers wrote."""
    config = read_config(CASES[case])
    ours = [name for name, _ in tree_flatten(Decoder(config).parameters())]
    theirs = {name.removeprefix("weights/") for name in load_file(FIXTURES / f"{case}.safetensors") if name.startswith("weights/")}
    assert set(hf_names(ours, config.family)) == theirs
    assert sorted(hf_names(ours, config.family).values()) == sorted(ours)
