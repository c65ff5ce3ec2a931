"""A model's parameters by name: which are trained, where one stands, arrays put in their place for a while, and their gradients.

A parameter's name is its module path, such as `layers.0.mlp.up_proj.weight`. Patterns in settings (`train_only`, `freeze`) are matched
against the name it has in Hugging Face checkpoints, such as `model.layers.0.mlp.up_proj.weight`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from fulltune_nb.errors import ConfigError
from fulltune_nb.models.families import to_hf

Arrays = dict[str, mx.array]
"""Name -> array. That of a stack, `together`, is its parts' names with blanks between."""


class Buffers(nn.Module):
    """Its arrays belong to the model, and are never trained: they are loaded, saved and kept as they are, in their own dtype.

    MLX knows no such thing: to it they are parameters, which whoever made the module has frozen.
    """


def parameters_of(module: nn.Module) -> Arrays:
    """All parameters of a module by their names in it, its buffers among them."""
    return dict(tree_flatten(module.parameters()))


def buffers_of(module: nn.Module) -> set[str]:
    """Names of the arrays in a module that are never trained."""
    held = [(path, part) for path, part in module.named_modules() if isinstance(part, Buffers)]
    return {f"{path}.{name}" for path, part in held for name in parameters_of(part)}


def in_dtype(module: nn.Module, dtype: mx.Dtype) -> Arrays:
    """The parameters of a module in another dtype, by their names in it; buffers keep theirs."""
    buffers = buffers_of(module)
    return {name: array if name in buffers else array.astype(dtype) for name, array in parameters_of(module).items()}


def trainable_of(module: nn.Module) -> Arrays:
    """The trainable parameters of a module by their names in it."""
    return dict(tree_flatten(module.trainable_parameters()))


def put_parameters(module: nn.Module, arrays: Mapping[str, mx.array]) -> None:
    """Gives a module these arrays, by their names in it; parameters that are not named stay."""
    if arrays:
        module.update(tree_unflatten(list(arrays.items())))


@contextmanager
def swapped_in(module: nn.Module, arrays: Mapping[str, mx.array]) -> Iterator[None]:
    """Within the block, a module has these arrays by their names in it; afterwards its own again.

    So a function of the arrays is made of a module, for MLX to differentiate or compile. Its own arrays must come back before anything
    else is computed: what was put in belongs to a graph, and would keep it.
    """
    holders = holders_of(module, arrays)
    own = {name: holder[key] for name, (holder, key) in holders.items()}
    _put(holders, arrays)
    try:
        yield
    finally:
        _put(holders, own)


def _put(holders: Mapping[str, tuple[Any, str | int]], arrays: Mapping[str, mx.array]) -> None:
    for name, (holder, key) in holders.items():
        holder[key] = arrays[name]


def backward_through(
    modules: Mapping[str, nn.Module], function: Callable[..., mx.array], inputs: Sequence[mx.array], cotangent: mx.array
) -> tuple[mx.array, list[mx.array], Arrays]:
    """A function's value, and the gradients of its inputs and of the modules' trainable parameters by name; lazy.

        x_of_block, loss = ..., ...
        value, (to_x,), own = backward_through({"layers.3": block}, lambda x: block(x, rotation, mask), [x], to_output)
        mx.eval(to_x, own)                    # own["layers.3.mlp.up_proj.weight"], ...

    Who has no use for the value must not name it: it would keep what it is computed from.

    Args:
        modules: by module path; `function` uses their parameters. With the path "" parameters go by their names in the module.
        function: of the inputs.
        inputs: arrays.
        cotangent: gradient with respect to the function's value.
    """
    trained = {path: together(trainable_of(module)) for path, module in modules.items()}
    names = [(path, name) for path, own in trained.items() for name in own]
    primals = [*inputs, *(array for own in trained.values() for array in own.values())]

    def of_arrays(*values: mx.array) -> mx.array:
        given = dict(zip(names, values[len(inputs) :], strict=True))
        with ExitStack() as stack:
            for path, module in modules.items():
                stack.enter_context(swapped_in(module, apart({name: given[path, name] for name in trained[path]})))
            return function(*values[: len(inputs)])

    if not primals:
        return function(), [], {}
    (value,), found = mx.vjp(of_arrays, primals, [cotangent])
    paths = [under(path, name) if path else name for path, name in names]
    return value, found[: len(inputs)], dict(zip(paths, found[len(inputs) :], strict=True))


# -- parts of one array: a GPU computes with a stack, and everybody else with the parameters in it ------------------------------------

_stacks: dict[int, tuple[list[weakref.ref], mx.array]] = {}
"""id of a stack's first part -> its parts, and the stack."""


def parts_of(stack: mx.array) -> list[mx.array]:
    """A stack's parts (*shape) of (parts, *shape), lazy views by which `stack_of` knows it for as long as the first of them lives."""
    parts = [part.squeeze(0) for part in mx.split(stack, len(stack))]
    first = id(parts[0])
    forget = weakref.ref(parts[0], lambda _: _stacks.pop(first, None))
    _stacks[first] = [forget, *map(weakref.ref, parts[1:])], stack
    return parts


def stack_of(parts: Sequence[mx.array]) -> mx.array | None:
    """The stack that these are all the parts of, in this order."""
    known, stack = _stacks.get(id(parts[0]), ((), None))
    return stack if len(known) == len(parts) and all(ref() is part for ref, part in zip(known, parts, strict=True)) else None


def together(arrays: Arrays, alike: Callable[[list[str]], bool] = lambda names: True) -> Arrays:
    """The arrays, with a stack instead of its parts wherever all of them are there, and `alike`."""
    found, names = dict(arrays), {id(array): name for name, array in arrays.items()}
    for array in arrays.values():
        known, stack = _stacks.get(id(array), ((), None))
        parts = [names.get(id(ref())) for ref in known]
        if len(parts) > 1 and None not in parts and alike(parts):
            for name in parts:
                del found[name]
            found[" ".join(parts)] = stack
    return found


def apart(arrays: Arrays) -> Arrays:
    """The arrays, with its parts instead of each stack."""
    found: Arrays = {}
    for name, array in arrays.items():
        names = name.split(" ")
        found |= zip(names, [array] if len(names) == 1 else parts_of(array), strict=True)
    return found


def under(path: str, name: str) -> str:
    """The name, or a stack's, in the module that has the named one at this path."""
    return " ".join(f"{path}.{part}" for part in name.split(" "))


class Stacked(MutableMapping):
    """What several modules or dicts hold by the same keys, as a stack of each: theirs are its parts.

    Where somebody has put another array, all are copied together when the stack is asked for.
    """

    def __init__(self, holders: Sequence[Any]):
        self.holders = holders

    def __getitem__(self, key: str) -> mx.array:
        parts = [holder[key] for holder in self.holders]
        stack = stack_of(parts)
        if stack is None:
            self[key] = stack = mx.stack(parts)
            mx.eval(stack, [holder[key] for holder in self.holders])
        return stack

    def __setitem__(self, key: str, stack: mx.array) -> None:
        for holder, part in zip(self.holders, parts_of(stack), strict=True):
            holder[key] = part

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"{key}: what a stack's parts stand in stays")

    def __iter__(self) -> Iterator[str]:
        return iter(self.holders[0])

    def __len__(self) -> int:
        return len(self.holders[0])


def holder_of(module: nn.Module, name: str) -> tuple[Any, str | int]:
    """The module or list that holds a parameter, or a module, of this name, and its key there: `holder[key]` reads and writes it."""
    *path, last = name.split(".")
    holder: Any = module
    for part in path:
        holder = holder[int(part) if isinstance(holder, list) else part]
    return holder, int(last) if isinstance(holder, list) else last


def holders_of(module: nn.Module, names: Iterable[str]) -> dict[str, tuple[Any, str | int]]:
    """`holder_of` for several names."""
    return {name: holder_of(module, name) for name in names}


def select_trainable(model: nn.Module, train_only: Sequence[str], freeze: Sequence[str]) -> None:
    """Makes every tensor but buffers trainable, then freezes what `train_only` leaves out and `freeze` names.

    Args:
        model: changed in place; whatever was frozen before does not matter.
        train_only: shell-style patterns on Hugging Face tensor names; empty means all.
        freeze: patterns of what stays as it is; wins over `train_only`.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing left to train.
    """
    put_trainable(model, trained_names(model, train_only, freeze))


def put_trainable(model: nn.Module, trained: Collection[str]) -> None:
    """Makes the parameters of these names trainable, and no other."""
    model.unfreeze()
    for name in parameters_of(model).keys() - set(trained):
        module, key = holder_of(model, name)
        module.freeze(recurse=False, keys=key)


def trained_names(model: nn.Module, train_only: Sequence[str], freeze: Sequence[str]) -> set[str]:
    """Names of the parameters that `select_trainable` leaves trainable; arguments and errors as there."""
    buffers = buffers_of(model)
    names = {name: to_hf(name, model.config.family) for name in parameters_of(model)}
    for setting, patterns in (("train_only", train_only), ("freeze", freeze)):
        for pattern in patterns:
            if not any(fnmatchcase(hf_name, pattern) for hf_name in names.values()):
                some = ", ".join(list(names.values())[:4])
                raise ConfigError(f"{setting}: {pattern!r} matches no tensor. Names look like {some}; '*' stands for anything.")
    kept = {name: hf_name for name, hf_name in names.items() if name in buffers}
    names = {name: hf_name for name, hf_name in names.items() if name not in buffers}
    for pattern in train_only:
        if not any(fnmatchcase(hf_name, pattern) for hf_name in names.values()):
            raise ConfigError(f"train_only: {pattern!r} matches only tensors that are kept as they are, such as {min(kept.values())}.")

    def matched(hf_name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(hf_name, pattern) for pattern in patterns)

    trained = {name for name, hf_name in names.items() if matched(hf_name, train_only or ["*"]) and not matched(hf_name, freeze)}
    if not trained:
        raise ConfigError("train_only and freeze together leave nothing to train.")
    return trained


def lowest_trained_block(trained: Collection[str], num_layers: int) -> int:
    """The first block that a backward pass has to go through: below it nothing is trained. `num_layers` where no block is.

    Args:
        trained: names of the trained parameters.
        num_layers: blocks of the model.
    """
    if any(name.startswith("embed_tokens.") for name in trained):
        return 0
    return min((int(name.split(".")[1]) for name in trained if name.startswith("layers.")), default=num_layers)
