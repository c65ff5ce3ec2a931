"""The optimizer of a run: which rule, learning-rate factor and weight decay each tensor has, and the state of them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from mlx.utils import tree_flatten

from fulltune_nb import html
from fulltune_nb.cpu import AdamUpdate, Kernels, kernels_for, num_streams, sole, streams_for
from fulltune_nb.errors import CheckpointError, TrainingError, nearest
from fulltune_nb.models.families import to_hf
from fulltune_nb.settings import SettingError
from fulltune_nb.training.adafactor import Adafactor, TensorUpdate
from fulltune_nb.training.config import TrainConfig, optimizer_settings
from fulltune_nb.training.rounding import check_dtype, round_to, rounding_key
from fulltune_nb.training.rules import (
    SGD,
    Adam,
    EightBit,
    Lion,
    MlxRule,
    Piece,
    Place,
    Shape,
    Slot,
    State,
    UpdateRule,
    batches,
    cut,
    first_row,
    matrix_rows,
    piece_size,
    put,
    take,
)

# -- update_observer: Watching what an optimizer step does to each tensor, without keeping the old weights

class UpdateObserver(Protocol):
    """Is told of each tensor, or piece of one, before and after its update."""

    def before(self, update: PendingUpdate) -> None:
        """The update is about to be made. Nothing of it may be held on to that has not been evaluated."""

    def after(self, name: str, first_row: int, new: mx.array) -> None:
        """The same tensor or piece as it is now, evaluated."""


@dataclass(frozen=True, eq=False)
class PendingUpdate:
    """One tensor or piece, and what is about to be done to it."""

    name: str
    """Module path of the tensor."""
    step: int
    """Of the optimizer, from 1."""
    first_row: int
    """Where the piece begins in the matrix of all rows; 0 for a tensor as it is."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    weight: mx.array
    gradient: mx.array
    """Before clipping."""
    state: dict[str, mx.array]
    rule: Any
    scalars: Any
    result: Callable[[], mx.array]
    """The weight after the step, float32 and not rounded; lazy, and computed apart from the step's own."""

    def change(self, every: int = 1) -> tuple[mx.array, mx.array]:
        """The weight and the update before any rounding, both float32, of each `every`-th row; lazy.

        Rules with a `change` method (AdamW, Adam, SGD, Lion) compute just these rows, as the update itself. For the others all rows
        of the piece are computed, and the update is a difference of float32 numbers: where it is too small for those, it counts as none.
        """
        rows = slice(None, None, every)
        weight = self.weight[rows].astype(mx.float32)
        if hasattr(self.rule, "change"):
            state = {name: array[rows] for name, array in self.state.items()}
            return weight, self.rule.change(weight, self.gradient[rows], state, self.scalars)
        return weight, self.result()[rows].astype(mx.float32) - weight


def tell_after(observers: Sequence[UpdateObserver], model: nn.Module, pieces: Sequence[Piece]) -> None:
    """Tell observers of pieces that have been updated."""
    for piece in pieces if observers else ():
        array = Place(model, piece.name).array
        new = array if piece.rows is None else take(array, array.ndim, piece.rows)
        for observer in observers:
            observer.after(piece.name, first_row(piece), new)


# -- optimizer_groups: Which rule, learning-rate factor and weight decay each tensor has, by its name and shape; and the ru

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


# -- optimizer_memory: What an optimizer's state and its update take, from shapes alone

def predict_state_bytes(shapes: Mapping[str, Shape], config: TrainConfig) -> int:
    """Bytes the optimizer state will take, from module paths and shapes of the trained parameters alone."""
    groups = {name: group_of(name, shape, config, lambda path: path) for name, shape in shapes.items()}
    return sum(slot.nbytes for own in slots_of(shapes, groups, rules_of(config)).values() for slot in own.values())


def random_bits_bytes(shapes: Mapping[str, Shape], config: TrainConfig, dtype: mx.Dtype) -> int:
    """Bytes of the table that stochastic rounding keeps from its first use on; arguments as for `update_bytes`."""
    if dtype == mx.float32 or config.rounding == "nearest":
        return 0
    largest = max((_piece(shape, config) for shape in shapes.values()), default=1)
    return 4 << max(largest - 1, 1).bit_length()  # a power of two


def update_bytes(shapes: Mapping[str, Shape], config: TrainConfig, dtype: mx.Dtype = mx.float32) -> int:
    """Bytes that an update needs besides parameters, gradients and state, at most.

    None for float32 parameters and state. Else the new parameters of all pieces that are worked on at a time, in their own dtype,
    and some float32 arrays for a piece on each stream.

    Args:
        shapes: module path -> shape, of the parameters that are updated at a time.
        config: `optimizer` and its settings count.
        dtype: of the parameters.
    """
    size = sum(math.prod(shape) for shape in shapes.values())
    together = min(size, piece_size() * num_streams())
    if config.optimizer == "muon":
        largest = max((math.prod(shape) for name, shape in shapes.items() if is_hidden_matrix(name, shape)), default=0)
        return 8 * min(size, max(largest, together))
    own = {dtype, *(slot.dtype for rule in rules_of(config).values() for shape in shapes.values() for slot in rule.slots(shape).values())}
    if own == {mx.float32} and all(rule.in_place(config.weight_decay) for rule in rules_of(config).values()):
        return 0
    streams = num_streams()
    in_work = sum(sorted((size for shape in shapes.values() for size in _pieces(shape, config, streams)), reverse=True)[:streams])
    return _RESULT_BYTES * together + _BYTES_AN_ELEMENT[config.optimizer][dtype != mx.float32] * min(in_work, together)


_RESULT_BYTES = 2
_BYTES_AN_ELEMENT = {
    "adamw": (16, 16), "adam": (20, 20), "sgd": (12, 12), "lion": (8, 8), "adafactor": (3, 9), "adamw8bit": (20, 18), "lion8bit": (12, 12),
}  # fmt: skip
"""Of a piece, for float32 and for bfloat16 parameters: arrays on the way to the new parameters and state, as measured."""


def _piece(shape: Shape, config: TrainConfig) -> int:
    """Elements of the tensor's largest piece."""
    return math.prod(shape) if config.optimizer == "muon" and len(shape) >= 2 else min(math.prod(shape), piece_size())


def _pieces(shape: Shape, config: TrainConfig, most: int) -> list[int]:
    """Elements of the tensor's pieces, so many of them at most."""
    size, piece = math.prod(shape), _piece(shape, config)
    return [min(piece, size - begin) for begin in range(0, size, piece)][:most]


# -- optimizer_state: Whether arrays are what an optimizer needs: its state from a file, and gradients of some rows

def check_state_arrays(slots: Mapping[str, Mapping[str, Slot]], arrays: Mapping[str, mx.array]) -> None:
    """Nothing where the arrays are `"step"` and those of the slots, module path -> name -> slot.

    Raises:
        CheckpointError: arrays are missing, unexpected, or of another shape or dtype.
    """
    expected = {f"{name}.{slot}": (s.shape, s.dtype) for name, own in slots.items() for slot, s in own.items()}
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


def check_gradients(gradients: Mapping[str, mx.array], expected: Mapping[str, Shape | None]) -> None:
    """Nothing where each gradient has the expected shape.

    Raises:
        TrainingError: one has another, or there is no parameter of its name.
    """
    for name, gradient in gradients.items():
        if gradient.shape != expected[name]:
            raise TrainingError(
                f"gradient of {name}: expected the shape {expected[name] or 'of a parameter trainable at the start'}, got "
                f"{gradient.shape}. Make a new trainer after freezing or changing a model."
            )


def shape_of_rows(name: str, shape: Shape, rows: slice, optimizer: str, by_rows: bool) -> Shape:
    """What the gradient of some places on a tensor's first axis must look like.

    Raises:
        TrainingError: no such places, or a rule that needs the tensor whole.
    """
    if len(shape) < 2 or not by_rows:
        raise TrainingError(f"rows of {name} {shape}: {optimizer} updates this tensor as a whole. Give its whole gradient.")
    if rows.step not in (None, 1) or rows.start is None or rows.stop is None or not 0 <= rows.start < rows.stop <= shape[0]:
        raise TrainingError(f"rows of {name} {shape}: expected slice(start, stop) within 0 and {shape[0]}, got {rows}.")
    return (rows.stop - rows.start, *shape[1:])


# -- native_update: An optimizer's update by kernels of our own, in the memory of a model's parameters and of the optimi

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
        place.array, state[name]["m"], state[name]["v"] = sole([place.array, state[name]["m"], state[name]["v"]])
    mx.eval(gradients, [(Place(model, name).array, state[name]) for name in gradients])
    for piece in pieces:
        p, moments = Place(model, piece.name).array, state[piece.name]
        first = first_row(piece) * p.shape[-1]
        kernels.adam([AdamUpdate(p, gradients[piece.name], moments["m"], moments["v"], first)], piece.native)


# -- optimizer_view: What an optimizer shows in a cell

def optimizers_html(optimizers: Optimizers, shapes: Mapping[str, Shape]) -> str:
    """Its groups, as a table. `shapes`: of the parameters."""
    rows = [
        (group.optimizer, f"{group.factor:g}", f"{group.weight_decay:g}", len(names), f"{sum(math.prod(shapes[name]) for name in names):,}")
        for group, names in optimizers.groups().items()
    ]
    state = f"Optimizer after {optimizers.step:,} steps; its state takes {html.human_bytes(optimizers.state_bytes)}"
    return html.table(("rule", "learning-rate factor", "weight decay", "tensors", "parameters"), rows, caption=state)


# -- optimizers: The optimizer of a run: which rule, learning-rate factor and weight decay each tensor has, and the s

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
        config: `optimizer`, `optimizer_config`, `weight_decay`, `lr_factors`, `rounding` and `seed` count.
        hf_name: module path -> the name that patterns are matched against, besides the path itself. Not given, it is the
            model family's Hugging Face name.

    Raises:
        ConfigError: a pattern in `lr_factors` matches no parameter.
        TrainingError: a trainable parameter is neither float32 nor bfloat16.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, hf_name: HfName | None = None):
        parameters = dict(tree_flatten(model.trainable_parameters()))
        check_patterns(config, _shapes(model.parameters()), hf_name := hf_name or family_name(model))
        for name, array in parameters.items():
            check_dtype(name, array.dtype)
        self.step = 0
        """Updates made, the one in progress included."""
        self.observers: list[UpdateObserver] = []
        """Are told of every tensor's update."""
        self._shapes = shapes = {name: array.shape for name, array in parameters.items()}
        self._seed = config.seed if config.rounding == "stochastic" else None
        self._groups = {name: group_of(name, shape, config, hf_name) for name, shape in shapes.items()}
        self._rules = rules_of(config)
        self.kernels = kernels_for(sum(array.size for array in parameters.values()))
        """Take the place of MLX where there are some for a tensor's rule."""
        self._slots = slots_of(shapes, self._groups, self._rules)
        self._state: dict[str, State] = {
            name: {slot: mx.zeros(s.shape, dtype=s.dtype) for slot, s in own.items()} for name, own in self._slots.items()
        }
        self._scalars: dict[Group, Any] | None = None
        """Of the step in progress."""
        self._factored: dict[str, TensorUpdate] = {}
        """Of the step in progress, by tensor."""
        self._changed = False
        """Whether the step in progress has changed a parameter."""
        mx.eval(self._state)

    # -- a step ---------------------------------------------------------------------------------------------------

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
        self._check_gradients(dict(tree_flatten(gradients)), None)
        self.begin_step(learning_rate, gradient_scale)
        self.update_tensors(model, gradients)
        self.end_step()

    def begin_step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Begin a step of which the gradients come little by little; arguments as in `update`."""
        scalars = {
            group: self._rules[group.optimizer].begin(self.step + 1, learning_rate * group.factor, group.weight_decay, gradient_scale)
            for group in set(self._groups.values())
        }
        self.step, self._scalars, self._factored, self._changed = self.step + 1, scalars, {}, False

    def update_tensors(self, model: nn.Module, gradients: Mapping[str, Any], rows: slice | None = None) -> None:
        """Update some parameters now; they and their state are evaluated when it returns.

        What is computed on the way takes `update_bytes`, whatever the tensors' sizes: they are worked on in pieces.

        Args:
            model: the model this was made for.
            gradients: module path -> gradient, or a tree of them; not changed and not kept.
            rows: the gradients are those of these places on the parameters' first axis only, as of some rows of an embedding or some
                experts of a stack.

        Raises:
            TrainingError: no step was begun; a gradient of an unknown name or of another shape; rows of a tensor whose rule
                needs it whole. Nothing is updated.
        """
        flat = self._checked(gradients, rows)
        for name in flat:
            if self.passes(name):
                self._observe_what_is_whole(model, name, flat[name], rows)
        for batch in batches([piece for name in flat for piece in self._cut(name, model, rows)]):
            self._update_batch(model, batch, flat)

    def passes(self, name: str) -> int:
        """How often `observe` must have seen all rows of a matrix before `update_tensors` can take some of them; 0 for most rules."""
        return getattr(self._rules[self._groups[name].optimizer], "passes", 0) if len(self._shapes[name]) >= 2 else 0

    def observe(self, model: nn.Module, gradients: Mapping[str, Any], rows: slice | None = None) -> None:
        """Take in some rows of gradients that `update_tensors` will be given later; arguments and errors as there.

        Within a pass each row comes once, in any order. Nothing is updated; nothing happens where `passes` is 0.
        """
        flat = self._checked(gradients, rows)
        for name, gradient in flat.items():
            if self.passes(name):
                start, stop = matrix_rows(self._shapes[name], rows)
                self._observe(model, name, gradient, slice(start, stop), start)

    def end_step(self) -> None:
        """The step is whole."""
        self._scalars, self._factored = None, {}

    def abandon_step(self) -> None:
        """The step in progress will not become whole. Where nothing was changed yet, it is as if it had not begun."""
        changed = self._changed or any(update.changed for update in self._factored.values())
        if self._scalars is not None and not changed:
            self.step -= 1
        self.end_step()

    def _checked(self, gradients: Mapping[str, Any], rows: slice | None) -> dict[str, mx.array]:
        flat = dict(tree_flatten(gradients))
        if self._scalars is None:
            raise TrainingError("No step was begun: call begin_step(learning_rate) before the gradients come.")
        self._check_gradients(flat, rows)
        return flat

    def _pieces_of(self, name: str, start: int, stop: int) -> Iterator[slice]:
        """Rows in pieces; those of a rule that sees matrices as wholes lie within one matrix each."""
        shape = self._shapes[name]
        own = shape[-2] if self.passes(name) else stop - start
        for first in range(start, stop, own):
            yield from cut(first, min(first + own, stop), shape[-1])

    def _observe_what_is_whole(self, model: nn.Module, name: str, gradient: mx.array, rows: slice | None) -> None:
        """All passes over matrices of which the whole gradient is here and nothing was observed yet."""
        (start, stop), own = matrix_rows(self._shapes[name], rows), self._shapes[name][-2]
        for matrix in (slice(row, row + own) for row in range(start, stop, own)):
            update = self._tensor_update(name)
            if matrix.stop <= stop and matrix.start % own == 0:
                for _ in range(update.passes_left(matrix)):
                    self._observe(model, name, gradient, matrix, start)
            if update.passes_left(matrix):
                raise TrainingError(
                    f"rows of {name}: {self._groups[name].optimizer} has to observe the gradients of all rows, {self.passes(name)} times,"
                    " before some can be updated. Call observe(...) for all of them first, or give the whole gradient."
                )

    def _observe(self, model: nn.Module, name: str, gradient: mx.array, rows: slice, before: int) -> None:
        """Rows of the matrix; `before`: that of the gradient's first."""
        update, p, rank = self._tensor_update(name), Place(model, name).array, len(self._shapes[name])
        for part in self._pieces_of(name, rows.start, rows.stop):
            update.observe(take(p, rank, part), take(gradient, rank, slice(part.start - before, part.stop - before)), part)

    def _tensor_update(self, name: str) -> TensorUpdate:
        if name not in self._factored:
            group = self._groups[name]
            rule, scalars = self._rules[group.optimizer], self._scalars[group]
            self._factored[name] = TensorUpdate(rule, self._shapes[name], self._state[name], scalars)
        return self._factored[name]

    def _cut(self, name: str, model: nn.Module, rows: slice | None) -> Iterator[Piece]:
        """A tensor as it is where that needs little or no memory, else pieces of it."""
        shape, dtype = self._shapes[name], Place(model, name).array.dtype
        size, (start, stop) = math.prod(shape), matrix_rows(shape, rows)
        group = self._groups[name]
        rule = self._rules[group.optimizer]
        if scalars := native_scalars(self.kernels, rule, self._scalars[group], dtype):
            yield Piece(name, (stop - start) * shape[-1], rows and slice(start, stop), start, in_place=True, native=scalars)
            return
        own = {dtype, *(slot.dtype for slot in self._slots[name].values())}
        in_place = own == {mx.float32} and rule.in_place(group.weight_decay)
        whole = in_place or not rule.by_rows or len(shape) < 2 or size <= piece_size()
        if rows is None and whole and not self.passes(name):
            yield Piece(name, size, in_place=in_place)
            return
        for part in self._pieces_of(name, start, stop):
            yield Piece(name, (part.stop - part.start) * shape[-1], part, before=start)

    def _update_batch(self, model: nn.Module, pieces: list[Piece], gradients: Mapping[str, mx.array]) -> None:
        for piece in pieces if self.observers else ():
            self._tell_before(model, piece, gradients[piece.name])
        if native := [piece for piece in pieces if piece.native]:
            self._changed = True
            update_natively(self.kernels, model, self._state, native, gradients)
        self._update_by_mlx(model, [piece for piece in pieces if not piece.native], gradients)
        tell_after(self.observers, model, pieces)

    def _update_by_mlx(self, model: nn.Module, pieces: list[Piece], gradients: Mapping[str, mx.array]) -> None:
        new, parts = [], []
        for piece, stream in zip(pieces, streams_for([piece.size for piece in pieces]), strict=True):
            with mx.stream(stream):
                if piece.rows is None:
                    new.append(self._update_whole(Place(model, piece.name), piece, gradients[piece.name]))
                else:
                    parts.append(self._updated_rows(Place(model, piece.name), piece, gradients[piece.name]))
        mx.eval(new, [p for p, _ in parts])  # first: Lion's new parameter reads the old moment, whose memory is free only after that
        mx.eval([self._state[piece.name] for piece in pieces if piece.rows is None], [state for _, state in parts])
        cut_ones = [piece for piece in pieces if piece.rows is not None]
        for piece, (p, state) in zip(cut_ones, parts, strict=True):
            self._put_rows(Place(model, piece.name), piece, p, state)
        mx.eval([(Place(model, piece.name).array, self._state[piece.name]) for piece in cut_ones])

    def _update_whole(self, place: Place, piece: Piece, gradient: mx.array) -> mx.array:
        # Place and state are taken by the new arrays before anything is evaluated: only their graph then holds the old ones, so
        # that evaluation may write into these.
        dtype = place.array.dtype
        p, state = self._applied(piece, *self._inputs(place, piece, gradient))
        p, self._changed = round_to(p, dtype, self._key(piece.name)), True
        place.array, self._state[piece.name] = p, state
        return place.array

    def _updated_rows(self, place: Place, piece: Piece, gradient: mx.array) -> tuple[mx.array, State]:
        (new, state), old = self._applied(piece, *self._inputs(place, piece, gradient)), place.array
        return round_to(new, old.dtype, self._key(piece.name), first=piece.rows.start * old.shape[-1]), state

    def _inputs(self, place: Place, piece: Piece, gradient: mx.array) -> tuple[mx.array, mx.array, State]:
        """Parameter, gradient and state of a piece."""
        if piece.rows is None:
            return place.array, gradient, self._state[piece.name]
        rank, slots = len(self._shapes[piece.name]), self._state[piece.name]
        if self.passes(piece.name):  # the other slots are means over rows or columns
            slots = {slot: array for slot, array in slots.items() if slot == "exp_avg"}
        g_rows = take(gradient, rank, slice(piece.rows.start - piece.before, piece.rows.stop - piece.before))
        return take(place.array, rank, piece.rows), g_rows, {slot: take(array, rank, piece.rows) for slot, array in slots.items()}

    def _applied(self, piece: Piece, p: mx.array, g: mx.array, state: State) -> tuple[mx.array, State]:
        """Parameter (float32) and state of a piece after the step; lazy."""
        if piece.rows is not None and self.passes(piece.name):
            new, moment = self._factored[piece.name].apply(p, g, state.get("exp_avg"), piece.rows)
            return new, {} if moment is None else {"exp_avg": moment}
        return self._rules[self._groups[piece.name].optimizer].apply(p, g, state, self._scalars[self._groups[piece.name]])

    def _tell_before(self, model: nn.Module, piece: Piece, gradient: mx.array) -> None:
        group, inputs = self._groups[piece.name], self._inputs(Place(model, piece.name), piece, gradient)
        own = self._rules[group.optimizer], self._scalars[group], lambda: self._applied(piece, *inputs)[0]
        update = PendingUpdate(piece.name, self.step, first_row(piece), self._shapes[piece.name], *inputs, *own)
        for observer in self.observers:
            observer.before(update)

    def _put_rows(self, place: Place, piece: Piece, p: mx.array, state: State) -> None:
        rank, own, self._changed = len(self._shapes[piece.name]), self._state[piece.name], True
        place.array = put(place.array, rank, piece.rows, p)
        for slot, part in state.items():
            own[slot] = put(own[slot], rank, piece.rows, part)

    def _key(self, name: str) -> int | None:
        return None if self._seed is None else rounding_key(self._seed, self.step, name)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_arrays(self) -> dict[str, mx.array]:
        """The state as flat names -> arrays: `"step"`, and `"<module path>.<slot>"` for each slot of each parameter."""
        arrays = {f"{name}.{slot}": array for name, own in self._state.items() for slot, array in own.items()}
        return {"step": mx.array(self.step, dtype=mx.uint32), **arrays}

    def load_state_arrays(self, arrays: Mapping[str, mx.array]) -> None:
        """Take over what `state_arrays` gave; evaluated, so that a file behind it may change afterwards.

        Raises:
            CheckpointError: arrays are missing, unexpected, or of another shape or dtype; nothing is changed.
        """
        check_state_arrays(self._slots, arrays)
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

    def _check_gradients(self, flat: Mapping[str, mx.array], rows: slice | None) -> None:
        expected = {name: self._shapes.get(name) for name in flat}
        for name, shape in expected.items() if rows is not None else ():
            if shape is not None:
                optimizer = self._groups[name].optimizer
                expected[name] = shape_of_rows(name, shape, rows, optimizer, bool(self._rules[optimizer].by_rows or self.passes(name)))
        check_gradients(flat, expected)

    def __repr__(self) -> str:
        return f"Optimizers({len(self._groups)} tensors in {len(set(self._groups.values()))} groups, step {self.step})"

    def _repr_html_(self) -> str:
        return optimizers_html(self, self._shapes)


def _shapes(tree: Any) -> dict[str, Shape]:
    return {name: array.shape for name, array in tree_flatten(tree)}
