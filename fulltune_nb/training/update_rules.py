"""How one tensor is updated: the arithmetic of each optimizer as pure functions, and what it keeps between steps.

AdamW, Adam, SGD and Lion are written as single-output element-wise functions, compiled once for all shapes. A function with
one output may write into the memory of an input that nobody holds any more, so moments and parameters are updated in place
and a step needs no memory of its own (one function with three outputs, measured: no faster, and three copies of the tensor).
Everything that changes from step to step comes in as a scalar array, so nothing is compiled twice. Muon is that of
`mlx.optimizers`; Adafactor is in `factored`, state of 8 bits in `eight_bit`.

State and arithmetic are float32 whatever the parameter's dtype: in bfloat16 a second moment with beta 0.999 would never
change. So is the result; `rounding.round_to` brings it to the parameter's dtype.

Names: p parameter, g gradient, m and v first and second moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.optimizers

State = dict[str, mx.array]
Shape = tuple[int, ...]

_compiled = partial(mx.compile, shapeless=True)


def _scalar(value: float) -> mx.array:
    return mx.array(value, dtype=mx.float32)


@dataclass(frozen=True)
class Slot:
    """An array that is kept for a parameter between steps; it starts as zeros."""

    shape: Shape
    dtype: mx.Dtype = mx.float32

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.size


class UpdateRule(Protocol):
    """An optimizer, seen from one tensor. Rules hold no state; `begin` is called once a step."""

    by_rows: bool
    """Rows are updated independently of each other: `apply` may be called with some rows of p, g and every slot, and gives bit
    for bit what it gives for all at once. A row is what has one place on all axes but the last; slots have the same rows."""

    def in_place(self, weight_decay: float) -> bool:
        """Whether float32 parameters and state are updated with no memory besides their own."""

    def slots(self, shape: Shape) -> dict[str, Slot]:
        """Name -> array kept for a parameter of this shape."""

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> Any:
        """The scalars of a step, for all tensors with this learning rate and weight decay. `step` counts from 1."""

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: Any) -> tuple[mx.array, State]:
        """The parameter (float32, not rounded) and the state after the step; lazy."""


@_compiled
def _decayed_gradient(p: mx.array, g: mx.array, weight_decay: mx.array, scale: mx.array) -> mx.array:
    return g.astype(mx.float32) * scale + weight_decay * p.astype(mx.float32)


@_compiled
def _average(m: mx.array, g: mx.array, keep: mx.array, take: mx.array) -> mx.array:
    return keep * m + take * g.astype(mx.float32)


@_compiled
def _average_of_squares(v: mx.array, g: mx.array, keep: mx.array, take: mx.array, scale: mx.array) -> mx.array:
    g = g.astype(mx.float32) * scale
    return keep * v + take * (g * g)


@_compiled
def _adam_step(p, m, v, keep, rate, root, eps) -> mx.array:
    return keep * p.astype(mx.float32) - rate * m / (mx.sqrt(v) * root + eps)


@_compiled
def _descend(p: mx.array, g: mx.array, rate: mx.array) -> mx.array:
    return p.astype(mx.float32) - rate * g.astype(mx.float32)


@_compiled
def _descend_ahead(p, g, m, rate, rate_of_momentum) -> mx.array:
    return p.astype(mx.float32) - (rate * g.astype(mx.float32) + rate_of_momentum * m)


@_compiled
def _lion_step(p, g, m, keep, take, kept, rate) -> mx.array:
    return kept * p.astype(mx.float32) - rate * mx.sign(keep * m + take * g.astype(mx.float32))


# Updates themselves, before they are added and rounded; what `change` methods give.


@_compiled
def _adam_change(p, m, v, keep, rate, root, eps) -> mx.array:
    return (keep - 1.0) * p - rate * m / (mx.sqrt(v) * root + eps)


@_compiled
def _lion_change(p, g, m, keep, take, kept, rate) -> mx.array:
    return (kept - 1.0) * p - rate * mx.sign(keep * m + take * g.astype(mx.float32))


class Adam:
    """Adam (Kingma & Ba 2015), bias-corrected as in PyTorch; AdamW (Loshchilov & Hutter 2019) when `decoupled`.

    Not decoupled, weight decay is added to the gradient, as `torch.optim.Adam` does.
    """

    by_rows = True

    def __init__(self, settings: Mapping[str, Any], decoupled: bool):
        self.betas, self.eps, self.bias_correction = settings["betas"], settings["eps"], settings.get("bias_correction", True)
        self.decoupled = decoupled

    def in_place(self, weight_decay: float) -> bool:
        return self.decoupled or not weight_decay  # else the decayed gradient is an array of its own

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"m": Slot(shape), "v": Slot(shape)}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        b1, b2 = self.betas
        correction1, correction2 = (1.0 - b1**step, 1.0 - b2**step) if self.bias_correction else (1.0, 1.0)
        decay_now = weight_decay if self.decoupled else 0.0
        l2 = None if self.decoupled or not weight_decay else (_scalar(weight_decay), _scalar(gradient_scale))
        scale = 1.0 if l2 else gradient_scale  # the decayed gradient is scaled already
        m, v = (b1, (1.0 - b1) * scale), (b2, 1.0 - b2, scale)
        p = (1.0 - learning_rate * decay_now, learning_rate / correction1, 1.0 / math.sqrt(correction2), self.eps)
        lazily = {name: tuple(map(_scalar, values)) for name, values in (("m", m), ("v", v), ("p", p))}
        return {"l2": l2, **lazily, "native": None if l2 else (*m, *v, *p)}

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        if scalars["l2"]:
            g = _decayed_gradient(p, g, *scalars["l2"])
        m = _average(state["m"], g, *scalars["m"])
        v = _average_of_squares(state["v"], g, *scalars["v"])
        return _adam_step(p, m, v, *scalars["p"]), {"m": m, "v": v}

    def change(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> mx.array:
        """What `apply` adds to a float32 p, before any rounding; float32, lazy. Any rows of the tensors will do."""
        after = self.apply(p, g, state, scalars)[1]
        return _adam_change(p, after["m"], after["v"], *scalars["p"])


class SGD:
    """Stochastic gradient descent with momentum, dampening and Nesterov's look ahead, as `mlx.optimizers.SGD`."""

    by_rows = True

    def __init__(self, settings: Mapping[str, Any]):
        self.momentum, self.dampening, self.nesterov = settings["momentum"], settings["dampening"], settings["nesterov"]

    def in_place(self, weight_decay: float) -> bool:
        return not weight_decay

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"v": Slot(shape)} if self.momentum else {}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        l2 = (_scalar(weight_decay), _scalar(gradient_scale)) if weight_decay else None
        scale = 1.0 if l2 else gradient_scale
        return {
            "l2": l2,
            "v": (_scalar(self.momentum), _scalar((1.0 - self.dampening) * scale)),
            "plain": (_scalar(learning_rate * scale),),
            "momentum": (_scalar(learning_rate),),
            "nesterov": (_scalar(learning_rate * scale), _scalar(learning_rate * self.momentum)),
        }

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        if scalars["l2"]:
            g = _decayed_gradient(p, g, *scalars["l2"])
        if not self.momentum:
            return _descend(p, g, *scalars["plain"]), {}
        v = _average(state["v"], g, *scalars["v"])
        if self.nesterov:
            return _descend_ahead(p, g, v, *scalars["nesterov"]), {"v": v}
        return _descend(p, v, *scalars["momentum"]), {"v": v}

    def change(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> mx.array:
        """As `Adam.change`."""
        if scalars["l2"]:
            g, scalars = _decayed_gradient(p, g, *scalars["l2"]), {**scalars, "l2": None}
        return self.apply(mx.zeros_like(p), g, state, scalars)[0]  # apart from the decay, p is only added to


class Lion:
    """Lion (Chen et al. 2023): the sign of an average of gradients."""

    by_rows = True

    def __init__(self, settings: Mapping[str, Any]):
        self.betas = settings["betas"]

    def in_place(self, weight_decay: float) -> bool:
        return True

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"m": Slot(shape)}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        b1, b2 = self.betas
        return {
            "p": (
                _scalar(b1),
                _scalar((1.0 - b1) * gradient_scale),
                _scalar(1.0 - learning_rate * weight_decay),
                _scalar(learning_rate),
            ),
            "m": (_scalar(b2), _scalar((1.0 - b2) * gradient_scale)),
        }

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        return _lion_step(p, g, state["m"], *scalars["p"]), {"m": _average(state["m"], g, *scalars["m"])}

    def change(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> mx.array:
        """As `Adam.change`."""
        return _lion_change(p, g, state["m"], *scalars["p"])


class MlxRule:
    """An optimizer of `mlx.optimizers`, one tensor at a time, in float32.

    Args:
        optimizer: its `learning_rate`, `weight_decay` and step are set anew for every step.
        per_matrix: a stack of matrices (E, out, in) is treated as E parameters.
    """

    by_rows = False

    def __init__(self, optimizer: mlx.optimizers.Optimizer, per_matrix: bool = False):
        self.optimizer, self.per_matrix = optimizer, per_matrix

    def in_place(self, weight_decay: float) -> bool:
        return False

    def slots(self, shape: Shape) -> dict[str, Slot]:
        probe: State = {}
        self.optimizer.init_single(mx.zeros(shape, dtype=mx.float32), probe)  # lazy: nothing is allocated
        return {name: Slot(array.shape) for name, array in probe.items()}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        scalars = {"step": mx.array(step, dtype=mx.uint64), "learning_rate": _scalar(learning_rate)}
        return {"state": scalars, "weight_decay": weight_decay, "scale": None if gradient_scale == 1.0 else _scalar(gradient_scale)}

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        self.optimizer.state.update(scalars["state"])
        self.optimizer.weight_decay = scalars["weight_decay"]
        p, g = p.astype(mx.float32), g.astype(mx.float32)
        if scalars["scale"] is not None:
            g = g * scalars["scale"]
        if not (self.per_matrix and p.ndim > 2):
            state = dict(state)
            return self.optimizer.apply_single(g, p, state), state
        states = [{name: array[i] for name, array in state.items()} for i in range(p.shape[0])]
        p = mx.stack([self.optimizer.apply_single(g[i], p[i], states[i]) for i in range(p.shape[0])])
        return p, {name: mx.stack([one[name] for one in states]) for name in state}
