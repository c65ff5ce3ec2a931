"""The chunked cross-entropy against MLX's plain one."""

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fulltune_nb.training import loss as loss_module
from fulltune_nb.training.loss import cross_entropy, prediction_sums
from nbs_tests.gpu_like import gpu_like
from nbs_tests.memory_held import memory_held

NUM_POSITIONS, HIDDEN, VOCAB = 70, 16, 97


@pytest.fixture(params=[32, 10_000], ids=["three chunks", "one chunk"])
def chunk_rows(request, monkeypatch):
    for name in ("CHUNK_ELEMENTS", "GPU_CHUNK_ELEMENTS"):
        monkeypatch.setattr(loss_module, name, request.param * VOCAB)


@pytest.fixture(params=[nullcontext, gpu_like], ids=["on a CPU", "on a GPU"])
def device(request):
    with request.param():
        yield


def _problem(bias: bool):
    random = np.random.RandomState(0)
    hidden = mx.array(random.randn(NUM_POSITIONS, HIDDEN), dtype=mx.float32)
    head = {"weight": mx.array(random.randn(VOCAB, HIDDEN), dtype=mx.float32)}
    if bias:
        head["bias"] = mx.array(random.randn(VOCAB), dtype=mx.float32)
    targets = mx.array(random.randint(0, VOCAB, NUM_POSITIONS))
    weights = mx.array((np.arange(NUM_POSITIONS) < 60) / 60, dtype=mx.float32)  # the last ten are padding
    return hidden, head, targets, weights


def _plain(hidden, head, targets, weights):
    logits = hidden @ head["weight"].T + head.get("bias", 0.0)
    return (nn.losses.cross_entropy(logits, targets) * weights).sum()


def _distance(ours, reference):
    return (mx.linalg.norm(ours - reference) / mx.linalg.norm(reference)).item()


@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_all_gradients_equal_the_plain_ones(chunk_rows, device, bias):
    hidden, head, targets, weights = _problem(bias)
    ours, (d_hidden, d_head) = mx.value_and_grad(lambda h, w: 3.0 * cross_entropy(h, w, targets, weights), argnums=(0, 1))(hidden, head)
    plain, (p_hidden, p_head) = mx.value_and_grad(lambda h, w: 3.0 * _plain(h, w, targets, weights), argnums=(0, 1))(hidden, head)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    assert _distance(d_hidden, p_hidden) < 1e-5
    for name in head:
        assert _distance(d_head[name], p_head[name]) < 1e-5


@pytest.mark.parametrize("cap", [None, 5.0])
def test_an_evaluation_gives_loss_accuracy_and_entropy_of_the_plain_distributions(chunk_rows, device, cap):
    hidden, head, targets, weights = _problem(bias=True)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head["weight"], np.float64).T + np.asarray(head["bias"], np.float64)
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    ids = np.array(targets)
    ids[:20] = logits.argmax(axis=1)[:20]  # else hardly any would be right
    log_shares = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    per_token = -log_shares[np.arange(NUM_POSITIONS), ids], logits.argmax(axis=1) == ids, -(np.exp(log_shares) * log_shares).sum(axis=1)
    found = prediction_sums(hidden, head, mx.array(ids), weights, cap)
    np.testing.assert_allclose(found, [(column * np.asarray(weights, np.float64)).sum() for column in per_token], rtol=1e-5)


def test_what_is_likeliest_is_right_though_another_is_as_likely():
    sums = prediction_sums(mx.zeros((3, 2)), {"weight": mx.zeros((8, 2))}, mx.array([0, 3, 7]), mx.ones((3,)))
    np.testing.assert_allclose(sums, [3 * np.log(8), 3, 3 * np.log(8)], rtol=1e-6)


def test_padding_has_no_gradient():
    hidden, head, targets, weights = _problem(bias=False)
    gradient = mx.grad(lambda h: cross_entropy(h, head, targets, weights))(hidden)
    assert mx.abs(gradient[60:]).max().item() == 0
    assert mx.abs(gradient[:60]).min(axis=0).max().item() > 0


def test_logits_of_all_positions_never_exist_at_once(monkeypatch):
    rows, vocab = 4096, 4096
    for name in ("CHUNK_ELEMENTS", "GPU_CHUNK_ELEMENTS"):
        monkeypatch.setattr(loss_module, name, 64 * vocab)
    hidden, weight = mx.random.normal((rows, 64)), mx.random.normal((vocab, 64))
    targets, weights = mx.zeros((rows,), dtype=mx.int32), mx.ones((rows,))
    mx.eval(hidden, weight, targets, weights)

    def peak(loss):
        before = memory_held()
        mx.eval(mx.grad(loss, argnums=(0, 1))(hidden, weight))
        return mx.get_peak_memory() - before

    all_logits = rows * vocab * 4
    chunked = peak(lambda h, w: cross_entropy(h, {"weight": w}, targets, weights))
    assert chunked < all_logits < peak(lambda h, w: _plain(h, {"weight": w}, targets, weights))
