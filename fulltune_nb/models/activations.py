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
    return _few_kernels(name, numbers)(gate, up)


def _gated(name: str, numbers: tuple[float, ...], gate: mx.array, up: mx.array) -> mx.array:
    if name in CLAMPED_GATES:
        return CLAMPED_GATES[name][0](gate, up, *numbers)
    whole = GATED_ACTIVATIONS.get(name)
    return whole(gate, up) if whole else ACTIVATIONS[name](gate) * up


@cache
def _few_kernels(name: str, numbers: tuple[float, ...]) -> Callable[[mx.array, mx.array], mx.array]:
    """One kernel, and for the gradient of each of the two one more, if they are compiled, which computes all again from gate and up: what
    is between is neither written nor kept."""
    whole = mx.compile(partial(_gated, name, numbers), shapeless=True)

    @mx.custom_function
    def function(gate: mx.array, up: mx.array) -> mx.array:
        return whole(gate, up)

    @function.vjp
    def gradients(inputs: tuple[mx.array, mx.array], gradient: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
        # Each waits for the gradient on its own: what MLX sees computed twice it computes once, and keeps.
        (gate, fixed_up), (fixed_gate, up) = mx.depends(list(inputs), [gradient]), mx.depends(list(inputs), [gradient])
        (to_gate,) = mx.vjp(lambda gate: whole(gate, fixed_up), [gate], [gradient])[1]
        (to_up,) = mx.vjp(lambda up: whole(fixed_gate, up), [up], [gradient])[1]
        return to_gate, to_up

    return function


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
