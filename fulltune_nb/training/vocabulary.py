"""The vocabulary's two matrices in the layerwise engine: the head with the loss, and the embedding, a range of rows at a time.

Neither the logits of all tokens nor a gradient of the size of the vocabulary ever exists. The loss needs a first pass over the
ranges for the logarithm of the softmax's sum, the hidden states' gradient a second; the weights' gradients, asked for when the
blocks are done, a third. Where there are few logits, their exponentials are kept for the second, and what these become for the third.

Dimension letters: N trained positions, D hidden_size, V vocab_size, v rows of a range, n positions of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from fulltune_nb.cpu import Kernels, evaluate, fast_exp, on_cpu
from fulltune_nb.models.embedding import sums_by_token
from fulltune_nb.training.loss import Head, cap_slope, chunk_logits, chunks, losses_by_kernel

RANGE_ELEMENTS, GPU_RANGE_ELEMENTS = 2**24, 2**26
"""Weights of a range of rows on a CPU, 64 MiB in float32, and on a GPU, which few large kernels keep busier."""
KEPT_ELEMENTS = 2**24
"""Logits of which something is kept between the passes, at most."""
Chunk = tuple[int, int]
"""The first row and the first position of a chunk of logits."""


@dataclass
class HeadInput:
    """The trained positions of one micro-batch."""

    hidden: mx.array
    """(N, D), after the final norm."""
    targets: np.ndarray
    """(N,) token ids."""
    weights: mx.array
    """(N,) float32: 1 / trained tokens of the step, or what `Objective.weighed` says; 0 for padding."""
    cap: float | None = None
    """Of the logits, as `ModelConfig.logit_cap`."""
    smoothing: float = 0.0
    """As `Objective.smoothing`."""
    log_sums: mx.array | None = None
    """(N,) float32: log(sum(exp(logits)))."""
    exponentials: dict[Chunk, tuple[mx.array, mx.array]] = field(default_factory=dict)
    """From the first pass to the second: exp(logits - c) (n, v), and c (n,), the largest logit of a position by then."""
    kept: dict[Chunk, mx.array] = field(default_factory=dict)
    """From the second pass to the third: the logits' gradients (n, v)."""


def ranges(vocab_size: int, hidden_size: int) -> list[slice]:
    """The rows of the vocabulary in ranges of about `RANGE_ELEMENTS` weights, or those of a GPU."""
    size = max(1, (RANGE_ELEMENTS if on_cpu() else GPU_RANGE_ELEMENTS) // hidden_size)
    return [slice(begin, min(begin + size, vocab_size)) for begin in range(0, vocab_size, size)]


def head_loss(head: Head, inputs: list[HeadInput], kernels: Kernels | None = None) -> tuple[list[float | mx.array], list[mx.array]]:
    """Of each input the weighted sum of -log p(target), and its gradient with respect to `hidden` (N, D); by `evaluate`.

    Fills in `log_sums` and `kept` for `head_gradient`. With kernels, one pass is enough where it is kept for one range.
    """
    losses, gradients = [], []
    for one in inputs:
        keep = one.hidden.shape[0] * head["weight"].shape[0] <= KEPT_ELEMENTS
        if kernels is not None and keep and len(ranges(*head["weight"].shape)) == 1:
            loss, gradient = _only_pass(head, one, kernels)
            losses.append(loss)
            gradients.append(gradient)
            continue
        losses.append(_first_pass(head, one, keep))
        gradient = mx.zeros_like(one.hidden)
        for rows in ranges(*head["weight"].shape):
            weight = head["weight"][rows].astype(one.hidden.dtype)
            for part in _chunks(one, rows):
                logit_gradients = _logit_gradients(head, weight, one, rows, part)
                if keep:
                    one.kept[rows.start, part.start] = logit_gradients
                gradient[part] = gradient[part] + logit_gradients @ weight
                evaluate(gradient, one.kept)
        gradients.append(gradient)
    return losses, gradients


def head_gradient(head: Head, inputs: list[HeadInput], rows: slice, of: str, found: mx.array | None = None) -> mx.array:
    """Gradient of a range of the head's rows, `of` its "weight" (v, D) or "bias" (v,); by `evaluate`. It is added to what was `found`."""
    for one in inputs:
        weight = None if one.kept else head["weight"][rows].astype(one.hidden.dtype)
        for part in _chunks(one, rows):
            logit_gradients = one.kept.get((rows.start, part.start))
            if logit_gradients is None:
                logit_gradients = _logit_gradients(head, weight, one, rows, part)
            more = logit_gradients.T @ one.hidden[part] if of == "weight" else logit_gradients.sum(axis=0)
            found = more if found is None else found + more
            evaluate(found)
    return found


def embedding_gradient(ids: np.ndarray, cotangent: mx.array, rows: slice) -> mx.array:
    """Gradient of a range of the embedding's rows (v, D): ids (M,) and the gradient of what was looked up for them (M, D)."""
    here = np.flatnonzero((ids >= rows.start) & (ids < rows.stop))
    if not here.size:
        return mx.zeros((rows.stop - rows.start, cotangent.shape[-1]), dtype=cotangent.dtype)
    return sums_by_token(mx.array(ids[here] - rows.start), cotangent[mx.array(here)], rows.stop - rows.start)


def _only_pass(head: Head, one: HeadInput, kernels: Kernels) -> tuple[float, mx.array]:
    """Fills in `kept`; returns the loss and the hidden states' gradient."""
    head = {name: array.astype(one.hidden.dtype) if name == "weight" else array for name, array in head.items()}
    total, gradient, weights = 0.0, mx.zeros_like(one.hidden), np.asarray(one.weights)
    how = {"cap": one.cap, "smoothing": one.smoothing}
    for part, loss, logit_gradients in losses_by_kernel(kernels, one.hidden, head, one.targets, weights, **how):
        total += loss
        one.kept[0, part.start] = logit_gradients
        gradient[part] = logit_gradients @ head["weight"]
        mx.eval(gradient)
    return total, gradient


def _first_pass(head: Head, one: HeadInput, keep: bool) -> mx.array:
    """Fills in `log_sums`, and `exponentials` where they are to be kept; returns the loss.

    The sum of exponentials is carried along with the largest logit so far.
    """
    size = one.hidden.shape[0]
    largest, total, at_target, summed = mx.full((size,), -mx.inf), mx.zeros((size,)), mx.zeros((size,)), mx.zeros((size,))
    for rows in ranges(*head["weight"].shape):
        weight = head["weight"][rows].astype(one.hidden.dtype)
        for part in _chunks(one, rows):
            logits = _logits(head, weight, one, rows, part)
            new = mx.maximum(largest[part], logits.max(axis=1))
            exponentials = fast_exp(logits - new[:, None])
            total[part] = total[part] * mx.exp(largest[part] - new) + exponentials.sum(axis=1)
            largest[part] = new
            if keep and one.cap is None:  # else the second pass needs the logits themselves
                one.exponentials[rows.start, part.start] = exponentials, new
            position, target = _targets(one, rows, part)
            if position.size:
                at_target[part.start + position] = logits[position, target]
            if one.smoothing:
                summed[part] = summed[part] + logits.sum(axis=1)
            evaluate(largest, total, at_target, summed, one.exponentials)
            del logits, exponentials  # before the next chunk's are computed
    one.log_sums = largest + mx.log(total)
    if one.smoothing:
        at_target = (1.0 - one.smoothing) * at_target + (one.smoothing / head["weight"].shape[0]) * summed
    loss = ((one.log_sums - at_target) * one.weights).sum()
    evaluate(loss, one.log_sums)
    return loss


def _logit_gradients(head: Head, weight: mx.array, one: HeadInput, rows: slice, part: slice) -> mx.array:
    """weight * (softmax - target's distribution) for a chunk (n, v)."""
    weights, log_sums = one.weights[part], one.log_sums[part]
    if kept := one.exponentials.pop((rows.start, part.start), None):
        exponentials, subtracted = kept
        gradients = exponentials * (weights * mx.exp(subtracted - log_sums))[:, None]
    else:
        logits = _logits(head, weight, one, rows, part)
        gradients = fast_exp(logits - log_sums[:, None]) * weights[:, None]
    position, target = _targets(one, rows, part)
    if one.smoothing:
        gradients = gradients - weights[:, None] * (one.smoothing / head["weight"].shape[0])
    if position.size:
        gradients = gradients.at[position, target].subtract(weights[position] * (1.0 - one.smoothing))
    if one.cap is not None:
        gradients = gradients * cap_slope(logits, one.cap)
    return gradients.astype(one.hidden.dtype)


def _logits(head: Head, weight: mx.array, one: HeadInput, rows: slice, part: slice) -> mx.array:
    """(n, v) float32. `weight`: the range's rows in the dtype of the hidden states."""
    bias = {"bias": head["bias"][rows]} if "bias" in head else {}
    return chunk_logits(one.hidden[part], {"weight": weight, **bias}, one.cap)


def _targets(one: HeadInput, rows: slice, part: slice) -> tuple[mx.array, mx.array]:
    """Those of a chunk's targets that stand in the range: which positions of the chunk, and which rows of the range."""
    targets = one.targets[part]
    here = np.flatnonzero((targets >= rows.start) & (targets < rows.stop))
    return mx.array(here), mx.array(targets[here] - rows.start)


def _chunks(one: HeadInput, rows: slice) -> list[slice]:
    return chunks(one.hidden.shape[0], rows.stop - rows.start)
