"""Muon (Jordan 2024): momentum whose matrices are made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers

from fulltune_nb.training.rules import Rule, Shape, Slot, State, at_a_time, scalars_of


class Muon(Rule):
    """Muon (Jordan 2024) as `mlx.optimizers.Muon`, in float32; a stack of matrices (E, R, C) is treated as E parameters."""

    by_rows = False

    def __init__(self, settings: Mapping[str, Any]):
        own = {name: settings[name] for name in ("momentum", "nesterov", "ns_steps")}
        self.optimizer = mlx.optimizers.Muon(learning_rate=0.0, **own)  # rate, decay and step are set anew for every step

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"v": Slot(shape)}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        rate, scale = scalars_of(learning_rate, gradient_scale)
        state = {"step": mx.array(step, dtype=mx.uint64), "learning_rate": rate}
        return {"state": state, "weight_decay": weight_decay, "scale": None if gradient_scale == 1.0 else scale}

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        self.optimizer.state.update(scalars["state"])
        self.optimizer.weight_decay = scalars["weight_decay"]
        p, g = p.astype(mx.float32), g.astype(mx.float32)
        if scalars["scale"] is not None:
            g = g * scalars["scale"]
        if p.ndim == 2:
            state = dict(state)
            return self.optimizer.apply_single(g, p, state), state
        matrices = [self.apply(p[i], g[i], {"v": state["v"][i]}, {**scalars, "scale": None}) for i in range(p.shape[0])]
        return mx.stack([p for p, _ in matrices]), {"v": mx.stack([state["v"] for _, state in matrices])}

    def update_bytes(self, shapes: Sequence[Shape], dtype: mx.Dtype, weight_decay: float) -> int:
        return 8 * at_a_time([math.prod(shape) for shape in shapes], whole=True)


class GpuMuon(Muon):
    """`Muon` by few kernels: a stack of matrices at once, sums inside of the products, and what is elementwise compiled."""

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        momentum = self.optimizer.momentum
        numbers = scalars_of(gradient_scale, weight_decay, momentum, 1.0 - momentum)
        return {"numbers": numbers, "decays": bool(weight_decay), "rate": scalars_of(learning_rate)[0]}

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        given = p if scalars["decays"] else None, g, *scalars["numbers"]
        v = _moment(state["v"], *given)
        ahead = (v, *given, self.optimizer.nesterov)
        x = _over_norm(_squares_ahead(*ahead).sum(axis=(-2, -1), keepdims=True), *ahead)
        return _descend(p, _orthogonal(x, self.optimizer.ns_steps), scalars["rate"]), {"v": v}

    def update_bytes(self, shapes: Sequence[Shape], dtype: mx.Dtype, weight_decay: float) -> int:
        # A GPU is sent all of the iteration at once, and what is computed on the way is there until it has computed it.
        left, found = at_a_time([math.prod(shape) for shape in shapes], whole=True), 0
        for of_element, size in sorted(((self._bytes_of_element(shape), math.prod(shape)) for shape in shapes), reverse=True):
            found += int((of_element + 2 * (dtype != mx.float32)) * min(size, left))
            left -= min(size, left)
        return found

    def _bytes_of_element(self, shape: Shape) -> float:
        """Squares and what is made orthogonal, and for each step two products of the smaller size and one of the matrix's."""
        return 8 + self.optimizer.ns_steps * (4 + 8 * min(shape[-2:]) / max(shape[-2:]))


def _orthogonal(x: mx.array, steps: int) -> mx.array:
    """Matrices (..., R, C) with singular values of at most 1 -> with values near 1: a Newton-Schulz iteration, three products a step."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's
    for _ in range(steps):
        if x.shape[-2] <= x.shape[-1]:
            square = x @ x.swapaxes(-1, -2)
            x = mx.addmm(x, mx.addmm(square, square, square, alpha=c, beta=b), x, beta=a)
        else:
            square = x.swapaxes(-1, -2) @ x
            x = mx.addmm(x, x, mx.addmm(square, square, square, alpha=c, beta=b), beta=a)
    return x


# Each by one kernel, compiled for each shape. `p` is None without weight decay.


def _scaled(p, g, scale, weight_decay) -> mx.array:
    g = g.astype(mx.float32) * scale
    return g if p is None else g + weight_decay * p.astype(mx.float32)


def _ahead(v, p, g, scale, weight_decay, keep, take, nesterov) -> mx.array:
    """What is made orthogonal."""
    return _scaled(p, g, scale, weight_decay) * take + v * keep if nesterov else v


@mx.compile
def _moment(v, p, g, scale, weight_decay, keep, take) -> mx.array:
    return keep * v + take * _scaled(p, g, scale, weight_decay)


@mx.compile
def _squares_ahead(*given) -> mx.array:
    return mx.square(_ahead(*given))


@mx.compile
def _over_norm(sum_of_squares, *given) -> mx.array:
    return _ahead(*given) / (mx.sqrt(sum_of_squares) + 1e-7)


@mx.compile
def _descend(p, x, rate) -> mx.array:
    rows, columns = x.shape[-2:]
    return p.astype(mx.float32) - rate * max(1.0, rows / columns) ** 0.5 * x
