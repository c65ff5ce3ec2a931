"""How tensors are updated: the arithmetic of each optimizer, what it keeps between steps, and the pieces it works in.

A rule updates many tensors in one call. What float32 arithmetic needs no memory for is updated whole and in place. Anything else is
worked on in pieces that fit into a cache, so that what is computed on the way stays small: a tensor (..., C) is seen as a matrix
(R, C), and a piece is some of its R rows. Pieces are dealt out to the streams that a device has.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from fulltune_nb.cpu import AdamUpdate, Kernels, evaluate, num_streams, on_cpu, sole, streams_for
from fulltune_nb.training.rounding import Rounding

Shape = tuple[int, ...]
State = dict[str, mx.array]
Scalars = Any
"""What a rule's `begin` makes of a step's numbers."""


@dataclass(frozen=True)
class Slot:
    """An array that is kept for a parameter between steps; it starts as zeros."""

    shape: Shape
    dtype: mx.Dtype = mx.float32
    parts: tuple[str, ...] = ()
    """Names of several of one shape (..., C) that stand in it together, as (..., parts, C); it goes by these in files. (): it is one."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.size

    def apart(self, name: str, array: mx.array) -> dict[str, mx.array]:
        """Each part by its name, or the array by this name."""
        return {part: array[..., i, :] for i, part in enumerate(self.parts)} if self.parts else {name: array}

    def together(self, name: str, parts: State) -> mx.array:
        """The array that `apart` made these of."""
        return mx.stack([parts[part] for part in self.parts], axis=-2) if self.parts else parts[name]

    def stored(self, name: str) -> dict[str, tuple[Shape, mx.Dtype]]:
        """Name -> shape and dtype of what `apart` gives."""
        shape = (*self.shape[:-2], self.shape[-1]) if self.parts else self.shape
        return dict.fromkeys(self.parts or (name,), (shape, self.dtype))


@dataclass(eq=False)
class Tensor:
    """A parameter that is about to be updated, with its gradient; or a stack of some, which `Stacked` holds."""

    name: str
    """Module path; a stack's are all, with blanks between."""
    holder: Any
    """Module, dict or list of the model that holds the parameter, at `key`."""
    key: Any
    state: State
    """Changed in place."""
    gradient: mx.array
    """Before clipping; of the whole tensor, or of some places on its first axis."""
    places: slice | None
    """These places; None: all."""
    rounding: Rounding

    @property
    def array(self) -> mx.array:
        """The parameter."""
        return self.holder[self.key]

    @property
    def rows(self) -> slice:
        """The rows of the matrix (R, C) that the gradient is of."""
        shape = self.array.shape
        per_place = math.prod(shape[1:-1])
        return slice(self.places.start * per_place, self.places.stop * per_place) if self.places else slice(0, math.prod(shape[:-1]))


@dataclass(frozen=True, eq=False)
class Piece:
    """A tensor, or some of its rows, in a step. Its arrays are taken from the model when they are asked for."""

    tensor: Tensor
    rows: slice | None
    """Of the matrix (R, C); None: the tensor as it is."""
    rule: Rule
    scalars: Scalars
    in_place: bool = False
    """The update needs no memory of its own."""

    @property
    def name(self) -> str:
        """Module path of the tensor."""
        return self.tensor.name

    @property
    def step(self) -> int:
        """Of the optimizer, from 1."""
        return self.tensor.rounding.step

    @property
    def shape(self) -> Shape:
        """Of the whole tensor."""
        return self.tensor.array.shape

    @property
    def first_row(self) -> int:
        """Where the piece begins in the matrix of all rows; 0 for a tensor as it is."""
        return self.rows.start if self.rows else 0

    @property
    def size(self) -> int:
        """Elements."""
        return (self.rows.stop - self.rows.start) * self.shape[-1] if self.rows else self.tensor.array.size

    @property
    def weight(self) -> mx.array:
        """Rows of the parameter (r, C), or the parameter as it is."""
        return take(self.tensor.array, len(self.shape), self.rows)

    @property
    def gradient(self) -> mx.array:
        """The same rows of the gradient, before clipping."""
        if self.rows is None:
            return self.tensor.gradient
        before = self.tensor.rows.start
        return take(self.tensor.gradient, len(self.shape), slice(self.rows.start - before, self.rows.stop - before))

    @property
    def state(self) -> State:
        """The same rows of the slots, for a rule that works by rows."""
        return {name: take(array, len(self.shape), self.rows) for name, array in self.tensor.state.items()}

    def change(self, every: int = 1) -> tuple[mx.array, mx.array]:
        """The weight and the update before any rounding, both float32, of each `every`-th row; lazy.

        Rules with a `change` (AdamW, Adam, SGD, Lion) compute just these rows, as the update itself. For the others all rows of the
        piece are computed, and the update is a difference of float32 numbers: where it is too small for those, it counts as none.
        """
        rows = slice(None, None, every)
        weight = self.weight[rows].astype(mx.float32)
        if self.rule.change is None:
            return weight, self.rule.result(self)[0][rows].astype(mx.float32) - weight
        state = {name: array[rows] for name, array in self.state.items()}
        return weight, self.rule.change(weight, self.gradient[rows], state, self.scalars)


def take(array: mx.array, rank: int, rows: slice | None) -> mx.array:
    """Some rows of what is kept for a tensor of this rank: (..., *) -> (rows, *); all of it as it is where `rows` is None."""
    return array if rows is None else _as_rows(array, rank)[rows]


def put(array: mx.array, rank: int, rows: slice, part: mx.array) -> mx.array:
    """`array` with some rows replaced; lazy. Evaluated, it is in the memory of `array` unless something else holds that."""
    changed = mx.slice_update(_as_rows(array, rank), part, mx.array([rows.start]), axes=[0])
    return changed if changed.shape == array.shape else changed.reshape(array.shape)


def _as_rows(array: mx.array, rank: int) -> mx.array:
    return array if rank == 2 else array.reshape(-1, *array.shape[rank - 1 :])


def piece_size() -> int:
    """Elements of a piece. On the CPU one that fits into the cache; elsewhere enough to keep a GPU busy."""
    return 2**20 if on_cpu() else 2**24


def cut(rows: slice, columns: int) -> Iterator[slice]:
    """Rows in pieces of about `piece_size()` elements."""
    step = max(1, piece_size() // columns)
    return (slice(row, min(row + step, rows.stop)) for row in range(rows.start, rows.stop, step))


def batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are evaluated together: a piece for each stream, more where they are small or need no memory."""
    most, batch, size = piece_size() * num_streams(), [], 0
    for piece in pieces:
        own = piece.size // 8 if piece.in_place else piece.size
        if batch and size + own > most:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += own
    if batch:
        yield batch


def at_a_time(sizes: Sequence[int], whole: bool = False) -> int:
    """Elements, at most, that are updated together of tensors of these sizes: those of a batch, and on a GPU of two.

    `whole`: the tensors are not worked on in pieces.
    """
    batch = piece_size() * num_streams()
    batch = max(*sizes, batch) if whole else batch
    return min(sum(sizes), batch if on_cpu() else 2 * batch)


class Rule(ABC):
    """An optimizer's rule. It holds no state: what belongs to a step is in the scalars, what outlives it in the tensors."""

    by_rows = True
    """Rows are updated independently of each other: `apply` may be called with some rows of p, g and every slot, and gives bit
    for bit what it gives for all at once. A row is what has one place on all axes but the last; slots have the same rows."""
    passes = 0
    """How often `observe` has to see all rows of a matrix before some of them can be updated."""
    change: Callable[[mx.array, mx.array, State, Scalars], mx.array] | None = None
    """p, g, state, scalars -> what `apply` adds to a float32 p, before any rounding; float32, lazy. Any rows of the tensors will do.
    None: only the difference of float32 numbers is known."""
    two_at_a_time = True
    """The host waits for a batch when the next one is sent, so that what a GPU computes on the way is of two at most."""
    in_stacks = False
    """Tensors that are parts of a stack are updated as one, with the same bits."""
    temporary_bytes = (0, 0)
    """Of an element that is worked on, for float32 and for bfloat16 parameters: arrays on the way to the new ones, as measured."""

    @abstractmethod
    def slots(self, shape: Shape) -> dict[str, Slot]:
        """Name -> array kept for a parameter of this shape."""

    @abstractmethod
    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> Scalars:
        """The scalars of a step, for all tensors with this learning rate and weight decay. `step` counts from 1."""

    def in_place(self, scalars: Scalars) -> bool:
        """Whether float32 parameters and state are updated with no memory besides their own."""
        return False

    @abstractmethod
    def apply(self, p: mx.array, g: mx.array, state: State, scalars: Scalars) -> tuple[mx.array, State]:
        """The parameter (float32, not rounded) and the state after the step; lazy."""

    def observe(self, tensor: Tensor, scalars: Scalars) -> None:
        """Take in some rows of a gradient that will be updated later; nothing of the tensor changes."""
        raise NotImplementedError

    def pieces(self, tensors: Sequence[Tensor], scalars: Scalars) -> list[Piece]:
        """Tensors as they are where that needs little or no memory, else pieces of them."""
        found, most, in_place = [], piece_size(), self.in_place(scalars)
        for tensor in tensors:
            array = tensor.array
            own = in_place and all(a.dtype == mx.float32 for a in (array, *tensor.state.values()))
            if tensor.places is None and (own or not self.by_rows or array.ndim < 2 or array.size <= most):
                found.append(Piece(tensor, None, self, scalars, own))
            else:
                found += [Piece(tensor, rows, self, scalars) for rows in cut(tensor.rows, array.shape[-1])]
        return found

    def update(self, pieces: Sequence[Piece], before: Callable[[list[Piece]], None], after: Callable[[list[Piece]], None]) -> None:
        """Update parameters and state, by `evaluate`. `before` and `after` are told of the pieces that are updated together."""
        sent: list[Piece] = []
        for batch in batches(pieces):
            before(batch)
            self.update_batch(batch)
            after(batch)
            if sent and self.two_at_a_time:
                mx.eval([piece.tensor.array for piece in sent])
            sent = batch

    def update_batch(self, batch: Sequence[Piece]) -> None:
        """Update some pieces at the same time, by MLX."""
        streams, results = streams_for([piece.size for piece in batch]), []
        for piece, stream in zip(batch, streams, strict=True):
            with mx.stream(stream):
                results.append(self.result(piece))
        states = [state for _, state in results]
        places = [(piece.tensor.array.dtype, piece.name, piece.first_row * piece.shape[-1]) for piece in batch]
        # Nothing here holds the float32 results any longer, which are larger than what they are rounded to.
        arrays = batch[0].tensor.rounding.round_all([results.pop(0)[0] for _ in batch], places, streams)
        whole, parts = [], []
        for piece, array, state in zip(batch, arrays, states, strict=True):
            if piece.size == piece.tensor.array.size:
                # Model and state take the new arrays before anything is evaluated: only their graph then holds the old ones, so that
                # evaluation may write into these.
                piece.tensor.holder[piece.tensor.key] = array.reshape(piece.shape)
                piece.tensor.state.update({slot: new.reshape(piece.tensor.state[slot].shape) for slot, new in state.items()})
                whole.append(piece.tensor)
            else:
                parts.append((piece, array, state))
        # The parameters first: Lion's new one reads the old moment, whose memory is free only after that.
        evaluate([tensor.array for tensor in whole], [new for _, new, _ in parts])
        evaluate([list(tensor.state.values()) for tensor in whole], [state for *_, state in parts])
        if parts:  # a GPU would copy a tensor, of which it has yet to read rows, to change some
            mx.eval([(new, state) for _, new, state in parts])
        for piece, new, state in parts:
            tensor, rank = piece.tensor, piece.tensor.array.ndim
            tensor.holder[tensor.key] = put(tensor.array, rank, piece.rows, new)
            tensor.state.update({slot: put(tensor.state[slot], rank, piece.rows, part) for slot, part in state.items()})
        evaluate([(piece.tensor.array, piece.tensor.state) for piece, *_ in parts])

    def update_bytes(self, shapes: Sequence[Shape], dtype: mx.Dtype, weight_decay: float) -> int:
        """Bytes that an update of tensors in this dtype needs besides parameters, gradients and state, at most.

        None in place. Else the new parameters of all pieces of a batch, and some float32 arrays for a piece on each stream; on a GPU,
        which is sent all at once, for all pieces.
        """
        dtypes = {dtype, *(slot.dtype for shape in shapes for slot in self.slots(shape).values())}
        if dtypes == {mx.float32} and self.in_place(self.begin(1, 0.0, weight_decay, 1.0)):
            return 0
        piece, streams, sizes = piece_size(), num_streams(), [math.prod(shape) for shape in shapes]
        pieces = (min(piece, size - begin) for size in sizes for begin in range(0, size, piece)[:streams])
        in_work = sum(sorted(pieces, reverse=True)[:streams]) if on_cpu() else at_a_time(sizes)
        return 2 * at_a_time(sizes) + self.temporary_bytes[dtype != mx.float32] * in_work

    def result(self, piece: Piece) -> tuple[mx.array, State]:
        """A piece (float32, not rounded) and its state after the step; lazy, nothing is changed."""
        return self.apply(piece.weight, piece.gradient, piece.state, piece.scalars)


_compiled = partial(mx.compile, shapeless=True)


def scalars_of(*values: float) -> tuple[mx.array, ...]:
    """Numbers of a step as float32 arrays: what is compiled is not made anew for each."""
    return tuple(mx.array(value, dtype=mx.float32) for value in values)


@_compiled
def _decayed_gradient(p: mx.array, g: mx.array, weight_decay: mx.array, scale: mx.array) -> mx.array:
    return g.astype(mx.float32) * scale + weight_decay * p.astype(mx.float32)


@_compiled
def _average(m: mx.array, g: mx.array, keep: mx.array, take: mx.array) -> mx.array:
    return keep * m + take * g.astype(mx.float32)


@_compiled
def _average_of_squares(v: mx.array, g: mx.array, keep: mx.array, take: mx.array, scale: mx.array) -> mx.array:
    g = g.astype(mx.float32) * scale
    return keep * v + take * (g * g)


@_compiled
def _adam_step(p, m, v, keep, rate, root, eps) -> mx.array:
    return keep * p.astype(mx.float32) - rate * m / (mx.sqrt(v) * root + eps)


@_compiled
def _descend(p: mx.array, g: mx.array, rate: mx.array) -> mx.array:
    return p.astype(mx.float32) - rate * g.astype(mx.float32)


@_compiled
def _descend_ahead(p, g, m, rate, rate_of_momentum) -> mx.array:
    return p.astype(mx.float32) - (rate * g.astype(mx.float32) + rate_of_momentum * m)


@_compiled
def _lion_step(p, g, m, keep, take, kept, rate) -> mx.array:
    return kept * p.astype(mx.float32) - rate * mx.sign(keep * m + take * g.astype(mx.float32))


class Adam(Rule):
    """Adam (Kingma & Ba 2015), bias-corrected as in PyTorch; AdamW (Loshchilov & Hutter 2019) when `decoupled`.

    Not decoupled, weight decay is added to the gradient, as `torch.optim.Adam` does.
    """

    def __init__(self, settings: Mapping[str, Any], decoupled: bool):
        self.betas, self.eps, self.bias_correction = settings["betas"], settings["eps"], settings.get("bias_correction", True)
        self.decoupled, self.temporary_bytes = decoupled, (16, 16) if decoupled else (20, 20)

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"m": Slot(shape), "v": Slot(shape)}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        b1, b2 = self.betas
        correction1, correction2 = (1.0 - b1**step, 1.0 - b2**step) if self.bias_correction else (1.0, 1.0)
        decay_now = weight_decay if self.decoupled else 0.0
        l2 = None if self.decoupled or not weight_decay else scalars_of(weight_decay, gradient_scale)
        scale = 1.0 if l2 else gradient_scale  # the decayed gradient is scaled already
        m, v = (b1, (1.0 - b1) * scale), (b2, 1.0 - b2, scale)
        p = (1.0 - learning_rate * decay_now, learning_rate / correction1, 1.0 / math.sqrt(correction2), self.eps)
        return {"l2": l2, "m": scalars_of(*m), "v": scalars_of(*v), "p": scalars_of(*p), "numbers": (*m, *v, *p)}

    def in_place(self, scalars: dict[str, Any]) -> bool:
        return scalars["l2"] is None  # else the decayed gradient is an array of its own

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        m, v = self._moments(p, g, state, scalars)
        return _adam_step(p, m, v, *scalars["p"]), {"m": m, "v": v}

    def change(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> mx.array:
        (m, v), (keep, *step) = self._moments(p, g, state, scalars), scalars["p"]
        return _adam_step(p, m, v, keep - 1.0, *step)

    def _moments(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, mx.array]:
        if scalars["l2"]:
            g = _decayed_gradient(p, g, *scalars["l2"])
        return _average(state["m"], g, *scalars["m"]), _average_of_squares(state["v"], g, *scalars["v"])


class KernelAdam(Adam):
    """`Adam`, where float32 parameters are updated by the CPU's kernel: one pass over memory on all cores, with the same bits."""

    def __init__(self, settings: Mapping[str, Any], decoupled: bool, kernels: Kernels):
        super().__init__(settings, decoupled)
        self.kernels = kernels

    def pieces(self, tensors: Sequence[Tensor], scalars: dict[str, Any]) -> list[Piece]:
        in_place = self.in_place(scalars)
        own = [tensor for tensor in tensors if in_place and tensor.array.dtype == mx.float32]
        others = [tensor for tensor in tensors if not (in_place and tensor.array.dtype == mx.float32)]
        pieces = [Piece(tensor, tensor.rows if tensor.places else None, self, scalars, in_place=True) for tensor in own]
        return pieces + super().pieces(others, scalars)

    def update_batch(self, batch: Sequence[Piece]) -> None:
        own = [piece for piece in batch if piece.in_place]
        tensors = [piece.tensor for piece in own]
        # Model and state take the new arrays before these are evaluated: then nothing but their graph holds the old ones.
        arrays = sole([array for tensor in tensors for array in (tensor.array, tensor.state["m"], tensor.state["v"])])
        for i, tensor in enumerate(tensors):
            tensor.holder[tensor.key], tensor.state["m"], tensor.state["v"] = arrays[3 * i : 3 * i + 3]
        gradients = [mx.contiguous(tensor.gradient.astype(mx.float32)) for tensor in tensors]
        mx.eval(arrays, gradients)
        updates = []
        for i, (piece, g) in enumerate(zip(own, gradients, strict=True)):
            p, m, v = arrays[3 * i : 3 * i + 3]
            updates.append(AdamUpdate(p, g, m, v, first=piece.first_row * p.shape[-1]))
        if own:
            self.kernels.adam(updates, own[0].scalars["numbers"])
        if others := [piece for piece in batch if not piece.in_place]:
            super().update_batch(others)


class SGD(Rule):
    """Stochastic gradient descent with momentum, dampening and Nesterov's look ahead, as `mlx.optimizers.SGD`."""

    temporary_bytes = (12, 12)

    def __init__(self, settings: Mapping[str, Any]):
        self.momentum, self.dampening, self.nesterov = settings["momentum"], settings["dampening"], settings["nesterov"]

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"v": Slot(shape)} if self.momentum else {}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        scale = 1.0 if weight_decay else gradient_scale  # the decayed gradient is scaled already
        return {
            "l2": scalars_of(weight_decay, gradient_scale) if weight_decay else None,
            "v": scalars_of(self.momentum, (1.0 - self.dampening) * scale),
            "plain": scalars_of(learning_rate * scale),
            "momentum": scalars_of(learning_rate),
            "nesterov": scalars_of(learning_rate * scale, learning_rate * self.momentum),
        }

    def in_place(self, scalars: dict[str, Any]) -> bool:
        return scalars["l2"] is None

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        if scalars["l2"]:
            g = _decayed_gradient(p, g, *scalars["l2"])
        if not self.momentum:
            return _descend(p, g, *scalars["plain"]), {}
        v = _average(state["v"], g, *scalars["v"])
        if self.nesterov:
            return _descend_ahead(p, g, v, *scalars["nesterov"]), {"v": v}
        return _descend(p, v, *scalars["momentum"]), {"v": v}

    def change(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> mx.array:
        if scalars["l2"]:
            g, scalars = _decayed_gradient(p, g, *scalars["l2"]), {**scalars, "l2": None}
        return self.apply(mx.zeros_like(p), g, state, scalars)[0]  # apart from the decay, p is only added to


class Lion(Rule):
    """Lion (Chen et al. 2023): the sign of an average of gradients."""

    temporary_bytes = (8, 8)

    def __init__(self, settings: Mapping[str, Any]):
        self.betas = settings["betas"]

    def slots(self, shape: Shape) -> dict[str, Slot]:
        return {"m": Slot(shape)}

    def begin(self, step: int, learning_rate: float, weight_decay: float, gradient_scale: float) -> dict[str, Any]:
        b1, b2 = self.betas
        p = scalars_of(b1, (1.0 - b1) * gradient_scale, 1.0 - learning_rate * weight_decay, learning_rate)
        return {"p": p, "m": scalars_of(b2, (1.0 - b2) * gradient_scale)}

    def in_place(self, scalars: dict[str, Any]) -> bool:
        return True

    def apply(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> tuple[mx.array, State]:
        return _lion_step(p, g, state["m"], *scalars["p"]), {"m": _average(state["m"], g, *scalars["m"])}

    def change(self, p: mx.array, g: mx.array, state: State, scalars: dict[str, Any]) -> mx.array:
        keep, take, kept, rate = scalars["p"]
        return _lion_step(p, g, state["m"], keep, take, kept - 1.0, rate)
