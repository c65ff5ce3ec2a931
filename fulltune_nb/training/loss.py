"""Cross-entropy of a language model's head, in chunks, so that logits of all tokens never exist at once.

Only positions with a trained target are given here at all, and gradients are worked out chunk by chunk together with
the loss, while the chunk's logits are at hand (the idea of Liger's fused linear cross-entropy, Hsu et al. 2024).

Dimension letters: N trained positions, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from fulltune_nb.cpu import Kernels, exp_and_sum, on_cpu
from fulltune_nb.data.batches import collate, evaluation_batches, evaluation_shapes
from fulltune_nb.data.dataset import DataSet, Split
from fulltune_nb.data.read import SPLITS
from fulltune_nb.data.split import check_ids
from fulltune_nb.errors import IN_EVALUATION, DataError, tells_device_errors
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.layers import soft_cap
from fulltune_nb.training.gradients import add
from fulltune_nb.training.history import EvalReport
from fulltune_nb.training.parallel import Ranks

CHUNK_ELEMENTS = 2**22
"""Logits of a chunk: 16 MiB in float32. About 20 such arrays exist at the peak, as MLX works on some operations ahead."""
GPU_CHUNK_ELEMENTS = 2**26
"""The same on a GPU, 256 MiB."""

Head = Mapping[str, mx.array]  # "weight" (V, D), "bias" (V,) where there is one


def cross_entropy(
    hidden: mx.array, head: Head, targets: mx.array, weights: mx.array, cap: float | None = None, smoothing: float = 0.0
) -> mx.array:
    """Weighted sum of -log p(target), in float32; differentiable in `hidden` and `head`.

    Args:
        hidden: (N, D), after the final norm.
        head: the output projection's arrays.
        targets: (N,) token ids.
        weights: (N,) float32; 0 for padding. Pass 1 / trained tokens of the step for the step's mean.
        cap: of the logits, as `ModelConfig.logit_cap`.
        smoothing: as `Objective.smoothing`.
    """
    names = list(head)

    @mx.custom_function
    def loss_with_gradients(hidden: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        return _loss_with_gradients(hidden, dict(zip(names, arrays, strict=True)), targets, weights, cap, smoothing)

    @loss_with_gradients.vjp
    def scaled(primals, cotangents, outputs):
        return tuple(gradient * cotangents[0].astype(gradient.dtype) for gradient in outputs[1:])

    return loss_with_gradients(hidden, *head.values())[0]


def prediction_sums(hidden: mx.array, head: Head, targets: mx.array, weights: mx.array, cap: float | None = None) -> mx.array:
    """What an evaluation tells, without gradients, one chunk's logits at a time; arguments as for `cross_entropy`.

    Returns:
        (3,) float32, weighted sums over the positions: of -log p(target), in nats; of 1 where no token is likelier than the target; and
        of the entropy of what is predicted, in nats.
    """
    sums = mx.zeros((3,))
    head = {name: array.astype(hidden.dtype) for name, array in head.items()}
    for rows in chunks(hidden.shape[0], head["weight"].shape[0]):
        logits = chunk_logits(mx.depends([hidden[rows]], [sums])[0], head, cap)
        exponentials, total, maximum = exp_and_sum(logits)  # (n, V), (n, 1), (n, 1)
        at_target = mx.take_along_axis(logits, targets[rows][:, None], axis=1)
        entropies = mx.log(total) - (exponentials * (logits - maximum)).sum(axis=1, keepdims=True) / total
        found = mx.concatenate([maximum + mx.log(total) - at_target, at_target == maximum, entropies], axis=1)  # (n, 3)
        sums = sums + (found * weights[rows][:, None]).sum(axis=0)
    return sums


def target_log_probs(hidden: mx.array, head: Head, targets: mx.array, cap: float | None = None) -> mx.array:
    """(N,) float32, log p(target), without gradients, one chunk's logits at a time; arguments as for `cross_entropy`."""
    found: list[mx.array] = []
    head = {name: array.astype(hidden.dtype) for name, array in head.items()}
    for rows in chunks(hidden.shape[0], head["weight"].shape[0]):
        *_, losses = _token_losses(chunk_logits(mx.depends([hidden[rows]], found[-1:])[0], head, cap), targets[rows])
        found.append(-losses)
    return mx.stop_gradient(mx.concatenate(found))


def _loss_with_gradients(
    hidden: mx.array, head: Head, targets: mx.array, weights: mx.array, cap: float | None, smoothing: float
) -> tuple[mx.array, ...]:
    """Loss, then the gradients of `hidden` and of each array of `head`, in their order."""
    losses, hidden_gradients = [], []
    head_gradients: dict[str, mx.array] = {}
    head = {name: array.astype(hidden.dtype) for name, array in head.items()}
    chunk_loss = _chunk_loss if on_cpu() else _chunk_loss_on_gpu
    for rows in chunks(hidden.shape[0], head["weight"].shape[0], chunk_elements(*head["weight"].shape)):
        # Each chunk waits for all of the one before: otherwise they would be computed side by side and exist together.
        part = mx.depends([hidden[rows]], [*losses[-1:], *hidden_gradients[-1:], *head_gradients.values()])[0]
        loss, hidden_gradient, more = chunk_loss(part, head, targets[rows], weights[rows], cap, smoothing)
        losses.append(loss)
        hidden_gradients.append(hidden_gradient)
        add(head_gradients, more)
    return sum(losses[1:], losses[0]), mx.concatenate(hidden_gradients), *(head_gradients[name] for name in head)


def _chunk_loss(
    hidden: mx.array, head: Head, targets: mx.array, weights: mx.array, cap: float | None, smoothing: float
) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    """A chunk's loss, and the gradients of `hidden` (n, D) and of the head's arrays."""
    logits = chunk_logits(hidden, head, cap)
    exponentials, total_of_row, losses = _token_losses(logits, targets)
    # d loss / d logits = weight (softmax - one_hot(target)) = share (exponentials - one_hot(target) total). The share is multiplied
    # into what has D columns, not V.
    share = (weights[:, None] / total_of_row).astype(hidden.dtype)
    if smoothing:  # the target's distribution is then (1 - smoothing) one_hot(target) + smoothing / V
        losses = losses + smoothing_loss(logits, targets, smoothing)
        exponentials = exponentials - total_of_row * (smoothing / logits.shape[1])
    at_target = mx.take_along_axis(exponentials, targets[:, None], axis=1) - total_of_row * (1.0 - smoothing)
    unscaled = mx.put_along_axis(exponentials, targets[:, None], at_target, axis=1)
    unscaled = (unscaled if cap is None else unscaled * cap_slope(logits, cap)).astype(hidden.dtype)
    found = {"weight": unscaled.T @ (hidden * share)}
    if "bias" in head:
        found["bias"] = (unscaled.T @ share)[:, 0]
    return (losses * weights).sum(), (unscaled @ head["weight"]) * share, found


def _chunk_loss_on_gpu(
    hidden: mx.array, head: Head, targets: mx.array, weights: mx.array, cap: float | None, smoothing: float
) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    """The same where few kernels count: the logits are read for the sum of their exponentials, and once more for their gradients."""
    logits = chunk_logits(hidden, head, cap)
    total = mx.logsumexp(logits, axis=1, keepdims=True)  # (n, 1)
    losses = total - mx.take_along_axis(logits, targets[:, None], axis=1)
    target = mx.arange(logits.shape[1]) == targets[:, None]  # (n, V), never written anywhere
    if smoothing:
        losses = losses + smoothing_loss(logits, targets, smoothing)[:, None]
        target = target * (1.0 - smoothing) + smoothing / logits.shape[1]
    gradients = (mx.exp(logits - total) - target) * weights[:, None]
    gradients = (gradients if cap is None else gradients * cap_slope(logits, cap)).astype(hidden.dtype)
    found = {"weight": gradients.T @ hidden}
    if "bias" in head:
        found["bias"] = gradients.sum(axis=0)
    return (losses * weights[:, None]).sum(), gradients @ head["weight"], found


def _token_losses(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Of a chunk's logits (n, V), in float32: exp(logits - maximum) (n, V), its sum (n, 1), and -log p(target) (n,)."""
    exponentials, total, maximum = exp_and_sum(logits)
    at_target = mx.take_along_axis(logits, targets[:, None], axis=1)
    return exponentials, total, (maximum + mx.log(total) - at_target)[:, 0]


def smoothing_loss(logits: mx.array, targets: mx.array, smoothing: float) -> mx.array:
    """What smoothed targets add to the cross-entropy of logits (n, V): (n,)."""
    return smoothing * (mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0] - logits.mean(axis=1))


def losses_by_kernel(
    kernels: Kernels,
    hidden: mx.array,
    head: Head,
    targets: np.ndarray,
    weights: np.ndarray,
    elements: int | None = None,
    cap: float | None = None,
    smoothing: float = 0.0,
) -> Iterator[tuple[slice, float, mx.array]]:
    """The loss outside of MLX's graph: chunk by chunk the positions, their share, and the gradient of their logits (n, V), evaluated.

    Who takes a chunk lets go of its gradient before the next, or keeps it. Arguments as for `cross_entropy`, and
    `chunk_size`; `head` in the dtype of `hidden`.
    """
    for rows in chunks(hidden.shape[0], head["weight"].shape[0], elements):
        logits = chunk_logits(hidden[rows], head, cap)
        slope = None if cap is None else cap_slope(logits, cap)
        more = smoothing_loss(logits, mx.array(targets[rows]), smoothing) if smoothing else None
        mx.eval(logits, slope, more)
        loss = kernels.cross_entropy(logits, targets[rows], weights[rows])  # in place: by now the gradients
        if more is not None:
            own, weight = mx.array(targets[rows])[:, None], mx.array(weights[rows])[:, None]
            loss += (more * weight[:, 0]).sum().item()
            logits = logits - weight * (smoothing / logits.shape[1])
            at_target = mx.take_along_axis(logits, own, axis=1) + weight * smoothing
            logits = mx.put_along_axis(logits, own, at_target, axis=1)
            mx.eval(logits)
        if slope is not None:
            logits = logits * slope
            mx.eval(logits)
        yield rows, loss, logits
        del logits, slope


def chunk_logits(hidden: mx.array, head: Head, cap: float | None = None) -> mx.array:
    """(n, D) -> (n, V) float32."""
    logits = hidden @ head["weight"].T
    if "bias" in head:
        logits = logits + head["bias"]
    return soft_cap(logits.astype(mx.float32), cap)


def cap_slope(logits: mx.array, cap: float) -> mx.array:
    """Derivative of a soft cap's output, the logits, by what it was made of; any shape."""
    return 1.0 - mx.square(logits / cap)


def chunk_elements(vocab_size: int, hidden_size: int) -> int:
    """Logits of a chunk where gradients are computed with them. On a GPU as many as the head has weights, up to twice the usual: each chunk
    reads the head and adds to its gradient, whatever its size."""
    return CHUNK_ELEMENTS if on_cpu() else max(GPU_CHUNK_ELEMENTS, min(vocab_size * hidden_size, 2 * GPU_CHUNK_ELEMENTS))


def chunk_size(width: int, elements: int | None = None) -> int:
    """Positions of a chunk of `elements` logits (`CHUNK_ELEMENTS` of the device), when each has `width` of them."""
    return max(32, (elements or (CHUNK_ELEMENTS if on_cpu() else GPU_CHUNK_ELEMENTS)) // width)


def chunks(length: int, width: int, elements: int | None = None) -> list[slice]:
    """`length` positions with `width` logits each, in chunks of `chunk_size` positions."""
    size = chunk_size(width, elements)
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


class SplitLoss(NamedTuple):
    """What a model makes of a split; means over its trained tokens, all of them counting the same."""

    loss: float
    """-log p(target), in nats."""
    tokens: int
    """How many trained tokens these are."""
    accuracy: float
    """The share of tokens than which none was held likelier, each with the true text before it."""
    entropy: float
    """Of what is predicted, in nats: 0 where the model is sure, right or wrong."""


@tells_device_errors(IN_EVALUATION)
def evaluate_loss(
    model: Decoder,
    split: Split,
    batch_size: int,
    max_batches: int | None = None,
    tell: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> SplitLoss:
    """Loss, accuracy and entropy over a split's trained tokens.

    Args:
        model: the decoder.
        split: the examples.
        batch_size: rows at a time; changes memory and time, not the result.
        max_batches: at most so many batches; None for the whole split.
        tell: called with how many batches are done, from 0 on, and how many there are.
        ranks: the processes that share the batches, each of which calls this; None: this one has them all.

    Raises:
        DataError: token ids that the model has no row for.
    """
    check_ids(split, model.config.vocab_size)
    found: dict[int, tuple[float, ...]] = {}  # number of the batch -> its `prediction_sums`, and its tokens
    batches = evaluation_batches(split, batch_size, max_batches)
    for number, (rows, shape) in enumerate(zip(batches, evaluation_shapes(split, batches), strict=True)):
        if ranks is not None and number % ranks.size != ranks.rank:
            continue
        if tell is not None:
            tell(number, len(batches))
        batch = collate(split, rows, shape)
        lengths = mx.array(batch.row_lengths)
        hidden = model.hidden_states(mx.array(batch.inputs), dtype=model.compute_dtype, lengths=lengths)  # (B, T, D)
        hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.target_positions)]  # -> (N, D)
        sums = prediction_sums(hidden, model.head_weights(), mx.array(batch.targets), mx.array(batch.weights), model.config.logit_cap)
        found[number] = (*sums.tolist(), batch.num_tokens)
    *columns, tokens = zip(*(found.values() if ranks is None else ranks.merged(found)), strict=True)
    loss, accuracy, entropy = (sum_in_order(column) / sum(tokens) for column in columns)
    return SplitLoss(loss, sum(tokens), accuracy, entropy)


def sum_in_order(numbers: Iterable[float]) -> float:
    """Number after number in double precision: Python's own sum does better, and so has other last digits."""
    total = 0.0
    for number in numbers:
        total += number
    return total


def evaluate_split(
    model: Decoder,
    data: DataSet,
    split: str,
    step: int,
    batch_size: int,
    max_batches: int | None,
    tell: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> EvalReport:
    """Loss, perplexity, accuracy and entropy over a split of the data, as a report; see `evaluate_loss`.

    Raises:
        DataError: there is no such split, or it has token ids that the model has no row for.
    """
    if split not in SPLITS or getattr(data, split) is None:
        raise DataError(f"No split {split!r} in this data; there are {', '.join(data.splits)}.")
    started = time.perf_counter()
    found = evaluate_loss(model, getattr(data, split), batch_size, max_batches, tell, ranks)
    perplexity = math.exp(found.loss) if found.loss < 700 else math.inf
    seconds = time.perf_counter() - started
    return EvalReport(split, step, found.loss, perplexity, found.tokens, seconds, found.accuracy, found.entropy)
