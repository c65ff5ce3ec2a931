"""The range test leaves everything as it was, and suggests what its curve says."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.insight import LearningRateSearch, UpdateMeter


def everything(trainer):
    weights = dict(tree_flatten(trainer.lm.model.parameters()))
    arrays = {**weights, **{f"state {name}": array for name, array in trainer.optimizers.state_arrays().items()}}
    arrays["key"] = mx.random.state[0]
    return {name: np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes() for name, array in arrays.items()}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "adafactor", "muon"])
def test_everything_is_bit_for_bit_as_before_at_the_start_and_on_the_way(make_trainer, optimizer):
    trainer, quiet = make_trainer(optimizer=optimizer), make_trainer(optimizer=optimizer)
    for _ in range(2):
        before, history = everything(trainer), list(trainer.history)
        ft.find_lr(trainer, steps=12, lowest=1e-5, highest=1e-1)
        assert everything(trainer) == before and list(trainer.history) == history
        for _ in range(2):
            assert trainer.step().loss == quiet.step().loss
    assert trainer.step_count == quiet.step_count


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor"])
def test_layer_by_layer_in_bfloat16_too(make_trainer, optimizer):
    lean = {"backward": "layerwise", "weights": "bfloat16", "optimizer": optimizer, "max_grad_norm": 1.0}
    trainer, quiet = make_trainer(**lean), make_trainer(**lean)
    trainer.step(), quiet.step()
    before = everything(trainer)
    ft.find_lr(trainer, steps=10)
    assert everything(trainer) == before and trainer.step().loss == quiet.step().loss


def test_bfloat16_weights_come_back_too(make_trainer):
    trainer = make_trainer(weights="bfloat16", rounding="nearest")
    before = everything(trainer)
    found = ft.find_lr(trainer, steps=30, lowest=1e-7, highest=1e-1)
    assert everything(trainer) == before
    assert found.survival[0] < 0.3 and found.survival[-1] > 0.6 and found.dtype == "bfloat16"  # weight decay alone is lost
    assert 1e-6 < found.survives_from < 1e-1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_on_the_way_leaves_everything_as_before(make_trainer, monkeypatch, error):
    trainer = make_trainer()
    trainer.step()
    before, calls = everything(trainer), []
    real = trainer.optimizers.update_tensors

    def update(*arguments, **settings):
        real(*arguments, **settings)
        calls.append(1)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(trainer.optimizers, "update_tensors", update)
    with pytest.raises(error):
        ft.find_lr(trainer, steps=12)
    assert everything(trainer) == before


def test_a_meter_that_watches_the_trainer_sees_nothing_of_it(make_trainer):
    trainer = make_trainer()
    meter = UpdateMeter(every=1).attach(trainer)
    ft.find_lr(trainer, steps=10)
    trainer.step()
    assert meter.steps == [1] and trainer.optimizers.observers == [meter]


def test_it_stops_when_the_loss_runs_away(make_trainer):
    found = ft.find_lr(make_trainer(optimizer="sgd"), steps=60, lowest=1e-2, highest=1e6)
    assert len(found.rates) < 60
    assert found.suggestion is None or found.suggestion < found.rates[-1] / 5


def curve(losses, survivals=None, dtype="float32", stochastic=False):
    rates = np.geomspace(1e-6, 1e-1, len(losses))
    return LearningRateSearch(rates, losses, [np.nan] * len(losses) if survivals is None else survivals, dtype, stochastic)


def test_the_suggestion_is_a_seventh_of_the_rate_with_the_lowest_loss():
    at = np.linspace(0, 1, 101)
    found = curve(2 + (at - 0.6) ** 2)
    assert found.lowest_loss_rate == pytest.approx(1e-3, rel=0.2) and found.suggestion == pytest.approx(found.lowest_loss_rate / 7)
    assert not found.notes


@pytest.mark.parametrize(
    ("schedule", "below"),
    [(None, 7.0), ("linear", 3.5), ("cosine", 3.5), ({"name": "cosine_decay", "arguments": [1e-3, 100, 1e-4]}, 3.85)],
)
def test_a_schedule_that_decays_may_begin_higher(make_trainer, schedule, below):
    trainer = make_trainer(iters=100, lr_schedule=schedule, warmup=10 if isinstance(schedule, str) else 0)
    found = ft.find_lr(trainer, steps=60)
    assert found.below == pytest.approx(below, rel=0.03)
    assert found.suggestion == pytest.approx(found.lowest_loss_rate / found.below)
    assert ("lets the rate decay" in found._repr_html_()) == (schedule is not None)


def test_curves_without_a_minimum_say_so():
    assert curve(np.linspace(1, 2, 50)).suggestion is None and "never fell" in curve(np.linspace(1, 2, 50)).notes[0]
    assert "highest=" in curve(np.linspace(2, 1, 50)).notes[0]
    assert curve([np.inf]).suggestion is None


def test_a_fall_no_larger_than_batches_differ_suggests_nothing_and_says_from_where_the_loss_rises():
    at, noise = np.linspace(0, 1, 101), np.random.default_rng(0).normal(0, 0.2, 101)
    rise = np.maximum(at - 0.7, 0) * 20
    trained, learning = curve(3 + noise + rise), curve(3 + noise + rise - np.clip(at, 0.2, 0.7) * 4)
    assert trained.suggestion is None and trained.rises_from == pytest.approx(10 ** (-6 + 5 * 0.75), rel=1)
    assert "no more than batches differ" in trained.notes[0] and f"from {trained.rises_from:.2g} on" in trained.notes[0]
    assert any("loss rises" in text.get_text() for text in trained.plot().texts)
    assert learning.suggestion is not None and not learning.notes
    flat = curve(3 + noise)
    assert flat.suggestion is None and flat.rises_from is None and "any rate tried: try higher ones" in flat.notes[0]


def test_a_suggestion_where_rounding_eats_the_updates_names_the_remedy():
    at = np.linspace(0, 1, 101)
    losses = 2 + (at - 0.6) ** 2
    found = curve(losses, at > 0.55, "bfloat16")
    assert found.survives_from == pytest.approx(6e-4, rel=0.2) and 'rounding="stochastic"' in found.notes[0]
    assert not curve(losses, at > 0.55, "bfloat16", stochastic=True).notes
    assert not curve(losses, at > 0.2, "bfloat16").notes
    assert "every rate" in curve(losses, at > 2, "bfloat16").notes[0].lower()


def test_wrong_numbers_are_refused(make_trainer):
    trainer = make_trainer()
    for wrong in ({"steps": 3}, {"lowest": 0.0}, {"lowest": 1.0, "highest": 0.1}):
        with pytest.raises(ft.ConfigError):
            ft.find_lr(trainer, **wrong)


def test_plots_and_frames(make_trainer):
    found = ft.find_lr(make_trainer(), steps=20)
    assert len(found.to_frame()) == len(found.rates) and "suggestion" in found._repr_html_() and "suggestion" in repr(found)
    assert 'src="data:image/png' in found._repr_html_()
    found.plot().figure.canvas.draw()
