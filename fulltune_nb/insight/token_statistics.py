"""Loss, probability, rank and the likeliest tokens at every position of some rows, a chunk of logits at a time.

Dimension letters: B rows, T tokens, D hidden_size, V vocab_size, n positions of a chunk, K alternatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from fulltune_nb.models.cpu_math import softmax_statistics
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.kernels import compute_dtype
from fulltune_nb.training.loss import chunks

ALTERNATIVES = 5
_POSITIONS = 4096  # B * T of a forward pass


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """How well each token of a row was predicted from those before it; the first, which nothing predicts, has NaN and rank 0."""

    losses: np.ndarray
    """(T,) float32, nats: -log p(token)."""
    ranks: np.ndarray
    """(T,) int32; 1 is the likeliest token. Ties count for the token."""
    top_ids: np.ndarray
    """(T, K) int32, the likeliest tokens at each place, best first; empty where none were asked for."""
    top_probabilities: np.ndarray
    """(T, K) float32."""

    @property
    def probabilities(self) -> np.ndarray:
        """(T,) float32."""
        return np.exp(-self.losses)


def token_statistics(model: Decoder, rows: Sequence[np.ndarray], alternatives: int = ALTERNATIVES) -> list[TokenStatistics]:
    """One for each row of token ids, in their order. `alternatives=0` leaves out ranks and alternatives, and takes less time."""
    found: list[TokenStatistics | None] = [None] * len(rows)
    alternatives = min(alternatives, model.config.vocab_size)
    for numbers in _batches([len(row) for row in rows]):
        inputs = np.zeros((len(numbers), max(1, *(len(rows[i]) - 1 for i in numbers))), dtype=np.int32)
        for b, i in enumerate(numbers):
            inputs[b, : max(0, len(rows[i]) - 1)] = rows[i][:-1]
        # (B, T - 1, D); padding stands to the right, where nothing looks from
        hidden = model.hidden_states(mx.array(inputs), dtype=compute_dtype(model.embed_tokens.weight.dtype))
        mx.eval(hidden)
        for b, i in enumerate(numbers):
            found[i] = _of_row(model, hidden[b, : max(0, len(rows[i]) - 1)], rows[i], alternatives)
    return found


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of about one length together, at most `_POSITIONS` positions (or one row) at a time."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > _POSITIONS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _of_row(model: Decoder, hidden: mx.array, tokens: np.ndarray, alternatives: int) -> TokenStatistics:
    size = len(tokens)
    losses, ranks = np.full(size, np.nan, np.float32), np.zeros(size, np.int32)
    ids, probabilities = np.zeros((size, alternatives), np.int32), np.zeros((size, alternatives), np.float32)
    for begin, end in ((part.start, part.stop) for part in chunks(size - 1, model.config.vocab_size)):
        logits = model.head(hidden[begin:end]).astype(mx.float32)  # (n, V)
        targets = mx.array(tokens[begin + 1 : end + 1].astype(np.int32))[:, None]
        at_target = mx.take_along_axis(logits, targets, axis=1)  # (n, 1)
        log_sum, shares = softmax_statistics(logits)
        places = slice(begin + 1, end + 1)
        losses[places] = np.array(log_sum - at_target[:, 0])
        if alternatives:
            ranks[places] = np.array((logits > at_target).sum(axis=1) + 1)
            ids[places], probabilities[places] = top_tokens(logits, shares, alternatives)
    return TokenStatistics(losses, ranks, ids, probabilities)


def top_tokens(logits: mx.array, shares: mx.array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and probabilities (n, K) of the likeliest tokens of logits and their softmax (n, V), best first."""
    ids = mx.argpartition(-logits, kth=count - 1, axis=-1)[:, :count]
    ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1), axis=-1)
    return np.array(ids), np.array(mx.take_along_axis(shares, ids, axis=-1))
