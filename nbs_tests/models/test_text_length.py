"""Rotations that depend on how long a text is, `dynamic` and `longrope`: answers across the switch, and rows of other lengths beside it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

import fulltune_nb as ft
from fulltune_nb.data.batches import collate
from fulltune_nb.insight.predictions import token_statistics
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.folder import load_decoder
from fulltune_nb.models.model_config import read_config
from fulltune_nb.training.engine import make_engine
from fulltune_nb.training.loss import evaluate_loss
from nbs_tests.models.model_cases import SMALL, random_ids
from nbs_tests.models.parity import greedy, need_torch, relative_error, write_folder

SWITCH = 16
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.2, 1.5], "long_factor": [2.0, 3.0, 4.0]}
CASES = {
    "dynamic": {"model_type": "llama", "max_position_embeddings": SWITCH, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "longrope": {"model_type": "phi3", "original_max_position_embeddings": SWITCH, "rope_scaling": LONGROPE, "pad_token_id": 0},
    "longrope in windows": {
        "model_type": "gemma3_text", "head_dim": 6, "sliding_window": 40, "sliding_window_pattern": 2, "tie_word_embeddings": False,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {**LONGROPE, "rope_type": "longrope", "rope_theta": 1e3, "original_max_position_embeddings": SWITCH},
        },
    },
}  # fmt: skip


def shaken(model: Decoder) -> Decoder:
    model.update(tree_map(lambda array: array + 0.3 * mx.random.normal(array.shape), model.parameters()))
    return model


@pytest.fixture(params=CASES)
def lm(request, tokenizer):
    """A model whose weights are large enough that places show."""
    lm = ft.LanguageModel.from_config({**SMALL, **CASES[request.param], "vocab_size": 512}, tokenizer, seed=3)
    shaken(lm.model)
    return lm


@pytest.fixture
def split(tokenizer):
    """Rows below and above the switch."""
    rows = [{"text": "fox " * 3}, {"text": "the quick brown fox jumps " * 6}, {"text": "rows in the table " * 2}]
    split = ft.load_data({"train": rows}, tokenizer).train
    assert min(split.lengths) < SWITCH < max(split.lengths)
    return split


@pytest.mark.parametrize("prompt_length", [5, SWITCH, SWITCH + 1])
@pytest.mark.parametrize("case", ["dynamic", "longrope"])
def test_answers_across_the_switch_are_those_that_a_new_model_of_transformers_generates_with_its_cache(case, prompt_length, tmp_path):
    need_torch()
    from nbs_tests.models import torch_reference as reference

    raw = {**SMALL, **CASES[case]}
    model = reference.build(raw, 1)
    decoder = load_decoder(write_folder(tmp_path, raw, reference.checkpoint(model)))
    prompt = random_ids(raw, (1, prompt_length), 1)
    expected, gap = reference.greedy_with_gap(model, prompt, 32)
    assert gap > 1e-4  # no close call
    assert greedy(decoder, prompt, 32).tolist() == expected.tolist()


def test_many_answers_are_the_single_ones(lm):
    prompts = [list(range(40, 40 + length)) for length in (3, 12, SWITCH, SWITCH + 1, SWITCH + 6, 12)]
    expected = [lm.generate(prompt, max_tokens=20) for prompt in prompts]
    assert lm.generate_many(prompts, max_tokens=20) == expected


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_a_rows_gradient_is_the_same_beside_longer_rows_packed_and_alone(backward, lm, split):
    engine, ways = make_engine(lm.model, backward), {}
    for name, batches in {"alone": [[0], [1], [2]], "side by side": [[0, 1, 2]], "packed": [[(0, 1, 2)]]}.items():
        step = engine.gradients(1, [collate(split, rows) for rows in batches])
        ways[name] = {name: np.array(g) for piece in step.pieces() for name, g in piece.gradients.items()} | {"loss": np.array([step.loss])}
    for way in ("side by side", "packed"):
        errors = {name: relative_error(ways[way][name], gradient) for name, gradient in ways["alone"].items()}
        assert max(errors.values()) < 1e-4, (way, max(errors, key=errors.get))


def test_losses_do_not_depend_on_the_rows_beside(lm, split):
    assert evaluate_loss(lm.model, split, 1)[0] == pytest.approx(evaluate_loss(lm.model, split, 3)[0], rel=1e-5)
    rows = [split[i].tokens for i in range(3)]
    alone = [token_statistics(lm.model, [row])[0].losses for row in rows]
    for found, expected in zip(token_statistics(lm.model, rows), alone, strict=True):
        np.testing.assert_allclose(found.losses[1:], expected[1:], rtol=1e-4, atol=1e-4)


def test_the_rows_own_lengths_are_what_counts(lm):
    ids = mx.array(random_ids({"vocab_size": 512}, (2, 30), 0))
    padded = np.array(lm.model.hidden_states(ids, lengths=mx.array([10, 30])))
    np.testing.assert_allclose(padded[0, :10], np.array(lm.model.hidden_states(ids[:1, :10]))[0], atol=1e-4)
    np.testing.assert_allclose(padded[1], np.array(lm.model.hidden_states(ids[1:]))[0], atol=1e-4)


def test_a_longrope_of_layers_with_windows_is_computed_anew_at_its_switch():
    mx.random.seed(3)
    model = shaken(Decoder(read_config({**SMALL, **CASES["longrope in windows"]})))
    ids = [5, 9, 33, 21]
    for token in greedy(model, np.array([ids]), 20).tolist():  # each from the whole text, without a cache
        assert token == mx.argmax(model(mx.array([ids]))[0, -1]).item()
        ids.append(token)
