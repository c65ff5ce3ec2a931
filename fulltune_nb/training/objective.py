"""What training minimizes, which both engines read: cross-entropy with its settings, or a loss of the user's own.

Dimension letters: B rows, T tokens, N trained positions, R examples (as many as rows, unless they are packed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from fulltune_nb.data.batches import Batch
from fulltune_nb.errors import ConfigError, TrainingError

_NOISE = 0x4E4546  # tells this use of the seed from others


class StepSize(NamedTuple):
    """What the micro-batches of an optimizer step, those of all ranks, have together."""

    tokens: int
    """Trained ones."""
    rows: int

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> StepSize:
        """The size of a step."""
        return cls(sum(batch.num_tokens for batch in batches), sum(len(batch.rows) for batch in batches))


class LossInput:
    """One micro-batch, as a loss of the user's own sees it.

    Attributes:
        log_probs: (N,) float32, log p(token) of the trained tokens, each with the true text before it; 0 where N is padded. What the loss
            is differentiated by.
        rows: (R,) which rows of the training split these are, as in `data.train[row]`.
        step_rows: rows of the whole optimizer step, which may have several micro-batches.
        step_tokens: its trained tokens.
    """

    def __init__(self, batch: Batch, step: StepSize, log_probs: mx.array):
        self._batch, self.log_probs, self.rows = batch, log_probs, batch.rows
        self.step_rows, self.step_tokens = step.rows, step.tokens

    @cached_property
    def row_of(self) -> mx.array:
        """(N,) int32, for each of `log_probs` which of `rows` it belongs to, from 0."""
        batch, length = self._batch, self._batch.inputs.shape[1]
        of_position = batch.target_positions // length
        if batch.segments is not None:  # packed: the rows of a batch hold several each
            before = np.concatenate([[0], np.cumsum(batch.segments.max(axis=1) + 1)[:-1]])
            of_position = before[of_position] + np.maximum(batch.segments.reshape(-1)[batch.target_positions], 0)
        return mx.array(of_position.astype(np.int32))

    def sum_by_row(self, values: mx.array) -> mx.array:
        """(N,) -> (R,): of each row's trained tokens the sum, such as that of `log_probs`."""
        return mx.zeros((len(self.rows),), dtype=values.dtype).at[self.row_of].add(values)


Loss = Callable[[LossInput], mx.array]
"""A micro-batch's share of the step's loss; the step's is the sum of these."""


@dataclass(frozen=True)
class Objective:
    """What is minimized at the trained positions."""

    smoothing: float = 0.0
    """The share of a target's probability that is spread evenly over the vocabulary, the target included (Szegedy et al. 2016)."""
    loss: Loss | None = None
    """In place of the cross-entropy."""
    noise_alpha: float | None = None
    """Of the noise on the embeddings (NEFTune, Jain et al. 2023); None: none."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        if self.loss is not None and not callable(self.loss):
            raise ConfigError(f"loss: expected a function of a LossInput, got {type(self.loss).__name__}.")
        if self.loss is not None and self.smoothing:
            raise ConfigError("label_smoothing is of the cross-entropy, and loss= takes its place: leave one of them out.")

    @property
    def note(self) -> str | None:
        """What the user should hear about the losses that are told; None where they are those of an evaluation."""
        told = []
        if self.smoothing:
            told.append(f"those of smoothed targets (label_smoothing={self.smoothing:g}), which a perfect model has above 0 too")
        if self.loss is not None:
            told.append(f"those of {name_of(self.loss)}")
        if self.noise_alpha is not None:
            told.append(f"with noise on the embeddings (neftune_alpha={self.noise_alpha:g})")
        return f"the losses of steps are {' and '.join(told)}; evaluations have the plain cross-entropy" if told else None

    def noise(self, batch: Batch, number: int, micro_batch: int, hidden_size: int) -> mx.array | None:
        """What is added to the embeddings: (B, T, D) float32, uniform within alpha / sqrt(L D), L tokens of the example; lazy.

        A function of seed, step (`number`) and micro-batch alone, so that a second pass, and a run that goes on, have the same.
        """
        if self.noise_alpha is None:
            return None
        (key,) = np.random.SeedSequence((self.seed, _NOISE, number, micro_batch)).generate_state(1, np.uint64)
        bounds = mx.array(self.noise_alpha / np.sqrt(_lengths(batch) * hidden_size), dtype=mx.float32)[..., None]  # (B, T, 1)
        return mx.random.uniform(-1.0, 1.0, (*batch.inputs.shape, hidden_size), key=mx.random.key(int(key))) * bounds

    def weighed(self, batch: Batch, step: StepSize, log_probs: mx.array) -> tuple[mx.array, mx.array]:
        """The value of `loss`, and the weights (N,) float32 with which the cross-entropy has its gradients.

        A loss is a function of the log-probabilities, so its gradients are theirs, each times its derivative: what is read of the
        vocabulary for them is the same as for a cross-entropy.

        Raises:
            TrainingError: it is no number.
        """
        real = mx.array(batch.weights != 0)

        def value(log_probs: mx.array) -> mx.array:
            found = self.loss(LossInput(batch, step, mx.where(real, log_probs, 0.0)))
            if not isinstance(found, mx.array) or found.size != 1 or not mx.issubdtype(found.dtype, mx.floating):
                what = f"an array {found.shape} of {found.dtype}" if isinstance(found, mx.array) else f"a {type(found).__name__}"
                raise TrainingError(f"{name_of(self.loss)}: expected one mx.array number, a micro-batch's share of the loss, got {what}.")
            return found.reshape(()).astype(mx.float32)

        found, slope = mx.value_and_grad(value)(log_probs)
        return found, -slope


def _lengths(batch: Batch) -> np.ndarray:
    """(B, T), for each position how many tokens its example has in the inputs; 1 where padded behind packed ones."""
    rows, length = batch.inputs.shape
    if batch.segments is None:
        own = np.full(rows, length) if batch.row_lengths is None else np.maximum(batch.row_lengths, 1)
        return np.repeat(own[:, None], length, axis=1)
    counts = [np.append(np.bincount(segments[segments >= 0]), 1) for segments in batch.segments]  # the last is of padding, -1
    return np.stack([count[segments] for count, segments in zip(counts, batch.segments, strict=True)])


def name_of(loss: Loss | None) -> str | None:
    """By which a run that goes on knows a loss again; None for the cross-entropy."""
    return None if loss is None else getattr(loss, "__qualname__", type(loss).__qualname__)


PLAIN = Objective()
"""Cross-entropy, and nothing else."""
