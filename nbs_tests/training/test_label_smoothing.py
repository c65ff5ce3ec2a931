"""Smoothed targets: torch's loss and gradients, whichever way the loss is computed."""

from __future__ import annotations

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.model_config import read_config
from fulltune_nb.training import loss as loss_module
from fulltune_nb.training import vocabulary
from fulltune_nb.training.engine import make_engine
from fulltune_nb.training.loss import cross_entropy, losses_by_kernel
from fulltune_nb.training.objective import Objective
from fulltune_nb.training.vocabulary import HeadInput
from nbs_tests.gpu_like import gpu_like
from nbs_tests.models.parity import need_torch, relative_error
from nbs_tests.training.conftest import TINY_LLAMA, random_batch

NUM_POSITIONS, REAL, HIDDEN, VOCAB, SMOOTHING = 70, 60, 16, 97, 0.15
Found = tuple[float, np.ndarray, dict[str, np.ndarray]]
"""The loss, and its gradients: of the hidden states and of the head's arrays."""


@pytest.fixture(params=[None, 5.0], ids=["", "capped"])
def cap(request):
    return request.param


@pytest.fixture
def problem():
    random = np.random.RandomState(0)
    head = {"weight": random.randn(VOCAB, HIDDEN).astype(np.float32), "bias": random.randn(VOCAB).astype(np.float32)}
    weights = ((np.arange(NUM_POSITIONS) < REAL) / REAL).astype(np.float32)  # the last ten are padding
    targets = random.randint(0, VOCAB, NUM_POSITIONS).astype(np.int32)
    return random.randn(NUM_POSITIONS, HIDDEN).astype(np.float32), head, targets, weights


def by_torch(hidden, head, targets, _weights, cap) -> Found:
    need_torch()
    import torch

    hidden = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    head = {name: torch.tensor(array, dtype=torch.float64, requires_grad=True) for name, array in head.items()}
    logits = hidden @ head["weight"].T + head["bias"]
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING)(logits[:REAL], torch.from_numpy(targets[:REAL]).long())
    loss.backward()
    return loss.item(), hidden.grad.numpy(), {name: array.grad.numpy() for name, array in head.items()}


def by_graph(hidden, head, targets, weights, cap) -> Found:
    arrays = mx.array(hidden), {name: mx.array(array) for name, array in head.items()}
    rest = mx.array(targets), mx.array(weights), cap, SMOOTHING
    loss, (to_hidden, to_head) = mx.value_and_grad(lambda hidden, head: cross_entropy(hidden, head, *rest), argnums=(0, 1))(*arrays)
    return loss.item(), np.array(to_hidden), {name: np.array(array) for name, array in to_head.items()}


def by_ranges(hidden, head, targets, weights, cap, kernels=None) -> Found:
    head = {name: mx.array(array) for name, array in head.items()}
    one = HeadInput(mx.array(hidden), targets, mx.array(weights), cap, SMOOTHING)
    (loss,), (to_hidden,) = vocabulary.head_loss(head, [one], kernels)
    ranges = vocabulary.ranges(VOCAB, HIDDEN)
    to_head = {name: np.concatenate([np.array(vocabulary.head_gradient(head, [one], rows, name)) for rows in ranges]) for name in head}
    return float(loss), np.array(to_hidden), to_head


def by_kernel(kernels, hidden, head, targets, weights, cap) -> Found:
    arrays, hidden = {name: mx.array(array) for name, array in head.items()}, mx.array(hidden)
    chunks = losses_by_kernel(kernels, hidden, arrays, targets, weights, None, cap, SMOOTHING)
    found = [(loss, np.array(gradient)) for _, loss, gradient in chunks]
    gradient = np.concatenate([part for _, part in found])
    to_head = {"weight": gradient.T @ np.array(hidden), "bias": gradient.sum(axis=0)}
    return sum(loss for loss, _ in found), gradient @ head["weight"], to_head


def assert_same(found: Found, expected: Found) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert relative_error(found[1], expected[1]) < 1e-5
    for name, array in expected[2].items():
        assert relative_error(found[2][name], array) < 1e-5, name


@pytest.mark.parametrize("device", [nullcontext, gpu_like], ids=["on a CPU", "on a GPU"])
@pytest.mark.parametrize("rows", [32, 10_000], ids=["chunks", "one chunk"])
def test_over_the_whole_graph_loss_and_gradients_are_torch_s(problem, cap, rows, device, monkeypatch):
    for name in ("CHUNK_ELEMENTS", "GPU_CHUNK_ELEMENTS"):
        monkeypatch.setattr(loss_module, name, rows * VOCAB)
    with device():
        assert_same(by_graph(*problem, cap), by_torch(*problem, cap))


@pytest.mark.parametrize("kept", [0, 2**24], ids=["nothing kept", "logits kept"])
@pytest.mark.parametrize("size", [30, 10_000], ids=["ranges", "one range"])
def test_by_ranges_of_the_vocabulary_they_are_too(problem, cap, size, kept, monkeypatch):
    monkeypatch.setattr(vocabulary, "KEPT_ELEMENTS", kept)
    for name in ("RANGE_ELEMENTS", "GPU_RANGE_ELEMENTS"):
        monkeypatch.setattr(vocabulary, name, size * HIDDEN)
    assert_same(by_ranges(*problem, cap), by_torch(*problem, cap))


def test_with_the_kernel_they_are_too(problem, cap, kernels):
    assert_same(by_kernel(kernels, *problem, cap), by_torch(*problem, cap))
    assert_same(by_ranges(*problem, cap, kernels), by_torch(*problem, cap))


@pytest.mark.parametrize("tied", [True, False])
def test_both_engines_compute_the_same_step(tied):
    model = Decoder(read_config({**TINY_LLAMA, "tie_word_embeddings": tied}))
    batches, objective, found = [random_batch(512, 3, 20, 1), random_batch(512, 2, 13, 2)], Objective(SMOOTHING), []
    for backward, compiled in (("whole", False), ("whole", True), ("layerwise", False)):
        gradients = make_engine(model, backward, compiled=compiled, objective=objective).gradients(1, batches)
        arrays = {name: np.array(array) for piece in gradients.pieces() for name, array in piece.gradients.items()}
        found.append((gradients.loss, np.zeros(1), arrays))
    for other in found[1:]:
        assert other[0] == pytest.approx(found[0][0], rel=1e-6)
        assert all(relative_error(other[2][name], array) < 1e-5 for name, array in found[0][2].items())


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_run_says_that_its_losses_are_of_smoothed_targets_and_evaluates_the_plain_ones(make_trainer, memory):
    plain, smoothed = make_trainer(memory=memory), make_trainer(memory=memory, label_smoothing=0.5)
    assert smoothed.step().loss != pytest.approx(plain.step().loss, rel=1e-3)
    fresh, other = make_trainer(memory=memory), make_trainer(memory=memory, label_smoothing=0.5)
    assert other.evaluate("valid").loss == fresh.evaluate("valid").loss
    assert any("label_smoothing=0.5" in event.message for event in smoothed.history.events)
    assert not any(event.kind == "loss" for event in plain.history.events)


@pytest.mark.parametrize("value", [-0.1, 1.0, "0.1"])
def test_a_share_is_from_0_to_below_1(value):
    with pytest.raises(ft.ConfigError, match="label_smoothing"):
        ft.TrainConfig(label_smoothing=value)
