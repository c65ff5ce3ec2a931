"""Muon (Jordan 2024): momentum whose matrices are made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers

from fulltune_nb.cpu import on_cpu
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
        # A GPU is sent all of the iteration at once, and what is computed on the way is there until it has computed it.
        of_element = 8 if on_cpu() else 24 + 12 * self.optimizer.ns_steps + 10 * (dtype != mx.float32)
        return of_element * at_a_time([math.prod(shape) for shape in shapes], whole=True)
