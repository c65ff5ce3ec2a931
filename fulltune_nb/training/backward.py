"""Loss and gradients of a step, with automatic differentiation over the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from fulltune_nb.data.batching import Batch
from fulltune_nb.models.cpu_streams import Dealer
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.kernels import compute_dtype
from fulltune_nb.training.loss import cross_entropy
from fulltune_nb.training.native import Kernels

Gradients = dict[str, Any]
"""A tree of arrays, shaped as `model.trainable_parameters()`."""


def loss_and_gradients(model: Decoder, batch: Batch, step_tokens: int, checkpoint: bool = False) -> tuple[mx.array, Gradients]:
    """One micro-batch's share of the step's mean loss, and its gradients.

    Args:
        model: the decoder.
        batch: rows and targets.
        step_tokens: trained tokens of the whole optimizer step; each micro-batch is weighted by its tokens, so that
            the shares of all micro-batches add up to the mean over all tokens (not a mean of means).
        checkpoint: keep only block inputs for the backward pass.

    Returns:
        The share (scalar, float32) and the gradients; nothing is evaluated yet.
    """
    arrays = batch_arrays(batch, step_tokens)
    return nn.value_and_grad(model, lambda model: share_of_loss(model, arrays, checkpoint))(model)


def batch_arrays(batch: Batch, step_tokens: int) -> dict[str, mx.array]:
    """A micro-batch as `share_of_loss` takes it."""
    arrays = {
        "inputs": mx.array(batch.inputs),  # (B, T)
        "positions": mx.array(batch.target_positions),  # (N,)
        "targets": mx.array(batch.targets),  # (N,)
        "weights": mx.array(batch.weights / step_tokens),  # (N,)
    }
    return arrays if batch.segments is None else {**arrays, "segments": mx.array(batch.segments)}  # (B, T)


def share_of_loss(model: Decoder, arrays: dict[str, mx.array], checkpoint: bool = False) -> mx.array:
    """A micro-batch's share of the step's mean loss: scalar, float32."""
    hidden = trained_hidden_states(model, arrays, checkpoint)
    return cross_entropy(hidden, model.head_weights(), arrays["targets"], arrays["weights"])


def trained_hidden_states(model: Decoder, arrays: dict[str, mx.array], checkpoint: bool = False) -> mx.array:
    """What the head sees of a micro-batch: (N, D), only positions with a trained target."""
    dtype = compute_dtype(model.embed_tokens.weight.dtype)
    hidden = model.hidden_states(arrays["inputs"], checkpoint=checkpoint, segments=arrays.get("segments"), dtype=dtype)  # (B, T, D)
    return hidden.reshape(-1, hidden.shape[-1])[arrays["positions"]]


LossAndGradients = Callable[[Decoder, Batch, int], tuple[mx.array, Gradients]]


def step_gradients(
    model: Decoder, batches: Sequence[Batch], checkpoint: bool = False, compiled: LossAndGradients | None = None
) -> tuple[mx.array, Gradients]:
    """Mean loss over all trained tokens of a step, and its gradients; the last micro-batch's part is not evaluated yet.

    Args:
        model: the decoder.
        batches: the step's micro-batches.
        checkpoint: keep only block inputs for the backward pass.
        compiled: takes the place of `loss_and_gradients`.
    """
    step_tokens = sum(batch.num_tokens for batch in batches)
    total, gradients = mx.array(0.0), None
    compute = compiled or partial(loss_and_gradients, checkpoint=checkpoint)
    for batch in batches:
        mx.eval(total, gradients)  # one micro-batch's activations at a time
        loss, more = compute(model, batch, step_tokens)
        total = total + loss
        gradients = more if gradients is None else tree_map(mx.add, gradients, more)
    return total, gradients


def global_norm(gradients: Gradients, kernels: Kernels | None = None) -> float:
    """Square root of the sum of all squared elements, by kernels of our own or by MLX."""
    arrays = [array.astype(mx.float32) for _, array in tree_flatten(gradients)]
    if kernels is not None:
        return math.sqrt(kernels.sum_of_squares(arrays))
    dealer, parts = Dealer(), []
    for array in arrays:
        with dealer.stream_for(array.size):
            parts.append(_sum_of_squares(array))
    return mx.sqrt(sum(parts)).item()


def _sum_of_squares(array: mx.array) -> mx.array:
    # Row sums by a product with ones: MLX's own sum takes twice the time on the CPU.
    squares = mx.square(array).reshape(-1, array.shape[-1])
    return (squares @ mx.ones((array.shape[-1], 1))).sum()


def clip_scale(norm: float, max_norm: float | None) -> float:
    """What gradients of this global norm are multiplied by, as in `torch.nn.utils.clip_grad_norm_`; at most 1."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
