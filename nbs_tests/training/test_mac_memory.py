"""What the GPU of a Mac keeps wired and cached while a run goes on, and that it is put back however the run ends."""

import gc
import shutil

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.data import load_data
from fulltune_nb.errors import NonFiniteError
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.training import memory, plan
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.plan import preflight
from fulltune_nb.training.trainer import Trainer
from nbs_tests.gpu_like import mac_limits


class Watch:
    """A callback that keeps what the limits were at each step, and may raise."""

    def __init__(self, limits, error=None):
        self.limits, self.error, self.seen = limits, error, []

    def on_step(self, trainer, report):
        self.seen.append(dict(self.limits))
        if self.error:
            raise self.error


@pytest.fixture
def limits():
    with mac_limits() as found:
        yield found


def test_a_run_has_what_its_plan_says_and_gives_it_back(make_trainer, limits):
    trainer, before, watch = make_trainer(), dict(limits), Watch(limits)
    needs = preflight(trainer.lm, trainer.data, trainer.config)
    assert 0 < needs.cache == needs.peak - needs.parts["weights"] - needs.parts["optimizer state"]
    trainer.run(2, callbacks=[watch])
    assert watch.seen == [{"wired": needs.peak + needs.cache, "cache": needs.cache}] * 2 and limits == before
    trainer.step()
    assert limits == before


@pytest.mark.parametrize("error", [ValueError("of a callback"), KeyboardInterrupt()])
def test_limits_are_put_back_after_an_error_and_an_interrupt(make_trainer, limits, error):
    trainer, before, watch = make_trainer(), dict(limits), Watch(limits, error)
    try:
        trainer.run(callbacks=[watch])
    except ValueError:
        pass
    assert watch.seen and watch.seen[0] != before and limits == before


def test_limits_are_put_back_after_a_step_that_failed_and_a_pause(make_trainer, limits):
    trainer, before = make_trainer(), dict(limits)
    for _ in trainer.steps():
        assert limits != before
        break
    assert limits == before
    trainer.lm.model.norm.weight = trainer.lm.model.norm.weight * np.nan
    with pytest.raises(NonFiniteError):
        trainer.step()
    assert limits == before


def test_two_runs_at_once_need_both(make_trainer, limits):
    one, other, before = make_trainer(), make_trainer(), dict(limits)
    steps = one.steps()
    next(steps)
    alone = dict(limits)
    rest = other.steps()
    next(rest)
    assert limits == {name: 2 * size for name, size in alone.items()}
    steps.close()
    assert limits == alone
    rest.close()
    assert limits == before


@pytest.mark.parametrize(("room", "measured"), [(1.5, 0), (1.24, 1)])
def test_near_the_limit_a_step_is_measured_before_the_run_begins(make_lm, make_data, monkeypatch, limits, room, measured):
    config = TrainConfig(backward="whole", iters=3)
    data = make_data(config=config)
    straight = Trainer(make_lm(), data, config)
    straight.run()
    counted, calls, measure = preflight(make_lm(), data, config), [], plan.measured
    monkeypatch.setattr(memory, "machine_limit", lambda: int(room * counted.peak))
    monkeypatch.setattr(plan, "measured", lambda *args, **names: calls.append(args) or measure(*args, **names))
    trainer = Trainer(make_lm(), data, config)
    trainer.run()
    assert len(calls) == measured
    assert [step.loss for step in trainer.history.steps] == [step.loss for step in straight.history.steps]


@pytest.mark.skipif(shutil.which("g++") is None, reason="under this emulation MLX compiles for the CPU, with g++")
@pytest.mark.parametrize("way", [{}, {"grad_checkpoint": True}, {"backward": "layerwise"}], ids=["whole", "checkpoint", "layerwise"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_what_is_counted_is_within_a_tenth_of_what_is_measured(tokenizer, limits, weights, way):
    sizes = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4}
    lm = LanguageModel.from_config({"model_type": "llama", **sizes, "tie_word_embeddings": True}, tokenizer, seed=1)
    if weights == "bfloat16":
        lm.model.set_dtype(mx.bfloat16)
    config = TrainConfig(batch_size=2, weights=weights, max_seq_length=129, **way)
    data = load_data({"train": [{"text": "a " * 500}] * 4}, tokenizer, config=config)
    gc.collect()
    measured = preflight(lm, data, config, measure=True).peak
    assert preflight(lm, data, config).peak == pytest.approx(measured, rel=0.1)


def test_freed_arrays_are_kept_where_there_is_room_for_them(make_lm, make_data, monkeypatch, limits):
    config = TrainConfig(backward="whole")
    lm, data = make_lm(), make_data(config=config)
    needs = preflight(lm, data, config)
    monkeypatch.setattr(memory, "machine_limit", lambda: needs.peak + 1000)
    tight = preflight(lm, data, config)
    assert (tight.peak, tight.cache, tight.fits) == (needs.peak, 1000, True)
    monkeypatch.setattr(memory, "machine_limit", lambda: needs.peak - 1)
    assert preflight(lm, data, config).cache == 0
