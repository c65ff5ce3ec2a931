"""The backward pass through a part of the model, evaluated at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

Arrays = dict[str, mx.array]


def vjp(
    modules: Mapping[str, nn.Module],
    function: Callable[..., mx.array],
    inputs: Sequence[mx.array],
    cotangent: mx.array,
    sums: Arrays,
    to_inputs: bool = True,
) -> list[mx.array | None]:
    """Gradients with respect to the inputs; those of the modules' trainable parameters are added to `sums`. All evaluated.

    Args:
        modules: by module path; `function` uses their parameters.
        function: of the inputs.
        inputs: arrays.
        cotangent: gradient with respect to the function's result.
        sums: module path of a parameter -> gradients so far.
        to_inputs: whether gradients with respect to the inputs are needed; where not, they are None.
    """
    flat = {path: tree_flatten(module.trainable_parameters()) for path, module in modules.items()}
    names = [(path, name) for path, own in flat.items() for name, _ in own]
    arrays = [array for own in flat.values() for _, array in own]

    def of_parameters(*values: mx.array) -> mx.array:
        given = dict(zip(names, values[len(inputs) :], strict=True))
        for path, module in modules.items():
            _put(module, [(name, given[path, name]) for name, _ in flat[path]])
        return function(*values[: len(inputs)])

    try:
        _, gradients = mx.vjp(of_parameters, [*inputs, *arrays], [cotangent])
    finally:
        for path, module in modules.items():
            _put(module, flat[path])
    found = gradients[: len(inputs)] if to_inputs else [None] * len(inputs)
    for (path, name), gradient in zip(names, gradients[len(inputs) :], strict=True):
        key = f"{path}.{name}"
        sums[key] = sums[key] + gradient if key in sums else gradient
    mx.eval(sums, found)
    return found


def _put(module: nn.Module, arrays: list[tuple[str, mx.array]]) -> None:
    if arrays:
        module.update(tree_unflatten(arrays))
