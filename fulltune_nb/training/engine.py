"""Loss and gradients by automatic differentiation over the whole model: the fast way, beside the lean one in `layerwise`.

Both give the same step to rounding. They differ in what exists at once: here all blocks' activations after the forward pass, and all
gradients after the backward pass; there each block's input, and the gradients of one block.

Dimension letters: B rows, T tokens, N trained positions, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from fulltune_nb.cpu import Kernels, evaluate, on_cpu
from fulltune_nb.data.batches import Batch
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.embedding import EMBEDDING, with_exact_sums
from fulltune_nb.models.experts import RouterBalance, lay_together, stacks_of
from fulltune_nb.models.parameters import Arrays, apart, backward_through, parameters_of, swapped_in, together, trainable_of
from fulltune_nb.training.gradients import Engine, GradientPiece, add, check_finite, global_norm, norm_of
from fulltune_nb.training.layerwise import Layerwise, balance_of
from fulltune_nb.training.loss import cross_entropy, losses_by_kernel, target_log_probs
from fulltune_nb.training.objective import PLAIN, Objective, StepSize
from fulltune_nb.training.parallel import Ranks

CHUNK_ELEMENTS = 2**23
"""Logits of a chunk where a kernel computes the loss: 32 MiB."""


Sums = tuple[mx.array | None, Arrays]
"""Of the micro-batches so far: their loss, None before the first, and their gradients."""


def added(sums: Sums, loss: mx.array, gradients: Arrays) -> Sums:
    """The sums with one micro-batch more; lazy."""
    total, so_far = sums
    add(so_far, gradients)
    return loss if total is None else total + loss, so_far


class WholeGraph:
    """Computes the gradients of optimizer steps, all at once.

    Args:
        model: its trainable parameters get gradients.
        grad_checkpoint: keep only the blocks' inputs for the backward pass, and compute the rest again.
        compiled: once for each shape of batch; on a CPU not with experts.
        kernels: for the norm, and but for experts the loss; None: MLX computes them.
        balance: coefficient of the router's balance loss, which the gradients then contain, but not the loss that is told.
        in_stacks: on a GPU the experts' parameters lie in stacks from now on; where they are updated one by one, they should not.
        ranks: the processes that share the micro-batches; None: this one has them all.
        objective: what is minimized.
    """

    def __init__(
        self,
        model: Decoder,
        grad_checkpoint: bool = False,
        compiled: bool = False,
        kernels: Kernels | None = None,
        balance: float = 0.0,
        in_stacks: bool = True,
        ranks: Ranks | None = None,
        objective: Objective = PLAIN,
    ):
        self._model, self._config, self._kernels, self._ranks = model, model.config, kernels, ranks
        self._objective = objective
        self._grad_checkpoint, self._balance, self._stacks = grad_checkpoint, balance, stacks_of(model) if in_stacks else []
        # A graph with experts cannot wait for its loss: their routing is read while it is made.
        self._in_halves = kernels is not None and not self._config.num_experts
        graph = self._halves if self._in_halves else self._whole
        # What a loss of the user's reads of a batch would be constants of a compiled program.
        self._graph = mx.compile(graph) if compiled and (self._in_halves or objective.loss is None) else graph

    def __repr__(self) -> str:
        return "WholeGraph()"

    def gradients(self, number: int, batches: Sequence[Batch]) -> WholeGradients:
        """The step's loss and gradients, evaluated; see `gradients.Engine`."""
        lay_together(self._stacks)
        size = StepSize.of(batches)
        if self._ranks is not None:
            return WholeGradients(number, batches, *self._sums_of_ranks(self._ranks, number, batches, size), self._kernels)
        sums: Sums = None, {}
        for place, batch in enumerate(batches):
            sums = self._with((number, place), batch, size, sums)
        return WholeGradients(number, batches, *sums, self._kernels)

    def _with(self, place: tuple[int, int], batch: Batch, size: StepSize, sums: Sums) -> Sums:
        """The sums with one micro-batch more; by `evaluate`. `place`: the numbers of the step, and of the micro-batch in it."""
        inputs = inputs_of(batch, self._model, self._objective.noise(batch, *place, self._config.hidden_size))
        # Each micro-batch is weighted by its tokens: the sum is the mean over all tokens, not a mean of means.
        weights = batch.weights / size.tokens
        if self._in_halves:
            sums = added(sums, *self._by_kernel(batch, inputs, weights, size))
        else:
            sums = self._by_graph(batch, inputs, weights, size, sums)
        # One micro-batch's activations at a time; and before the norm, in one graph with which the peak of `grad_checkpoint` doubles.
        evaluate(*sums)
        return sums

    def _sums_of_ranks(self, ranks: Ranks, step: int, batches: Sequence[Batch], size: StepSize) -> Sums:
        """The sums over all ranks' micro-batches."""
        sums: Arrays = {}  # the loss is one of them
        for number, batch in ranks.own(batches):
            loss, gradients = self._with((step, number), batch, size, (None, {}))
            own = {"": loss, **gradients}
            del loss, gradients  # added to the running sum, none is held
            sums = ranks.added(number, len(batches), sums, own)
        sums = ranks.total(len(batches), sums)
        return sums.pop(""), sums

    def _by_graph(self, batch: Batch, inputs: Arrays, weights: np.ndarray, size: StepSize, sums: Sums) -> Sums:
        """The sums, to which a micro-batch's share of the mean loss and its gradients are added; lazy."""
        targets: dict[str, Any] = {"targets": mx.array(batch.targets), "weights": mx.array(weights)}  # (N,) each
        if self._objective.loss is not None:
            targets["weighed"] = partial(self._objective.weighed, batch, size)
        balance = balance_of(self._model, batch, self._balance * weights.sum()) or ()
        read = together(parameters_of(self._model)), inputs, targets, *balance
        # On a CPU adding is no part of what may be compiled: so it was, and runs that began so go on to the same bits.
        return added(sums, *self._graph((None, {}), *read)) if on_cpu() else self._graph(sums, *read)

    def _whole(self, sums: Sums, parameters: Arrays, inputs: Arrays, targets: dict[str, Any], *of_balance: Any) -> Sums:
        balance = RouterBalance(*of_balance) if of_balance else None

        # Frozen parameters are an input too: compiled, what is not would be a constant of the program.
        def loss(*rows: mx.array) -> mx.array:
            hidden, head = self._hidden_states(inputs, balance, *rows), self._model.head_weights()
            cap, smoothing = self._config.logit_cap, self._objective.smoothing
            if (weighed := targets.get("weighed")) is None:
                return cross_entropy(hidden, head, targets["targets"], targets["weights"], cap, smoothing)
            value, weights = weighed(target_log_probs(hidden, head, targets["targets"], cap))
            entropy = cross_entropy(hidden, head, targets["targets"], mx.stop_gradient(weights), cap)
            return value + (entropy - mx.stop_gradient(entropy))  # the value of the one, the gradients of the other

        with swapped_in(self._model, apart(parameters)):
            rows = self._embedding_rows(inputs["ids"])
            found, to_rows, gradients = backward_through({"": self._model}, loss, rows, mx.array(1.0))
        if rows:
            of_head = gradients[EMBEDDING] if self._config.tie_word_embeddings else mx.zeros(gradients[EMBEDDING].shape)
            ids, to_rows = inputs["ids"].reshape(-1), to_rows[0].reshape(-1, of_head.shape[-1])
            gradients[EMBEDDING] = with_exact_sums(of_head, ids, to_rows)
        return added(sums, found, gradients)

    def _embedding_rows(self, ids: mx.array) -> list[mx.array]:
        """On a GPU the rows (B, T, D) of a trained embedding: its gradient is added to the head's where they are one matrix, and is not
        another one of its size."""
        if on_cpu() or EMBEDDING not in trainable_of(self._model):
            return []
        return [self._model.embed_tokens.weight[ids].astype(self._model.compute_dtype)]

    def _hidden_states(self, inputs: Arrays, balance: RouterBalance | None = None, rows: mx.array | None = None) -> mx.array:
        """What the head sees of a micro-batch: (N, D), only positions with a trained target."""
        settings = {"grad_checkpoint": self._grad_checkpoint, "dtype": self._model.compute_dtype, "balance": balance}
        of_rows = {name: inputs.get(name) for name in ("segments", "lengths", "noise")}
        hidden = self._model.hidden_states(inputs["ids"], **of_rows, **settings, rows=rows, for_gradients=True)  # (B, T, D)
        return hidden.reshape(-1, hidden.shape[-1])[inputs["positions"]]

    # -- with kernels, which are no part of a graph, the loss stands between its two halves ----------------------------------------

    def _halves(self, parameters: Arrays, inputs: Arrays, hidden_gradient: mx.array) -> tuple[mx.array, Arrays]:
        """The hidden states (N, D), and all gradients but the head's, which depend on `hidden_gradient` (N, D); lazy."""
        model = self._model
        body = {"embed_tokens": model.embed_tokens, **{f"layers.{i}": block for i, block in enumerate(model.layers)}, "norm": model.norm}
        with swapped_in(model, parameters):
            hidden, _, gradients = backward_through(body, lambda: self._hidden_states(inputs), [], hidden_gradient)
        return hidden, gradients

    def _by_kernel(self, batch: Batch, inputs: Arrays, weights: np.ndarray, size: StepSize) -> tuple[mx.array, Arrays]:
        """A micro-batch's share of the mean loss, and its gradients; evaluated."""
        # The second half reads what the kernel has written by then. NaN: what would be computed too early could not go unnoticed.
        hidden_gradient = mx.full((len(batch.targets), self._config.hidden_size), math.nan)
        mx.eval(hidden_gradient)
        hidden, gradients = self._graph(parameters_of(self._model), inputs, hidden_gradient)
        mx.eval(hidden)
        value = None
        if self._objective.loss is not None:
            head, targets = self._model.head_weights(), mx.array(batch.targets)
            value, found = self._objective.weighed(batch, size, target_log_probs(hidden, head, targets, self._config.logit_cap))
            weights = np.asarray(found)
        loss, of_head = self._head(hidden, batch.targets, weights, np.asarray(hidden_gradient))
        del hidden
        mx.eval(gradients)
        add(gradients, of_head)  # a tied one has both
        del of_head
        mx.eval(gradients)
        return mx.array(loss) if value is None else value, gradients

    def _head(self, hidden: mx.array, targets: np.ndarray, weights: np.ndarray, hidden_gradient: np.ndarray) -> tuple[float, Arrays]:
        """The loss, and the gradients of the head's trained arrays; that of `hidden` is written into `hidden_gradient`. Evaluated."""
        head = {name: array.astype(mx.float32) for name, array in self._model.head_weights().items()}
        weight = EMBEDDING if self._config.tie_word_embeddings else "lm_head.weight"
        trained = {weight, "lm_head.bias"} & trainable_of(self._model).keys()
        total, found = 0.0, {}
        how = CHUNK_ELEMENTS, self._config.logit_cap, self._objective.smoothing
        for rows, loss, logit_gradients in losses_by_kernel(self._kernels, hidden, head, targets, weights, *how):
            total += loss
            back = logit_gradients @ head["weight"]
            if weight in trained:
                add(found, {weight: logit_gradients.T @ hidden[rows]})
            if "lm_head.bias" in trained:
                add(found, {"lm_head.bias": logit_gradients.sum(axis=0)})
            mx.eval(back, found)
            hidden_gradient[rows] = np.asarray(back)
            del logit_gradients, back  # before the next chunk
        return total, found


class WholeGradients:
    """Loss and gradients of a step, all of them there; see `gradients.StepGradients`."""

    def __init__(self, number: int, batches: Sequence[Batch], loss: mx.array, gradients: Arrays, kernels: Kernels | None):
        self._number, self._batches, self._gradients = number, batches, apart(gradients)
        if kernels is None:
            self.loss, self._norm = mx.stack([loss, norm_of(gradients)]).tolist()  # the one time in a step that a GPU is waited for
        else:
            self.loss, self._norm = loss.item(), global_norm(gradients, kernels)

    def norm(self) -> float:
        """Of all gradients."""
        return self._norm

    def check_finite(self) -> None:
        """Raises `NonFiniteError` where loss or norm is not finite."""
        check_finite(self._number, self.loss, self._norm, self._batches)

    def pieces(self, optimizers: object = None) -> Iterator[GradientPiece]:
        """One piece with everything; they are not kept here."""
        gradients, self._gradients = self._gradients, {}
        yield GradientPiece(gradients)


def make_engine(
    model: Decoder,
    backward: str,
    grad_checkpoint: bool = False,
    compiled: bool = False,
    kernels: Kernels | None = None,
    balance: float = 0.0,
    in_stacks: bool = True,
    ranks: Ranks | None = None,
    objective: Objective = PLAIN,
) -> Engine:
    """The engine of a run: "whole" or "layerwise", of which only the first has use for `grad_checkpoint`; else as `WholeGraph`."""
    if backward == "layerwise":
        return Layerwise(model, compiled, kernels, balance, in_stacks, ranks, objective)
    return WholeGraph(model, grad_checkpoint, compiled, kernels, balance, in_stacks, ranks, objective)


def inputs_of(batch: Batch, model: Decoder, noise: mx.array | None = None) -> Arrays:
    """A micro-batch as the graph reads it: only what the model has use for. `noise` (B, T, D): on the embeddings."""
    arrays = {"ids": mx.array(batch.inputs), "positions": mx.array(batch.target_positions)}  # (B, T), (N,)
    if batch.segments is not None:
        arrays["segments"] = mx.array(batch.segments)  # (B, T)
    if model.config.by_length and batch.row_lengths is not None:
        arrays["lengths"] = mx.array(batch.row_lengths)  # (B,)
    if noise is not None:
        arrays["noise"] = noise
    return arrays
