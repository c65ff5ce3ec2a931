"""The update-survival meter against a direct count over all weights."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.insight import UpdateMeter
from fulltune_nb.insight.updates import TensorUpdate
from fulltune_nb.training.optimizers import Optimizers
from fulltune_nb.training.rules import Piece

OPTIMIZERS = {
    "adamw": {"weight_decay": 0.1}, "adam": {"weight_decay": 0.1}, "sgd": {"optimizer_config": {"momentum": 0.9, "nesterov": True}},
    "lion": {"weight_decay": 0.1}, "adafactor": {}, "muon": {},
}


class _Changes:
    """Collects every tensor's update before rounding; pieces are put together by their rows."""

    def __init__(self):
        self._pieces: dict[str, dict[int, np.ndarray]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def before(self, update: Piece) -> None:
        self._pieces.setdefault(update.name, {})[update.first_row] = np.array(update.change()[1], dtype=np.float64)
        self._shapes[update.name] = update.shape

    def after(self, name, first_row, new) -> None:
        pass

    @property
    def found(self) -> dict[str, np.ndarray]:
        return {
            name: np.concatenate([pieces[row] for row in sorted(pieces)]).reshape(self._shapes[name])
            for name, pieces in self._pieces.items()
        }


class _Count:
    """Counts changed weights directly, in numpy."""

    def __init__(self, model):
        self.model, self.old = model, self.copy(model)

    @staticmethod
    def copy(model):
        return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(model.parameters())}

    def share(self, changes: dict[str, np.ndarray]) -> float:
        new = self.copy(self.model)
        changed = sum(((new[n] != self.old[n]) & (change != 0)).sum() for n, change in changes.items())
        return changed / sum((change != 0).sum() for change in changes.values())


def gradients_for(model, seed=0):
    random = np.random.default_rng(seed)
    flat = [(n, mx.array(random.normal(size=a.shape, scale=0.01).astype(np.float32))) for n, a in tree_flatten(model.parameters())]
    from mlx.utils import tree_unflatten

    return tree_unflatten(flat)


def one_update(lm, rate, meter, optimizer="adamw", **settings):
    """A step of an optimizer outside a trainer; returns the direct count's share."""
    config = ft.TrainConfig(optimizer=optimizer, learning_rate=rate, **{"rounding": "nearest", **settings})
    optimizers, changes, count = Optimizers(lm.model, config), _Changes(), _Count(lm.model)
    optimizers.observers += [changes, meter]
    optimizers.update(lm.model, gradients_for(lm.model), rate)
    meter.collect(1)
    return count.share(changes.found), changes.found, count


def test_float32_keeps_nearly_every_update(make_lm):
    meter = UpdateMeter(sample=None)
    direct, _, _ = one_update(make_lm(), 1e-5, meter)
    assert meter.survival() == pytest.approx(direct, abs=1e-9) and direct > 0.99


def test_bfloat16_rounded_to_nearest_loses_most_updates_at_a_small_rate(make_lm):
    lm = make_lm()
    lm.model.set_dtype(mx.bfloat16)
    meter = UpdateMeter(sample=None)
    direct, _, _ = one_update(lm, 1e-6, meter)
    assert meter.survival() == pytest.approx(direct, abs=1e-9) and direct < 0.3
    larger = UpdateMeter(sample=None)
    lm.model.set_dtype(mx.bfloat16)
    one_update(lm, 1e-2, larger)
    assert larger.survival() > 0.9


def test_stochastic_rounding_reads_its_expected_share(make_lm):
    """The share expected is the mean of update over spacing."""
    lm = make_lm()
    lm.model.set_dtype(mx.bfloat16)
    config = ft.TrainConfig(optimizer="sgd", learning_rate=1.0, rounding="stochastic")
    optimizers, changes, meter = Optimizers(lm.model, config), _Changes(), UpdateMeter(sample=None)
    old = _Count(lm.model)
    optimizers.observers += [changes, meter]
    optimizers.update(lm.model, gradients_for(lm.model), 1e-3)
    meter.collect(1)
    expected = moving = 0.0
    for name, change in changes.found.items():
        exact = (old.old[name] + change).astype(np.float32)
        bits = exact.view(np.uint32)
        below, up = (bits & 0xFFFF0000).view(np.float32), (bits & 0xFFFF).astype(np.float64) / 65536
        above = ((bits & 0xFFFF0000) + 0x10000).view(np.float32)
        stays = (1 - up) * (below == old.old[name]) + up * (above == old.old[name])
        expected, moving = expected + ((1 - stays) * (change != 0)).sum(), moving + (change != 0).sum()
    assert meter.survival() == pytest.approx(old.share(changes.found), abs=1e-9)
    assert meter.survival() == pytest.approx(expected / moving, rel=0.05) and 0.01 < expected / moving < 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_update_before_rounding_is_the_one_made(make_lm, optimizer):
    lm = make_lm()
    _, changes, count = one_update(lm, 1e-2, UpdateMeter(), optimizer, **OPTIMIZERS[optimizer])
    new = count.copy(lm.model)
    for name, change in changes.items():
        made = new[name].astype(np.float64) - count.old[name]
        np.testing.assert_allclose(change, made, atol=2e-7 * max(1.0, np.abs(new[name]).max()), rtol=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_watching_changes_no_weight(make_trainer, optimizer):
    watched, quiet = (make_trainer(optimizer=optimizer, **OPTIMIZERS[optimizer]) for _ in range(2))
    UpdateMeter(every=1).attach(watched)
    for _ in range(3):
        assert watched.step().loss == quiet.step().loss
    for (name, a), (_, b) in zip(tree_flatten(watched.lm.model.parameters()), tree_flatten(quiet.lm.model.parameters()), strict=True):
        assert mx.array_equal(a, b), name


def test_a_sample_of_rows_stands_for_the_whole(make_lm):
    shares = []
    for sample in (None, 256):
        lm = make_lm(hidden_size=64, intermediate_size=256)
        lm.model.set_dtype(mx.bfloat16)
        meter = UpdateMeter(sample=sample)
        one_update(lm, 1e-4, meter)
        shares.append(meter.survival())
        looked_at = {record.name: record.looked_at for record in meter.records}
    assert shares[1] == pytest.approx(shares[0], abs=0.05)
    assert looked_at["layers.0.mlp.up_proj.weight"] < 400


def test_norms_and_ratio_are_those_of_numpy(make_lm):
    lm = make_lm()
    gradients = dict(tree_flatten(gradients_for(lm.model)))
    meter = UpdateMeter(sample=None)
    _, changes, count = one_update(lm, 1e-3, meter)
    for record in meter.records:
        assert record.weight_norm == pytest.approx(np.linalg.norm(count.old[record.name]), rel=1e-5)
        assert record.gradient_norm == pytest.approx(np.linalg.norm(np.array(gradients[record.name])), rel=1e-5)
        ratio = np.linalg.norm(changes[record.name]) / np.linalg.norm(count.old[record.name])
        assert record.update_ratio == pytest.approx(ratio, rel=1e-4)


def test_as_a_callback_it_measures_every_few_steps_and_lets_go(make_trainer):
    trainer, meter = make_trainer(iters=8), UpdateMeter(every=3)
    trainer.run(callbacks=[meter])
    assert meter.steps == [1, 4, 7] and meter.survival() > 0.99
    assert not trainer.optimizers.observers and not trainer.listeners
    assert {record.name for record in meter.records} == {name for name, _ in tree_flatten(trainer.lm.model.trainable_parameters())}
    assert not [event for event in trainer.history.events if event.kind == "rounding"]


def test_attached_it_stays_and_can_be_attached_twice(make_trainer):
    trainer = make_trainer()
    meter = UpdateMeter(every=1).attach(trainer).attach(trainer)
    trainer.step()
    trainer.run(1, callbacks=[meter])
    trainer.step()
    assert meter.steps == [1, 2, 3] and len(meter.records) == 3 * len(meter.records[:]) // 3
    assert len({(record.step, record.name) for record in meter.records}) == len(meter.records)
    meter.detach()
    trainer.step()
    assert meter.steps == [1, 2, 3]


def test_eaten_updates_are_an_event_that_names_the_remedy(make_trainer):
    trainer = make_trainer(learning_rate=1e-6, weights="bfloat16", rounding="nearest")
    meter = UpdateMeter(every=1).attach(trainer)
    for _ in range(3):
        trainer.step()
    (event,) = [event for event in trainer.history.events if "survive rounding" in event.message]
    assert 'rounding="stochastic"' in event.message and "bfloat16" in event.message and event.step == 1
    assert meter.survival() < 0.3


def test_views_show_every_block(make_trainer):
    trainer, meter = make_trainer(), UpdateMeter(every=1)
    assert "nothing measured" in meter._repr_html_() and "0 steps" in repr(meter)
    meter.plot().figure.canvas.draw()
    trainer.run(3, callbacks=[meter])
    html = meter._repr_html_()
    assert all(name in html for name in ("embed_tokens", "layers.0", "layers.1", "norm", "lm_head"))
    assert len(meter.to_frame()) == len(meter.records)
    for what in ("survival", "update_ratio", "gradient_norm", "weight_norm"):
        meter.plot(what=what).figure.canvas.draw()
    with pytest.raises(ft.ConfigError, match="survival"):
        meter.heat("colour")


def test_thirty_two_layers_and_many_steps_are_drawn_in_bounded_room():
    meter = UpdateMeter()
    names = [f"layers.{layer}.{part}" for layer in range(32) for part in "abcdefghi"]
    meter.records = [TensorUpdate(step, name, "bfloat16", 9, 9, 9, step % 9, 0.1, 0.1, 1.0) for step in range(1, 201) for name in names]
    html = meter._repr_html_()
    meter.plot().figure.canvas.draw()  # how long it takes: nbs_tests/benchmarks/drawing_time.py
    assert html.count("<rect") == 32 * 60 and len(html) < 500_000 and "140 earlier measurements" in html


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw8bit"])
def test_layer_by_layer_and_in_pieces_it_reads_the_same_as_over_the_whole_graph(make_trainer, monkeypatch, optimizer):
    monkeypatch.setattr("fulltune_nb.training.rules.piece_size", lambda: 700)
    found = {}
    for backward in ("whole", "layerwise"):
        trainer = make_trainer(optimizer=optimizer, backward=backward, weights="bfloat16", rounding="nearest", learning_rate=1e-4)
        meter = UpdateMeter(every=1, sample=None).attach(trainer)
        trainer.step()
        found[backward] = {record.name: record for record in meter.records}
        assert all(record.looked_at == record.size for record in meter.records)
    assert found["whole"].keys() == found["layerwise"].keys()
    for name, record in found["whole"].items():
        other = found["layerwise"][name]
        assert other.gradient_norm == pytest.approx(record.gradient_norm, rel=2e-2)
        assert other.weight_norm == pytest.approx(record.weight_norm, rel=1e-5)
        assert other.changed == pytest.approx(record.changed, abs=0.02 * record.size)


def test_of_many_measured_steps_only_the_latest_are_kept_where_that_is_asked_for(make_trainer):
    trainer, tensors = make_trainer(), None
    meter = UpdateMeter(every=1, keep=2).attach(trainer)
    for step in range(1, 9):
        trainer.step()
        tensors = tensors or len(meter.records)
        assert meter.steps[-1] == step and min(step, 2) <= len(meter.steps) <= 4 and len(meter.records) == tensors * len(meter.steps)
    with pytest.raises(ft.ConfigError, match="keep"):
        UpdateMeter(keep=0)


def test_the_latest_records_are_found_from_the_end():
    meter = UpdateMeter()
    meter.records = [TensorUpdate(step, name, "bfloat16", 9, 9, 9, 9, 0.1, 0.1, 1.0) for step in (1, 11, 21, 31) for name in "abc"]
    assert [record.step for record in meter.latest()] == [31] * 3
    assert meter.latest(2) == meter.records[6:] and meter.latest(9) == meter.records and UpdateMeter().latest() == []
