"""Tensors of a checkpoint that are laid out otherwise than the model's parameters: a multimodal model's, stacks of experts, constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import mlx.core as mx

from fulltune_nb.errors import WeightsError
from fulltune_nb.models.families import COMMON_NAMES, FAMILIES
from fulltune_nb.models.family import Stack
from fulltune_nb.models.model_config import ModelConfig

_TEXT_PARTS = ("language_model.", "model.language_model.", "model.text_model.", "text_model.")
"""Prefixes of a text part's tensors."""


def is_stacked(config: ModelConfig) -> bool:
    """Whether all experts of a layer stand in one tensor of the file."""
    family = FAMILIES[config.family]
    return family.experts is not None and bool(family.experts.stacks)


def text_tensors(tensors: Mapping[str, mx.array]) -> tuple[dict[str, mx.array], dict[str, int]]:
    """The text part's tensors of a multimodal checkpoint, under the names of a text model, and how many of each other part there are.

    Returns:
        The tensors, all where no name is that of a text part; and part -> number of its tensors.
    """
    if not any(name.startswith(_TEXT_PARTS) for name in tensors):
        return dict(tensors), {}
    found, others = {}, Counter()
    for name, array in tensors.items():
        part = next((part for part in _TEXT_PARTS if name.startswith(part)), None)
        if part is not None:
            own = name.removeprefix(part)
            found[own if own.startswith(("model.", "lm_head.")) else f"model.{own}"] = array
        elif name.startswith("lm_head."):
            found[name] = array
        else:
            others[name.removeprefix("model.").split(".")[0]] += 1
    return found, dict(others)


def without_further_predictions(tensors: Mapping[str, mx.array], config: ModelConfig) -> tuple[dict[str, mx.array], list[str]]:
    """The tensors of a checkpoint without those for predicting several tokens at once, and the names of these."""
    prefixes = tuple(prefix.format(layers=config.num_layers) for prefix in FAMILIES[config.family].left_aside)
    aside = [name for name in tensors if name.startswith(prefixes)]
    return {name: tensors[name] for name in tensors.keys() - set(aside)} if aside else dict(tensors), aside


def from_file(tensors: Mapping[str, mx.array], config: ModelConfig) -> dict[str, mx.array]:
    """Tensors of a checkpoint as each expert's own, without its constants. What does not fit stays as it is.

    Raises:
        WeightsError: a constant has another value than the one that is computed with.
    """
    found = dict(tensors)
    for layer in range(config.num_layers):
        for path, constant in FAMILIES[config.family].buffers.items():
            given = found.pop(f"model.layers.{layer}.{path}", None)
            if given is not None and (given.size != 1 or abs(given.item() / constant - 1) > 0.01):  # 16 bits round it
                raise WeightsError(f"model.layers.{layer}.{path} is {given.tolist()}; computed is with {constant} only.")
        for stack, prefix, names in _stacks(config, layer):
            whole = found.get(prefix)
            if whole is None or whole.shape[0] != config.num_experts or whole.ndim != (2 if stack.parts[0].endswith("bias") else 3):
                continue
            del found[prefix]
            for expert, own in enumerate(names):
                found.update(zip(own, _parts(whole[expert], stack), strict=True))
    return found


def to_file(tensors: Mapping[str, mx.array], config: ModelConfig) -> dict[str, mx.array]:
    """The reverse of `from_file`."""
    found = dict(tensors)
    dtype = next(iter(tensors.values())).dtype
    for layer in range(config.num_layers):
        for path, constant in FAMILIES[config.family].buffers.items():
            name = f"model.layers.{layer}.{path}"
            if any(other.startswith(name.rpartition(".")[0] + ".") for other in tensors):  # beside parameters of its module only
                found[name] = mx.array(constant, dtype=dtype)
        for stack, prefix, names in _stacks(config, layer):
            if all(name in found for own in names for name in own):
                found[prefix] = mx.stack([_joined([found.pop(name) for name in own], stack) for own in names])
    return found


def _stacks(config: ModelConfig, layer: int) -> list[tuple[Stack, str, list[list[str]]]]:
    """Each stack of a layer, its name in the file, and for each expert the Hugging Face names of its parts."""
    if not is_stacked(config) or not config.with_experts[layer]:
        return []
    family = FAMILIES[config.family]
    mlp = f"model.layers.{layer}.{({**COMMON_NAMES, **family.names}).get('mlp', 'mlp')}"
    return [
        (stack, f"{mlp}.{stack.name}", [[f"{mlp}.experts.{e}.{part}" for part in stack.parts] for e in range(config.num_experts)])
        for stack in family.experts.stacks
    ]


def _parts(whole: mx.array, stack: Stack) -> list[mx.array]:
    """One expert's part of a stack as its own tensors, each by itself in memory."""
    rows = whole.T if stack.transposed else whole
    count = len(stack.parts)
    parts = [rows[i::count] for i in range(count)] if stack.alternating else mx.split(rows, count, axis=0)
    return [mx.contiguous(part) for part in parts]


def _joined(parts: list[mx.array], stack: Stack) -> mx.array:
    if stack.alternating:
        rows = mx.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    else:
        rows = mx.concatenate(parts, axis=0)
    return rows.T if stack.transposed else rows
