"""Loss over a split: every trained token counts the same, whatever batch it stood in."""

from __future__ import annotations

import math
import time

import mlx.core as mx

from fulltune_nb.data.batching import collate, evaluation_batches, evaluation_shapes
from fulltune_nb.data.dataset import DataSet, Split
from fulltune_nb.data.reading import SPLITS
from fulltune_nb.errors import DataError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.kernels import compute_dtype
from fulltune_nb.training.history import EvalReport
from fulltune_nb.training.loss import cross_entropy_only


def evaluate_loss(model: Decoder, split: Split, batch_size: int, max_batches: int | None = None) -> tuple[float, int]:
    """Mean -log p over the split's trained tokens, in nats, and how many they are.

    Args:
        model: the decoder.
        split: the examples.
        batch_size: rows at a time; changes memory and time, not the result.
        max_batches: at most so many batches; None for the whole split.
    """
    total, tokens = 0.0, 0
    batches = evaluation_batches(split, batch_size, max_batches)
    for rows, shape in zip(batches, evaluation_shapes(split, batches), strict=True):
        batch = collate(split, rows, shape)
        hidden = model.hidden_states(mx.array(batch.inputs), dtype=compute_dtype(model.embed_tokens.weight.dtype))  # (B, T, D)
        hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.target_positions)]  # -> (N, D)
        loss = cross_entropy_only(hidden, model.head_weights(), mx.array(batch.targets), mx.array(batch.weights))
        total += loss.item()
        tokens += batch.num_tokens
    return total / tokens, tokens


def evaluate_split(model: Decoder, data: DataSet, split: str, step: int, batch_size: int, max_batches: int | None) -> EvalReport:
    """Loss and perplexity over a split of the data, as a report; see `evaluate_loss`.

    Raises:
        DataError: there is no such split.
    """
    if split not in SPLITS or getattr(data, split) is None:
        raise DataError(f"No split {split!r} in this data; there are {', '.join(data.splits)}.")
    started = time.perf_counter()
    loss, tokens = evaluate_loss(model, getattr(data, split), batch_size, max_batches)
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return EvalReport(split, step, loss, perplexity, tokens, time.perf_counter() - started)
