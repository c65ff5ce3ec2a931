"""The rules whose tensors a GPU updates whole, each new array by one kernel, which writes it over the old one.

MLX writes the result of a kernel into the memory of an array that nothing else needs any more, but only where the kernel has one
result, and no kernel that a GPU still has before it reads that array. So an update is not one kernel with all its results, but one
for each array, and one more that rounds a bfloat16 parameter. Weight decay and clipping are inside of them. The arithmetic is the
CPU's; Adam's moments stand in one array (..., 2, C), so that one kernel does for both.

MLX makes a program for each shape; a program's kernels it builds once for all shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from fulltune_nb.training import rules
from fulltune_nb.training.adafactor import GpuAdafactor
from fulltune_nb.training.muon import GpuMuon
from fulltune_nb.training.rules import SGD, Adam, Lion, Piece, Rule, Shape, Slot, State, Tensor, at_a_time


class WholeTensors(Rule):
    """Beside a rule by rows: nothing is cut. Of the tensors that are updated together only what two kernels read needs more memory,
    and in bfloat16 the float32 parameter with what it is rounded to."""

    in_stacks = True
    two_at_a_time = False  # what they need is little, and the host is to wait for nothing

    def read_twice(self, decayed: bool) -> int:
        """Bytes of an element of what two kernels read, in float32. `decayed`: the gradient is, by the parameter."""
        return 4 * decayed

    def pieces(self, tensors: Sequence[Tensor], scalars: Any) -> list[Piece]:
        in_place = not self.read_twice(scalars.get("l2") is not None)
        return [
            Piece(tensor, tensor.rows if tensor.places else None, self, scalars, in_place and tensor.array.dtype == mx.float32)
            for tensor in tensors
        ]

    def update_bytes(self, shapes: Sequence[Shape], dtype: mx.Dtype, weight_decay: float) -> int:
        scalars, most = self.begin(1, 0.0, weight_decay, 1.0), at_a_time([math.prod(shape) for shape in shapes], whole=True)
        return (self.read_twice(scalars.get("l2") is not None) + 6 * (dtype != mx.float32)) * most


class GpuAdam(WholeTensors, Adam):
    """`Adam`: the moments by one kernel, the parameter by another."""

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"moments": Slot((*shape[:-1], 2, shape[-1]), parts=("m", "v"))}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        scalars, (b1, b2) = super().begin(step, learning_rate, weight_decay, gradient_scale), self.betas
        pairs = mx.array([[b1], [b2]]), mx.array([[1.0 - b1], [1.0 - b2]]), mx.array([[True], [False]])  # (2, 1) each
        return {**scalars, "moments": (*pairs, mx.array(gradient_scale, dtype=mx.float32))}

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        moments = self._stacked(p, g, state, scalars)
        return rules._adam_step(p, moments[..., 0, :], moments[..., 1, :], *scalars["p"]), {"moments": moments}

    def _moments(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, mx.array]:
        moments = self._stacked(p, g, state, scalars)
        return moments[..., 0, :], moments[..., 1, :]

    def _stacked(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> mx.array:
        """Both moments (..., 2, C)."""
        if scalars["l2"]:
            return _next_decayed_moments(p[..., None, :], g[..., None, :], scalars["l2"][0], state["moments"], *scalars["moments"])
        return _next_moments(g[..., None, :], state["moments"], *scalars["moments"])


class GpuSGD(WholeTensors, SGD):
    """`SGD`, with the decayed gradient inside of the kernels that need it."""

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        if not (l2 := scalars["l2"]):
            return super().apply(p, g, state, scalars)
        if not self.momentum:
            return _decayed_descend(p, g, *l2, *scalars["plain"]), {}
        v = _decayed_average(p, g, *l2, state["v"], *scalars["v"])
        if self.nesterov:
            return _decayed_descend_ahead(p, g, *l2, v, *scalars["nesterov"]), {"v": v}
        return rules._descend(p, v, *scalars["momentum"]), {"v": v}


class GpuLion(WholeTensors, Lion):
    """`Lion`: the parameter takes the old moment, and so does the new one."""

    def read_twice(self, decayed: bool) -> int:
        return 4


def gpu_rule(name: str, settings: Mapping[str, Any]) -> Rule | None:
    """The rule of a GPU for an optimizer, where it has one of its own."""
    if name in ("adamw", "adam"):
        return GpuAdam(settings, name == "adamw")
    own = {"sgd": GpuSGD, "lion": GpuLion, "muon": GpuMuon, "adafactor": GpuAdafactor}
    return own[name](settings) if name in own else None


# Compiled for each shape, not shapeless: there each operation counts twice among the eleven that MLX makes a kernel of.


@mx.compile
def _next_moments(g, moments, keep, take, is_first, scale) -> mx.array:
    g = g.astype(mx.float32) * scale
    return keep * moments + take * g * mx.where(is_first, 1.0, g)


@mx.compile
def _next_decayed_moments(p, g, weight_decay, moments, keep, take, is_first, scale) -> mx.array:
    g = rules._decayed_gradient(p, g, weight_decay, scale)
    return keep * moments + take * g * mx.where(is_first, 1.0, g)


@mx.compile
def _decayed_average(p, g, weight_decay, scale, v, keep, take) -> mx.array:
    return rules._average(v, rules._decayed_gradient(p, g, weight_decay, scale), keep, take)


@mx.compile
def _decayed_descend(p, g, weight_decay, scale, rate) -> mx.array:
    return rules._descend(p, rules._decayed_gradient(p, g, weight_decay, scale), rate)


@mx.compile
def _decayed_descend_ahead(p, g, weight_decay, scale, v, rate, rate_of_momentum) -> mx.array:
    return rules._descend_ahead(p, rules._decayed_gradient(p, g, weight_decay, scale), v, rate, rate_of_momentum)
