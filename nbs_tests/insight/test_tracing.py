"""Traces equal what transformers sees inside the same model; gradients equal those of the whole graph."""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.insight import tracing
from fulltune_nb.models.folder import load_decoder
from nbs_tests.insight.conftest import HOSTILE, assert_harmless
from nbs_tests.models.model_cases import CASES, VOCAB, random_ids
from nbs_tests.models.parity import assert_gradients_close, need_torch, write_folder

TOLERANCE = 1e-4


def norm(array) -> float:
    return float(np.linalg.norm(np.array(array, dtype=np.float64)))


@pytest.mark.parametrize("name", CASES)
def test_attention_and_lens_equal_transformers(name, tokenizer, tmp_path):
    need_torch()
    import torch

    from nbs_tests.models import torch_reference

    raw = CASES[name]
    reference = torch_reference.build(raw, seed=3)
    folder = write_folder(tmp_path / "model", raw, torch_reference.checkpoint(reference))
    lm = ft.LanguageModel(load_decoder(folder), tokenizer)
    tokens = random_ids(raw, (1, 27), seed=4)[0]
    found = ft.trace(lm, tokens.tolist())
    with torch.no_grad():
        seen = reference(torch.from_numpy(tokens[None]).long(), output_hidden_states=True, output_attentions=True)
        last = len(seen.hidden_states) - 1
        for layer, hidden in enumerate(seen.hidden_states):
            # Hugging Face's last one has been through the final norm already.
            final_norm = getattr(reference.model, "norm", None) or reference.model.final_layernorm
            normed = hidden if layer == last else final_norm(hidden)
            logits = reference.lm_head(normed)[0]
            np.testing.assert_allclose(found.logits(layer), logits.numpy(), atol=TOLERANCE, rtol=TOLERANCE)
            shares = torch.softmax(logits, dim=-1)
            np.testing.assert_allclose(found.top_probabilities[layer], torch.topk(shares, 5).values.numpy(), atol=TOLERANCE)
            following = shares[:-1].gather(1, torch.from_numpy(tokens[1:, None]).long())[:, 0]
            np.testing.assert_allclose(found.next_probabilities[layer], following.numpy(), atol=TOLERANCE)
            if layer < last:
                np.testing.assert_allclose(found.hidden(layer), hidden[0].numpy(), atol=TOLERANCE, rtol=TOLERANCE)
                np.testing.assert_allclose(found.residual_norms[layer], hidden[0].norm(dim=-1).numpy(), rtol=TOLERANCE)
    for layer, maps in enumerate(seen.attentions, 1):
        np.testing.assert_allclose(found.attention(layer), maps[0].numpy(), atol=TOLERANCE)
    assert VOCAB == raw["vocab_size"] and found.num_layers == last


@pytest.mark.parametrize("name", ["llama_linear_tied", "mixtral_top2_of_4", "gemma_wide_heads", "phi_qk_norm", "olmo_clipped"])
def test_gradients_by_block_equal_those_of_the_whole_graph(name, tokenizer):
    raw = CASES[name]
    lm = ft.LanguageModel.from_config(raw, tokenizer, seed=2)
    tokens = random_ids(raw, (1, 19), seed=1)[0]
    mask = np.arange(19) >= 7
    before = {path: np.array(array) for path, array in tree_flatten(lm.model.parameters())}
    found = tracing.Inspection(lm, ft.Example(tokens, mask, "", "a:1", 0, {}))

    def loss(model):
        logits = model(mx.array(tokens[None, :-1]))[0]
        return nn.losses.cross_entropy(logits, mx.array(tokens[1:]), reduction="none")[6:].mean()

    value, expected = nn.value_and_grad(lm.model, loss)(lm.model)
    assert found.loss == pytest.approx(value.item(), abs=1e-5)
    as_arrays = {path: np.array([norm(array)]) for path, array in tree_flatten(expected)}
    assert_gradients_close({path: np.array([value]) for path, value in found.gradient_norms.items()}, as_arrays)
    total = sum(value**2 for value in found.block_gradient_norms.values()) ** 0.5
    assert total == pytest.approx(norm(np.concatenate(list(as_arrays.values()))), rel=1e-3)
    assert all(np.array_equal(before[path], np.array(array)) for path, array in tree_flatten(lm.model.parameters()))


def test_inspecting_leaves_a_trainer_as_it_is(make_trainer):
    inspected, quiet = make_trainer(), make_trainer()
    for _ in range(3):
        found = ft.inspect(inspected, inspected.data.train[1])
        assert found.loss == pytest.approx(ft.token_losses(inspected.lm, inspected.data.train[1]).loss, abs=1e-5)
        assert inspected.step().loss == quiet.step().loss
    assert len(inspected.history) == len(quiet.history)


def test_the_gradient_of_frozen_tensors_is_not_shown(make_trainer):
    trainer = make_trainer(freeze=["*embed_tokens*", "*layers.0*"])
    names = ft.inspect(trainer, trainer.data.train[0]).block_gradient_norms
    assert list(names) == ["layers.1", "norm", "lm_head"]


def test_the_last_lens_is_the_model_itself_and_attention_sums_to_one(make_lm):
    lm = make_lm()
    found = ft.trace(lm, "the quick brown fox")
    logits = np.array(lm.model(mx.array(found.example.tokens[None]))[0])
    np.testing.assert_allclose(found.logits(2), logits, atol=1e-5)
    np.testing.assert_allclose(found.attention(1).sum(axis=-1), 1, atol=1e-5)
    assert (np.triu(found.attention(2, 3), 1) == 0).all()


def test_a_long_text_keeps_little_and_computes_the_rest_again(make_lm, monkeypatch):
    lm, text = make_lm(), "the quick brown fox jumps over the lazy dog"
    kept = ft.trace(lm, text)
    monkeypatch.setattr(tracing, "KEPT_BYTES", 0)
    again = ft.trace(lm, text)
    calls = []
    monkeypatch.setattr(tracing, "residual_stream", lambda *a, real=tracing.residual_stream: calls.append(1) or real(*a))
    np.testing.assert_allclose(again.hidden(1), kept.hidden(1), atol=1e-6)
    np.testing.assert_allclose(again.attention(2), kept.attention(2), atol=1e-6)
    np.testing.assert_allclose(again.attention(2, 3), kept.attention(2, 3), atol=1e-6)
    assert len(calls) == 3
    lm.model.embed_tokens.weight = lm.model.embed_tokens.weight * 2
    with pytest.raises(ft.ConfigError, match="Trace it again"):
        again.attention(2)


def test_pooling_keeps_the_largest_of_each_tile():
    maps = np.random.default_rng(0).random((2, 10, 10))
    small = tracing.pooled(maps, 4)
    assert small.shape == (2, 4, 4) and small[1, 0, 0] == maps[1, :3, :3].max() and small[0, 3, 3] == maps[0, 9, 9]


def test_wrong_questions_are_refused(make_lm, make_trainer):
    lm = make_lm()
    found = ft.trace(lm, "rows")
    for wrong in (lambda: found.attention(0), lambda: found.attention(3), lambda: found.attention(1, 4), lambda: found.hidden(3),
                  lambda: ft.trace(lm, ["a", "b"]), lambda: ft.trace(lm, 3)):
        with pytest.raises(ft.ConfigError):
            wrong()
    trainer = make_trainer()
    with pytest.raises(ft.DataError, match="ft.trace"):
        ft.inspect(trainer, ft.Example(np.arange(5), np.zeros(5, bool), "", "a:1", 0, {}))


def test_views_are_harmless_and_there_for_one_token_too(make_trainer, make_lm):
    trainer = make_trainer()
    found = ft.inspect(trainer, HOSTILE)
    assert_harmless(found._repr_html_())
    for ax in (found.plot(), found.plot_lens(), found.plot_attention(1, 2), found.plot_gradients()):
        ax.figure.canvas.draw()
    found.plot_heads(2).canvas.draw()
    assert len(found.to_frame()) == 3 * len(found.example.tokens)
    one = ft.trace(make_lm(), [5])
    assert "1 tokens" in one._repr_html_() and len(one.to_frame()) == 3
    one.plot_lens().figure.canvas.draw()


def test_thirty_two_layers_and_four_thousand_tokens_are_drawn_in_bounded_room(make_lm, monkeypatch):
    found = ft.trace(make_lm(), "the quick brown fox")
    layers, length, random = 33, 4096, np.random.default_rng(0)
    found.example = ft.Example(random.integers(10, 400, length), np.ones(length, bool), "x" * 9999, "long:1", 0, {})
    found.residual_norms, found.next_probabilities = random.random((layers, length)), random.random((layers, length - 1))
    found.top_ids = random.integers(10, 400, (layers, length, 5))
    found.top_probabilities = random.random((layers, length, 5))
    monkeypatch.setattr(found, "attention", lambda layer, head: random.random((length, length), dtype=np.float32))
    html = found._repr_html_()
    assert len(html) < 600_000
    assert "4,080 tokens before these are not shown" in html and html.count("<rect") == 33 * 64
    for draw in (found.plot, found.plot_lens, lambda: found.plot_attention(1)):
        draw().figure.canvas.draw()  # how long it takes: nbs_tests/benchmarks/drawing_time.py


def test_what_is_said_within_a_letter_is_the_letter_it_completes(make_lm):
    lm = make_lm()
    found = ft.trace(lm, "a日")
    found.top_ids[-1, -2] = found.example.tokens[-1]  # the last layer says the letter's last byte
    html = found._repr_html_()
    assert re.findall(r'<th colspan="3"[^>]*>([^<]*)</th>', html) == ["日"] and "<bdi>日</bdi> ✓" in html
