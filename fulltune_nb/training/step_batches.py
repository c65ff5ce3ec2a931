"""The micro-batches of every optimizer step, as a function of the step's number alone."""

from __future__ import annotations

import numpy as np

from fulltune_nb.data.batches import Batch, BatchOrder, PackedOrder, Row, best_fit, collate
from fulltune_nb.data.dataset import Split
from fulltune_nb.data.encode import Example
from fulltune_nb.settings import whole_number
from fulltune_nb.training.config import TrainConfig


class StepBatches:
    """Which rows each step trains on, epoch after epoch.

    Args:
        split: the training split.
        config: `batch_size`, `grad_accumulation_steps`, `seed`, `packing` and, with it, `max_seq_length` count.
    """

    def __init__(self, split: Split, config: TrainConfig):
        self._split, self._config = split, config
        self._order = batch_order(split, config)
        self._epoch = -1
        self._steps: list[list[tuple[Row, ...]]] = []  # of self._epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every row is trained on once."""
        return self._order.steps_per_epoch

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a step's rows in the mean, without padding."""
        lengths = self._split.lengths[self._split.trainable]
        return float(np.minimum(lengths, self._config.max_seq_length).sum() / self.steps_per_epoch)

    @property
    def packing_note(self) -> str:
        """What packing makes of the rows, in a sentence."""
        rows, packed, config = len(self._split.trainable), self._order.rows_per_epoch, self._config
        return (
            f"{rows:,} rows are packed into {packed:,} of at most {config.max_seq_length:,} tokens;"
            f" batch_size={config.batch_size} counts these, and an epoch is {self.steps_per_epoch:,} steps"
        )

    def of_step(self, step: int) -> list[Batch]:
        """The micro-batches of step `step`, counted from 0."""
        epoch, cursor = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._order.epoch(epoch)
        return [collate(self._split, rows, self._order.shape(rows)) for rows in self._steps[cursor]]

    def examples_of(self, step: int) -> list[Example]:
        """The rows of step `step`, counted from 1 as in its report, in the order of the micro-batches.

        Raises:
            ConfigError: no whole number of at least 1.
        """
        return [self._split[row] for batch in self.of_step(whole_number("step", step, low=1) - 1) for row in batch.rows]


def batch_order(split: Split, config: TrainConfig) -> BatchOrder:
    """The order of a split's batches, packed or not."""
    numbers = config.batch_size, config.seed, config.grad_accumulation_steps
    return PackedOrder(split, *numbers, config.max_seq_length) if config.packing else BatchOrder(split, *numbers)


def row_widths(lengths: np.ndarray, config: TrainConfig) -> np.ndarray:
    """Input positions of every row that an epoch's batches have, from the tokens (examples,) of what they hold."""
    lengths = np.minimum(lengths, config.max_seq_length)
    if not config.packing:
        return lengths - 1
    return np.array([(lengths[row] - 1).sum() for row in best_fit(lengths, config.max_seq_length)])
