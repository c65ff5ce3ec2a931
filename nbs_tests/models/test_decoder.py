"""The decoder against transformers: logits, gradients and greedy decoding of all seven families.

Against committed fixtures always; against transformers itself where torch is installed. Random configurations of every family are
compared in `test_family_parity.py`.
"""

from __future__ import annotations

import functools
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.folder import load_decoder
from fulltune_nb.models.layers import Norm, causal_mask
from fulltune_nb.models.model_config import read_config
from nbs_tests.memory_held import memory_held
from nbs_tests.models.model_cases import CASES, FAMILIES, FIXTURES, IDS_SHAPE, NEW_TOKENS, SMALL, random_ids
from nbs_tests.models.parity import (
    LOGITS_TOLERANCE,
    assert_gradients_close,
    gradients,
    greedy,
    need_torch,
    relative_error,
    write_folder,
)


@functools.cache
def fixture(case: str) -> dict[str, dict[str, np.ndarray] | np.ndarray]:
    """The tensors of one fixture; `weights` and `gradients` are dicts by Hugging Face name."""
    stored = load_file(FIXTURES / f"{case}.safetensors")
    groups = {
        group: {name.removeprefix(f"{group}/"): array for name, array in stored.items() if name.startswith(f"{group}/")}
        for group in ("weights", "gradients")
    }
    return {**{name: array for name, array in stored.items() if "/" not in name}, **groups}


@pytest.fixture
def fixture_decoder(tmp_path):
    return lambda case: load_decoder(write_folder(tmp_path / case, CASES[case], fixture(case)["weights"]))


# ---- against the committed fixtures ---------------------------------------------------------------------------------------


def test_fixtures_stand_for_the_cases():
    assert {path.stem for path in FIXTURES.glob("*.json")} == set(CASES)
    assert all(json.loads((FIXTURES / f"{case}.json").read_text()) == raw for case, raw in CASES.items())
    assert {raw["model_type"] for raw in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_fixture(case, fixture_decoder):
    expected = fixture(case)
    assert relative_error(fixture_decoder(case)(mx.array(expected["ids"])), expected["logits"]) < LOGITS_TOLERANCE


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_fixture(case, checkpoint, fixture_decoder):
    expected = fixture(case)
    assert_gradients_close(gradients(fixture_decoder(case), expected["ids"], checkpoint), expected["gradients"])


@pytest.mark.parametrize("case", CASES)
def test_greedy_decoding_equals_the_fixture(case, fixture_decoder):
    expected = fixture(case)
    assert greedy(fixture_decoder(case), expected["prompt"], NEW_TOKENS).tolist() == expected["answer"].tolist()


# ---- live, against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_fixtures_are_what_transformers_computes(case, tmp_path):
    need_torch()
    from nbs_tests.models import torch_reference

    expected = fixture(case)
    model = torch_reference.load(write_folder(tmp_path, CASES[case], expected["weights"]))
    assert relative_error(torch_reference.logits(model, expected["ids"]), expected["logits"]) < 1e-5
    assert torch_reference.greedy(model, expected["prompt"], NEW_TOKENS).tolist() == expected["answer"].tolist()
    found = torch_reference.gradients(model, expected["ids"])
    assert_gradients_close(found, expected["gradients"])


@pytest.mark.parametrize("family", FAMILIES)
def test_long_sequences_compute_what_transformers_does(family):
    need_torch()
    from nbs_tests.models import torch_reference

    window = {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}
    raw = {"model_type": family, **SMALL, **window, "hidden_size": 32, "tie_word_embeddings": False}
    model = torch_reference.build(raw, 0)
    ids = random_ids(raw, (1, 300), 0)
    decoder = decoder_of(raw, torch_reference.checkpoint(model))
    assert relative_error(decoder(mx.array(ids)), torch_reference.logits(model, ids)) < LOGITS_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_transformers_in_bfloat16(family):
    need_torch()
    import torch

    from nbs_tests.models import torch_reference

    raw = {"model_type": family, **SMALL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_local_experts": 4}
    model = torch_reference.build(raw, 0).bfloat16()
    ids = random_ids(raw, IDS_SHAPE, 0)
    in_bfloat16 = torch_reference.logits(model, ids)
    model = model.to(torch.float32)  # the same weights, rounded once
    exact = torch_reference.logits(model, ids)
    found = decoder_of(raw, torch_reference.checkpoint(model), mx.bfloat16)(mx.array(ids))
    assert found.dtype == mx.bfloat16
    assert relative_error(found.astype(mx.float32), exact) < 1.5 * relative_error(in_bfloat16, exact)


def decoder_of(raw, tensors, dtype=mx.float32) -> Decoder:
    from fulltune_nb.models.folder import assign_tensors

    decoder = Decoder(read_config(raw))
    assign_tensors(decoder, {name: mx.array(array) for name, array in tensors.items()}, "the test", dtype)
    return decoder


# ---- behaviour on its own -------------------------------------------------------------------------------------------------


def small_decoder(**changes) -> Decoder:
    mx.random.seed(0)
    decoder = Decoder(read_config({"model_type": "llama", **SMALL, **changes}))
    mx.eval(decoder.parameters())
    return decoder


def test_a_row_does_not_see_its_neighbours_or_what_follows():
    decoder = small_decoder()
    ids = random_ids(SMALL, (3, 12), 0)
    changed = ids.copy()
    changed[0, 7:] += 1
    changed[2] += 1
    before, after = (np.array(decoder(mx.array(array % SMALL["vocab_size"]))) for array in (ids, changed))
    np.testing.assert_allclose(after[0, :7], before[0, :7], atol=1e-5)
    np.testing.assert_allclose(after[1], before[1], atol=1e-5)
    assert np.abs(after[0, 7:] - before[0, 7:]).max() > 1e-2


@pytest.mark.parametrize(
    ("length", "offset", "first", "window", "expected"),
    [
        (3, 0, 0, None, [[1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        (3, 0, 0, 2, [[1, 0, 0], [1, 1, 0], [0, 1, 1]]),
        (2, 3, 0, None, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        (2, 3, 1, 2, [[0, 1, 1, 0], [0, 0, 1, 1]]),
        (1, 4, 0, 3, [[0, 0, 1, 1, 1]]),
        (2, 0, 0, 1, [[1, 0], [0, 1]]),
    ],
)
def test_masks_allow_the_past_within_the_window(length, offset, first, window, expected):
    assert np.array(causal_mask(length, offset, first, window)).astype(int).tolist() == expected


@pytest.mark.parametrize("window", [None, 5, 9])
def test_a_single_token_that_sees_everything_needs_no_mask(window):
    assert causal_mask(1, 4, 0, window) is None


def test_checkpointing_changes_neither_weights_nor_later_results():
    decoder = small_decoder()
    ids = random_ids(SMALL, IDS_SHAPE, 0)
    before, logits = dict(tree_flatten(decoder.parameters())), np.array(decoder(mx.array(ids)))
    copies = {name: np.array(array) for name, array in before.items()}
    first = gradients(decoder, ids, True)
    second = gradients(decoder, ids, True)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert all(np.array_equal(np.array(array), copies[name]) for name, array in tree_flatten(decoder.parameters()))
    np.testing.assert_array_equal(np.array(decoder(mx.array(ids))), logits)


def test_checkpointing_gives_gradients_of_the_trainable_weights_alone():
    decoder = small_decoder()
    decoder.freeze()
    decoder.layers[1].mlp.unfreeze()
    ids = random_ids(SMALL, IDS_SHAPE, 0)
    plain, checkpointed = (gradients(decoder, ids, checkpoint) for checkpoint in (False, True))
    assert set(plain) == {f"model.layers.1.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert_gradients_close(checkpointed, plain)


def test_checkpointing_needs_less_memory():
    decoder = small_decoder(num_hidden_layers=8, hidden_size=64, intermediate_size=256)
    ids = mx.array(random_ids(SMALL, (4, 100), 0))
    peaks = []
    for checkpoint in (False, True):
        step = nn.value_and_grad(decoder, lambda ids, on=checkpoint: decoder.head(decoder.hidden_states(ids, grad_checkpoint=on)).sum())
        mx.eval(step(ids))
        mx.eval(decoder.parameters())
        before = memory_held()
        mx.eval(step(ids))
        peaks.append(mx.get_peak_memory() - before)
        mx.eval(decoder.parameters())
    assert peaks[1] < 0.6 * peaks[0]


def test_a_norm_of_one_plus_weight_adds_in_float32():
    norm = Norm("rms_plus_one", 2, 1e-6)
    norm.weight = mx.full((2,), 0.00390625).astype(mx.bfloat16)  # 2^-8: 1 + 2^-8 is no bfloat16
    values = mx.array([[255.0, 1e-3]]).astype(mx.bfloat16)  # the first one's square alone decides: 255 -> sqrt(2)
    found = norm(values)
    assert found.dtype == mx.bfloat16
    assert found[0, 0].item() == mx.array(2**0.5 * 1.00390625).astype(mx.bfloat16).item() != mx.array(2**0.5).astype(mx.bfloat16).item()


def test_only_the_chosen_experts_are_computed():
    decoder = small_decoder(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=1)
    moe = decoder.layers[0].mlp
    moe.router.weight = mx.array([[9.0], [8.0], [-9.0], [-9.0]]) * mx.ones((4, SMALL["hidden_size"]))
    for unused in moe.experts[2:]:
        unused.up_proj.weight = unused.up_proj.weight * float("nan")
    assert mx.isfinite(moe(mx.abs(mx.random.normal((2, 5, SMALL["hidden_size"]))))).all().item()


def test_the_row_of_the_padding_token_gets_no_gradient_from_the_input():
    ids = np.array([[3, 7, 3, 9]], dtype=np.int32)
    found = gradients(small_decoder(pad_token_id=3), ids, False)["model.embed_tokens.weight"]
    assert np.all(found[3] == 0) and np.any(found[7] != 0)
    assert np.any(gradients(small_decoder(), ids, False)["model.embed_tokens.weight"][3] != 0)


def test_head_weights_are_what_the_head_computes_with():
    for changes in ({}, {"tie_word_embeddings": True}, {"model_type": "phi"}, {"model_type": "phi", "tie_word_embeddings": True}):
        decoder = small_decoder(**{"hidden_size": 32, **changes})
        hidden, weights = mx.random.normal((2, 3, 32)), decoder.head_weights()
        expected = np.array(hidden) @ np.array(weights["weight"]).T + np.array(weights.get("bias", mx.zeros(1)))
        np.testing.assert_allclose(np.array(decoder.head(hidden)), expected, atol=1e-4)
        assert ("bias" in weights) == (changes.get("model_type") == "phi")
