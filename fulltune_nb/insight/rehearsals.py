"""Short runs that are taken back: whether all that a run does works, and whether the model learns a few rows by heart."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from fulltune_nb.errors import NonFiniteError, TrainingError
from fulltune_nb.html import counted, facts, human_bytes
from fulltune_nb.models.parameters import parameters_of
from fulltune_nb.settings import whole_number
from fulltune_nb.training.loss import evaluate_loss
from fulltune_nb.training.schedule import check_rate
from fulltune_nb.training.state import read_checkpoint
from fulltune_nb.training.trainer import Trainer

if TYPE_CHECKING:
    from fulltune_nb.plots import Axes

_LEARNED = 0.1  # of the first loss


@dataclass(frozen=True)
class DevRun:
    """What `fast_dev_run` returns: each part of a run was tried, and worked."""

    losses: tuple[float, ...]
    """Of the steps, in nats."""
    evaluations: dict[str, float]
    """Split -> loss of one batch of it, in nats."""
    checkpoint_bytes: int
    """Size of the checkpoint that was written, read again, and removed."""
    answer: str
    """What the model says to the beginning of a row."""
    seconds: float
    peak_memory: int
    """Bytes, with the second set of weights and optimizer state that taking back needs."""

    def __repr__(self) -> str:
        done = f"{counted(len(self.losses), 'step')}, {', '.join(self.evaluations)} evaluated"
        return f"DevRun({done}, a checkpoint of {human_bytes(self.checkpoint_bytes)}, {self.seconds:.1f} s)"

    def _repr_html_(self) -> str:
        rows = [("losses of steps", ", ".join(f"{loss:.4f}" for loss in self.losses))]
        rows += [(f"{split} loss of one batch", f"{loss:.4f}") for split, loss in self.evaluations.items()]
        rows += [("checkpoint, written and read", human_bytes(self.checkpoint_bytes)), ("an answer", self.answer)]
        rows += [("time", f"{self.seconds:.1f} s"), ("peak memory", human_bytes(self.peak_memory))]
        return facts("All that a run does works; everything was taken back", rows)


def fast_dev_run(trainer: Trainer, steps: int = 2) -> DevRun:
    """Does once all that a run does, to find out in seconds what would fail in hours; then everything is as it was, bit for bit.

    Some steps, an evaluation of one batch of each split, an answer of eight tokens, and a checkpoint, which is read again and removed. It
    stands beside the run's folder meanwhile, without one in the system's for temporary files. Needs memory for a second set of
    weights and optimizer state. That rows of the largest batch fit is the matter of `ft.preflight(..., measure=True)`.

    Args:
        trainer: at any step.
        steps: how many; they have the learning rate of the next step, or the peak where that is 0.

    Raises:
        ConfigError: a number out of range.
        Exception: whatever a run would have failed with.
    """
    steps = whole_number("steps", steps, low=1)
    started, lm, data, batch_size = time.perf_counter(), trainer.lm, trainer.data, trainer.config.batch_size
    mx.reset_peak_memory()
    with trainer.rehearsal() as step:
        losses = tuple(step(trainer.learning_rate or trainer.peak_learning_rate) for _ in range(steps))
        evaluations = {name: evaluate_loss(lm.model, split, batch_size, 1).loss for name, split in data.splits.items()}
        row = data.train[0].tokens
        answer = lm.generate(lm.tokenizer.decode(row[: max(1, len(row) // 2)].tolist()), max_tokens=8)
    place = None if trainer.run_dir is None else trainer.run_dir.parent
    with tempfile.TemporaryDirectory(prefix="fast-dev-run-", dir=place) as folder:
        path = Path(folder, "checkpoint")
        trainer.snapshot(path)
        size = sum(file.stat().st_size for file in path.iterdir())
        _check_same(read_checkpoint(path, lm).weights, parameters_of(lm.model))
    return DevRun(losses, evaluations, size, answer, time.perf_counter() - started, mx.get_peak_memory())


def _check_same(read: dict[str, mx.array], written: dict[str, mx.array]) -> None:
    for name, array in written.items():
        if name not in read or read[name].dtype != array.dtype or not mx.array_equal(read[name], array, equal_nan=True).item():
            raise TrainingError(f"a checkpoint was written and read again, and {name} is not what it was. Please report this.")


class OverfitRun:
    """What `overfit_batch` returns.

    Attributes:
        losses: (n,) float64, before each step's update, in nats; fewer than asked for where one was not finite.
        rows: how many rows were trained on.
        learning_rate: of all steps.
        diverged: whether a loss was not finite.
    """

    def __init__(self, losses: Sequence[float], rows: int, learning_rate: float, diverged: bool):
        self.losses, self.rows, self.learning_rate, self.diverged = np.array(losses, np.float64), rows, learning_rate, diverged

    @property
    def learned(self) -> bool:
        """Whether the loss has come below a tenth of what it was."""
        return not self.diverged and bool(self.losses[-1] < _LEARNED * self.losses[0])

    @property
    def verdict(self) -> str:
        """What the losses say, in a sentence."""
        if self.diverged:
            return "The loss was not finite: lower the rate (learning_rate=), or set max_grad_norm."
        if self.learned:
            return "It learns these rows by heart, so gradients and updates reach the weights."
        return (
            "It does not learn these rows by heart. Give more steps or another rate (learning_rate=); if that does not help, look at what"
            " is trained: the loss mask, train_only and freeze, and rows that contradict each other."
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss by step, on `ax` or a new figure."""
        from fulltune_nb.plots import curves

        title = f"{counted(self.rows, 'row')} again and again, rate {self.learning_rate:.3g}"
        return curves([("loss", range(1, len(self.losses) + 1), self.losses)], "step", "loss (nats per token)", title, ax=ax)

    def __repr__(self) -> str:
        figures = f"loss {self.losses[0]:.4f} → {self.losses[-1]:.4f}, {counted(len(self.losses), 'step')} on {counted(self.rows, 'row')}"
        return f"OverfitRun({figures}, learned={self.learned})"

    def _repr_html_(self) -> str:
        rows = [("loss, first and last", f"{self.losses[0]:.4f} → {self.losses[-1]:.4f}"), ("lowest", f"{np.nanmin(self.losses):.4f}")]
        rows += [("steps", len(self.losses)), ("rows in each, the same", self.rows), ("learning rate", f"{self.learning_rate:.3g}")]
        return facts("One batch again and again; everything was taken back", [*rows, ("verdict", self.verdict)])


def overfit_batch(trainer: Trainer, steps: int = 60, learning_rate: float | None = None) -> OverfitRun:
    """Trains on the next step's rows again and again: a model that cannot learn these by heart will learn nothing. Taken back, bit for bit.

    Needs memory for a second set of weights and optimizer state meanwhile.

    Args:
        trainer: at any step; before the first one is the usual place.
        steps: how many.
        learning_rate: of all of them; the schedule's peak where left out.

    Raises:
        ConfigError: a number out of range.
    """
    steps = whole_number("steps", steps, low=2)
    rate = trainer.peak_learning_rate if learning_rate is None else learning_rate
    check_rate(rate)
    losses, diverged = [], False
    with trainer.rehearsal(same_rows=True) as step:
        for _ in range(steps):
            try:
                losses.append(step(float(rate)))
            except NonFiniteError:  # all is taken back anyway
                losses.append(math.inf)
                diverged = True
                break
    return OverfitRun(losses, len(trainer.batch_at(trainer.step_count + 1)), float(rate), diverged)
