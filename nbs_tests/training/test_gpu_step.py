"""A step on a GPU: the host waits once, for loss and norm. The package believes in a GPU here; MLX computes on the CPU."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.insight.updates import UpdateMeter
from fulltune_nb.training.loss import chunk_elements, chunk_size
from nbs_tests.gpu_like import gpu_like
from nbs_tests.training.promises import assert_a_resumed_run_has_the_same_bits, assert_nan_changes_nothing, weights_of

OPTIMIZERS = ["adamw", "adam", "sgd", "lion", "muon", "adafactor", "adamw8bit"]


@pytest.fixture
def on_gpu(make_trainer):
    """`on_gpu(**settings)`: a trainer that computes as on a GPU, for as long as the test runs."""
    with gpu_like():
        yield make_trainer


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_host_waits_for_nothing_but_loss_and_norm(on_gpu, monkeypatch, optimizer, weights):
    trainer = on_gpu(optimizer=optimizer, weights=weights, grad_accumulation_steps=2, max_grad_norm=1.0)
    trainer.step()
    waits, sent, wait, send = [], [], mx.eval, mx.async_eval
    monkeypatch.setattr(mx, "eval", lambda *arrays: (waits.append(arrays), wait(*arrays)))
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (sent.append(arrays), send(*arrays)))
    trainer.step()
    assert not waits and sent


@pytest.mark.parametrize("clipping", [None, 1.0])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_layer_by_layer_the_host_waits_once_a_block_and_pass(on_gpu, monkeypatch, optimizer, weights, clipping):
    settings = {"optimizer": optimizer, "weights": weights, "max_grad_norm": clipping, "grad_accumulation_steps": 2}
    trainer, waits = on_gpu(backward="layerwise", **settings), []

    def counted(owner, name, waits_for):
        function = getattr(owner, name)

        def noted(*args, **more):
            waits.extend([name] * waits_for(*args))
            return function(*args, **more)

        monkeypatch.setattr(owner, name, noted)

    trainer.step()
    counted(mx, "eval", lambda *_: True)
    counted(mx.array, "item", lambda *_: True)
    counted(mx.array, "tolist", lambda *_: True)
    for name in ("array", "asarray"):
        counted(np, name, lambda x, *_: isinstance(x, mx.array))
    trainer.step()
    monkeypatch.undo()
    passes = 1 if clipping is None else 2
    pieces = len(trainer.lm.model.layers) + 3  # final norm, head and embedding stand outside the blocks
    assert 0 < len(waits) <= passes * pieces + 1  # once more for the loss


@pytest.mark.parametrize(
    "settings",
    [*({"optimizer": optimizer} for optimizer in OPTIMIZERS), {"max_grad_norm": 0.1, "grad_accumulation_steps": 2}, {"packing": True}],
    ids=str,
)
def test_in_float32_it_is_the_step_of_a_cpu(make_trainer, settings):
    settings = {"iters": 20, "learning_rate": 1e-4, **settings}
    expected = make_trainer(**settings)
    expected.run()
    with gpu_like():
        trainer = make_trainer(**settings)
        trainer.run()
    for ours, reference in zip(trainer.history.steps, expected.history.steps, strict=True):
        assert ours.loss == pytest.approx(reference.loss, rel=1e-6) and ours.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
    reference = weights_of(expected)
    for name, ours in weights_of(trainer).items():
        assert np.linalg.norm(ours - reference[name]) <= 1e-5 * np.linalg.norm(reference[name]), name


def test_without_a_window_and_packing_attention_needs_no_array(make_lm):
    decoder = make_lm().model
    segments = mx.array([[0, 0, 1]])
    with gpu_like():
        assert [mask for _, mask in decoder.context(3)] == ["causal"] * 2
        assert all(mask.shape == (1, 1, 3, 3) for _, mask in decoder.context(3, segments=segments))
    assert all(mask.shape == (3, 3) for _, mask in decoder.context(3))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("cuda", [False, True])
def test_rows_are_padded_to_what_the_device_computes_at_once(make_trainer, cuda, packing):
    with gpu_like(cuda=cuda):
        trainer = make_trainer(packing=packing, max_seq_length=100)
        plan = ft.preflight(trainer.lm, trainer.data, trainer.config)
    widths = {batch.inputs.shape[1] for step in range(4) for batch in trainer.batches.of_step(step)}
    assert widths and all(width % (128 if cuda else 32) == 0 for width in widths)
    assert f" of {max(widths):,} tokens" in plan.workload


def test_chunks_of_logits_are_few():
    with gpu_like():
        assert chunk_size(128_256) == 523
        sizes = [chunk_size(vocab, chunk_elements(vocab, hidden)) for vocab, hidden in ((128_256, 2048), (32_000, 4096), (49_152, 576))]
        assert sizes == [1046, 4096, 1365]  # positions; the second has as many as its head has columns
    assert chunk_size(128_256) == 32


def test_micro_batches_of_bfloat16_are_added_in_float32(on_gpu):
    trainer = on_gpu(weights="bfloat16", grad_accumulation_steps=2, rows=16)
    (piece,) = trainer.engine.gradients(1, trainer.batches.of_step(0)).pieces()
    assert {array.dtype for array in piece.gradients.values()} == {mx.float32}
    whole = trainer.engine.gradients(1, trainer.batches.of_step(0)[:1])
    (piece,) = whole.pieces()
    assert mx.bfloat16 in {array.dtype for array in piece.gradients.values()}  # one needs no sum


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_a_loss_that_is_no_number_leaves_everything_as_it_was(on_gpu, weights):
    assert_nan_changes_nothing(on_gpu(weights=weights))


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_run_taken_up_again_goes_on_to_the_same_bits(on_gpu, make_data, tmp_path, optimizer):
    assert_a_resumed_run_has_the_same_bits(on_gpu, make_data, tmp_path / "run", optimizer=optimizer, weights="bfloat16")


def test_updates_are_measured(on_gpu):
    trainer = on_gpu()
    stats = UpdateMeter(every=1)
    trainer.run(2, callbacks=[stats])
    assert stats.steps == [1, 2]


@pytest.mark.skipif(shutil.which("g++") is None, reason="under this emulation MLX compiles for the CPU, with g++")
@pytest.mark.parametrize("backward", ["whole", "layerwise"])
def test_every_run_is_compiled(on_gpu, monkeypatch, backward):
    compiled, compile_ = [], mx.compile
    monkeypatch.setattr(mx, "compile", lambda *args, **settings: (compiled.append(args), compile_(*args, **settings))[1])
    on_gpu(iters=2, backward=backward)
    assert compiled
    compiled.clear()
    on_gpu(iters=2, backward=backward, compile=False)
    assert not compiled
