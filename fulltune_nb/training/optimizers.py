"""The optimizer of a run: which rule, learning-rate factor and weight decay each tensor has, and the state of them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from fulltune_nb import html
from fulltune_nb.cpu import Kernels, evaluate, kernels_for, on_cpu
from fulltune_nb.errors import CheckpointError, TrainingError, listed, nearest
from fulltune_nb.models.experts import lay_together, stacks_in
from fulltune_nb.models.families import to_hf
from fulltune_nb.models.parameters import Stacked, apart, holders_of, parameters_of, together, trainable_of
from fulltune_nb.settings import SettingError
from fulltune_nb.training.adafactor import Adafactor
from fulltune_nb.training.config import TrainConfig, optimizer_settings
from fulltune_nb.training.eight_bit import EightBit, GpuEightBit
from fulltune_nb.training.gpu_rules import gpu_rule
from fulltune_nb.training.moving_average import PART, MovingAverage
from fulltune_nb.training.muon import Muon
from fulltune_nb.training.rounding import Rounding, check_dtype
from fulltune_nb.training.rules import SGD, Adam, KernelAdam, Lion, Piece, Rule, Scalars, Shape, State, Tensor, piece_size


class UpdateObserver(Protocol):
    """Is told of each tensor, or piece of one, before and after its update."""

    def before(self, update: Piece) -> None:
        """The update is about to be made. Nothing of it may be held on to that has not been evaluated."""

    def after(self, name: str, first_row: int, new: mx.array) -> None:
        """The same tensor or piece as it is now; on a CPU evaluated."""


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
    embeddings, head, norms and biases go to AdamW. Frozen parameters are never touched. Parameters in bfloat16 stay in bfloat16:
    the update is computed in float32 and rounded as `config.rounding` says.

    A step is one call of `update` with all gradients, or

        optimizers.begin_step(learning_rate, gradient_scale)
        optimizers.update_tensors(model, gradients_of_a_block)     # any number of times, each tensor (or row) once
        optimizers.update_tensors(model, {"embed_tokens.weight": gradient_of_rows}, rows=slice(0, 4096))
        optimizers.end_step()

    with the same result bit for bit, however the gradients are dealt out. Adafactor needs to see all rows of a matrix before it
    can update some of them (`passes(name)` times: once for the means, once for the clipping); where they come by rows, therefore

        for _ in range(optimizers.passes(name)):
            for rows, gradient in gradients_by_rows():             # the same ones each time, computed again or kept
                optimizers.observe(model, {name: gradient}, rows)
        for rows, gradient in gradients_by_rows():
            optimizers.update_tensors(model, {name: gradient}, rows)

    which serves all optimizers: `passes` is 0 for the others. (Experts of a stack are matrices of their own and need no such thing.)

    Args:
        model: its trainable parameters count; freeze before.
        config: `optimizer`, `optimizer_config`, `weight_decay`, `lr_factors`, `rounding` and `seed` count. Patterns in `lr_factors`
            are matched against a parameter's Hugging Face name and its module path.
        rank, size: of so many processes this one, which updates its share of the tensors and has their state only.

    Raises:
        ConfigError: a pattern in `lr_factors` matches no parameter.
        TrainingError: a trainable parameter is neither float32 nor bfloat16.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, rank: int = 0, size: int = 1):
        parameters, names = trainable_of(model), _names_for_patterns(model)
        check_patterns(model, config)
        for name, array in parameters.items():
            check_dtype(name, array.dtype)
        self.step = 0
        """Updates made, the one in progress included."""
        self.observers: list[UpdateObserver] = []
        """Are told of every tensor's update."""
        self.kernels = kernels_for(sum(array.size for array in parameters.values()))
        """The CPU's, where there are some for a model of this size."""
        self._shapes = {name: array.shape for name, array in parameters.items()}
        self._seed = config.seed if config.rounding == "stochastic" else None
        self._rules = _rules_of(config, self.kernels)
        self._groups = {name: _group_of(name, shape, config, names[name]) for name, shape in self._shapes.items()}
        self._slots = {name: self._rule(name).slots(shape) for name, shape in self._shapes.items()}
        self.owners = shared_out(self._shapes, size)
        """Module path -> the process that updates the tensor."""
        self._state: dict[str, State] = {
            name: {slot: mx.zeros(s.shape, dtype=s.dtype) for slot, s in own.items()}
            for name, own in self._slots.items()
            if self.owners[name] == rank
        }
        self.average: MovingAverage | None = None
        """Of the weights that are updated here; None where none is asked for."""
        self._decay = config.ema_decay
        self.begin_average(model)
        self._scalars: dict[Group, Scalars] | None = None
        """Of the step in progress."""
        self._changed = False
        """Whether the step in progress has changed a parameter."""
        mx.eval(self._state)
        self._lay_together()

    def keeps(self, array: str) -> bool:
        """Whether an array of the state, by its name in `state_arrays`, is of a tensor that this process updates."""
        return array == "step" or any(array.startswith(f"{name}.") for name in self._state)

    # -- a step ---------------------------------------------------------------------------------------------------

    def update(self, model: nn.Module, gradients: dict[str, Any], learning_rate: float, gradient_scale: float = 1.0) -> None:
        """One step for every parameter that has a gradient; on a CPU model and state are evaluated when it returns, a GPU is at it then.

        Parameters and moments are updated in their own memory, unless something else still holds the old arrays.

        Args:
            model: the model this was made for.
            gradients: tree of arrays as `nn.value_and_grad` gives it; not changed and not kept.
            learning_rate: of this step, before the groups' factors.
            gradient_scale: the gradients are multiplied by it on the way, as for clipping.

        Raises:
            TrainingError: a gradient of an unknown name or of another shape; nothing is updated.
        """
        self._check_gradients(apart(dict(tree_flatten(gradients))), None)
        self.begin_step(learning_rate, gradient_scale)
        self.update_tensors(model, gradients)
        self.end_step()

    def begin_step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Begin a step whose gradients come little by little; arguments as in `update`."""
        self._scalars = {
            group: self._rules[group.optimizer].begin(self.step + 1, learning_rate * group.factor, group.weight_decay, gradient_scale)
            for group in set(self._groups.values())
        }
        self.step, self._changed = self.step + 1, False

    def update_tensors(self, model: nn.Module, gradients: Mapping[str, Any], rows: slice | None = None) -> None:
        """Update some parameters now; they and their state are evaluated when it returns, as in `update`.

        What is computed on the way takes `update_bytes`, whatever the tensors' sizes: they are worked on in pieces.

        Args:
            model: the model this was made for.
            gradients: module path -> gradient, or a tree of them; not changed and not kept.
            rows: the gradients are those of these places on the parameters' first axis only, as of some rows of an embedding or some
                experts of a stack.

        Raises:
            TrainingError: no step was begun; a gradient of an unknown name or of another shape; rows of a tensor whose rule
                needs it whole, or has yet to `observe` them. Nothing is updated.
        """
        tensors = self._tensors(model, gradients, rows)
        self._changed = self._changed or len(self._state) < len(self._shapes)  # what others update changes here too
        work = []  # all of it before the first update: what a rule refuses must come to nothing
        for group, own in tensors.items():
            rule = self._rules[group.optimizer]
            work.append((rule, rule.pieces(own, self._scalars[group])))
        for rule, pieces in work:
            rule.update(pieces, self._before, self._after)
        # What a stack's parts are views of is there, or under way: so are they for whoever reads them, in whichever thread.
        stacks = [tensor for own in tensors.values() for tensor in own if isinstance(tensor.holder, Stacked)]
        evaluate([([holder[stack.key] for holder in stack.holder.holders], stack.state.holders) for stack in stacks])

    def passes(self, name: str) -> int:
        """How often `observe` must have seen all rows of a matrix before `update_tensors` can take some of them; 0 for most rules."""
        return self._rule(name).passes if len(self._shapes[name]) >= 2 else 0

    def observe(self, model: nn.Module, gradients: Mapping[str, Any], rows: slice | None = None) -> None:
        """Take in some rows of gradients that `update_tensors` will be given later; arguments and errors as there.

        Within a pass each row comes once, in any order. Nothing is updated; nothing happens where `passes` is 0.
        """
        for group, tensors in self._tensors(model, gradients, rows).items():
            for tensor in tensors:
                if self.passes(tensor.name):
                    self._rules[group.optimizer].observe(tensor, self._scalars[group])

    def begin_average(self, model: nn.Module) -> None:
        """Has the moving average, where one is asked for, begin with the model's weights as they are."""
        if self._decay is not None:
            own = {name: array for name, array in trainable_of(model).items() if name in self._state}
            self.average = MovingAverage(own, self._decay)

    def take_average(self, model: nn.Module) -> None:
        """Takes the updated weights of a step into the moving average, where there is one. To be called before the step is whole."""
        if self.average is not None:
            self.average.update(trainable_of(model))

    def end_step(self) -> None:
        """The step is whole."""
        self._scalars = None

    def abandon_step(self) -> None:
        """The step in progress will not become whole. Where nothing was changed yet, it is as if it had not begun."""
        if self._scalars is not None and not self._changed:
            self.step -= 1
        self.end_step()

    def _tensors(self, model: nn.Module, gradients: Mapping[str, Any], rows: slice | None) -> dict[Group, list[Tensor]]:
        if self._scalars is None:
            raise TrainingError("No step was begun: call begin_step(learning_rate) before the gradients come.")
        gradients, tensors, rounding = apart(dict(tree_flatten(gradients))), {}, Rounding(self._seed, self.step)
        self._check_gradients(gradients, rows)
        gradients = {name: gradient for name, gradient in gradients.items() if name in self._state}
        places = holders_of(model, gradients)
        for name, gradient in together(gradients, self._alike).items():
            holders, keys, states = zip(*((*places[part], self._state[part]) for part in name.split(" ")), strict=True)
            holder, state = (holders[0], states[0]) if len(holders) == 1 else (Stacked(holders), Stacked(states))
            tensor = Tensor(name, holder, keys[0], state, gradient, rows, rounding)
            tensors.setdefault(self._groups[name.split(" ")[0]], []).append(tensor)
        return tensors

    def _alike(self, names: list[str]) -> bool:
        """Whether these, parts of a stack, are updated as one."""
        return self._rule(names[0]).in_stacks and len({self._groups.get(name) for name in names}) == 1

    @property
    def in_stacks(self) -> bool:
        """Whether all trained experts are updated in stacks, so that their parameters and state may lie in these."""
        return all(map(self._alike, stacks_in(self._shapes)))

    def _lay_together(self) -> None:
        for names in stacks_in(self._state) if self.in_stacks else ():
            stack = Stacked([self._state[name] for name in names])
            lay_together((stack, slot) for slot in stack)

    def _check_gradients(self, gradients: Mapping[str, mx.array], rows: slice | None) -> None:
        for name, gradient in gradients.items():
            if (shape := self._shapes.get(name)) and rows is not None:
                self._check_rows(name, rows)
                shape = (rows.stop - rows.start, *shape[1:])
            if gradient.shape != shape:
                raise TrainingError(
                    f"gradient of {name}: expected the shape {shape or 'of a parameter trainable at the start'}, got "
                    f"{gradient.shape}. Make a new trainer after freezing or changing a model."
                )

    def _check_rows(self, name: str, rows: slice) -> None:
        shape, rule = self._shapes[name], self._rule(name)
        if len(shape) < 2 or not (rule.by_rows or rule.passes):
            optimizer = self._groups[name].optimizer
            raise TrainingError(f"rows of {name} {shape}: {optimizer} updates this tensor as a whole. Give its whole gradient.")
        if rows.step not in (None, 1) or rows.start is None or rows.stop is None or not 0 <= rows.start < rows.stop <= shape[0]:
            raise TrainingError(f"rows of {name} {shape}: expected slice(start, stop) within 0 and {shape[0]}, got {rows}.")

    def _before(self, pieces: list[Piece]) -> None:
        for piece in _apart(pieces) if self.observers else ():
            for observer in self.observers:
                observer.before(piece)
        self._changed = True

    def _after(self, pieces: list[Piece]) -> None:
        for piece in _apart(pieces) if self.observers else ():
            for observer in self.observers:
                observer.after(piece.name, piece.first_row, piece.weight)

    def _rule(self, name: str) -> Rule:
        return self._rules[self._groups[name].optimizer]

    # -- state ----------------------------------------------------------------------------------------------------

    def state_arrays(self) -> dict[str, mx.array]:
        """The state as flat names -> arrays: `"step"`, and `"<module path>.<slot>"` for each slot of each parameter."""
        arrays = {
            f"{name}.{part}": array
            for name, own in self._state.items()
            for slot, kept in own.items()
            for part, array in self._slots[name][slot].apart(slot, kept).items()
        }
        if self.average is not None:
            arrays |= {f"{name}.{PART}": array for name, array in self.average.arrays.items()}
        mx.eval(arrays)  # parts of what is evaluated: there is nothing to compute, and other threads may read them
        return {"step": mx.array(self.step, dtype=mx.uint32), **arrays}

    def load_state_arrays(self, arrays: Mapping[str, mx.array]) -> None:
        """Take over what `state_arrays` gave; evaluated, so that a file behind it may change afterwards.

        Raises:
            CheckpointError: arrays are missing, unexpected, or of another shape or dtype; nothing is changed.
        """
        slots = [(name, slot, s) for name in self._state for slot, s in self._slots[name].items()]
        elsewhere = tuple(f"{name}." for name in self._shapes if name not in self._state)
        expected = {f"{name}.{part}": kept for name, slot, s in slots for part, kept in s.stored(slot).items()}
        if self.average is not None:
            expected |= {f"{name}.{PART}": (array.shape, mx.float32) for name, array in self.average.arrays.items()}
        expected["step"] = ((), mx.uint32)
        problems = [f"missing {name}" for name in expected.keys() - arrays.keys()]
        problems += [f"unexpected {name}" for name in arrays.keys() - expected.keys() if not name.startswith(elsewhere)]
        for name, (shape, dtype) in expected.items():
            if name in arrays and (arrays[name].shape != shape or arrays[name].dtype != dtype):
                problems.append(f"{name} is {arrays[name].dtype} {arrays[name].shape}, expected {dtype} {shape}")
        if problems:
            raise CheckpointError(
                f"the optimizer state does not fit this model and config: {listed(sorted(problems), 10, '; ')}. Resume with the model, "
                "optimizer and frozen parameters that the checkpoint was written with."
            )
        mx.eval(list(arrays.values()))
        self.step = int(arrays["step"].item())
        for name, slot, s in slots:  # one at a time: what stands together is a copy
            self._state[name][slot] = s.together(slot, {part: arrays[f"{name}.{part}"] for part in s.stored(slot)})
            mx.eval(self._state[name][slot])
        if self.average is not None:
            self.average.arrays = {name: arrays[f"{name}.{PART}"] for name in self.average.arrays}
        self._lay_together()

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer state."""
        averages = {} if self.average is None else self.average.arrays
        return sum(array.nbytes for own in (*self._state.values(), averages) for array in own.values())

    def groups(self) -> dict[Group, list[str]]:
        """Group -> module paths of its parameters."""
        found: dict[Group, list[str]] = {}
        for name, group in self._groups.items():
            found.setdefault(group, []).append(name)
        return found

    def __repr__(self) -> str:
        return f"Optimizers({len(self._groups)} tensors in {len(set(self._groups.values()))} groups, step {self.step})"

    def _repr_html_(self) -> str:
        rows = []
        for group, names in self.groups().items():
            elements = sum(math.prod(self._shapes[name]) for name in names)
            rows.append((group.optimizer, f"{group.factor:g}", f"{group.weight_decay:g}", len(names), f"{elements:,}"))
        state = f"Optimizer after {self.step:,} steps; its state takes {html.human_bytes(self.state_bytes)}"
        return html.table(("rule", "learning-rate factor", "weight decay", "tensors", "parameters"), rows, caption=state)


def _apart(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces, with its parts instead of each stack."""
    for piece in pieces:
        stack = piece.tensor
        if not isinstance(stack.holder, Stacked):
            yield piece
            continue
        held = zip(stack.name.split(" "), stack.holder.holders, stack.state.holders, stack.gradient, strict=True)
        for name, holder, state, gradient in held:
            yield replace(piece, tensor=Tensor(name, holder, stack.key, state, gradient, None, stack.rounding))


# -- groups and rules -------------------------------------------------------------------------------------------------


def make_rule(name: str, settings: Mapping[str, Any], kernels: Kernels | None = None, whole: bool = True) -> Rule:
    """The rule of an optimizer.

    Args:
        name: as in `TrainConfig.optimizer`.
        settings: all of them (`optimizer_settings`).
        kernels: the CPU's, where there are some.
        whole: a GPU may have the rule that updates whole tensors.
    """
    if name.endswith("8bit"):
        return (EightBit if on_cpu() else GpuEightBit)(make_rule(name.removesuffix("8bit"), settings, whole=False))
    if not on_cpu() and whole and (rule := gpu_rule(name, settings)):
        return rule
    if name in ("adamw", "adam"):
        return KernelAdam(settings, name == "adamw", kernels) if kernels else Adam(settings, name == "adamw")
    return {"sgd": SGD, "lion": Lion, "muon": Muon, "adafactor": Adafactor}[name](settings)


def _rules_of(config: TrainConfig, kernels: Kernels | None = None) -> dict[str, Rule]:
    """The rules a config needs, by name."""
    settings = optimizer_settings(config.optimizer, config.optimizer_config)
    names = {config.optimizer, "adamw"} if config.optimizer == "muon" else {config.optimizer}
    return {name: make_rule(name, settings, kernels) for name in names}


def _group_of(name: str, shape: Shape, config: TrainConfig, names: tuple[str, ...] = ()) -> Group:
    """The group of one tensor. `names`: those that patterns are matched against."""
    parts = name.split(".")
    matrix = len(shape) >= 2 and not any(part.endswith("norm") for part in parts)  # a norm may have a row of weights for each head
    hidden = matrix and not any(part in ("embed_tokens", "lm_head") for part in parts)  # a block's matrix, or a stack
    optimizer = "adamw" if config.optimizer == "muon" and not hidden else config.optimizer
    matching = (factor for pattern, factor in config.lr_factors.items() if any(fnmatchcase(n, pattern) for n in names))
    return Group(optimizer, next(matching, 1.0), config.weight_decay if matrix else 0.0)


def _names_for_patterns(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Module path -> the names that patterns are matched against: that in the model's family, where it has one, and the path."""
    family = getattr(getattr(model, "config", None), "family", None)
    return {name: (name,) if family is None else (to_hf(name, family), name) for name in parameters_of(model)}


def check_patterns(model: nn.Module, config: TrainConfig) -> None:
    """
    Raises:
        ConfigError: a pattern in `lr_factors` matches no parameter.
    """
    names = _names_for_patterns(model)
    for pattern in config.lr_factors:
        if not any(fnmatchcase(name, pattern) for own in names.values() for name in own):
            shown = [own[0] for own in names.values()]
            near = nearest(pattern.strip("*"), shown)
            hint = near if near.startswith("Did") else f"Names look like {', '.join(shown[:3])}."
            raise SettingError(f"lr_factors: the pattern {pattern!r} matches no parameter. {hint}", "lr_factors")


# -- memory, from shapes alone ----------------------------------------------------------------------------------------


def shared_out(shapes: Mapping[str, Shape], size: int) -> dict[str, int]:
    """The owner of each tensor among so many processes: the largest first, to whoever has least; a stack's have one."""
    stacks = stacks_in(shapes)
    units = [*stacks, *([name] for name in shapes if not any(name in names for names in stacks))]
    weights = {tuple(names): sum(math.prod(shapes[name]) for name in names) for names in units}
    owners, loads = {}, [0] * size
    for names in sorted(weights, key=lambda names: (-weights[names], names)):
        owner = loads.index(min(loads))
        loads[owner] += weights[names]
        owners |= dict.fromkeys(names, owner)
    return owners


def passes_of(name: str, shape: Shape, config: TrainConfig) -> int:
    """`Optimizers.passes` of a parameter."""
    ((rule, _),) = _shapes_by_rule({name: shape}, config)
    return rule.passes if len(shape) >= 2 else 0


def predict_state_bytes(shapes: Mapping[str, Shape], config: TrainConfig) -> int:
    """Bytes the optimizer state will take, from module paths and shapes of the trained parameters alone."""
    slots = (slot for rule, own in _shapes_by_rule(shapes, config) for shape in own for slot in rule.slots(shape).values())
    averages = 0 if config.ema_decay is None else 4 * sum(map(math.prod, shapes.values()))
    return averages + sum(slot.nbytes for slot in slots)


def update_bytes(shapes: Mapping[str, Shape], config: TrainConfig, dtype: mx.Dtype = mx.float32) -> int:
    """Bytes that an update needs besides parameters, gradients and state, at most.

    Args:
        shapes: module path -> shape, of the parameters that are updated at a time.
        config: `optimizer`, its settings and `weight_decay` count.
        dtype: of the parameters.
    """
    stacks = updated_in_stacks(shapes, config)
    single = {name: shape for name, shape in shapes.items() if not any(name in names for names in stacks)}
    shapes = single | {names[0]: (len(names), *shapes[names[0]]) for names in stacks}
    of_rules = [rule.update_bytes(own, dtype, config.weight_decay) for rule, own in _shapes_by_rule(shapes, config)]
    of_average = 0 if config.ema_decay is None else 8 * max(map(math.prod, shapes.values()), default=0)
    return max(of_average, *of_rules, 0)


def updated_in_stacks(names: Iterable[str], config: TrainConfig) -> list[list[str]]:
    """Of these trained parameters, by module path, those that are updated as a stack, where `lr_factors` treats all experts alike."""
    return stacks_in(names) if _rules_of(config)[config.optimizer].in_stacks else []


def random_bits_bytes(shapes: Mapping[str, Shape], config: TrainConfig, dtype: mx.Dtype) -> int:
    """Bytes of the table that stochastic rounding keeps from its first use on; arguments as for `update_bytes`."""
    if dtype == mx.float32 or config.rounding == "nearest":
        return 0
    largest = max((min(math.prod(shape), piece_size()) if on_cpu() else shape[-1] for shape in shapes.values()), default=1)
    return 4 << max(largest - 1, 1).bit_length()  # a power of two


def _shapes_by_rule(shapes: Mapping[str, Shape], config: TrainConfig) -> list[tuple[Rule, list[Shape]]]:
    found: dict[str, list[Shape]] = {}
    for name, shape in shapes.items():
        found.setdefault(_group_of(name, shape, config).optimizer, []).append(shape)
    rules = _rules_of(config)
    return [(rules[optimizer], own) for optimizer, own in found.items()]
