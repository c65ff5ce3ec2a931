"""A mixture of experts in the place of a block's MLP.

Dimension letters: B rows, T tokens, M = B * T, D hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fulltune_nb.models.layers import MLP, Linear
from fulltune_nb.models.model_config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """Which experts each of M tokens goes to."""

    chosen: mx.array
    """(M, chosen) indices of experts."""
    rows: tuple[mx.array, ...]
    """For each expert, the tokens it gets."""
    places: mx.array
    """(M * chosen,): where the output for each token's choice stands, when the experts' outputs follow one another."""


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

    def __call__(self, x: mx.array) -> mx.array:
        tokens = x.reshape(-1, x.shape[-1])  # (B, T, D) -> (M, D)
        routing = self.route(tokens)
        outputs = [expert(tokens[rows]) for expert, rows in zip(self.experts, routing.rows, strict=True) if rows.size]
        return self.combine(tokens, mx.concatenate(outputs), routing).reshape(x.shape)

    def route(self, tokens: mx.array) -> Routing:
        """Which experts each token goes to. (M, D).

        How many tokens an expert gets depends on the data, so the choices are read here: one synchronisation a layer.
        """
        scores = mx.stop_gradient(self._scores(tokens))
        chosen = np.array(mx.argpartition(-scores, kth=self._num_chosen - 1, axis=-1)[:, : self._num_chosen])
        order = np.argsort(chosen, axis=None, kind="stable")
        borders = np.searchsorted(chosen.reshape(-1)[order], np.arange(len(self.experts) + 1))
        rows = tuple(mx.array(order[begin:end] // self._num_chosen) for begin, end in zip(borders, borders[1:], strict=False))
        return Routing(mx.array(chosen), rows, mx.array(np.argsort(order, kind="stable")))

    def combine(self, tokens: mx.array, outputs: mx.array, routing: Routing) -> mx.array:
        """Each token's mixture of its experts' outputs, which come one expert after the other, and of the shared expert's:
        (M * chosen, D) -> (M, D)."""
        scores = self._scores(tokens)
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
