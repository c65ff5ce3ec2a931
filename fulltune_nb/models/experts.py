"""A mixture of experts: where tokens go, and the products of all experts at once.

On a CPU the routing is read, and each expert computes the tokens it gets. On a GPU nothing is read: tokens are sorted by expert, and one
product serves all experts (`mx.gather_mm`). MLX has that product for a CPU too, but one row at a time and only in float32.

Dimension letters: B rows, T tokens, M = B * T, E experts, k experts of a token, R = M * k, D hidden_size, O outputs of a product.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fulltune_nb.cpu import on_cpu
from fulltune_nb.models.layers import MLP, Linear
from fulltune_nb.models.model_config import ModelConfig
from fulltune_nb.models.parameters import Buffers, Stacked, holder_of, parameters_of, stack_of, trainable_of

NO_SHARE = 1e-20
"""Added to the sum of shares that they are divided by, as DeepSeek-V3 does: sigmoids of them all may be 0."""


@dataclass(frozen=True)
class Routing:
    """Which experts each of M tokens goes to, as read on a CPU."""

    chosen: mx.array
    """(M, chosen) indices of experts."""
    rows: tuple[mx.array, ...]
    """For each expert, the tokens it gets."""
    places: mx.array
    """(M * chosen,): where the output for each token's choice stands, when the experts' outputs follow one another."""


class RouterBalance:
    """The balance loss of one micro-batch (Fedus et al. 2022; transformers' `load_balancing_loss_func`), as far as gradients need it.

    Of E experts, f_e is the share of tokens that go to expert e, and P_e the mean of its softmax share, both over all layers; the loss is
    E sum_e f_e P_e. Where a token goes has no gradient, so the loss is linear in the shares: its gradient is known when the forward pass
    has been through all layers, and is added where the backward pass comes by the scores.

    Args:
        scale: the loss's coefficient times E over the square of how many real tokens all layers see. On a GPU an array, as `real`.
        real: (M,) bool, which tokens are no padding.
    """

    def __init__(self, scale: float | mx.array, real: np.ndarray | mx.array):
        self._scale, self._real = scale, real
        self._counts: dict[int, np.ndarray | mx.array] = {}  # id of a layer's mixture -> (E,) real tokens that each expert got

    def note(self, moe: MixtureOfExperts, chosen: mx.array) -> None:
        """Counts a layer's choices (M, k); again the same where the layer is computed again."""
        size = len(moe.experts)
        if on_cpu():
            self._counts[id(moe)] = np.bincount(np.array(chosen)[self._real].reshape(-1), minlength=size)
        else:
            self._counts.setdefault(id(moe), ((chosen[..., None] == mx.arange(size)) & self._real[:, None, None]).sum(axis=(0, 1)))

    def through(self, scores: mx.array) -> mx.array:
        """A layer's scores (M, E), which get the balance loss's gradient besides their own."""

        @mx.custom_function
        def same(scores: mx.array) -> mx.array:
            return scores * 1.0

        @same.vjp
        def with_balance(scores: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
            shares, slope = mx.softmax(scores, axis=-1), self._slope() * mx.array(self._real)[:, None]
            return cotangent + shares * (slope - (shares * slope).sum(axis=-1, keepdims=True))

        return same(scores)

    def _slope(self) -> mx.array:
        """Of the loss by a share of a real token: (E,) float32."""
        return mx.array(self._scale * sum(self._counts.values()), dtype=mx.float32)


class Correction(Buffers):
    """What is added to the experts' shares where they are chosen, so that all get work without a loss for it (Wang et al. 2024).

    Whoever trained the model moved it by counts of tokens, not by gradients: here it stays as it is.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.e_score_correction_bias = mx.zeros((config.num_experts,) if config.correction == 1 else (1, config.num_experts))
        self.freeze()

    def __call__(self, shares: mx.array) -> mx.array:
        return shares + self.e_score_correction_bias.astype(mx.float32)  # (M, E) + (E,) or (1, E)


class MixtureOfExperts(nn.Module):
    """Each token goes to its best few experts (Jiang et al. 2024); only these are computed. A shared one sees every token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._config, self._num_chosen = config, config.num_experts_per_token
        self.router = Linear(config.hidden_size, config.num_experts, bias="router" in config.biases)
        self.experts = [MLP(config, config.expert_size, config.expert_biases) for _ in range(config.num_experts)]
        if config.shared_expert_size:
            self.shared_expert = MLP(config, config.shared_expert_size)
        if config.shared_expert_gate:
            self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)
        if config.correction:
            self.correction = Correction(config)

    def __call__(self, x: mx.array, balance: RouterBalance | None = None, answering: bool = False) -> mx.array:
        """(B, T, D) -> (B, T, D). `answering`: there will be no gradients."""
        tokens = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (M, D)
        if on_cpu():
            routing = self.route(tokens, balance)
            parts = [expert(tokens[rows]) for expert, rows in zip(self.experts, routing.rows, strict=True) if rows.size]
            chosen, outputs = routing.chosen, mx.concatenate(parts)[routing.places]
        else:
            chosen = self.choose(tokens, balance)
            outputs = mixed_by_all(self.experts, tokens, chosen, answering)
        return self.combine(tokens, outputs, chosen, balance).reshape(x.shape)

    def choose(self, tokens: mx.array, balance: RouterBalance | None = None) -> mx.array:
        """The experts of each token: (M, D) -> (M, k) indices; lazy."""
        scores = mx.stop_gradient(self._scores(tokens))
        if balance is not None:  # counted is where the router alone would send them, as in transformers
            balance.note(self, self._best(scores))
        return self._best(self._corrected(scores) if "correction" in self else scores)

    def route(self, tokens: mx.array, balance: RouterBalance | None = None) -> Routing:
        """Which experts each token goes to. (M, D).

        How many tokens an expert gets depends on the data, so the choices are read here: one synchronisation a layer.
        """
        chosen = np.array(self.choose(tokens, balance))
        order = np.argsort(chosen, axis=None, kind="stable")
        borders = np.searchsorted(chosen.reshape(-1)[order], np.arange(len(self.experts) + 1))
        rows = tuple(mx.array(order[begin:end] // self._num_chosen) for begin, end in zip(borders, borders[1:], strict=False))
        return Routing(mx.array(chosen), rows, mx.array(np.argsort(order, kind="stable")))

    def combine(self, tokens: mx.array, outputs: mx.array, chosen: mx.array, balance: RouterBalance | None = None) -> mx.array:
        """Each token's mixture of its experts' outputs, (M * k, D) or (M, k, D) for `chosen` (M, k), and of the shared expert's: (M, D)."""
        scores = self._scores(tokens)
        scores = scores if balance is None else balance.through(scores)
        shares = self._shares_of_chosen(scores, chosen).astype(tokens.dtype)
        per_choice = outputs.reshape(*shares.shape, -1)  # (M, k, D)
        mixture = (per_choice * shares[..., None]).sum(axis=1)
        if "shared_expert" not in self:
            return mixture
        if "shared_expert_gate" not in self:
            return mixture + self.shared_expert(tokens)
        return mixture + mx.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)

    def besides_experts(self) -> dict[str, nn.Module]:
        """The modules whose parameters `combine` uses, by name."""
        return {name: module for name, module in self.children().items() if name != "experts"}

    def _scores(self, tokens: mx.array) -> mx.array:
        """The router's products (M, E), float32; with a correction computed in it, as whoever made that did."""
        return self.router(tokens.astype(mx.float32) if "correction" in self else tokens).astype(mx.float32)

    def _shares(self, scores: mx.array) -> mx.array:
        """Of all experts: (M, E) -> (M, E)."""
        return mx.sigmoid(scores) if self._config.scores == "sigmoid" else mx.softmax(scores, axis=-1)

    def _shares_of_chosen(self, scores: mx.array, chosen: mx.array) -> mx.array:
        """What each chosen expert's output is multiplied by: (M, E) and (M, chosen) -> (M, chosen)."""
        config = self._config
        if config.normalised_shares and config.scores == "softmax" and not config.least_sum:
            # Softmax over all experts, then normalised over the chosen, is the softmax over the chosen.
            return mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
        shares = mx.take_along_axis(self._shares(scores), chosen, axis=-1)
        if config.normalised_shares:
            shares = shares / mx.maximum(shares.sum(axis=-1, keepdims=True) + NO_SHARE, config.least_sum)
        return shares if config.share_scale is None else shares * config.share_scale

    def _best(self, values: mx.array) -> mx.array:
        """Indices of the largest few: (M, E) -> (M, k)."""
        return mx.argpartition(-values, kth=self._num_chosen - 1, axis=-1)[:, : self._num_chosen]

    def _corrected(self, scores: mx.array) -> mx.array:
        """What experts are chosen by: shares with their correction (M, E), -inf outside the groups whose two best have the largest sums."""
        values, (groups, best) = self.correction(self._shares(scores)), self._config.groups
        if groups == 1:
            return values
        grouped = values.reshape(len(values), groups, -1)
        sums = mx.topk(grouped, 2, axis=-1).sum(axis=-1)  # (M, groups)
        chosen = mx.argpartition(-sums, kth=best - 1, axis=-1)[:, :best]
        open_ = mx.put_along_axis(mx.zeros(sums.shape, dtype=mx.bool_), chosen, mx.array(True), axis=-1)
        return mx.where(open_[..., None], grouped, -math.inf).reshape(values.shape)


# ---- all experts at once, for a GPU


FEWEST_SORTED = 64
"""Rows: fewer are not worth sorting where an answer is made, as in mlx-lm."""

_LINEAR = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|bias)")


def stacks_in(names: Iterable[str]) -> list[list[str]]:
    """Of these parameters, by module path, those that a GPU has in one product: all experts' weights or biases, expert by expert."""
    found: dict[tuple[str, bool, str], list[tuple[int, str, str]]] = {}
    for name in () if on_cpu() else names:
        if match := _LINEAR.fullmatch(name):
            path, expert, linear, kind = match.groups()
            found.setdefault((path, linear == "down_proj", kind), []).append((int(expert), linear, name))
    return [[name for *_, name in sorted(own)] for own in found.values() if len(own) > 1]


def stacks_of(model: nn.Module) -> list[tuple[Stacked, str]]:
    """A model's stacks of experts, each with the key that it goes by: `stack[key]`. What is trained and what is frozen stand apart."""
    own, trained = parameters_of(model), trainable_of(model)
    found = []
    for names in stacks_in(trained) + stacks_in(own.keys() - trained.keys()):
        places = [holder_of(model, name) for name in names]
        found.append((Stacked([holder for holder, _ in places]), places[0][1]))
    return found


def lay_together(stacks: Iterable[tuple[Stacked, str]]) -> None:
    """Has what is held by these keys lie in stacks; copies only where it does not yet."""
    for stack, key in stacks:
        _ = stack[key]


def mixed_by_all(experts: Sequence[MLP], tokens: mx.array, chosen: mx.array, answering: bool = False) -> mx.array:
    """What each of a token's experts makes of it: tokens (M, D), indices of experts (M, k) -> (M, k, D). `answering`: without gradients."""
    if answering and chosen.size < FEWEST_SORTED:
        return experts[0].through(_Groups(experts, chosen.astype(mx.uint32), None, answering).project, tokens[:, None])
    flat = chosen.reshape(-1)  # (R,)
    order = mx.argsort(flat)  # the choices, one expert's after the other's
    places = mx.argsort(order)  # where each choice stands among these
    groups = _Groups(experts, flat[order].astype(mx.uint32), (flat[:, None] < mx.arange(len(experts) + 1)).sum(axis=0), answering)
    outputs = experts[0].through(groups.project, _taken(tokens, order // chosen.shape[1], places))  # (R, D)
    return _taken(outputs, places, order).reshape(*chosen.shape, -1)


def _taken(x: mx.array, rows: mx.array, places: mx.array) -> mx.array:
    """`x[rows]`, which has each row equally often, its copies at `places`, one row's after the other's. The gradient of MLX's indexing is a
    scatter, whose order is of chance on a GPU; this one's is a sum of what is gathered."""

    @mx.custom_function
    def taken(x: mx.array) -> mx.array:
        return x[rows]

    @taken.vjp
    def returned(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        gathered = cotangent[places]
        return gathered if len(gathered) == len(x) else gathered.reshape(len(x), -1, x.shape[-1]).sum(axis=1)

    return taken(x)


@dataclass(frozen=True)
class _Groups:
    """Rows that stand expert by expert, or in generation in any order, and the experts."""

    experts: Sequence[MLP]
    of_row: mx.array
    """(R,) uint32: the expert of each row, ascending. Without `starts` (M, k), of the rows (M, 1 or k, D)."""
    starts: mx.array | None
    """(E + 1,) int32: where each expert's rows begin, and where all end."""
    answering: bool

    def project(self, names: Sequence[str], x: mx.array) -> list[mx.array]:
        """Each row's product with its expert's linear maps of these names, of one size: (R, D) -> a (R, O) for each."""
        maps = [expert[name] for expert in self.experts for name in names]
        output = self._product(maps, x)  # (R, names * O)
        if "bias" in maps[0]:
            output = output + self._biases(maps).astype(output.dtype)
        return mx.split(output, len(names), axis=-1)

    def _of_rows(self, x: mx.array, stack: mx.array) -> mx.array:
        """Each row times its expert's matrix: (R, D) and (E, D, O) -> (R, O)."""
        return mx.gather_mm(x[..., None, :], stack, rhs_indices=self.of_row, sorted_indices=self.starts is not None)[..., 0, :]

    def _arrays(self, maps: Sequence[nn.Module], name: str) -> list[mx.array]:
        """The weights or biases of these maps: one stack, where there is one or an answer is made; else each as (1, ...)."""
        if self.answering:
            return [Stacked(maps)[name]]
        arrays = [one[name] for one in maps]
        stack = stack_of(arrays)
        return [array[None] for array in arrays] if stack is None else [stack]

    def _stacked(self, arrays: Sequence[mx.array], after: mx.array) -> mx.array:
        """All of an expert's under one another, (E, names * O, ...). What is no stack is copied together when `after` is there: so there is
        one block's copy at a time, and not one that is kept from the forward to the backward pass."""
        stack = mx.concatenate(mx.depends(list(arrays), [after]))
        return stack.reshape(len(self.experts), -1, *stack.shape[2:])

    def _product(self, maps: Sequence[nn.Module], x: mx.array) -> mx.array:
        arrays = self._arrays(maps, "weight")
        if self.answering:
            return self._of_rows(x, self._stacked(arrays, x).swapaxes(-1, -2))

        @mx.custom_function
        def product(x: mx.array, *weights: mx.array) -> mx.array:
            return self._of_rows(x, self._stacked(weights, x).swapaxes(-1, -2))

        @product.vjp
        def backward(primals: tuple[mx.array, ...], cotangent: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
            x, *weights = primals
            sums = self._sums(cotangent, x, weights)
            (cotangent,) = mx.depends([cotangent], sums)  # else MLX may leave these for later, and keep what they are computed from
            return self._of_rows(cotangent, self._stacked(weights, cotangent)), *sums

        return product(x, *arrays)

    def _biases(self, maps: Sequence[nn.Module]) -> mx.array:
        """Of each row's expert: (R, names * O)."""
        arrays = self._arrays(maps, "bias")
        if self.answering:
            return self._stacked(arrays, self.of_row)[self.of_row]

        @mx.custom_function
        def of_rows(*biases: mx.array) -> mx.array:
            return self._stacked(biases, self.of_row)[self.of_row]

        @of_rows.vjp
        def backward(_: object, cotangent: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
            ones = mx.ones((len(cotangent), 1), dtype=cotangent.dtype)
            return tuple(self._sums(cotangent, ones, arrays))

        return of_rows(*arrays)

    def _sums(self, cotangent: mx.array, x: mx.array, like: Sequence[mx.array]) -> list[mx.array]:
        """Each expert's `cotangent.T @ x`, cut up as `_stacked` puts together; in a fixed order, which a scatter has not on a GPU."""
        borders = mx.as_strided(self.starts, (len(self.experts), 2), (1, 1))
        sums = mx.segmented_mm(cotangent.T, x, borders)  # (E, names * O, D)
        parts = mx.split(sums.reshape(-1, x.shape[-1]), len(like))
        return [part.reshape(array.shape) for part, array in zip(parts, like, strict=True)]
