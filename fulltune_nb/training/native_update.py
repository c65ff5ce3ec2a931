"""An optimizer's update by kernels of our own, in the memory of a model's parameters and of the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.training.native import AdamUpdate, Kernels, sole
from fulltune_nb.training.pieces import Piece, Place, first_row
from fulltune_nb.training.update_rules import Adam, State


def native_scalars(kernels: Kernels | None, rule: Any, scalars: Any, dtype: mx.Dtype) -> tuple[float, ...] | None:
    """What a kernel needs to know of a step for parameters of a dtype; None where MLX updates them."""
    return scalars["native"] if kernels is not None and isinstance(rule, Adam) and dtype == mx.float32 else None


def update_natively(
    kernels: Kernels,
    model: nn.Module,
    state: dict[str, State],
    pieces: Sequence[Piece],
    gradients: Mapping[str, mx.array],
) -> None:
    """Update pieces of parameters and their moments; what somebody else holds of these is left as it is.

    Args:
        kernels: ours.
        model: holds the parameters.
        state: module path -> slot -> array.
        pieces: what is updated; `native` are its `native_scalars`.
        gradients: module path -> that of the piece's tensor or rows.
    """
    gradients = {piece.name: mx.contiguous(gradients[piece.name].astype(mx.float32)) for piece in pieces}
    for name in gradients:
        place = Place(model, name)
        # Place and state are taken by the new arrays before anything is evaluated: nothing but their graph then holds the old ones.
        place.array, state[name] = sole(place.array), {slot: sole(state[name].pop(slot)) for slot in ("m", "v")}
    mx.eval(gradients, [(Place(model, name).array, state[name]) for name in gradients])
    updates = []
    for piece in pieces:
        p, moments = Place(model, piece.name).array, state[piece.name]
        first = first_row(piece) * p.shape[-1]
        updates.append(AdamUpdate(p, gradients[piece.name], moments["m"], moments["v"], first, piece.native))
    kernels.adam(updates)
