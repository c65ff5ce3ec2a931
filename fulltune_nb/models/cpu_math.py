"""Exponentials at the speed of vector arithmetic, for MLX's CPU backend only.

MLX's CPU `exp` computes one element at a time (8 ns an element; so do sigmoid, tanh and softmax), which makes half of a
training step. Here `exp` is a range reduction and a polynomial of plain multiplications and additions, which `mx.compile`
turns into one loop that the C++ compiler vectorises: about 1 ns. Forms that contain it (gates, softmax, cross-entropy) have
closed-form gradients, so that the backward pass is one loop too.

Every function gives the same as the MLX operations it replaces, to float32 rounding, and *is* these operations on another
device or in another dtype than float32 (see `applies`). Two rules keep the loops fast: their inputs are contiguous, and
nothing is broadcast inside them (a row's maximum is subtracted beforehand). The C++ compiler runs once for each function,
not for each shape (about 1.5 s, kept in the temporary folder for later processes); where there is none MLX computes the same
uncompiled, several times slower.

Dimension letters: n rows, V columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

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


def applies(*arrays: mx.array) -> bool:
    """Whether the forms of this module are used: float32 on the CPU."""
    return mx.default_device().type == mx.DeviceType.cpu and all(array.dtype == mx.float32 for array in arrays)


# ---- the exponential -----------------------------------------------------------------------------------------------------


def _exp(x: mx.array) -> mx.array:
    """exp of x <= 89 (inf there already above 88.4); 0 below -87.7, -inf included; NaN stays NaN."""
    x = mx.maximum(x, _LOWEST)
    shifted = x * _LOG2E + _ROUND_AND_BIAS
    k = shifted - _ROUND_AND_BIAS
    r = x - k * _LN2_HIGH - k * _LN2_LOW
    square = r * r
    # In pairs (Estrin), not nested (Horner): twice as fast, as the processor works on the pairs at the same time.
    polynomial = ((_C5 * r + _C4) * square + (_C3 * r + _C2)) * square + (r + 1.0)
    two_to_k = mx.view(mx.view(shifted, mx.int32) << 23, mx.float32)
    return polynomial * two_to_k


@mx.compile
def _exp_loop(x: mx.array) -> mx.array:
    return _exp(mx.minimum(x, _HIGHEST))


_exp_loop_to_zero = mx.compile(_exp)  # of x <= 0


@mx.custom_function
def _fast_exp(x: mx.array) -> mx.array:
    return _exp_loop(mx.contiguous(x))


@_fast_exp.vjp
def _fast_exp_vjp(_x, cotangent, output):
    return cotangent * output


def fast_exp(x: mx.array) -> mx.array:
    """`mx.exp(x)`, any shape; relative error below 5e-7 on the CPU, with 0 below -87.7 and inf above 88.4."""
    return _fast_exp(x) if applies(x) else mx.exp(x)


# ---- softmax -------------------------------------------------------------------------------------------------------------


def exp_and_sum(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The parts of a softmax over the last axis, without gradients of their own.

    Args:
        x: (..., V), float32 on the CPU; -inf counts as absent.

    Returns:
        exp(x - maximum) (..., V), its sum (..., 1), and the maximum (..., 1).
    """
    maximum = x.max(axis=-1, keepdims=True)
    exponentials = _exp_loop_to_zero(x - maximum)
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
    if not applies(logits):
        log_sum = mx.logsumexp(logits, axis=-1)
        return log_sum, mx.exp(logits - log_sum[:, None])
    exponentials, total, maximum = exp_and_sum(logits)
    return (maximum + mx.log(total))[:, 0], exponentials * (1.0 / total)


# ---- activations, plain and gated ----------------------------------------------------------------------------------------


# Each is x s(x) with a sigmoid s. The forward pass keeps s, so that the backward pass needs no exponential again.


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
    """The activation x s(x) and its product with a second array, as functions whose two directions are loops.

    Args:
        sigmoid: x -> s.
        slope: x, s -> d(x s) / dx.
    """

    @mx.compile
    def plain_forward(x):
        s = sigmoid(x)
        return x * s, s

    @mx.compile
    def plain_backward(x, s, cotangent):
        return cotangent * slope(x, s)

    @mx.compile
    def gated_forward(gate, up):
        s = sigmoid(gate)
        return gate * s * up, s

    @mx.compile
    def gated_backward(gate, up, s, cotangent):
        return cotangent * up * slope(gate, s), cotangent * gate * s

    @mx.custom_function
    def plain(x):
        return plain_forward(mx.contiguous(x))

    @plain.vjp
    def plain_vjp(x, cotangents, outputs):
        return plain_backward(mx.contiguous(x), outputs[1], mx.contiguous(cotangents[0]))

    @mx.custom_function
    def gated(gate, up):
        return gated_forward(mx.contiguous(gate), mx.contiguous(up))

    @gated.vjp
    def gated_vjp(primals, cotangents, outputs):
        gate, up = (mx.contiguous(array) for array in primals)
        return gated_backward(gate, up, outputs[1], mx.contiguous(cotangents[0]))

    return (lambda x: plain(x)[0]), (lambda gate, up: gated(gate, up)[0])


_silu_plain, _silu_gated = _differentiable(_sigmoid, _silu_slope)
_gelu_tanh_plain, _gelu_tanh_gated = _differentiable(_gelu_tanh_sigmoid, _gelu_tanh_slope)


def silu(x: mx.array) -> mx.array:
    """`x sigmoid(x)`, any shape."""
    return _silu_plain(x) if applies(x) else nn.silu(x)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) * up` (Shazeer 2020), both of one shape."""
    return _silu_gated(gate, up) if applies(gate, up) else nn.silu(gate) * up


@partial(mx.compile, shapeless=True)
def _gelu_tanh_elsewhere(x: mx.array) -> mx.array:
    return 0.5 * x * (1.0 + mx.tanh(0.5 * _TWO_ROOT * (x + 0.044715 * x * x * x)))


def gelu_tanh(x: mx.array) -> mx.array:
    """`0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: `gelu_new` and `gelu_pytorch_tanh` of Hugging Face."""
    return _gelu_tanh_plain(x) if applies(x) else _gelu_tanh_elsewhere(x)


def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """`gelu_tanh(gate) * up`, both of one shape."""
    return _gelu_tanh_gated(gate, up) if applies(gate, up) else _gelu_tanh_elsewhere(gate) * up
