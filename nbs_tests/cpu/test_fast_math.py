"""The CPU's fast exponentials against numpy in float64 and against the MLX operations they replace."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from fulltune_nb.cpu import fast_math

INF, NAN = np.inf, np.nan


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """On the CPU, and the module's own forms whatever the size, so that small examples test them."""
    monkeypatch.setattr(fast_math, "FEWEST_ELEMENTS", 1)
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def normal(*shape: int, scale: float = 3.0, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32))


def relative_error(got: mx.array, want: np.ndarray) -> float:
    return float(np.max(np.abs(np.array(got, dtype=np.float64) - want) / np.maximum(np.abs(want), np.finfo(np.float32).tiny)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("traced", [False, True], ids=["alone", "inside a gradient"])
def test_exp_is_right_to_float32_over_the_whole_normal_range(traced):
    x = np.concatenate([np.linspace(-87.3, 88.3, 200_001), np.linspace(-1e-3, 1e-3, 1001)]).astype(np.float32)
    got = mx.vjp(fast_math.fast_exp, [mx.array(x)], [mx.array(x)])[0][0] if traced else fast_math.fast_exp(mx.array(x))
    assert relative_error(got, np.exp(x.astype(np.float64))) < 1e-6


def test_exp_of_special_values():
    x = [0.0, -0.0, -INF, -1e30, -88.0, INF, 1e30, 89.0, NAN]
    got = np.array(fast_math.fast_exp(mx.array(x)))
    np.testing.assert_array_equal(got, np.array([1, 1, 0, 0, 0, INF, INF, INF, NAN], dtype=np.float32))


def test_exp_beside_its_borders_goes_down_to_zero_and_up_to_infinity_without_a_step_back():
    got = np.array(fast_math.fast_exp(mx.array(np.linspace(-89, -87, 2001, dtype=np.float32))))
    assert (np.diff(got) >= 0).all() and got[0] == 0.0
    got = np.array(fast_math.fast_exp(mx.array(np.linspace(88, 89, 1001, dtype=np.float32))))
    assert (got[:-1] <= got[1:]).all() and got[-1] == INF


def test_softmax_is_numpys():
    x = normal(3, 5, 77, scale=8.0)
    x32 = np.array(x)
    e = np.exp((x32 - x32.max(-1, keepdims=True)).astype(np.float64))  # the difference's own rounding is float32's, not exp's
    assert relative_error(fast_math.softmax(x), e / e.sum(-1, keepdims=True)) < 1e-6


def test_softmax_gives_masked_positions_zero_and_passes_nan_on():
    x = mx.array([[1.0, -INF, 1.0, -INF], [5e4, -5e4, -3e38, 0.0], [0.0, NAN, 0.0, 0.0], [-INF] * 4])
    got = np.array(fast_math.softmax(x))
    np.testing.assert_array_equal(got[:2], [[0.5, 0, 0.5, 0], [1, 0, 0, 0]])
    assert np.isnan(got[2:]).all()


def test_a_masked_position_gets_no_gradient_and_gives_none_to_others():
    x, weights = mx.array([[1.0, -INF, 2.0]]), mx.array([[1.0, 5.0, 3.0]])
    masked = mx.grad(lambda x: (fast_math.softmax(x) * weights).sum())(x)
    alone = mx.grad(lambda x: (fast_math.softmax(x) * weights[:, ::2]).sum())(x[:, ::2])
    np.testing.assert_allclose(np.array(masked)[0, [0, 2]], np.array(alone)[0], rtol=1e-6)
    assert masked[0, 1].item() == 0.0


def test_softmax_statistics_are_the_log_sum_and_the_softmax():
    logits = normal(6, 1000, scale=10.0)
    wide = np.array(logits, dtype=np.float64)
    top = wide.max(-1, keepdims=True)
    want = np.log(np.exp(wide - top).sum(-1)) + top[:, 0]
    log_sum, probabilities = fast_math.softmax_statistics(logits)
    assert relative_error(log_sum, want) < 1e-6
    assert np.abs(np.array(probabilities) - np.exp(wide - want[:, None])).max() < 1e-6
    assert log_sum.shape == (6,)


def test_softmax_statistics_of_huge_and_of_excluded_logits_are_finite():
    log_sum, probabilities = fast_math.softmax_statistics(mx.array([[3e38, 0.0, -3e38], [-INF, 2.0, -INF]]))
    np.testing.assert_allclose(np.array(log_sum), [3e38, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(np.array(probabilities), [[1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("function", "reference"),
    [(fast_math.silu, lambda x: x * sigmoid(x)), (fast_math.gelu_tanh, gelu_tanh)],
    ids=["silu", "gelu_tanh"],
)
def test_activations_are_numpys(function, reference):
    x = np.linspace(-12, 12, 50_001).astype(np.float32)
    wide = x.astype(np.float64)
    got = np.array(function(mx.array(x)), dtype=np.float64)
    assert np.abs(got - reference(wide)).max() < 2e-6 and np.linalg.norm(got - reference(wide)) < 3e-7 * np.linalg.norm(reference(wide))
    up = normal(50_001)
    gated = {fast_math.silu: fast_math.swiglu, fast_math.gelu_tanh: fast_math.geglu}[function](mx.array(x), up)
    want = reference(wide) * np.array(up, dtype=np.float64)
    assert np.linalg.norm(np.array(gated) - want) < 3e-7 * np.linalg.norm(want)


@pytest.mark.parametrize("x", [-1e4, -200.0, 200.0, 1e4])
@pytest.mark.parametrize("function", [fast_math.silu, fast_math.gelu_tanh])
def test_activations_far_out_are_zero_or_the_input_with_gradients_zero_or_one(function, x):
    value, gradient = mx.vjp(function, [mx.array([x])], [mx.array([1.0])])
    assert value[0].item() == max(x, 0.0) and gradient[0].item() == float(x > 0)


def test_activations_pass_nan_on():
    one, nan = mx.array([1.0]), mx.array([NAN])
    for got in (fast_math.silu(nan), fast_math.gelu_tanh(nan), fast_math.swiglu(one, nan), fast_math.geglu(nan, one)):
        assert np.isnan(got.item())


PAIRS = {
    "fast_exp": (fast_math.fast_exp, mx.exp, 1),
    "softmax": (fast_math.softmax, lambda x: mx.softmax(x, axis=-1), 1),
    "silu": (fast_math.silu, nn.silu, 1),
    "gelu_tanh": (fast_math.gelu_tanh, nn.gelu_approx, 1),
    "swiglu": (fast_math.swiglu, lambda g, u: nn.silu(g) * u, 2),
    "geglu": (fast_math.geglu, lambda g, u: nn.gelu_approx(g) * u, 2),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "inside mx.compile"])
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_those_of_automatic_differentiation(name, compiled):
    function, reference, count = PAIRS[name]
    inputs = [normal(2, 9, 33, seed=i) for i in range(count)]
    weights = normal(2, 9, 33, seed=9)
    arguments = tuple(range(count))
    gradients = mx.grad(lambda *a: (function(*a) * weights).sum(), arguments)
    got = (mx.compile(gradients) if compiled else gradients)(*inputs)
    want = mx.grad(lambda *a: (reference(*a) * weights).sum(), arguments)(*inputs)
    for ours, theirs in zip(got, want, strict=True):
        assert mx.linalg.norm(ours - theirs).item() < 2e-6 * mx.linalg.norm(theirs).item()


@pytest.mark.parametrize("name", PAIRS)
def test_views_that_are_not_contiguous_give_the_same(name):
    function, reference, count = PAIRS[name]
    inputs = [normal(7, 4, 6, seed=i).transpose(1, 2, 0) for i in range(count)]
    assert mx.allclose(function(*inputs), reference(*inputs), rtol=1e-5, atol=1e-6)
    got, want = (mx.grad(lambda *a, f=f: f(*a).square().sum())(*inputs) for f in (function, reference))
    assert mx.allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_other_dtypes_keep_mlxs_own_functions_and_their_dtype(name, dtype):
    function, reference, count = PAIRS[name]
    inputs = [normal(5, 8, seed=i).astype(dtype) for i in range(count)]
    assert not fast_math.applies(*inputs) and fast_math.applies(normal(2))
    got = function(*inputs)
    assert got.dtype == dtype and mx.allclose(got, reference(*inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", PAIRS)
def test_small_arrays_are_left_to_mlx_and_give_the_same(name, monkeypatch):
    monkeypatch.undo()
    function, reference, count = PAIRS[name]
    for elements in (8191, 8192):
        inputs = [normal(elements, seed=i) for i in range(count)]
        assert fast_math.applies(*inputs) == (elements == 8192)
        got, want = (mx.grad(lambda *a, f=f: f(*a).square().sum())(*inputs) for f in (function, reference))
        assert mx.linalg.norm(got - want).item() < 1e-5 * mx.linalg.norm(want).item()


@pytest.mark.long
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, 8), (2, 5, 8), (8,), (1, 1, 8)])
def test_linear_is_the_product_and_its_gradients_lie_row_by_row(shape, bias):
    x, weight, cotangent = normal(*shape), normal(6, 8, seed=1), normal(*shape[:-1], 6, seed=2)
    arrays = [x, weight, normal(6, seed=3)] if bias else [x, weight]

    def reference(x, weight, bias=0.0):
        return x @ weight.T + bias

    got, got_gradients = mx.vjp(fast_math.linear, arrays, [cotangent])
    want, want_gradients = mx.vjp(reference, arrays, [cotangent])
    assert mx.allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(got_gradients, want_gradients, strict=True):
        assert ours.shape == theirs.shape and mx.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert np.asarray(memoryview(got_gradients[1])).strides == (32, 4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("rows", [1, 50])
def test_linear_in_half_precision_is_float32s_rounded(dtype, rows):
    x, weight = normal(rows, 64, scale=1.0).astype(dtype), normal(32, 64, scale=1.0, seed=1).astype(dtype)
    got = fast_math.linear(x, weight)
    want = (x.astype(mx.float32) @ weight.astype(mx.float32).T).astype(dtype)
    assert got.dtype == dtype
    assert mx.allclose(got, want, rtol=1e-2, atol=1e-2) if rows == 1 else mx.array_equal(got, want)
