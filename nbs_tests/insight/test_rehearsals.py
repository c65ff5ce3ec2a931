"""Short runs that are taken back: all is as it was, and what they tell is true."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb import insight
from fulltune_nb.insight import rehearsals

SHAPE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def trainer(tokenizer, tmp_path):
    rows = [{"prompt": f"how many rows are in table {i}", "completion": f"the answer is {i * i}"} for i in range(8)]
    config = ft.TrainConfig(iters=6, batch_size=4, learning_rate=3e-3, warmup=2)
    lm = ft.LanguageModel.from_config(SHAPE, tokenizer, seed=1)
    return ft.Trainer(lm, ft.load_data({"train": rows, "valid": rows[:3]}, tokenizer, config=config), config, tmp_path / "run")


def state_of(trainer: ft.Trainer) -> dict[str, np.ndarray]:
    arrays = dict(tree_flatten(trainer.lm.model.parameters())) | trainer.optimizers.state_arrays()
    return {name: np.array(array) for name, array in arrays.items()} | {"random": np.array(mx.random.state[0])}


def assert_as_before(trainer: ft.Trainer, before: dict[str, np.ndarray], entries: int) -> None:
    after = state_of(trainer)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert len(trainer.history) == entries


def test_a_dev_run_tries_every_part_and_leaves_nothing_behind(trainer, tmp_path):
    trainer.step()
    before, entries, files = state_of(trainer), len(trainer.history), sorted(tmp_path.rglob("*"))
    tried = insight.fast_dev_run(trainer)
    assert_as_before(trainer, before, entries)
    assert sorted(tmp_path.rglob("*")) == files
    following = [report.loss for report in trainer.steps(1)]
    assert len(tried.losses) == 2 and tried.losses[0] == following[0]
    assert tried.evaluations.keys() == {"train", "valid"} and tried.checkpoint_bytes > sum(array.nbytes for array in before.values()) / 2
    assert "1 step" not in repr(tried) and "checkpoint" in tried._repr_html_()


def test_what_would_fail_later_fails_in_the_dev_run(trainer, monkeypatch):
    monkeypatch.setattr(rehearsals, "read_checkpoint", lambda path, lm: type("Read", (), {"weights": {}}))
    with pytest.raises(ft.FulltuneError, match="is not what it was"):
        insight.fast_dev_run(trainer, steps=1)


def test_one_batch_is_learned_by_heart_and_forgotten_again(trainer):
    before, entries = state_of(trainer), len(trainer.history)
    found = insight.overfit_batch(trainer, steps=80, learning_rate=1e-2)
    assert_as_before(trainer, before, entries)
    assert found.learned and len(found.losses) == 80 and found.rows == 4
    assert "by heart" in found._repr_html_() and "learned=True" in repr(found)


def test_the_same_rows_come_in_every_step(trainer):
    """With a rate of nearly nothing the loss stays what it was."""
    found = insight.overfit_batch(trainer, steps=3, learning_rate=1e-12)
    np.testing.assert_allclose(found.losses, found.losses[0], rtol=1e-5)
    assert not found.learned and "does not learn" in found.verdict
    with trainer.rehearsal() as step:
        others = [step(1e-12) for _ in range(3)]
    assert others[0] == found.losses[0] and abs(others[1] - others[0]) > 1e-4


def test_a_loss_that_runs_away_is_told(trainer):
    found = insight.overfit_batch(trainer, steps=30, learning_rate=1e30)
    assert found.diverged and not found.learned and "not finite" in found.verdict


@pytest.mark.parametrize("settings", [{"steps": 1}, {"learning_rate": 0.0}, {"learning_rate": True}, {"learning_rate": float("nan")}])
def test_numbers_out_of_range_are_refused(trainer, settings):
    with pytest.raises(ft.ConfigError):
        insight.overfit_batch(trainer, **settings)
