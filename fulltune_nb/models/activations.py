"""Activations, and how a gate and what it opens become one; chosen by name in `config.json` or in a family's row."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.cpu import fast_math as cpu_math

XIELU = "xielu"
"""The one activation with parameters of its own; see `XIelu`."""


def relu_squared(x: mx.array) -> mx.array:
    """`max(x, 0)^2` (So et al. 2021), any shape."""
    return mx.square(mx.maximum(x, 0))


ACTIVATIONS = {
    "silu": cpu_math.silu,
    "swish": cpu_math.silu,
    "gelu": nn.gelu,
    "gelu_new": cpu_math.gelu_tanh,
    "gelu_pytorch_tanh": cpu_math.gelu_tanh,
    "relu": nn.relu,
    "relu2": relu_squared,
}
"""`hidden_act` -> the function of one array."""
GATED_ACTIVATIONS = {
    "silu": cpu_math.swiglu, "swish": cpu_math.swiglu, "gelu_new": cpu_math.geglu, "gelu_pytorch_tanh": cpu_math.geglu,
}
"""`hidden_act` -> `act(gate) * up` in one function (Shazeer 2020), where there is one."""
SAME_ACTIVATION = {  # other names that transformers has for the same functions
    "gelu_fast": "gelu_new", "gelu_accurate": "gelu_new", "gelu_python_tanh": "gelu_new", "gelu_python": "gelu",
}


def clamped_swiglu(gate: mx.array, up: mx.array, alpha: float, limit: float) -> mx.array:
    """`(up + 1) gate sigmoid(alpha gate)`, gate at most `limit`, up between -limit and limit (gpt-oss), both of one shape."""
    gate, up = mx.minimum(gate, limit), mx.clip(up, -limit, limit)
    return (up + 1) * (gate * mx.sigmoid(alpha * gate))


CLAMPED_GATES = {"clamped_swiglu": (clamped_swiglu, ("swiglu_alpha", "swiglu_limit"))}
"""Name -> the function of gate, up and numbers, and the keys of `config.json` that these numbers stand under."""


def gated(name: str, numbers: tuple[float, ...], gate: mx.array, up: mx.array) -> mx.array:
    """What a gate and what it opens become, both of one shape; on a GPU in one kernel, outside of what is compiled too.

    Args:
        name: a key of `ACTIVATIONS` or `CLAMPED_GATES`.
        numbers: that the latter's function takes.
        gate: what the activation is of.
        up: what it is multiplied by.
    """
    if cpu_math.on_cpu():
        return _gated(name, numbers, gate, up)
    return _one_kernel(name, numbers)(gate, up)


def _gated(name: str, numbers: tuple[float, ...], gate: mx.array, up: mx.array) -> mx.array:
    if name in CLAMPED_GATES:
        return CLAMPED_GATES[name][0](gate, up, *numbers)
    whole = GATED_ACTIVATIONS.get(name)
    return whole(gate, up) if whole else ACTIVATIONS[name](gate) * up


@cache
def _one_kernel(name: str, numbers: tuple[float, ...]) -> Callable[[mx.array, mx.array], mx.array]:
    return mx.compile(partial(_gated, name, numbers), shapeless=True)


class XIelu(nn.Module):
    """xIELU (Huang & Schlag 2024): `a x^2 + x / 2` above zero, `b (exp(x) - 1 - x) + x / 2` below, with learned a > 0 and b > 1/2."""

    def __init__(self):
        super().__init__()
        self.alpha_p = mx.full((1,), 0.2)
        self.alpha_n = mx.full((1,), -1.0)

    def __call__(self, x: mx.array) -> mx.array:
        above = nn.softplus(self.alpha_p).astype(x.dtype)
        below = (0.5 + nn.softplus(self.alpha_n)).astype(x.dtype)
        return 0.5 * x + mx.where(x > 0, above * x * x, below * (mx.expm1(mx.minimum(x, -1e-6)) - x))
