"""What a model forgets is seen at every evaluation and checkpoint, against what it was at first."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.insight import Forgetting
from nbs_tests.insight.conftest import HOSTILE, assert_harmless

TEXT = "naive cities and trains have many people, and the answer is forty two. How are you today?"


def test_it_looks_at_the_start_at_evaluations_and_at_checkpoints_once_a_step(make_trainer, tmp_path):
    trainer = make_trainer(iters=6, steps_per_eval=2, save_every=3, run_dir=tmp_path / "run")
    watch = Forgetting(["the quick", "rows"], TEXT, max_tokens=4)
    trainer.run(callbacks=[watch])
    assert watch.steps == [0, 2, 3, 4, 6]
    assert len(watch.to_frame()) == 10 and all(len(s.answers) == 2 for s in watch.snapshots)


def test_attached_it_looks_at_once_and_whoever_takes_the_steps(make_trainer):
    trainer = make_trainer(steps_per_eval=2)
    watch = Forgetting(["the quick"], max_tokens=2).attach(trainer)
    assert watch.attach(trainer) is watch and watch.steps == [0]
    for _ in trainer.steps(3):
        pass
    assert watch.steps == [0, 2]
    watch.detach()
    watch.detach()
    trainer.run()
    assert watch.steps == [0, 2] and watch not in trainer.listeners


def test_perplexity_is_that_of_the_text_and_drift_that_of_the_weights(make_trainer):
    trainer = make_trainer()
    watch = Forgetting(text=TEXT, sample=None)
    start = {name: np.array(array) for name, array in tree_flatten(trainer.lm.model.parameters())}
    assert set(watch.look(trainer).drift.values()) == {0.0}
    for _ in range(3):
        trainer.step()
    found = watch.look(trainer)
    assert found.perplexity == pytest.approx(math.exp(ft.token_losses(trainer.lm, TEXT).loss), rel=1e-5)
    for name, array in tree_flatten(trainer.lm.model.parameters()):
        expected = np.linalg.norm(np.array(array) - start[name]) / np.linalg.norm(start[name])
        assert found.drift[name] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_a_sample_of_rows_stands_for_the_whole(make_trainer):
    trainer = make_trainer()
    watches = [Forgetting(sample=sample) for sample in (None, 500)]
    for watch in watches:
        watch.look(trainer)
    for _ in range(3):
        trainer.step()
    whole, sampled = (watch.look(trainer).drift["layers.0.mlp.up_proj.weight"] for watch in watches)
    assert sampled == pytest.approx(whole, rel=0.3) and sampled != whole


def test_a_long_text_is_read_in_pieces_that_cover_every_token_once(make_trainer, monkeypatch):
    trainer, read = make_trainer(), []
    monkeypatch.setattr("fulltune_nb.insight.forgetting.token_statistics", lambda model, rows, **settings: read.append(rows) or [])
    for count in (1, 2, 512, 513, 514, 1543):
        tokens = np.arange(count) % 301
        Forgetting(text=ft.Example(tokens, np.ones(count, bool), "", "a:1", 0, {})).look(trainer)
        assert np.concatenate([piece[1:] for piece in read[-1]]).tolist() == tokens[1:].tolist()
        assert max(len(piece) for piece in read[-1]) <= 513


def test_watching_does_not_change_the_run(make_trainer):
    watched, quiet = make_trainer(iters=4, steps_per_eval=1), make_trainer(iters=4, steps_per_eval=1)
    watched.run(callbacks=[Forgetting(["rows"], TEXT, max_tokens=3)])
    quiet.run()
    assert [r.loss for r in watched.history.steps] == [r.loss for r in quiet.history.steps]
    for (name, a), (_, b) in zip(tree_flatten(watched.lm.model.parameters()), tree_flatten(quiet.lm.model.parameters()), strict=True):
        assert mx.array_equal(a, b), name


def test_views_and_refusals(make_trainer):
    watch = Forgetting([HOSTILE], HOSTILE, max_tokens=3, chat=False)
    assert "nothing looked at" in watch._repr_html_()
    watch.plot().figure.canvas.draw()
    watch.plot_drift().figure.canvas.draw()
    trainer = make_trainer(iters=8, steps_per_eval=1)
    trainer.run(callbacks=[watch])
    html = watch._repr_html_()
    assert_harmless(html)
    assert "4 snapshots between are not shown" in html and "9 snapshots" in repr(watch)
    watch.plot().figure.canvas.draw()
    watch.plot_drift().figure.canvas.draw()
    for wrong in ({"prompts": "one"}, {"prompts": [3]}, {"max_tokens": 0}):
        with pytest.raises(ft.ConfigError):
            Forgetting(**wrong)
