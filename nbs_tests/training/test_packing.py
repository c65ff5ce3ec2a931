"""Packed rows: the loss and the gradients of the same examples unpacked; no example sees another; runs end, resume and fit."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.data import Example, Split, StepBatches, collate
from fulltune_nb.data.batches import padded_to
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.device import length_multiple
from fulltune_nb.errors import ConfigError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.layers import causal_mask, within_segments
from fulltune_nb.models.model_config import read_config
from fulltune_nb.training import memory
from fulltune_nb.training.engine import WholeGraph
from fulltune_nb.training.layerwise import Layerwise
from fulltune_nb.training.plan import preflight
from nbs_tests.memory_held import memory_held
from nbs_tests.models.model_cases import CASES, FAMILIES, SMALL
from nbs_tests.training.conftest import loss_and_gradients, make_rows

SEGMENTS = [5, 9, 3]
"""Input positions of the examples of one row; two of padding follow."""


def random_split(vocab, lengths, seed=0):
    random = np.random.RandomState(seed)
    examples = []
    for i, length in enumerate(lengths, 1):
        mask = random.rand(length) < 0.6
        mask[0], mask[-1] = False, True
        examples.append(Example(random.randint(0, vocab, length).astype(np.int32), mask, "", f"train.jsonl:{i}", 0, {}))
    return Split("train", "text", examples)


def random_decoder(raw, seed=0):
    """Matrices one and a half times the usual, so that what a token sees matters more."""
    mx.random.seed(seed)
    decoder = Decoder(read_config(raw))
    decoder.update(_scaled(decoder.parameters()))
    return decoder


def _scaled(tree):
    if isinstance(tree, dict):
        return {name: _scaled(part) for name, part in tree.items()}
    if isinstance(tree, list):
        return [_scaled(part) for part in tree]
    return tree * 1.5 if tree.ndim > 1 else tree


def assert_same(found, reference) -> None:
    """Loss and gradients of two steps are the same to 1e-5, but for gradients that are zero."""
    (loss, gradients), (expected_loss, expected) = found, reference
    assert loss == pytest.approx(expected_loss, rel=1e-5) and gradients.keys() == expected.keys()
    for name, array in expected.items():
        assert mx.linalg.norm(array) < 1e-6 or distance(gradients[name], array) < 1e-5, name


def packed_batches(split, batch_size, capacity):
    batches = StepBatches(split, batch_size=batch_size, seed=0, packing=True, max_seq_length=capacity)
    return [batch for step in range(batches.steps_per_epoch) for batch in batches.of_step(step)]


def distance(found, expected):
    return float(mx.linalg.norm(found - expected) / mx.maximum(mx.linalg.norm(expected), 1e-30))


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("case", CASES)
def test_packed_loss_and_gradients_equal_those_of_each_example_alone(case, checkpoint):
    raw = CASES[case]
    decoder = random_decoder(raw)
    split = random_split(raw["vocab_size"], [12, 7, 20, 3, 2, 16, 9, 5, 11])
    packed = packed_batches(split, 2, 32)
    assert max(batch.segments.max() for batch in packed) >= 2 and len(packed) > 1
    alone = [collate(split, (index,)) for index in range(len(split))]
    assert_same(loss_and_gradients(WholeGraph(decoder, checkpoint), *packed), loss_and_gradients(WholeGraph(decoder), *alone))


@pytest.mark.parametrize("case", CASES)
def test_the_layerwise_backward_pass_keeps_packed_examples_apart_too(case):
    raw = CASES[case]
    decoder = random_decoder(raw)
    split = random_split(raw["vocab_size"], [12, 7, 20, 3, 2, 16, 9])
    packed = packed_batches(split, 2, 32)
    alone = [collate(split, (index,)) for index in range(len(split))]
    expected_loss, expected = loss_and_gradients(WholeGraph(decoder), *alone)
    expected = {name: np.array(array) for name, array in expected.items()}
    backward = Layerwise(decoder).gradients(1, packed)
    assert backward.loss == pytest.approx(expected_loss, rel=1e-5)
    seen = set()
    for piece in backward.pieces():
        for name, gradient in piece.gradients.items():
            reference = expected[name] if piece.rows is None else expected[name][piece.rows]
            seen.add(name)
            norm = max(np.linalg.norm(expected[name]), 1e-6)
            assert np.linalg.norm(np.array(gradient) - reference) < 1e-5 * norm, name
    assert seen == set(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_large_arrays_too(family):
    # These take the CPU's own forms of softmax and products; windows shorter and longer than the examples.
    window = {"sliding_window": 50, "use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 2}
    raw = {"model_type": family, **SMALL, **window, "hidden_size": 32, "tie_word_embeddings": False}
    decoder = random_decoder(raw)
    split = random_split(raw["vocab_size"], [90, 70, 33, 20, 120, 64, 31, 12, 2])
    packed = packed_batches(split, 4, 160)
    alone = [collate(split, (index,)) for index in range(len(split))]
    assert_same(loss_and_gradients(WholeGraph(decoder), *packed), loss_and_gradients(WholeGraph(decoder), *alone))


@pytest.mark.parametrize("case", CASES)
def test_an_example_cannot_be_told_from_what_its_neighbours_say(case):
    raw = CASES[case]
    decoder = random_decoder(raw)
    segments = np.concatenate([np.repeat(np.arange(len(SEGMENTS)), SEGMENTS), [-1, -1]])
    before = np.random.RandomState(0).randint(0, raw["vocab_size"], (1, len(segments)))
    for changed in range(len(SEGMENTS)):
        other = np.where(segments == changed, (before + 1) % raw["vocab_size"], before)
        states = [np.array(decoder.hidden_states(mx.array(ids), segments=mx.array(segments[None]))) for ids in (before, other)]
        difference = np.abs(states[0] - states[1])[0].max(axis=-1)
        assert difference[segments != changed].max() < 1e-6
        assert difference[segments == changed].min() > 1e-3
        assert np.isfinite(states[0]).all()  # padding too: a NaN there would spoil the gradients


def test_without_segments_neighbours_are_seen():
    decoder = random_decoder(CASES["llama_linear_tied"])
    ids = np.zeros((1, 10), dtype=np.int32)
    other = ids.copy()
    other[0, 2] = 1
    states = [np.array(decoder.hidden_states(mx.array(each))) for each in (ids, other)]
    assert np.abs(states[0] - states[1])[0, 5:].max() > 1e-3


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_the_mask_is_causal_within_segments_and_windows_by_brute_force(window):
    segments = np.array([[0, 0, 0, 0, 1, 1, 2, 2, -1, -1], [0] * 10])
    found = np.array(within_segments(causal_mask(10, window=window), mx.array(segments)))
    assert found.shape == (2, 1, 10, 10)
    for b in range(2):
        for query in range(10):
            for key in range(10):
                near = key <= query and (window is None or query - key < window)
                assert found[b, 0, query, key] == (near and segments[b, query] == segments[b, key])


# ---------------------------------------------------------------- whole runs


def packed_trainer(make_trainer, **settings):
    return make_trainer(rows=30, packing=True, batch_size=1, max_seq_length=96, **settings)


def test_a_packed_epoch_trains_on_every_example_once_and_ends_there(make_trainer):
    trainer = packed_trainer(make_trainer, epochs=2, iters=None)
    assert trainer.total_steps == 2 * trainer.steps_per_epoch < 30
    seen = []
    while not trainer.done:
        seen += [row for batch in trainer.batches.of_step(trainer.step_count) for row in batch.rows]
        trainer.step()
    assert sorted(seen) == sorted(2 * list(range(30)))
    assert trainer.history.steps[-1].epoch == 2.0
    assert sum(report.tokens for report in trainer.history.steps) == 2 * trainer.data.train.trained_tokens


def test_a_step_over_all_rows_is_the_same_packed_and_not(make_trainer):
    one = make_trainer(rows=12, batch_size=12, max_seq_length=96).step()
    other = make_trainer(rows=12, batch_size=12, max_seq_length=96, packing=True).step()
    assert one.tokens == other.tokens
    assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)


def test_a_resumed_packed_run_equals_the_uninterrupted_one(make_trainer, make_data, tmp_path):
    straight = packed_trainer(make_trainer, iters=9)
    straight.run()
    stopped = packed_trainer(make_trainer, iters=9, run_dir=tmp_path / "run")
    stopped.run(5)
    stopped.save()
    resumed = ft.Trainer.resume(tmp_path / "run", data=make_data(30, config=stopped.config))
    assert resumed.config.packing and resumed.step_count == 5
    resumed.run()
    assert [r.loss for r in resumed.history.steps] == [r.loss for r in straight.history.steps]
    for (name, found), (_, expected) in zip(
        tree_flatten(resumed.lm.model.parameters()), tree_flatten(straight.lm.model.parameters()), strict=True
    ):
        assert mx.array_equal(found, expected), name


def test_evaluation_is_not_packed(make_trainer):
    packed, plain = packed_trainer(make_trainer), make_trainer(rows=30, max_seq_length=96)
    assert packed.evaluate("test").loss == pytest.approx(plain.evaluate("test").loss, rel=1e-6)


def test_cut_and_untrainable_rows_count_as_they_do_unpacked(make_lm, tokenizer):
    rows = [*make_rows(20), {"prompt": "the " * 60, "completion": "end"}]  # cut before its answer begins
    config = ft.TrainConfig(batch_size=1, epochs=1, packing=True, mask_prompt=True, max_seq_length=48)
    data = ft.load_data({"train": rows}, tokenizer, config=config)
    assert len(data.train.untrainable) == 1 and data.train.truncated >= 1
    trainer = ft.Trainer(make_lm(), data, config)
    seen = [row for step in range(trainer.total_steps) for batch in trainer.batches.of_step(step) for row in batch.rows]
    assert sorted(seen) == data.train.trainable.tolist()


def test_a_packed_run_says_what_its_numbers_count(make_trainer):
    trainer = packed_trainer(make_trainer)
    steps = trainer.steps_per_epoch
    (event,) = trainer.history.events
    expected = f"30 rows are packed into {steps} of at most 96 tokens; batch_size=1 counts these, and an epoch is {steps} steps"
    assert event.kind == "packing" and event.message == expected
    assert not make_trainer().history.events


def test_packing_is_a_flag():
    with pytest.raises(ConfigError, match="packing"):
        ft.TrainConfig(packing="false")
    assert ft.TrainConfig().packing is False


# ---------------------------------------------------------------- preflight


def test_preflight_counts_the_widest_packed_row(monkeypatch):
    monkeypatch.setattr(memory, "machine_limit", lambda: 10**12)
    config = read_config({"model_type": "llama", **SMALL})
    lm = SimpleNamespace(model=Decoder(config), config=config, dtype="float32", tokenizer=None)
    split = random_split(config.vocab_size, [40, 30, 30, 20, 10, 10])
    data = SimpleNamespace(train=split, splits={"train": split}, settings=DataSettings())

    def width(tokens):
        return padded_to(tokens, length_multiple())

    # 40 + 20, 30 + 30, 10 + 10: widths 58, 58 and 18
    words = preflight(lm, data, ft.TrainConfig(packing=True, batch_size=8, max_seq_length=60)).workload
    assert words.startswith(f"3 packed rows of {width(58)} tokens in a micro-batch")
    words = preflight(lm, data, ft.TrainConfig(packing=True, batch_size=1, max_seq_length=200)).workload
    assert words.startswith(f"1 packed row of {width(134)} tokens")
    # Shorter rows, which advice may try, cut the examples: 25 + 10, 25 + 10, 25 + ..., never more than 35 tokens.
    words = preflight(lm, data, ft.TrainConfig(packing=True, batch_size=1, max_seq_length=35)).workload
    assert words.startswith(f"1 packed row of {width(34)} tokens")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_prediction_for_packed_rows_is_near_the_measured_peak(tokenizer, batch_size):
    model = {"model_type": "llama", "vocab_size": 1024, "num_attention_heads": 4, "tie_word_embeddings": True}
    lm = ft.LanguageModel.from_config(model | dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4), tokenizer, seed=1)
    rows = [{"text": "a " * n} for n in [20, 35, 50, 60, 75, 90, 100] * 6]
    config = ft.TrainConfig(batch_size=batch_size, iters=3, packing=True, max_seq_length=256)
    data = ft.load_data({"train": rows}, tokenizer, config=config)
    outside = memory_held() - sum(array.nbytes for _, array in tree_flatten(lm.model.parameters()))
    plan = ft.preflight(lm, data, config)
    measured = max(report.peak_memory for report in ft.Trainer(lm, data, config).steps()) - outside
    assert plan.peak == pytest.approx(measured, rel=0.15)
