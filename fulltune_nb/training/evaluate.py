"""Loss over a split: every trained token counts the same, whatever batch it stood in."""

from __future__ import annotations

import mlx.core as mx

from fulltune_nb.data.batching import collate, evaluation_batches
from fulltune_nb.data.dataset import Split
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.kernels import compute_dtype
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
    for rows in evaluation_batches(split, batch_size, max_batches):
        batch = collate(split, rows)
        hidden = model.hidden_states(mx.array(batch.inputs), dtype=compute_dtype(model.embed_tokens.weight.dtype))  # (B, T, D)
        hidden = hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.target_positions)]  # -> (N, D)
        loss = cross_entropy_only(hidden, model.head_weights(), mx.array(batch.targets), mx.array(batch.weights))
        total += loss.item()
        tokens += batch.num_tokens
    return total / tokens, tokens
