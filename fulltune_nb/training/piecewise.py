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
    found, of_parameters = gradients(modules, function, inputs, cotangent)
    found = found if to_inputs else [None] * len(inputs)
    add(sums, of_parameters)
    mx.eval(sums, found)
    return found


def add(sums: Arrays, gradients: Arrays) -> None:
    """Adds gradients to those so far; lazy."""
    for name, gradient in gradients.items():
        sums[name] = sums[name] + gradient if name in sums else gradient


def gradients(
    modules: Mapping[str, nn.Module], function: Callable[..., mx.array], inputs: Sequence[mx.array], cotangent: mx.array
) -> tuple[list[mx.array], Arrays]:
    """Gradients with respect to the inputs, and to the modules' trainable parameters by module path; lazy.

    Arguments as for `vjp`; a module of path "" gives its parameters by their names in it.
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
        _, found = mx.vjp(of_parameters, [*inputs, *arrays], [cotangent])
    finally:
        for path, module in modules.items():
            _put(module, flat[path])
    paths = [f"{path}.{name}" if path else name for path, name in names]
    return found[: len(inputs)], dict(zip(paths, found[len(inputs) :], strict=True))


def _put(module: nn.Module, arrays: list[tuple[str, mx.array]]) -> None:
    if arrays:
        module.update(tree_unflatten(arrays))
