"""Exponentials at the speed of vector arithmetic, for MLX's CPU backend only.

MLX's CPU `exp` computes one element at a time (8 ns an element on the machine this was measured on; so do sigmoid, tanh and
softmax). Here `exp` is a range reduction and a polynomial, made of additions and multiplications, each of which MLX does
for many elements at once: 20 passes of 0.2 ns. The forms that contain it (gates, softmax, cross-entropy) have closed-form
gradients. Forward and backward together the gates take a third to a half of the time, softmax two thirds to a half, and
the statistics of logits, which MLX needs two exponentials for, less than a third.

Every function gives the same as the MLX operations it replaces, to float32 rounding, and *is* these operations on other
devices, in other dtypes, and for small arrays, where starting 20 operations takes longer (see `applies`).

Nothing is compiled here. `mx.compile` would make one pass of all (1.3 ns), but inside `mx.grad`, where training spends its
time, MLX takes compiled functions apart again; and outside of it, it runs the C++ compiler for seconds at the first use.
A caller that compiles a whole step, gradient and all, gets the one pass.

Dimension letters: n rows, V columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

# exp(x) = 2^k exp(r), k = round(x / ln 2), |r| <= ln(2) / 2. ln 2 in two parts, the first with few bits, so that
# k * LN2_HIGH is exact (Cody & Waite 1980).
_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Adding 1.5 * 2^23 rounds a float32 to an integer that then stands in its low bits; 127 more is the exponent's bias.
_ROUND_AND_BIAS = 12582912.0 + 127.0
# exp(r) = 1 + r + c2 r^2 + ... + c5 r^5: least maximal relative error on |r| <= ln(2) / 2, 1.1e-7 before rounding.
_C5, _C4, _C3, _C2 = 0.008312520571053028, 0.04189015552401543, 0.16667114198207855, 0.499992311000824
# At -88 k is -127, the biased exponent 0 and the result exactly 0; at 89 it is 255 and the result inf.
_LOWEST, _HIGHEST = -88.0, 89.0

_TWO_ROOT = 2.0 * math.sqrt(2.0 / math.pi)

FEWEST_ELEMENTS = 8192
"""Arrays smaller than this are left to MLX's own functions: there they are as fast or faster."""


def applies(*arrays: mx.array) -> bool:
    """Whether the forms of this module are used: large float32 arrays on the CPU."""
    return on_cpu() and all(array.dtype == mx.float32 and array.size >= FEWEST_ELEMENTS for array in arrays)


def on_cpu() -> bool:
    """Whether MLX's default device is the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu


def evaluate(*arrays: Any) -> None:
    """Has arrays, or trees of them, computed: on a CPU now, elsewhere while the host goes on. Who reads one waits for it."""
    (mx.eval if on_cpu() else mx.async_eval)(*arrays)


def _exp(x: mx.array) -> mx.array:
    """exp of x <= 89 (inf there already above 88.4); 0 below -87.7, -inf included; NaN stays NaN."""
    x = mx.maximum(x, _LOWEST)
    shifted = x * _LOG2E + _ROUND_AND_BIAS
    k = shifted - _ROUND_AND_BIAS
    r = x - k * _LN2_HIGH - k * _LN2_LOW
    square = r * r
    # In pairs (Estrin), not nested (Horner): compiled, it is twice as fast, as the pairs are computed at the same time.
    polynomial = ((_C5 * r + _C4) * square + (_C3 * r + _C2)) * square + (r + 1.0)
    two_to_k = mx.view(mx.view(shifted, mx.int32) << 23, mx.float32)
    return polynomial * two_to_k


@mx.custom_function
def _fast_exp(x: mx.array) -> mx.array:
    return _exp(mx.minimum(x, _HIGHEST))


@_fast_exp.vjp
def _fast_exp_vjp(_x, cotangent, output):
    return cotangent * output


def fast_exp(x: mx.array) -> mx.array:
    """`mx.exp(x)`, any shape; relative error below 5e-7 on the CPU, with 0 below -87.7 and inf above 88.4."""
    return _fast_exp(x) if applies(x) else mx.exp(x)


def exp_and_sum(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The parts of a softmax over the last axis, without gradients of their own.

    Args:
        x: (..., V), float32; -inf counts as absent.

    Returns:
        exp(x - maximum) (..., V), its sum (..., 1), and the maximum (..., 1).
    """
    maximum = x.max(axis=-1, keepdims=True)
    if not applies(x):
        exponentials = mx.exp(x - maximum)
        return exponentials, exponentials.sum(axis=-1, keepdims=True), maximum
    exponentials = _exp(x - maximum)
    return exponentials, _row_sums(exponentials), maximum


def _row_sums(x: mx.array) -> mx.array:
    """(..., V) -> (..., 1). As a product with ones, which the BLAS does in a quarter of the time of `sum`."""
    return (x.reshape(-1, x.shape[-1]) @ mx.ones((x.shape[-1], 1))).reshape(*x.shape[:-1], 1)


@mx.custom_function
def _softmax(x: mx.array) -> mx.array:
    exponentials, total, _ = exp_and_sum(x)
    return exponentials * (1.0 / total)


@_softmax.vjp
def _softmax_vjp(_x, cotangent, output):
    weighted = cotangent * output
    return weighted - output * _row_sums(weighted)


def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis of (..., V); -inf gives 0, a row of nothing but -inf NaN."""
    return _softmax(x) if applies(x) else mx.softmax(x, axis=-1, precise=True)


def softmax_statistics(logits: mx.array) -> tuple[mx.array, mx.array]:
    """log(sum(exp(logits))) over the last axis (n,), and the softmax (n, V), without gradients of their own; float32."""
    exponentials, total, maximum = exp_and_sum(logits)
    return (maximum + mx.log(total))[:, 0], exponentials * (1.0 / total)


_FEWEST_ROWS = 8
"""Products of fewer rows read each weight once or twice: turning it into float32 would cost more than it saves."""


@mx.custom_function
def _product(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.astype(mx.result_type(x, weight)).T


@_product.vjp
def _product_vjp(primals, cotangent, _output):
    # Automatic differentiation gives (x.T @ cotangent).T, whose rows lie across the memory: all that reads the gradient
    # afterwards (its norm, the optimizer) would then be two to four times as slow. A weight in half precision is turned into float32
    # once more, so that the copy does not live from the forward to the backward pass; its gradient stays float32, as the optimizer's
    # arithmetic.
    x, weight = primals
    return cotangent @ weight.astype(mx.result_type(x, weight)), _rows_of(cotangent).T @ _rows_of(x)


def _rows_of(x: mx.array) -> mx.array:
    return x.reshape(-1, x.shape[-1])


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """`x @ weight.T + bias`: (..., D) and (O, D) -> (..., O).

    On the CPU, half-precision products of several rows are computed in float32 and rounded to the dtype of the operands: only
    float32 has a fast BLAS. With x in float32 the result, and the weight's gradient, stay float32.
    """
    if not on_cpu():
        return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    if weight.dtype in (mx.bfloat16, mx.float16) and (x.dtype == mx.float32 or x.size >= _FEWEST_ROWS * x.shape[-1]):
        product = _product(x.astype(mx.float32), weight).astype(mx.result_type(x, weight))
    else:
        product = _product(x, weight)
    return product if bias is None else product + bias


# Activations are x s(x) with a sigmoid s. The forward pass keeps s, so that the backward pass needs no exponential again.


def _sigmoid(x: mx.array) -> mx.array:
    return 1.0 / (1.0 + _exp(mx.minimum(-x, _HIGHEST)))


def _silu_slope(x: mx.array, s: mx.array) -> mx.array:
    return s + x * s * (1.0 - s)


def _gelu_tanh_sigmoid(x: mx.array) -> mx.array:
    # 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
    return _sigmoid(x * (_TWO_ROOT + _TWO_ROOT * 0.044715 * (x * x)))


def _gelu_tanh_slope(x: mx.array, s: mx.array) -> mx.array:
    return s + x * s * (1.0 - s) * (_TWO_ROOT + _TWO_ROOT * 3 * 0.044715 * (x * x))


def _differentiable(sigmoid: Callable, slope: Callable) -> tuple[Callable, Callable]:
    """The activation x s(x), and its product with a second array, with closed-form gradients.

    Args:
        sigmoid: x -> s.
        slope: x, s -> d(x s) / dx.
    """

    @mx.custom_function
    def plain(x):
        s = sigmoid(x)
        return x * s, s

    @plain.vjp
    def plain_vjp(x, cotangents, outputs):
        return cotangents[0] * slope(x, outputs[1])

    @mx.custom_function
    def gated(gate, up):
        s = sigmoid(gate)
        return gate * s * up, s

    @gated.vjp
    def gated_vjp(primals, cotangents, outputs):
        (gate, up), s, cotangent = primals, outputs[1], cotangents[0]
        return cotangent * up * slope(gate, s), cotangent * gate * s

    return (lambda x: plain(x)[0]), (lambda gate, up: gated(gate, up)[0])


_silu_plain, _silu_gated = _differentiable(_sigmoid, _silu_slope)
_gelu_tanh_plain, _gelu_tanh_gated = _differentiable(_gelu_tanh_sigmoid, _gelu_tanh_slope)


def _gelu_tanh(x: mx.array) -> mx.array:
    return 0.5 * x * (1.0 + mx.tanh(0.5 * _TWO_ROOT * (x + 0.044715 * x * x * x)))


@partial(mx.compile, shapeless=True)
def _gelu_tanh_compiled(x: mx.array) -> mx.array:
    """The same by a sigmoid: few enough operations for one kernel, and exact in half precision where 1 + tanh is not."""
    return x * mx.sigmoid(x * (_TWO_ROOT + _TWO_ROOT * 0.044715 * (x * x)))


def silu(x: mx.array) -> mx.array:
    """`x sigmoid(x)`, any shape."""
    if applies(x):
        return _silu_plain(x)
    return x * mx.sigmoid(x) if on_cpu() else nn.silu(x)  # nn.silu is compiled


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up` (Shazeer 2020), both of one shape."""
    return _silu_gated(gate, up) if applies(gate, up) else silu(gate) * up


def gelu_tanh(x: mx.array) -> mx.array:
    """`0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: `gelu_new` and `gelu_pytorch_tanh` of Hugging Face."""
    if applies(x):
        return _gelu_tanh_plain(x)
    return _gelu_tanh(x) if on_cpu() else _gelu_tanh_compiled(x)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """`gelu_tanh(gate) * up`, both of one shape."""
    return _gelu_tanh_gated(gate, up) if applies(gate, up) else gelu_tanh(gate) * up
