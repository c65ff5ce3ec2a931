"""A loss of the user's own: the gradients of torch for DPO, the same with every engine, and a run that goes on with it."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import fulltune_nb as ft
from fulltune_nb.data.batches import Batch, StepBatches, collate
from fulltune_nb.errors import CheckpointError, ConfigError, TrainingError
from fulltune_nb.models.folder import load_decoder
from fulltune_nb.training.engine import make_engine
from fulltune_nb.training.objective import LossInput, Objective, StepSize
from nbs_tests.gpu_like import gpu_like
from nbs_tests.models.model_cases import SMALL
from nbs_tests.models.parity import need_torch, relative_error, write_folder
from nbs_tests.training.conftest import make_rows, random_batch

RAW, BETA, ROWS, LENGTH = {"model_type": "llama", **SMALL}, 0.3, 4, 12
REFERENCE = np.array([-9.0, -12.0, -30.0, -21.0], np.float32)


def dpo(batch: LossInput) -> mx.array:
    """Rows 2i are preferred to rows 2i + 1 (Rafailov et al. 2023)."""
    gain = batch.sum_by_row(batch.log_probs) - mx.array(REFERENCE)[mx.array(batch.rows)]
    return -nn.log_sigmoid(BETA * (gain[0::2] - gain[1::2])).sum() / (batch.step_rows / 2)


def plain(batch: LossInput) -> mx.array:
    return -batch.log_probs.sum() / batch.step_tokens


def batch_of(ids: np.ndarray, rows: tuple[int, ...]) -> Batch:
    """Answers of different lengths at the rows' ends; two positions of padding behind."""
    places = np.concatenate([i * LENGTH + np.arange(3 + row, LENGTH - 1) for i, row in enumerate(rows)]).astype(np.int32)
    targets, ones = ids.reshape(-1)[places + 1], np.ones(len(places), np.float32)
    padded = [np.pad(array, (0, 2)) for array in (places, targets, ones)]
    return Batch(ids, *padded, len(places), rows, tuple("abcd"[: len(rows)]), ids.size, ids.size)


def by_torch(model, ids: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    import torch

    from nbs_tests.models import torch_reference

    tensor = torch.from_numpy(ids).long()
    log_shares = model(tensor).logits[:, :-1].log_softmax(-1).gather(2, tensor[:, 1:, None])[..., 0]
    sums = torch.stack([log_shares[row, 3 + row :].sum() for row in range(ROWS)]) - torch.from_numpy(REFERENCE)
    loss = -torch.nn.functional.logsigmoid(BETA * (sums[0::2] - sums[1::2])).mean()
    loss.backward()
    return loss.item(), torch_reference.written_gradients(model)


def found_by(engine, batches) -> tuple[float, dict[str, np.ndarray]]:
    gradients = engine.gradients(1, batches)
    return gradients.loss, {name: np.array(array) for piece in gradients.pieces() for name, array in piece.gradients.items()}


@pytest.mark.parametrize("backward", ["whole", "with kernels", "layerwise", "layerwise with kernels"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_loss_and_gradients_of_dpo_are_torch_s(backward, micro_batches, tmp_path, request):
    need_torch()
    from fulltune_nb.models.families import to_hf
    from nbs_tests.models import torch_reference

    kernels = request.getfixturevalue("kernels") if "kernels" in backward else None
    model = torch_reference.build(RAW, 0)
    decoder = load_decoder(write_folder(tmp_path, RAW, torch_reference.checkpoint(model)))
    ids = np.random.default_rng(1).integers(0, SMALL["vocab_size"], (ROWS, LENGTH), dtype=np.int32)
    expected_loss, expected = by_torch(model, ids)
    batches = [batch_of(ids[i : i + ROWS // micro_batches], tuple(range(ROWS))[i : i + ROWS // micro_batches])
               for i in range(0, ROWS, ROWS // micro_batches)]  # fmt: skip
    for device in (nullcontext, gpu_like) if kernels is None else (nullcontext,):
        with device():
            way = "layerwise" if "layer" in backward else "whole"
            engine = make_engine(decoder, way, kernels=kernels, objective=Objective(loss=dpo))
            loss, gradients = found_by(engine, batches)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[to_hf(name, "llama")]) < 1e-4, (device, name)


@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_the_cross_entropy_written_as_a_loss_is_the_cross_entropy(make_lm, backward):
    model, batches = make_lm().model, [random_batch(512, 3, 20, 1), random_batch(512, 2, 13, 2)]
    expected = found_by(make_engine(model, backward), batches)
    found = found_by(make_engine(model, backward, compiled=True, objective=Objective(loss=plain)), batches)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert all(relative_error(found[1][name], array) < 1e-5 for name, array in expected[1].items())


def test_a_loss_sees_which_row_each_token_is_of_packed_or_not(make_data):
    split = make_data(6, mask_prompt=True).train
    mask, tokens = split.examples.loss_mask, split.examples.tokens
    for rows in ([0, 3, 5], [(0, 3), (5,), (1, 2, 4)]):
        batch = collate(split, rows)
        seen = LossInput(batch, StepSize.of([batch]), mx.ones(len(batch.targets)))
        counts = np.array(seen.sum_by_row(mx.array(batch.weights)))
        begins, ends = split.examples.begins[list(seen.rows)], split.examples.begins[list(seen.rows)] + split.lengths[list(seen.rows)]
        assert counts.tolist() == [mask[begin:end].sum() for begin, end in zip(begins, ends, strict=True)]
        ids = np.array(seen.sum_by_row(mx.array(batch.targets * batch.weights.astype(np.int32))))
        assert ids.tolist() == [(tokens[begin:end] * mask[begin:end]).sum() for begin, end in zip(begins, ends, strict=True)]


def trained(lm, data, **settings) -> ft.Trainer:
    config = ft.TrainConfig(batch_size=4, iters=6, rows_together=2, learning_rate=1e-3, save_every=3, val_batches=0, **settings)
    return ft.Trainer(lm, data, config, loss=preferred)


def preferred(batch: LossInput) -> mx.array:
    sums = batch.sum_by_row(batch.log_probs)
    return -nn.log_sigmoid(sums[0::2] - sums[1::2]).sum() / (batch.step_rows / 2)


def weights(trainer) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(trainer.lm.model.parameters())}


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_run_goes_on_to_the_same_bits_and_wants_its_loss_again(make_lm, make_data, tmp_path, memory):
    data = make_data(8)
    straight = trained(make_lm(), data, memory=memory)
    straight.run()
    losses = [report.loss for report in straight.history.steps]
    assert losses[-1] < losses[0] and any("losses of steps are those of preferred" in event.message for event in straight.history.events)
    begun = trained(make_lm(), data, memory=memory)
    begun.move_run(tmp_path / "run")
    begun.run(3)
    del begun
    with pytest.raises(CheckpointError, match="trained with loss=preferred, and here it is None.*pass the same"):
        ft.Trainer.resume(tmp_path / "run", data=data)
    again = ft.Trainer.resume(tmp_path / "run", data=data, loss=preferred)
    again.run()
    assert [report.loss for report in again.history.steps] == losses
    assert all(np.array_equal(array, weights(straight)[name]) for name, array in weights(again).items())
    fork = again.fork(iters=7)
    fork.run()
    assert fork.loss is preferred and fork.step_count == 7


@pytest.mark.parametrize("wrong", [lambda batch: 1.0, lambda batch: batch.log_probs, lambda batch: mx.array(1)])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_what_is_no_number_of_mlx_is_refused_and_the_trainer_is_as_before(make_lm, make_data, wrong, memory):
    trainer = ft.Trainer(make_lm(), make_data(4), ft.TrainConfig(iters=2, memory=memory), loss=wrong)
    before = weights(trainer)
    with pytest.raises(TrainingError, match="expected one mx.array number"):
        trainer.step()
    assert trainer.step_count == 0 and all(np.array_equal(array, before[name]) for name, array in weights(trainer).items())


def test_settings_that_go_against_a_loss_are_refused(make_lm, make_data):
    with pytest.raises(ConfigError, match="label_smoothing is of the cross-entropy"):
        ft.Trainer(make_lm(), make_data(4), ft.TrainConfig(label_smoothing=0.1), loss=plain)
    with pytest.raises(ConfigError, match="expected a function of a LossInput"):
        ft.Trainer(make_lm(), make_data(4), ft.TrainConfig(), loss="dpo")


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_that_belong_together_stand_in_one_batch_in_their_order(make_data, seed):
    batches = StepBatches(make_data(50).train, batch_size=8, seed=seed, rows_together=2)
    for epoch in (0, 1):
        rows = [row for step in batches.epoch(epoch) for batch in step for row in batch]
        assert sorted(rows) == list(range(50)) and rows != list(range(50))
        assert all(first % 2 == 0 and second == first + 1 for first, second in zip(rows[0::2], rows[1::2], strict=True))
    assert all(batch.inputs.shape[0] in (8, 2) for step in range(batches.steps_per_epoch) for batch in batches.of_step(step))


@pytest.mark.parametrize(("settings", "rows", "message"), [
    ({"batch_size": 3}, 4, "batch_size=3 is no multiple"), ({"packing": True}, 4, "packing puts rows together otherwise"),
    ({}, 5, "the split has 5 rows"), ({"bad_rows": "skip"}, 4, "with bad_rows='skip' rows move up"),
])  # fmt: skip
def test_rows_that_cannot_stay_together_are_refused(make_lm, tokenizer, settings, rows, message):
    config = ft.TrainConfig(rows_together=2, **settings)
    with pytest.raises(ConfigError, match=message):
        ft.Trainer(make_lm(), ft.load_data({"train": make_rows(rows)}, tokenizer, config=config), config)
