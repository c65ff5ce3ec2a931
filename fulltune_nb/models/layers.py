"""Linear maps, norms, and the feed-forward part or a mixture of experts in its place: what blocks are made of.

Dimension letters: B rows, T tokens, D hidden_size, H heads, C head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fulltune_nb.cpu import fast_math as cpu_math
from fulltune_nb.models.activations import ACTIVATIONS, CLAMPED_GATES, GATED_ACTIVATIONS, XIELU, XIelu
from fulltune_nb.models.model_config import ModelConfig


class Linear(nn.Linear):
    """`nn.Linear`, with gradients that lie row by row."""

    def __call__(self, x: mx.array) -> mx.array:
        return cpu_math.linear(x, self.weight, self.get("bias"))


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm, with the parameters the kind has; computed in float32.

    Args:
        kind: as `Family.norm`.
        size: (D,); or (H, C), each head's own weight for x (B, H, T, C).
        eps: added to the variance.
        scale: what the output is multiplied by.
    """

    def __init__(self, kind: str, size: int | tuple[int, int], eps: float, scale: float | None = None):
        super().__init__()
        self._kind, self._eps, self._scale = kind, eps, scale
        if kind.endswith("plus_one"):
            self.weight = mx.zeros(size)
        elif kind != "layer_no_params":
            self.weight = mx.ones(size)
        if kind in ("layer", "layer_plus_one"):
            self.bias = mx.zeros(size)

    def __call__(self, x: mx.array) -> mx.array:
        normed = self._normed(x)
        return normed if self._scale is None else normed * self._scale

    def _normed(self, x: mx.array) -> mx.array:
        function = mx.fast.rms_norm if self._kind.startswith("rms") else mx.fast.layer_norm
        weight, bias = self.get("weight"), () if self._kind.startswith("rms") else (self.get("bias"),)
        if weight is not None and weight.ndim == 2:
            plain = function(x.astype(mx.float32), None, *([None] if bias else []), self._eps)
            return (plain * weight[:, None]).astype(x.dtype)
        if self._kind.endswith("plus_one"):  # in bfloat16, 1 + weight would lose the weight's last bits
            scale = 1.0 + weight.astype(mx.float32)
            return function(x.astype(mx.float32), scale, *(part.astype(mx.float32) for part in bias), self._eps).astype(x.dtype)
        return function(x, weight, *bias, self._eps)


class HeadNorms(nn.Module):
    """A norm for each head: (B, H, T, C) -> (B, H, T, C)."""

    def __init__(self, kind: str, heads: int, size: int, eps: float):
        super().__init__()
        self.norms = [Norm(kind, size, eps) for _ in range(heads)]

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([norm(x[:, head : head + 1]) for head, norm in enumerate(self.norms)], axis=1)


class MLP(nn.Module):
    """Feed-forward: `down(act(gate(x)) * up(x))` when gated (Shazeer 2020), else `down(act(up(x)))`.

    Args:
        config: of the model.
        size: of what is between; None: the model's intermediate_size.
    """

    def __init__(self, config: ModelConfig, size: int | None = None):
        super().__init__()
        self._activation, self._numbers = config.activation, config.activation_numbers
        hidden, size = config.hidden_size, size or config.intermediate_size
        if "gate_up_proj" in config.fused:
            self.gate_up_proj = Linear(hidden, 2 * size, bias=False)
        else:
            if config.mlp != "plain":
                self.gate_proj = Linear(hidden, size, bias="gate_proj" in config.biases)
            self.up_proj = Linear(hidden, size, bias="up_proj" in config.biases)
        self.down_proj = Linear(size, hidden, bias="down_proj" in config.biases)
        if config.activation == XIELU:
            self.act_fn = XIelu()

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            return self.down_proj(self._gated(*mx.split(self.gate_up_proj(x), 2, axis=-1)))
        if "gate_proj" in self:
            return self.down_proj(self._gated(self.gate_proj(x), self.up_proj(x)))
        activation = self.act_fn if "act_fn" in self else ACTIVATIONS[self._activation]
        return self.down_proj(activation(self.up_proj(x)))

    def _gated(self, gate: mx.array, up: mx.array) -> mx.array:
        if self._activation in CLAMPED_GATES:
            return CLAMPED_GATES[self._activation][0](gate, up, *self._numbers)
        gated = GATED_ACTIVATIONS.get(self._activation)
        return gated(gate, up) if gated else ACTIVATIONS[self._activation](gate) * up


# ---- experts


@dataclass(frozen=True)
class Routing:
    """Which experts each of M tokens goes to."""

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
        coefficient: what the loss is multiplied by.
        real: (M,) bool, which tokens are no padding.
    """

    def __init__(self, coefficient: float, real: np.ndarray):
        self._coefficient, self._real = coefficient, real
        self._counts: dict[int, np.ndarray] = {}  # id of a layer's mixture -> (E,) real tokens that each expert got

    def note(self, moe: MixtureOfExperts, chosen: np.ndarray) -> None:
        """Counts a layer's choices (M, chosen); again the same where the layer is computed again."""
        self._counts[id(moe)] = np.bincount(chosen[self._real].reshape(-1), minlength=len(moe.experts))

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
        """Of the loss by a share of a real token: (E,)."""
        counts = sum(self._counts.values())
        rows = len(self._counts) * max(int(self._real.sum()), 1)
        return mx.array((self._coefficient * len(counts) / rows**2) * counts, dtype=mx.float32)


class MixtureOfExperts(nn.Module):
    """Each token goes to its best few experts (Jiang et al. 2024); only these are computed. A shared one sees every token."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self._num_chosen, self._normalised = config.num_experts_per_token, config.normalised_shares
        self.router = Linear(config.hidden_size, config.num_experts, bias="router" in config.biases)
        self.experts = [MLP(config, config.expert_size) for _ in range(config.num_experts)]
        if config.shared_expert_size:
            self.shared_expert = MLP(config, config.shared_expert_size)
            self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)

    def __call__(self, x: mx.array, balance: RouterBalance | None = None) -> mx.array:
        tokens = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (M, D)
        routing = self.route(tokens, balance)
        outputs = [expert(tokens[rows]) for expert, rows in zip(self.experts, routing.rows, strict=True) if rows.size]
        return self.combine(tokens, mx.concatenate(outputs), routing, balance).reshape(x.shape)

    def route(self, tokens: mx.array, balance: RouterBalance | None = None) -> Routing:
        """Which experts each token goes to. (M, D).

        How many tokens an expert gets depends on the data, so the choices are read here: one synchronisation a layer.
        """
        scores = mx.stop_gradient(self._scores(tokens))
        chosen = np.array(mx.argpartition(-scores, kth=self._num_chosen - 1, axis=-1)[:, : self._num_chosen])
        if balance is not None:
            balance.note(self, chosen)
        order = np.argsort(chosen, axis=None, kind="stable")
        borders = np.searchsorted(chosen.reshape(-1)[order], np.arange(len(self.experts) + 1))
        rows = tuple(mx.array(order[begin:end] // self._num_chosen) for begin, end in zip(borders, borders[1:], strict=False))
        return Routing(mx.array(chosen), rows, mx.array(np.argsort(order, kind="stable")))

    def combine(self, tokens: mx.array, outputs: mx.array, routing: Routing, balance: RouterBalance | None = None) -> mx.array:
        """Each token's mixture of its experts' outputs, which come one expert after the other, and of the shared expert's:
        (M * chosen, D) -> (M, D)."""
        scores = self._scores(tokens)
        scores = scores if balance is None else balance.through(scores)
        if self._normalised:  # softmax over all experts, then normalised over the chosen, is the softmax over the chosen
            shares = mx.softmax(mx.take_along_axis(scores, routing.chosen, axis=-1), axis=-1)
        else:
            shares = mx.take_along_axis(mx.softmax(scores, axis=-1), routing.chosen, axis=-1)
        shares = shares.astype(tokens.dtype)
        per_choice = outputs[routing.places].reshape(*shares.shape, -1)  # (M, chosen, D)
        mixture = (per_choice * shares[..., None]).sum(axis=1)
        if "shared_expert" not in self:
            return mixture
        return mixture + mx.sigmoid(self.shared_expert_gate(tokens)) * self.shared_expert(tokens)

    def besides_experts(self) -> dict[str, nn.Module]:
        """The modules whose parameters `combine` uses, by name."""
        return {name: module for name, module in self.children().items() if name != "experts"}

    def _scores(self, tokens: mx.array) -> mx.array:
        return self.router(tokens).astype(mx.float32)
