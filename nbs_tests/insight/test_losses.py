"""Token losses are the losses that training sees, and show themselves safely and in time."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.insight import top_losses
from fulltune_nb.insight.losses import ExampleLosses, TokenLosses
from fulltune_nb.insight.predictions import TokenStatistics, token_statistics
from nbs_tests.insight.conftest import HOSTILE, assert_harmless
from nbs_tests.models.parity import need_torch


def test_trained_tokens_average_to_the_loss_of_evaluate(make_trainer):
    trainer = make_trainer(rows=23)
    for split in ("train", "valid"):
        found = ft.token_losses(trainer.lm, getattr(trainer.data, split))
        report = trainer.evaluate(split)
        assert found.tokens == report.tokens
        assert found.loss == pytest.approx(report.loss, abs=1e-5)


def test_losses_equal_torchs_on_the_same_tokens(make_lm, make_data, tmp_path):
    need_torch()
    import torch

    from nbs_tests.models import torch_reference

    lm, data = make_lm(), make_data(6)
    reference = torch_reference.load(lm.save(tmp_path / "model"))
    for row in ft.token_losses(lm, data.train).rows:
        tokens = torch.from_numpy(row.example.tokens.astype(np.int64))
        with torch.no_grad():
            logits = reference(tokens[None]).logits[0, :-1].float()
        expected = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").numpy()
        np.testing.assert_allclose(row.losses[1:], expected, atol=1e-5)
        shares = torch.softmax(logits, dim=-1)
        best = torch.topk(shares, 5, dim=-1)
        np.testing.assert_allclose(row.found.top_probabilities[1:], best.values.numpy(), atol=1e-6)
        at_target = shares.gather(1, tokens[1:, None])
        np.testing.assert_array_equal(row.found.ranks[1:], (shares > at_target).sum(dim=1).numpy() + 1)


def test_alternatives_are_sorted_and_probabilities_fit_the_losses(make_lm, make_data):
    for row in ft.token_losses(make_lm(), make_data(4).train).rows:
        shares = row.found.top_probabilities[1:]
        assert (np.diff(shares, axis=1) <= 0).all()
        np.testing.assert_allclose(row.found.probabilities[1:], np.exp(-row.losses[1:]), rtol=1e-6)
        first = row.found.ranks[1:] == 1
        np.testing.assert_array_equal(row.found.top_ids[1:][first, 0], row.example.tokens[1:][first])
        assert np.isnan(row.losses[0]) and row.found.ranks[0] == 0


def test_the_difference_to_a_base_is_what_training_changed(make_trainer, make_lm):
    trainer = make_trainer()
    for _ in trainer.steps(8):
        pass
    base = make_lm()
    found = ft.token_losses(trainer.lm, trainer.data.train, base=base)
    own, other = ft.token_losses(trainer.lm, trainer.data.train), ft.token_losses(base, trainer.data.train)
    assert found.difference == pytest.approx(own.loss - other.loss, abs=1e-5) and found.difference < 0
    same = ft.token_losses(base, trainer.data.train, base=make_lm())
    assert same.difference == 0 and all((row.difference[1:] == 0).all() for row in same.rows)


def test_texts_are_examples_too_and_other_things_are_refused(make_lm, make_data):
    lm = make_lm()
    found = ft.token_losses(lm, ["the quick brown fox", "rows"])
    assert [row.example.source for row in found.rows] == ["text:1", "text:2"]
    assert found.rows[0].trained.tolist() == [False] + [True] * (len(found.rows[0].losses) - 1)
    with pytest.raises(ft.ConfigError, match=r"data\.valid"):
        ft.token_losses(lm, make_data(3))
    with pytest.raises(ft.ConfigError, match="int"):
        ft.token_losses(lm, 3)


def test_a_base_with_other_tokens_and_ids_beyond_the_vocabulary_are_refused(make_lm, make_data, make_tokenizer):
    lm, data = make_lm(), make_data(3)
    with pytest.raises(ft.ConfigError, match="one tokenizer"):
        ft.token_losses(lm, data.train, base=make_lm(vocab_size=20))
    with pytest.raises(ft.DataError, match="no row for"):
        ft.token_losses(make_lm(vocab_size=20), data.train)


def test_long_rows_give_the_same_alone_and_among_others(make_lm, make_data):
    lm, data = make_lm(), make_data(12)
    together = ft.token_losses(lm, data.train)
    for row, example in zip(together.rows, data.train, strict=True):
        np.testing.assert_allclose(ft.token_losses(lm, example).rows[0].losses, row.losses, atol=1e-5)


def test_of_the_last_tokens_alone_the_same_is_said(make_lm, make_data):
    lm = make_lm()
    rows = [example.tokens for example in make_data().train][:5] + [np.array([3], np.int32)]
    last = [1, 2, 5, len(rows[3]) - 1, len(rows[4]), 1]
    for size, some, whole in zip(last, token_statistics(lm.model, rows, 2, last), token_statistics(lm.model, rows, 2), strict=True):
        assert np.isnan(some.losses[: len(some.losses) - size]).all() and not some.ranks[: len(some.ranks) - size].any()
        assert np.allclose(some.losses[-size:], whole.losses[-size:], rtol=1e-6, atol=1e-6, equal_nan=True)
        assert (some.ranks[-size:] == whole.ranks[-size:]).all() and (some.top_ids[-size:] == whole.top_ids[-size:]).all()


def test_one_token_alone_has_no_loss_and_is_shown(make_lm):
    found = ft.token_losses(make_lm(), ft.Example(np.array([5], np.int32), np.array([False]), "x", "a:1", 0, {}))
    assert np.isnan(found.loss) and found.tokens == 0 and "nothing stands before it" in found._repr_html_()


def test_top_losses_sorts_a_split_and_pages_through_it(make_lm, make_data):
    lm, data = make_lm(), make_data(13)
    top = top_losses(lm, data.train, page_size=5)
    losses = [ft.token_losses(lm, example).loss for example in data.train]
    assert top.order.tolist() == sorted(range(13), key=lambda row: -losses[row])
    assert top.pages == 3 and [len(top.page(n)) for n in (1, 2, 3)] == [5, 5, 3]
    assert top.page(1).rows[0].example is data.train[int(np.argmax(losses))]
    largest = top_losses(lm, data.train, by="max").order[0]
    assert largest == np.argmax([np.nanmax(np.where(r.trained, r.losses, np.nan)) for r in ft.token_losses(lm, data.train).rows])
    for wrong in (lambda: top.page(4), lambda: top.page(0), lambda: top_losses(lm, data.train, by="median")):
        with pytest.raises(ft.ConfigError):
            wrong()


def test_batch_at_gives_the_rows_behind_a_report(make_trainer):
    trainer = make_trainer(rows=10, batch_size=2, grad_accumulation_steps=2)
    for _ in range(5):  # over the border of an epoch
        step = trainer.step_count + 1
        expected = ft.token_losses(trainer.lm, trainer.batch_at(step)).loss
        report = trainer.step()
        assert report.step == step and report.loss == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ft.ConfigError, match="step"):
        trainer.batch_at(0)


def test_batch_at_gives_the_rows_of_packed_batches_too(make_trainer):
    trainer = make_trainer(rows=12, packing=True, max_seq_length=64, batch_size=2)
    for _ in range(3):
        expected = ft.token_losses(trainer.lm, trainer.batch_at(trainer.step_count + 1)).loss
        assert trainer.step().loss == pytest.approx(expected, abs=1e-5)


def test_losses_of_bfloat16_weights_are_those_of_evaluate_too(make_trainer):
    trainer = make_trainer(weights="bfloat16")
    assert ft.token_losses(trainer.lm, trainer.data.valid).loss == pytest.approx(trainer.evaluate("valid").loss, abs=1e-5)


def test_asking_for_batches_changes_nothing_in_the_run(make_trainer):
    asked, quiet = make_trainer(), make_trainer()
    for _ in range(4):
        asked.batch_at(1), asked.batch_at(40)
        assert asked.step().loss == quiet.step().loss


def test_frames_hold_a_line_for_each_token(make_lm, make_data):
    lm, data = make_lm(), make_data(3)
    frame = ft.token_losses(lm, data.train, base=lm).to_frame()
    assert len(frame) == data.train.tokens and (frame["difference"].dropna() == 0).all()
    assert "".join(frame[frame["source"] == data.train[0].source]["token"]) == data.train[0].text
    assert top_losses(lm, data.train).to_frame()["mean"].is_monotonic_decreasing


def test_no_token_is_told_by_colour_alone(make_lm, make_data):
    lm, data = make_lm(), make_data(3)
    for found in (ft.token_losses(lm, data.train), ft.token_losses(lm, data.train, base=make_lm(rms_norm_eps=1.0))):
        styles = re.findall(r'<span style="([^"]+)" title', found._repr_html_())
        assert styles and all("border-" in style for style in styles if "background" in style)


def test_hostile_texts_are_only_text(make_lm):
    found = ft.token_losses(make_lm(), [HOSTILE, HOSTILE + "x"], base=make_lm())
    example = found.rows[0].example
    object.__setattr__(example, "source", HOSTILE)
    assert_harmless(found._repr_html_())
    assert_harmless(top_losses(make_lm(), [example] * 2)._repr_html_())
    found.plot().figure.canvas.draw()


def test_four_thousand_tokens_stay_in_a_box(make_tokenizer):
    random, tokenizer = np.random.default_rng(0), make_tokenizer()
    tokens = random.integers(10, 400, 4096).astype(np.int32)
    five = random.integers(10, 400, (4096, 5)).astype(np.int32), random.random((4096, 5), dtype=np.float32)
    statistics = TokenStatistics(random.exponential(1.0, 4096).astype(np.float32), np.ones(4096, np.int32), *five)
    example = ft.Example(tokens, np.arange(4096) > 100, "", "long:1", 0, {}, tokenizer)
    found = TokenLosses([ExampleLosses(example, statistics)], tokenizer, compared=False)
    html = found._repr_html_()
    found.plot().figure.canvas.draw()  # how long both take: nbs_tests/benchmarks/drawing_time.py
    assert html.count(", id ") == 4096 and "max-height" in html and html.count("<rect") == 120
    assert len(html) < 2_500_000


def test_what_is_not_shown_is_counted(make_lm, monkeypatch):
    monkeypatch.setattr("fulltune_nb.insight.losses.TOKENS_SHOWN", 5)
    html = ft.token_losses(make_lm(), ["the quick brown fox jumps over the lazy dog", "rows", "city"])._repr_html_()
    assert "tokens not shown" in html and "2 more examples not shown" in html


def test_a_broken_model_is_shown_for_what_it_is(make_lm, make_data):
    lm = make_lm()
    lm.model.norm.weight = lm.model.norm.weight * mx.array(float("nan"))
    found = ft.token_losses(lm, make_data(2).train)
    assert np.isnan(found.loss) and "nan" in found._repr_html_() and "nan" in repr(found)


def test_a_letter_of_several_tokens_is_shown_as_a_letter_with_the_sum_of_their_losses(make_lm):
    found = ft.token_losses(make_lm(), "a日")
    html = found._repr_html_()
    assert ">日</span>" in html and f"3 tokens, together {found.rows[0].losses[-3:].sum():.3f}" in html
