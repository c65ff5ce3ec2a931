"""Each mechanism of the decoder by itself, against its formula; what families make of them is compared with transformers elsewhere."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from fulltune_nb.errors import WeightsError
from fulltune_nb.models.activations import XIelu, clamped_swiglu, relu_squared
from fulltune_nb.models.decoder import Block, Decoder
from fulltune_nb.models.experts import MixtureOfExperts
from fulltune_nb.models.families import to_hf
from fulltune_nb.models.file_layout import from_file, to_file
from fulltune_nb.models.folder import hf_tensors, load_decoder, save_folder
from fulltune_nb.models.generation import Sampling, decode
from fulltune_nb.models.layers import MLP, Attention, HeadNorms, Norm, Scoring, added_to_scores, attend, attention_shares
from fulltune_nb.models.model_config import read_config
from fulltune_nb.models.rope import Rope, RopeConfig, places_within, rotate, rotation_table
from nbs_tests.gpu_like import gpu_like
from nbs_tests.models.model_cases import SMALL, random_ids


def config_of(model_type: str = "llama", **changes):
    return read_config({"model_type": model_type, **SMALL, **changes})


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """With weights that are neither zeros nor ones anywhere."""
    mx.random.seed(seed)
    module.update(tree_map(lambda array: array + 0.3 * mx.random.normal(array.shape), module.parameters()))
    return module


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def assert_close(found: mx.array, expected, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=tolerance, atol=tolerance)


# ---- attention ---------------------------------------------------------------------------------------------------------------

QUERIES, KEYS, VALUES = random(2, 4, 5, 6), random(2, 2, 5, 6, seed=1), random(2, 2, 5, 6, seed=2)
CAUSAL = mx.tril(mx.ones((5, 5), dtype=mx.bool_))


def by_hand(scale: float, cap: float | None = None, sinks=None) -> tuple[np.ndarray, np.ndarray]:
    """Shares of attention, and what comes of them, head by head."""
    queries, keys, values = (np.array(array, dtype=np.float64) for array in (QUERIES, KEYS, VALUES))
    shares, mixed = np.zeros((2, 4, 5, 5)), np.zeros((2, 4, 5, 6))
    for b, h in np.ndindex(2, 4):
        scores = scale * queries[b, h] @ keys[b, h // 2].T
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.where(np.array(CAUSAL), np.exp(scores), 0.0)
        shares[b, h] = weights / (weights.sum(axis=-1, keepdims=True) + (0.0 if sinks is None else np.exp(sinks[h])))
        mixed[b, h] = shares[b, h] @ values[b, h // 2]
    return shares, mixed


@pytest.mark.parametrize(
    "scoring",
    [{}, {"cap": 0.7}, {"sinks": [0.5, -1.0, 2.0, 0.0]}, {"cap": 2.0, "sinks": [0.0, 1.0, 2.0, 3.0]}],
    ids=["plain", "cap", "sinks", "both"],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_scores_are_scaled_capped_and_share_with_sinks(scoring, dtype):
    shares, mixed = by_hand(0.4, **scoring)
    given = {name: mx.array(value, dtype=dtype) if name == "sinks" else value for name, value in scoring.items()}
    arrays = [array.astype(dtype) for array in (QUERIES, KEYS, VALUES)]
    tolerance = 1e-5 if dtype == mx.float32 else 3e-2
    found = mx.unflatten(attend(*arrays, CAUSAL, Scoring(0.4, **given)), -1, (4, -1)).transpose(0, 2, 1, 3)
    assert found.dtype == dtype
    assert_close(found.astype(mx.float32), mixed, tolerance)
    assert_close(attention_shares(*arrays[:2], CAUSAL, Scoring(0.4, **given)), shares, tolerance)


def _gradients(of_masks, dtype: mx.Dtype) -> list[np.ndarray]:
    """Of queries (2, 8, 96, 16), two heads of keys and of values, computed in `dtype` with a mask of `of_masks`."""
    given = [random(2, heads, 96, 16, seed=heads + i).astype(mx.bfloat16).astype(dtype) for i, heads in enumerate((8, 2, 2))]
    slope = random(2, 96, 128, seed=5).astype(mx.bfloat16).astype(dtype)
    found = mx.vjp(lambda *heads: attend(*heads, of_masks, Scoring(0.25)), given, [slope])
    return [np.array(array.astype(mx.float32)) for arrays in found for array in arrays]


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
def test_its_own_backward_pass_computes_what_that_of_mlx_does_and_as_exactly(packed):
    mask = mx.tri(96, dtype=mx.bool_)
    if packed:
        segments = mx.array([[i // 40 for i in range(96)], [i // 25 for i in range(96)]])
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    with gpu_like():
        exact, half = _gradients(mask, mx.float32), _gradients(mask, mx.bfloat16)
        own, own_half = (_gradients(added_to_scores(mask, 96, dtype), dtype) for dtype in (mx.float32, mx.bfloat16))
    for reference, same, rounded, by_mlx in zip(exact, own, own_half, half, strict=True):
        size = np.linalg.norm(reference)
        assert np.linalg.norm(same - reference) <= 2e-6 * size
        assert np.linalg.norm(rounded - reference) <= 1.05 * np.linalg.norm(by_mlx - reference)


@pytest.mark.parametrize("settings", [{}, {"cap": 2.0}, {"sinks": [0.5, -1.0, 2.0, 0.0]}], ids=["plain", "cap", "sinks"])
def test_a_mask_that_is_added_is_the_mask(settings):
    scoring = Scoring(0.4, **{name: mx.array(value) for name, value in settings.items()})
    for mask in (CAUSAL, CAUSAL & (mx.arange(10).reshape(2, 1, 1, 5) % 5 > 0) | mx.eye(5, dtype=mx.bool_)):
        expected = attend(QUERIES, KEYS, VALUES, mask, scoring)
        assert_close(attend(QUERIES, KEYS, VALUES, added_to_scores(mask, 5, mx.float32), scoring), expected)


def test_one_projection_of_three_is_the_three():
    apart, fused = config_of(), config_of("phi3")
    attention, whole, x = Attention(apart), Attention(fused), random(2, 5, apart.hidden_size)
    whole.qkv_proj.weight = mx.concatenate([attention[name].weight for name in ("q_proj", "k_proj", "v_proj")])
    for one, other in zip(attention.heads(x, None), whole.heads(x, None), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "hunyuan_v1_dense", "cohere", "stablelm"])
def test_queries_and_keys_are_normed_by_head_or_over_all_heads_before_or_after_rotation(family):
    config = config_of(family, use_qk_norm=True, qk_layernorm=True, head_dim=8, hidden_size=32)
    attention, x = shaken(Attention(config)), random(2, 5, config.hidden_size)
    rotation = Rope(config.rope).rotation(0, 5)
    queries = attention.q_proj(x)
    if family == "olmo2":
        queries = attention.q_norm(queries)
    queries = queries.reshape(2, 5, -1, 8).transpose(0, 2, 1, 3)
    if family in ("qwen3", "cohere", "stablelm"):
        queries = attention.q_norm(queries)
    queries = rotate(queries, rotation, config.rope.interleaved)
    if family == "hunyuan_v1_dense":
        queries = attention.q_norm(queries)
    assert_close(attention.heads(x, rotation)[0], queries)


def test_each_head_may_have_a_norm_of_its_own():
    x = random(2, 3, 5, 8)
    together, listed = shaken(Norm("layer_no_bias", (3, 8), 1e-5)), HeadNorms("layer_no_bias", 3, 8, 1e-5)
    for head, norm in enumerate(listed.norms):
        norm.weight = together.weight[head]
    values = np.array(x, dtype=np.float64)
    normed = (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + 1e-5)
    for found in (together(x), listed(x)):
        assert_close(found, normed * np.array(together.weight)[:, None])


# ---- norms, blocks, scales ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rms", "rms_plus_one", "layer", "layer_plus_one", "layer_no_bias", "layer_no_params"])
def test_norms_scale_by_weight_or_one_plus_weight_and_add_a_bias_where_they_have_one(kind):
    norm, x = shaken(Norm(kind, 8, 1e-3)), random(3, 8)
    values = np.array(x, dtype=np.float64)
    centred = values if kind.startswith("rms") else values - values.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    weight = 1.0 if kind == "layer_no_params" else np.array(norm.weight) + kind.endswith("plus_one")
    bias = np.array(norm.bias) if kind in ("layer", "layer_plus_one") else 0.0
    assert_close(norm(x), expected * weight + bias)
    assert ("bias" in norm) == (kind in ("layer", "layer_plus_one"))


@pytest.mark.parametrize(("family", "layout"), [("llama", "pre"), ("olmo2", "post"), ("glm4", "both"), ("cohere", "parallel")])
def test_norms_stand_before_or_behind_attention_and_mlp(family, layout):
    config = config_of(family, head_dim=8, hidden_size=32)
    block, x = shaken(Block(config, 0)), random(2, 5, 32)
    assert config.block == layout
    attention = lambda x: block.attention(x, None, CAUSAL)  # noqa: E731
    if layout == "pre":
        middle = x + attention(block.input_norm(x))
        expected = middle + block.mlp(block.post_attention_norm(middle))
    elif layout == "post":
        middle = x + block.attention_output_norm(attention(x))
        expected = middle + block.mlp_output_norm(block.mlp(middle))
    elif layout == "both":
        middle = x + block.attention_output_norm(attention(block.input_norm(x)))
        expected = middle + block.mlp_output_norm(block.mlp(block.post_attention_norm(middle)))
    else:
        expected = x + attention(block.input_norm(x)) + block.mlp(block.input_norm(x))
    assert_close(block(x, None, CAUSAL), expected)


def test_multipliers_of_embeddings_residuals_attention_and_logits():
    factors = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 4.0}
    plain, config = config_of("granite"), config_of("granite", **factors)
    one, other = Decoder(plain), Decoder(config)
    other.update(one.parameters())
    ids, x = mx.array(random_ids(SMALL, (1, 5), 0)), random(1, 5, plain.hidden_size)
    assert_close(other.embed(ids), 3.0 * one.embed(ids))
    assert_close(other.head(other.norm(x)), one.head(one.norm(x)) / 4.0)
    block = other.layers[0]
    middle = x + 0.5 * block.attention(block.input_norm(x), None, None)
    assert_close(block(x, None, None), middle + 0.5 * block.mlp(block.post_attention_norm(middle)))
    assert (block.attention.scoring_of().scale, config_of("gemma2", query_pre_attn_scalar=16).attention_scale) == (0.2, 0.25)


def test_logits_are_capped():
    decoder = Decoder(config_of("gemma2", final_logit_softcapping=0.5, head_dim=8))
    hidden = random(3, decoder.config.hidden_size)
    logits = np.array(hidden @ decoder.embed_tokens.weight.T, dtype=np.float64)
    assert_close(decoder.head(hidden), 0.5 * np.tanh(logits / 0.5))


# ---- positions ---------------------------------------------------------------------------------------------------------------


def test_interleaved_pairs_are_the_halves_in_another_order():
    x, table = random(2, 3, 5, 10), Rope(RopeConfig(1e4, 8)).rotation(0, 5)
    order = mx.array([0, 2, 4, 6, 1, 3, 5, 7, 8, 9])
    assert_close(rotate(x, table, interleaved=True)[..., order], rotate(x[..., order], table))


def test_layers_without_positions_are_not_rotated():
    listed = config_of("smollm3", no_rope_layers=[1, 0])
    assert [rope is not None for rope in listed.ropes] == [True, False]
    pattern = {"num_hidden_layers": 4, "sliding_window": 3, "sliding_window_pattern": 2}
    assert [rope is not None for rope in config_of("cohere2", **pattern).ropes] == [True, False, True, False]
    assert all(config_of("exaone4", **{**pattern, "sliding_window": None}).ropes)
    contexts = Decoder(listed).context(5)
    assert contexts[0][0] is not None and contexts[1][0] is None


def test_layers_with_a_window_have_a_base_of_their_own():
    scaling = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6, "rope_local_base_freq": 1e3}
    config = config_of("gemma3_text", num_hidden_layers=3, sliding_window_pattern=3, sliding_window=4, **scaling)
    assert [(rope.theta, rope.scaling) for rope in config.ropes] == [(1e3, "default"), (1e3, "default"), (1e6, "linear")]


def test_a_dynamic_base_grows_with_texts_longer_than_the_model_was_made_for():
    config = RopeConfig(1e4, 8, 1.0, "dynamic", (("factor", 2.0), ("max_position_embeddings", 16.0)))
    plain = RopeConfig(1e4, 8)
    assert_close(Rope(config).rotation(0, 16)["cos"], Rope(plain).rotation(0, 16)["cos"])
    theta = 1e4 * (2.0 * 40 / 16 - 1.0) ** (8 / 6)
    assert_close(Rope(config).rotation(30, 10)["sin"], Rope(RopeConfig(theta, 8)).rotation(30, 10)["sin"], 1e-4)


SHORT, LONG = (1.0, 2.0, 3.0, 4.0), (2.0, 3.0, 5.0, 7.0)
LONGROPE = RopeConfig(
    1e4, 8, 1.0, "longrope",
    (("short_factor", SHORT), ("long_factor", LONG), ("original_max_position_embeddings", 16.0), ("max_position_embeddings", 64.0)),
)  # fmt: skip


def test_longrope_stretches_each_dimension_by_its_own_factor_and_longer_texts_by_others():
    frequencies = 1e4 ** (-np.arange(4) / 4)
    raised = math.sqrt(1 + math.log(4) / math.log(16))
    for length, factors in ((16, SHORT), (17, LONG)):
        plain = rotation_table(mx.array((frequencies / factors).astype(np.float32)), mx.arange(length))
        found = Rope(LONGROPE).rotation(0, length)
        assert_close(found["cos"], raised * plain["cos"])
        assert_close(found["sin"], raised * plain["sin"])


def test_yarn_keeps_fast_dimensions_stretches_slow_ones_and_raises_scores():
    config = RopeConfig(1e4, 64, 1.0, "yarn", (("factor", 4.0), ("original_max_position_embeddings", 256.0)))
    plain, scaled = (Rope(one).rotation(1, 1) for one in (RopeConfig(1e4, 64), config))
    raised = 0.1 * math.log(4) + 1
    angles, expected = (np.arctan2(np.array(one["sin"]), np.array(one["cos"]))[0] for one in (scaled, plain))
    turns = 256 * expected / (2 * math.pi)
    np.testing.assert_allclose(angles[turns > 40], expected[turns > 40], rtol=1e-4)
    np.testing.assert_allclose(4 * angles[turns < 0.8], expected[turns < 0.8], rtol=1e-3)
    assert_close(mx.sqrt(scaled["cos"] ** 2 + scaled["sin"] ** 2), np.full((1, 32), raised), 1e-4)


def test_queries_grow_beyond_the_original_length():
    config = config_of("ministral3", head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
                                                                  "original_max_position_embeddings": 4})  # fmt: skip
    growth = Rope(config.rope).rotation(0, 10)["growth"]
    assert_close(growth[:, 0], 1 + 0.1 * np.log(1 + np.arange(10) // 4))
    segments = mx.array([[0] * 6 + [1] * 4])
    assert_close(Rope(config.rope).rotation(0, 10, segments)["growth"][0, 0, 6:, 0], growth[:4, 0])


def test_places_within_segments_begin_anew():
    places, lengths = places_within(mx.array([[0, 0, 0, 1, 1, -1], [0, 1, 1, 1, 1, 2]]))
    assert places.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]]
    assert lengths.tolist() == [[3, 3, 3, 2, 2, 1], [1, 4, 4, 4, 4, 1]]


@pytest.mark.parametrize("prompt_length", [3, 20])
def test_an_answer_that_grows_beyond_longropes_short_texts_is_computed_anew(prompt_length):
    scaling = {"type": "longrope", "short_factor": SHORT[:3], "long_factor": LONG[:3]}
    decoder = shaken(Decoder(config_of("phi3", original_max_position_embeddings=8, rope_scaling=scaling)))
    ids = random_ids(SMALL, (1, prompt_length), 1)[0].tolist()
    found = [token for (token,) in decode(decoder, [ids], Sampling(temperature=0.0, max_tokens=12), [0])]
    for token in found:  # each from the whole text, without a cache
        assert token == mx.argmax(decoder(mx.array([ids]))[0, -1]).item()
        ids.append(token)


# ---- mlp and experts ---------------------------------------------------------------------------------------------------------


def test_activations_are_their_formulas():
    x, up = random(50), random(50, seed=1)
    values, other = np.array(4 * x, dtype=np.float64), np.array(4 * up, dtype=np.float64)
    assert_close(relu_squared(4 * x), np.maximum(values, 0) ** 2)
    gate, opened = np.minimum(values, 2.0), np.clip(other, -2.0, 2.0)
    assert_close(clamped_swiglu(4 * x, 4 * up, 1.7, 2.0), (opened + 1) * gate / (1 + np.exp(-1.7 * gate)))
    xielu = XIelu()
    above, below = np.log1p(np.exp(0.2)), 0.5 + np.log1p(np.exp(-1.0))
    expected = np.where(values > 0, above * values**2, below * (np.expm1(np.minimum(values, 0)) - values)) + values / 2
    assert_close(xielu(4 * x), expected)


def test_gate_and_up_may_be_one_tensor():
    apart, fused = MLP(config_of()), MLP(config_of("phi3"))
    fused.gate_up_proj.weight = mx.concatenate([apart.gate_proj.weight, apart.up_proj.weight])
    fused.down_proj.weight = apart.down_proj.weight
    x = random(2, 5, SMALL["hidden_size"])
    assert_close(fused(x), apart(x))


@pytest.mark.parametrize("normalised", [False, True])
def test_experts_share_by_the_softmax_over_all_or_over_the_chosen_and_a_shared_one_has_a_gate(normalised):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
    moe = shaken(MixtureOfExperts(config_of("qwen2_moe", norm_topk_prob=normalised, **sizes)))
    x = random(1, 6, SMALL["hidden_size"])
    scores = np.array(moe.router(x)[0], dtype=np.float64)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.array(mx.sigmoid(moe.shared_expert_gate(x)) * moe.shared_expert(x))[0]
    for token in range(6):
        best = np.argsort(-scores[token])[:2]
        of_chosen = shares[token, best] / (shares[token, best].sum() if normalised else 1.0)
        expected[token] += sum(share * np.array(moe.experts[e](x[:, token]))[0] for share, e in zip(of_chosen, best, strict=True))
    assert_close(moe(x)[0], expected, 1e-4)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("groups", [(1, 1), (4, 1), (4, 2), (2, 2)])
def test_sigmoids_with_a_correction_choose_in_the_best_groups_and_share_without_it(groups, normalised):
    sizes = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 2}
    settings = {"n_group": groups[0], "topk_group": groups[1], "norm_topk_prob": normalised, "routed_scaling_factor": 2.5}
    moe, x = shaken(MixtureOfExperts(config_of("dots1", **sizes, **settings))), random(1, 6, SMALL["hidden_size"])
    moe.correction.e_score_correction_bias = random(8)
    shares = 1 / (1 + np.exp(-np.array(moe.router(x)[0], dtype=np.float64)))
    values = shares + np.array(moe.correction.e_score_correction_bias)
    expected = np.array(moe.shared_expert(x))[0].astype(np.float64)
    for token in range(6):
        of_groups = values[token].reshape(groups[0], -1)
        best_groups = np.argsort(-np.sort(of_groups)[:, -2:].sum(-1))[: groups[1]]
        best = sorted((e for e in range(8) if e // of_groups.shape[1] in best_groups), key=lambda e: -values[token, e])[:2]
        of_chosen = 2.5 * shares[token, best] / (shares[token, best].sum() if normalised else 1.0)
        expected[token] += sum(share * np.array(moe.experts[e](x[:, token]))[0] for share, e in zip(of_chosen, best, strict=True))
    assert_close(moe(x)[0], expected, 1e-4)


def test_some_layers_have_experts():
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_hidden_layers": 4}
    assert config_of("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3], **sizes).with_experts == (False, True, False, False)
    assert config_of("glm4_moe", head_dim=8, first_k_dense_replace=3, num_hidden_layers=4).with_experts == (False, False, False, True)
    interval = {"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 2, "num_hidden_layers": 6}
    assert config_of("ernie4_5_moe", **interval).with_experts == (False, True, False, True, False, False)


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_stacked_experts_are_taken_apart_and_put_together_again(family):
    decoder = shaken(Decoder(config_of(family, num_local_experts=3, num_experts_per_tok=2, head_dim=6)))
    stored = hf_tensors(decoder)
    assert not any(".experts.0." in name for name in stored)
    again = to_file(from_file(stored, decoder.config), decoder.config)
    assert again.keys() == stored.keys() and all(mx.array_equal(again[name], stored[name]) for name in stored)
    if family == "gpt_oss":  # columns of gate and up take turns
        expert, whole = decoder.layers[1].mlp.experts[2], stored["model.layers.1.mlp.experts.gate_up_proj"]
        assert mx.array_equal(whole[2, :, ::2].T, expert.gate_proj.weight) and mx.array_equal(whole[2, :, 1::2].T, expert.up_proj.weight)


@pytest.mark.parametrize(("family", "called"), [("gpt_oss", "mlp.experts"), ("granitemoe", "block_sparse_moe.switch_mlp")])
def test_experts_as_mlx_lm_stacks_them_are_read(family, called, tmp_path):
    raw = {"model_type": family, **SMALL, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 6}
    decoder = shaken(Decoder(read_config(raw)))
    save_folder(tmp_path / "saved", decoder, None)
    tensors, stacks = {}, {}
    for name, array in tree_flatten(decoder.parameters()):
        before, _, number_and_rest = to_hf(name, family).partition(".experts.")
        if number_and_rest:
            stacks.setdefault(f"{before.rpartition('.')[0]}.{called}.{number_and_rest.partition('.')[2]}", []).append(array)
        else:
            tensors[before] = array
    mx.save_safetensors(str(tmp_path / "saved" / "model.safetensors"), tensors | {name: mx.stack(one) for name, one in stacks.items()})
    again, ids = load_decoder(tmp_path / "saved"), mx.array(random_ids(SMALL, (1, 7), 0))
    assert mx.array_equal(again(ids), decoder(ids))


def test_stored_constants_are_written_and_others_are_refused():
    decoder = Decoder(config_of("apertus"))
    stored = hf_tensors(decoder)
    beta = "model.layers.0.mlp.act_fn.beta"
    assert stored[beta].item() == 0.5 and beta not in from_file(stored, decoder.config)
    with pytest.raises(WeightsError, match=r"act_fn.beta is 0.25; computed is with 0.5 only"):
        from_file({**stored, beta: mx.array(0.25)}, decoder.config)
