"""Our own kernels against MLX's arithmetic and numpy's in float64, and what becomes of arrays that somebody else holds."""

from __future__ import annotations

import platform
import subprocess
from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb import cpu
from fulltune_nb.cpu import kernels as kernels_module
from fulltune_nb.cpu.kernel_folder import CompileWarning
from fulltune_nb.training.rules import Adam

SIZES = (1, 31, 2**12 + 5, 2**19 + 77, 2**21)
ADAM = {"betas": (0.9, 0.99), "eps": 1e-8}


def normal(*shape: int, seed: int = 0) -> mx.array:
    array = mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    mx.eval(array)
    return array


def address_of(array: mx.array) -> int:
    return np.asarray(array).ctypes.data


def bits(array: mx.array) -> np.ndarray:
    return np.array(array).view(np.uint32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_adam_is_mlx_s_on_x86_to_the_last_bit(kernels, size, scale):
    p, g, m, v = (normal(size, seed=seed) for seed in range(4))
    v = mx.square(v)
    mx.eval(v)
    scalars = Adam(ADAM, decoupled=True).begin(3, 1e-3, 0.1, scale)
    new_p, state = Adam(ADAM, decoupled=True).apply(p + 0.0, g, {"m": m + 0.0, "v": v + 0.0}, scalars)
    mx.eval(new_p, state)
    kernels.adam([cpu.AdamUpdate(p, g, m, v, 0)], scalars["numbers"])
    for ours, theirs in ((p, new_p), (m, state["m"]), (v, state["v"])):
        if platform.machine() == "x86_64":
            assert np.array_equal(bits(ours), bits(theirs))
        else:  # g++ may fuse MLX's multiplications and additions there
            assert np.linalg.norm(np.array(ours) - np.array(theirs)) <= 1e-6 * np.linalg.norm(np.array(theirs))


def test_adam_of_some_elements_leaves_the_others_alone(kernels):
    p, m, v = (mx.abs(normal(1000, seed=seed)) for seed in range(3))
    g = normal(10)
    mx.eval(p, m, v)
    before = [np.array(array) for array in (p, m, v)]
    kernels.adam([cpu.AdamUpdate(p, g, m, v, 500)], Adam(ADAM, decoupled=True).begin(1, 1e-3, 0.0, 1.0)["numbers"])
    for old, new in zip(before, (p, m, v), strict=True):
        changed = np.flatnonzero(old != np.array(new))
        assert changed.tolist() == list(range(500, 510))


@pytest.mark.parametrize("size", SIZES)
def test_sums_of_squares_are_those_of_float64(kernels, size):
    arrays = [normal(size, seed=1), normal(3, 5, seed=2), normal(7, 4, seed=3).T]
    expected = sum(float(np.square(np.array(array, np.float64)).sum()) for array in arrays)
    assert kernels.sum_of_squares(arrays) == pytest.approx(expected, rel=1e-6)


def test_a_sum_of_squares_does_not_depend_on_the_number_of_cores(kernels, monkeypatch):
    arrays = [normal(2**20 + 3, seed=seed) for seed in range(3)]
    sums = set()
    for cores in (1, 2, 3):
        monkeypatch.setattr(kernels_module, "worker_cores", lambda cores=cores: cores)
        sums.add(kernels.sum_of_squares(arrays))
    assert len(sums) == 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 61), (7, 4099), (300, 8192)], ids=str)
def test_cross_entropy_and_its_gradient_are_those_of_float64(kernels, shape):
    rows, width = shape
    logits, random = normal(*shape) * 8.0, np.random.default_rng(1)
    mx.eval(logits)
    targets, weights = random.integers(0, width, rows), random.random(rows).astype(np.float32)
    weights[rows // 2] = 0.0  # padding
    x = np.array(logits, np.float64)
    shifted = x - x.max(axis=1, keepdims=True)
    softmax = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    expected = -(weights * np.log(softmax[np.arange(rows), targets])).sum()
    softmax[np.arange(rows), targets] -= 1.0
    assert kernels.cross_entropy(logits, targets, weights) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    gradient = softmax * weights[:, None]
    assert np.linalg.norm(np.array(logits) - gradient) <= 2e-6 * max(np.linalg.norm(gradient), 1e-3)


def test_cross_entropy_of_huge_and_of_excluded_logits_is_finite_and_of_nan_is_nan(kernels):
    row = np.zeros((4, 100), np.float32)
    row[0, 3], row[0, 4] = 3e38, -3e38
    row[1, :50] = -np.inf
    row[2, 7] = np.nan
    row[3, 0] = np.nan
    weights = np.ones(1, np.float32)
    losses, gradients = [], []
    for i, target in enumerate((3, 60, 8, 8)):
        logits = mx.array(row[i : i + 1])
        mx.eval(logits)
        losses.append(kernels.cross_entropy(logits, np.array([target]), weights))
        gradients.append(np.array(logits))
    assert losses[0] == 0.0 and losses[1] == pytest.approx(np.log(50), rel=1e-6)
    assert np.all(gradients[0] == 0.0) and np.all(gradients[1][0, :50] == 0.0)
    assert np.isnan(losses[2]) and np.isnan(losses[3])


@pytest.mark.parametrize("target", [-1, 10])
def test_a_target_outside_the_vocabulary_is_refused_before_anything_is_written(kernels, target):
    logits = normal(2, 10)
    before = bits(logits)
    with pytest.raises(ValueError, match="from 0 to 9"):
        kernels.cross_entropy(logits, np.array([0, target]), np.ones(2, np.float32))
    assert np.array_equal(bits(logits), before)


HOLDERS = {
    "itself": lambda a: a, "a slice": lambda a: a[5:9], "a row": lambda a: a[5], "another shape": lambda a: a.reshape(-1),
    "transposed": lambda a: a.T, "its bits": lambda a: a.view(mx.uint32), "something not computed yet": lambda a: a + 1,
    "numpy": np.asarray,
}  # fmt: skip


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_what_somebody_holds_stays_as_it_is(holder):
    array = normal(100, 30)
    held, expected = holder(array), np.array(holder(array))
    kept = [array]
    del array
    (own,) = cpu.sole(kept)
    kept.clear()
    mx.eval(own)
    np.asarray(own)[:] = 7.0
    assert np.array_equal(np.array(held), expected)


@pytest.mark.parametrize("shape", [(50,), (20, 30), (3, 4, 5)], ids=str)
def test_what_nobody_holds_stays_where_it_is(shape):
    array = normal(*shape)
    address, values, arrays = address_of(array), np.array(array), [array]
    del array
    arrays = cpu.sole(arrays)
    mx.eval(arrays)
    assert address_of(arrays[0]) == address and np.array_equal(np.array(arrays[0]), values)


@pytest.mark.parametrize("setting", ["off", "0", " None "])
def test_the_variable_leaves_everything_to_mlx(monkeypatch, setting):
    monkeypatch.setenv(kernels_module.VARIABLE, setting)
    assert cpu.kernels_for(10**9) is None


def test_small_models_are_left_to_mlx():
    assert cpu.kernels_for(kernels_module.SMALLEST_MODEL - 1) is None


@pytest.mark.parametrize("trouble", ["no compiler", "it fails", "it takes too long", "it makes no library"])
def test_where_they_cannot_be_compiled_mlx_does_the_work(monkeypatch, trouble):
    def run(command, **_):
        if trouble == "it fails":
            raise subprocess.CalledProcessError(1, command)
        if trouble == "it takes too long":
            raise subprocess.TimeoutExpired(command, 60)

    monkeypatch.setattr(kernels_module.shutil, "which", lambda name: None if trouble == "no compiler" else "/usr/bin/g++")
    monkeypatch.setattr(kernels_module.subprocess, "run", run)
    expected = nullcontext() if trouble == "no compiler" else pytest.warns(CompileWarning, match="MLX does their work")
    with expected:
        assert kernels_module.compiled_kernels.__wrapped__() is None
