"""The optimizer of a run: which rule, learning-rate factor and weight decay each tensor has, and the state of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from fulltune_nb import html
from fulltune_nb.errors import CheckpointError, TrainingError
from fulltune_nb.models.cpu_streams import Dealer
from fulltune_nb.models.names import to_hf
from fulltune_nb.training.checks import SettingError, nearest
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.optimizer_settings import optimizer_settings
from fulltune_nb.training.update_observer import PendingUpdate, UpdateObserver
from fulltune_nb.training.update_rules import Shape, State, UpdateRule, make_rule

_CHUNK_BYTES = 2**26  # parameters updated between two evaluations; Adafactor and Muon have temporaries of that size

HfName = Callable[[str], str]


@dataclass(frozen=True)
class Group:
    """What tensors that are treated alike have in common."""

    optimizer: str
    """Name of the rule; with Muon, "adamw" for what Muon does not take."""
    factor: float
    """Factor on the learning rate."""
    weight_decay: float
    """0 for norms and biases."""


class Optimizers:
    """Updates a model's trainable parameters, each by the rule of its group, and holds the optimizer state.

    Norms and biases (tensors of fewer than two dimensions) have no weight decay. Muon takes the matrices inside the blocks;
    embeddings, head, norms and biases go to AdamW. Frozen parameters are never touched.

    Args:
        model: its trainable parameters count; freeze before.
        config: `optimizer`, `optimizer_config`, `weight_decay` and `lr_factors` count.
        hf_name: module path -> the name that patterns are matched against, besides the path itself. Not given, it is the
            model family's Hugging Face name.

    Raises:
        ConfigError: a pattern in `lr_factors` matches no parameter.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, hf_name: HfName | None = None):
        shapes = _shapes(model.trainable_parameters())
        _check_patterns(config, _shapes(model.parameters()), hf_name := hf_name or _family_name(model))
        self.step = 0
        """Updates made."""
        self.observers: list[UpdateObserver] = []
        """Are told of every tensor's update."""
        self._groups = {name: _group(name, shape, config, hf_name) for name, shape in shapes.items()}
        self._rules = _rules(config)
        self._slots = _slots(shapes, self._groups, self._rules)
        self._shapes = shapes
        self._state: dict[str, State] = {name: {slot: mx.zeros(s) for slot, s in own.items()} for name, own in self._slots.items()}
        mx.eval(self._state)

    def update(self, model: nn.Module, gradients: dict[str, Any], learning_rate: float, gradient_scale: float = 1.0) -> None:
        """One step for every parameter that has a gradient; model and state are evaluated when it returns.

        Parameters and moments are updated in their own memory, unless something else still holds the old arrays.

        Args:
            model: the model this was made for.
            gradients: tree of arrays as `nn.value_and_grad` gives it; not changed and not kept.
            learning_rate: of this step, before the groups' factors.
            gradient_scale: the gradients are multiplied by it on the way, as for clipping.

        Raises:
            TrainingError: a gradient of an unknown name or of another shape; nothing is updated.
        """
        flat = dict(tree_flatten(gradients))
        self._check_gradients(flat)
        self.step += 1
        scalars = {
            group: self._rules[group.optimizer].begin(self.step, learning_rate * group.factor, group.weight_decay, gradient_scale)
            for group in set(self._groups.values())
        }
        old = dict(tree_flatten(model.trainable_parameters()))
        for names in _chunks(flat):
            new, dealer = {}, Dealer()
            for name in names if self.observers else ():
                rule, own = self._rules[self._groups[name].optimizer], scalars[self._groups[name]]
                update = PendingUpdate(name, self.step, old[name], flat[name], rule, self._state[name], own)
                for observer in self.observers:
                    observer.before(update)
                del update  # the old array must have no holder left
            for name in names:
                group = self._groups[name]
                # `pop`, and the state's place taken: only the new arrays' graph then holds the old ones, so that evaluation
                # may write into their memory.
                rule = self._rules[group.optimizer]
                with dealer.stream_for(flat[name].size):
                    new[name], self._state[name] = rule.apply(old.pop(name), flat[name], self._state[name], scalars[group])
            model.update(tree_unflatten(list(new.items())))
            mx.eval(new)  # first: Lion's new parameter reads the old moment, whose memory is free only after that
            mx.eval([self._state[name] for name in names])
            for observer in self.observers:
                for name in names:
                    observer.after(name, new[name])

    def state_arrays(self) -> dict[str, mx.array]:
        """The state as flat names -> arrays: `"step"`, and `"<module path>.<slot>"` for each slot of each parameter."""
        arrays = {f"{name}.{slot}": array for name, own in self._state.items() for slot, array in own.items()}
        return {"step": mx.array(self.step, dtype=mx.uint32), **arrays}

    def load_state_arrays(self, arrays: Mapping[str, mx.array]) -> None:
        """Take over what `state_arrays` gave; evaluated, so that a file behind it may change afterwards.

        Raises:
            CheckpointError: arrays are missing, unexpected, or of another shape or dtype; nothing is changed.
        """
        expected = {f"{name}.{slot}": (shape, mx.float32) for name, own in self._slots.items() for slot, shape in own.items()}
        expected["step"] = ((), mx.uint32)
        problems = [f"missing {name}" for name in expected.keys() - arrays.keys()]
        problems += [f"unexpected {name}" for name in arrays.keys() - expected.keys()]
        for name, (shape, dtype) in expected.items():
            if name in arrays and (arrays[name].shape != shape or arrays[name].dtype != dtype):
                problems.append(f"{name} is {arrays[name].dtype} {arrays[name].shape}, expected {dtype} {shape}")
        if problems:
            shown = "; ".join(sorted(problems)[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
            raise CheckpointError(
                f"the optimizer state does not fit this model and config: {shown}. Resume with the model, optimizer and frozen "
                "parameters that the checkpoint was written with."
            )
        mx.eval(list(arrays.values()))
        self.step = int(arrays["step"].item())
        self._state = {name: {slot: arrays[f"{name}.{slot}"] for slot in own} for name, own in self._slots.items()}

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer state."""
        return sum(array.nbytes for own in self._state.values() for array in own.values())

    def groups(self) -> dict[Group, list[str]]:
        """Group -> module paths of its parameters."""
        found: dict[Group, list[str]] = {}
        for name, group in self._groups.items():
            found.setdefault(group, []).append(name)
        return found

    def _check_gradients(self, flat: Mapping[str, mx.array]) -> None:
        for name, gradient in flat.items():
            if gradient.shape != self._shapes.get(name):
                raise TrainingError(
                    f"gradient of {name}: expected the shape {self._shapes.get(name, 'of a parameter trainable at the start')}, got "
                    f"{gradient.shape}. Make a new trainer after freezing or changing a model."
                )

    def __repr__(self) -> str:
        return f"Optimizers({len(self._groups)} tensors in {len(set(self._groups.values()))} groups, step {self.step})"

    def _repr_html_(self) -> str:
        rows = [
            (group.optimizer, f"{group.factor:g}", f"{group.weight_decay:g}", len(names), f"{_count(names, self._shapes):,}")
            for group, names in self.groups().items()
        ]
        state = f"Optimizer after {self.step:,} steps; its state takes {html.human_bytes(self.state_bytes)}"
        return html.table(("rule", "learning-rate factor", "weight decay", "tensors", "parameters"), rows, caption=state)


def predict_state_bytes(shapes: Mapping[str, Shape], config: TrainConfig) -> int:
    """Bytes the optimizer state will take, from module paths and shapes of the trained parameters alone."""
    groups = {name: _group(name, shape, config, lambda path: path) for name, shape in shapes.items()}
    return 4 * sum(_size(shape) for own in _slots(shapes, groups, _rules(config)).values() for shape in own.values())


def update_bytes(shapes: Mapping[str, Shape], config: TrainConfig) -> int:
    """Bytes that `Optimizers.update` needs besides parameters, gradients and state: none for the rules that work in place."""
    if config.optimizer not in ("adafactor", "muon"):
        return 0
    largest = 4 * max((_size(s) for n, s in shapes.items() if config.optimizer == "adafactor" or is_hidden_matrix(n, s)), default=0)
    return 2 * min(max(largest, _CHUNK_BYTES), 4 * sum(_size(s) for s in shapes.values()))


def is_hidden_matrix(name: str, shape: Shape) -> bool:
    """Whether a parameter is a matrix (or a stack of them) inside the blocks: what Muon is for."""
    return len(shape) >= 2 and not any(part in ("embed_tokens", "lm_head") for part in name.split("."))


def _group(name: str, shape: Shape, config: TrainConfig, hf_name: HfName) -> Group:
    optimizer = config.optimizer
    if optimizer == "muon" and not is_hidden_matrix(name, shape):
        optimizer = "adamw"
    names = (hf_name(name), name)
    matching = (factor for pattern, factor in config.lr_factors.items() if any(fnmatchcase(n, pattern) for n in names))
    return Group(optimizer, next(matching, 1.0), config.weight_decay if len(shape) >= 2 else 0.0)


def _rules(config: TrainConfig) -> dict[str, UpdateRule]:
    settings = optimizer_settings(config.optimizer, config.optimizer_config)
    names = {config.optimizer, "adamw"} if config.optimizer == "muon" else {config.optimizer}
    return {name: make_rule(name, settings) for name in names}


def _slots(shapes: Mapping[str, Shape], groups: Mapping[str, Group], rules: Mapping[str, UpdateRule]) -> dict[str, dict[str, Shape]]:
    return {name: rules[groups[name].optimizer].slots(shape) for name, shape in shapes.items()}


def _chunks(arrays: Mapping[str, mx.array]) -> Iterator[list[str]]:
    """Names in their order, a chunk at a time: single tensors, or several that are small together."""
    names: list[str] = []
    size = 0
    for name, array in arrays.items():
        if names and size + array.nbytes > _CHUNK_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += array.nbytes
    if names:
        yield names


def _check_patterns(config: TrainConfig, shapes: Mapping[str, Shape], hf_name: HfName) -> None:
    names = [hf_name(name) for name in shapes]
    for pattern in config.lr_factors:
        if not any(fnmatchcase(name, pattern) for name in (*names, *shapes)):
            raise SettingError(f"lr_factors: the pattern {pattern!r} matches no parameter. {_some(pattern, names)}", "lr_factors")


def _some(pattern: str, names: list[str]) -> str:
    hint = nearest(pattern.strip("*"), names)
    return hint if hint.startswith("Did") else f"Names look like {', '.join(names[:3])}."


def _family_name(model: nn.Module) -> HfName:
    family = getattr(getattr(model, "config", None), "family", None)
    return (lambda name: name) if family is None else (lambda name: to_hf(name, family))


def _shapes(tree: Any) -> dict[str, Shape]:
    return {name: array.shape for name, array in tree_flatten(tree)}


def _size(shape: Shape) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _count(names: list[str], shapes: Mapping[str, Shape]) -> int:
    return sum(_size(shapes[name]) for name in names)
