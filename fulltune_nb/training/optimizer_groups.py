"""Which rule, learning-rate factor and weight decay each tensor has, by its name and shape; and the rules by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import mlx.nn as nn
import mlx.optimizers

from fulltune_nb.models.names import to_hf
from fulltune_nb.training.checks import SettingError, nearest
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.eight_bit import EightBit
from fulltune_nb.training.factored import Adafactor
from fulltune_nb.training.optimizer_settings import optimizer_settings
from fulltune_nb.training.update_rules import SGD, Adam, Lion, MlxRule, Shape, Slot, UpdateRule

HfName = Callable[[str], str]
Rule = UpdateRule | Adafactor


@dataclass(frozen=True)
class Group:
    """What tensors that are treated alike have in common."""

    optimizer: str
    """Name of the rule; with Muon, "adamw" for what Muon does not take."""
    factor: float
    """Factor on the learning rate."""
    weight_decay: float
    """0 for norms and biases."""


def group_of(name: str, shape: Shape, config: TrainConfig, hf_name: HfName) -> Group:
    """The group of one tensor.

    Args:
        name: module path.
        shape: of the tensor; those of fewer than two dimensions are norms and biases.
        config: `optimizer`, `weight_decay` and `lr_factors` count.
        hf_name: module path -> the name that patterns are matched against, besides the path.
    """
    optimizer = config.optimizer
    if optimizer == "muon" and not is_hidden_matrix(name, shape):
        optimizer = "adamw"
    names = (hf_name(name), name)
    matching = (factor for pattern, factor in config.lr_factors.items() if any(fnmatchcase(n, pattern) for n in names))
    return Group(optimizer, next(matching, 1.0), config.weight_decay if len(shape) >= 2 else 0.0)


def is_hidden_matrix(name: str, shape: Shape) -> bool:
    """Whether a parameter is a matrix (or a stack of them) inside the blocks: what Muon is for."""
    return len(shape) >= 2 and not any(part in ("embed_tokens", "lm_head") for part in name.split("."))


def family_name(model: nn.Module) -> HfName:
    """Module path -> the Hugging Face name in the model's family; the path itself where there is no family."""
    family = getattr(getattr(model, "config", None), "family", None)
    return (lambda name: name) if family is None else (lambda name: to_hf(name, family))


def check_patterns(config: TrainConfig, shapes: Mapping[str, Shape], hf_name: HfName) -> None:
    """Refuse patterns in `lr_factors` that no parameter matches.

    Raises:
        SettingError: with the nearest names.
    """
    names = [hf_name(name) for name in shapes]
    for pattern in config.lr_factors:
        if not any(fnmatchcase(name, pattern) for name in (*names, *shapes)):
            raise SettingError(f"lr_factors: the pattern {pattern!r} matches no parameter. {_some(pattern, names)}", "lr_factors")


def _some(pattern: str, names: list[str]) -> str:
    hint = nearest(pattern.strip("*"), names)
    return hint if hint.startswith("Did") else f"Names look like {', '.join(names[:3])}."


def make_rule(name: str, settings: Mapping[str, Any]) -> Rule:
    """The rule of an optimizer, from all of its settings (`optimizer_settings`)."""
    if name.endswith("8bit"):
        return EightBit(make_rule(name.removesuffix("8bit"), settings))
    if name in ("adamw", "adam"):
        return Adam(settings, decoupled=name == "adamw")
    if name == "muon":
        own = {key: settings[key] for key in ("momentum", "nesterov", "ns_steps")}
        return MlxRule(mlx.optimizers.Muon(learning_rate=0.0, **own), per_matrix=True)
    return {"sgd": SGD, "lion": Lion, "adafactor": Adafactor}[name](settings)


def rules_of(config: TrainConfig) -> dict[str, Rule]:
    """The rules a config needs, by name."""
    settings = optimizer_settings(config.optimizer, config.optimizer_config)
    names = {config.optimizer, "adamw"} if config.optimizer == "muon" else {config.optimizer}
    return {name: make_rule(name, settings) for name in names}


def slots_of(shapes: Mapping[str, Shape], groups: Mapping[str, Group], rules: Mapping[str, Rule]) -> dict[str, dict[str, Slot]]:
    """What is kept for each tensor."""
    return {name: rules[groups[name].optimizer].slots(shape) for name, shape in shapes.items()}
