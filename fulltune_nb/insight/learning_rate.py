"""The learning-rate range test (Smith 2017): one short run in which the rate grows at every step, on the real model, taken back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mlx.utils import tree_flatten

from fulltune_nb.errors import ConfigError, MissingDependencyError, NonFiniteError
from fulltune_nb.frames import frame
from fulltune_nb.html import NO_MATH, esc, facts
from fulltune_nb.insight.updates import UpdateMeter, survival
from fulltune_nb.settings import whole_number
from fulltune_nb.training.history import moving_mean
from fulltune_nb.training.schedule import final_share
from fulltune_nb.training.trainer import Trainer

if TYPE_CHECKING:
    from fulltune_nb.plots import Axes

_BELOW_THE_MINIMUM = 7.0
"""The rate with the lowest loss is already at the edge: losses of later steps would not stand it. A tenth of it is the usual advice; on the
package's tiny model the best rate for 200 steps was a seventh of it with 2, 4 and 16 rows, in the mean over seeds (`docs/log.md`)."""
_SAMPLE = 2**12  # elements of a tensor that surviving updates are counted in
_SURVIVES = 0.5
_VALLEY = 0.1  # of the fall
_FEWEST = 5  # steps before a minimum that make it a fall
_CLEAR = 4.0
"""Standard errors that the fall has to have. On the package's tiny model it had 33 to 53 at the start, 7 to 20 after 20 steps, and 2 to 3
at the end of a run, where no rate lowers the loss in so few steps (`docs/log.md`)."""


class LearningRateSearch:
    """What `find_lr` returns.

    Attributes:
        rates: (n,) float64, the rate of each step; fewer than asked for where the loss ran away.
        losses: (n,) float64, before each step's update, in nats; the last may be infinite.
        smoothed: (n,) float64, the losses' centred moving mean.
        survival: (n,) float64, share of updates that survive rounding at each rate; all NaN where the weights are float32.
        lowest_loss_rate: where the smoothed loss is lowest, which is the middle (on the logarithmic scale) of the rates at which it is
            within a tenth of its whole fall from the bottom; None where it fell no further than batches differ, or not at all.
        rises_from: the rate from which on the smoothed loss stays clearly above that of the lowest rates; None where it does not.
        below: what that is divided by: 7 where the schedule keeps its rate, 3.5 where it lets it decay to 0 (as the mean of its rates is
            half its highest then), in between for others.
        suggestion: the quotient: the rate to train with (the peak of the schedule).
        stochastic: whether the run rounds stochastically, so that updates too small for the dtype are kept on average.
    """

    def __init__(
        self,
        rates: Sequence[float],
        losses: Sequence[float],
        survivals: Sequence[float],
        dtype: str,
        stochastic: bool,
        final_share: float = 1.0,
    ):
        """
        Args:
            rates, losses, survivals: of each step.
            dtype: of the weights.
            stochastic: as the attribute.
            final_share: what the schedule's last rate is of its highest one.
        """
        self.rates, self.losses = np.array(rates, np.float64), np.array(losses, np.float64)
        self.survival, self.dtype, self.stochastic = np.array(survivals, np.float64), dtype, stochastic
        finite = np.where(np.isfinite(self.losses), self.losses, np.nan)
        window = max(3, len(finite) // 12) // 2 * 2 + 1
        self.smoothed = moving_mean(finite, window)
        lowest = int(np.nanargmin(self.smoothed)) if np.isfinite(self.smoothed).any() else 0
        self._fall, doubt = self._compare_with_the_start(lowest, finite, window)
        self.lowest_loss_rate = self._middle_of_the_valley(lowest) if lowest >= _FEWEST and self._fall > doubt else None
        self.rises_from = self._end_of_the_flat(lowest, doubt)
        self._stays_flat = len(self.rates) > _FEWEST and abs(self.smoothed[-1] - self.smoothed[lowest] - self._fall) <= doubt
        self.below = _BELOW_THE_MINIMUM * (1.0 + final_share) / 2.0
        self.suggestion = None if self.lowest_loss_rate is None else self.lowest_loss_rate / self.below
        self._at_the_end = lowest >= len(self.rates) - 2

    def _compare_with_the_start(self, lowest: int, losses: np.ndarray, window: int) -> tuple[float, float]:
        """How far the smoothed loss fell, and how far it may seem to, as the rows of each step are others; both in nats."""
        if len(losses) <= _FEWEST or not np.isfinite(losses).any():
            return 0.0, 0.0
        steps = np.diff(losses[: max(lowest, 2 * _FEWEST) + 1])  # a slow fall hardly changes them
        error = math.sqrt(np.nanmean(steps**2) / window)  # of the difference of two means, each of so many losses
        return float(np.nanmean(self.smoothed[:_FEWEST]) - self.smoothed[lowest]), _CLEAR * error

    def _end_of_the_flat(self, lowest: int, doubt: float) -> float | None:
        flat = np.flatnonzero(self.smoothed <= self.smoothed[lowest] + self._fall + doubt)
        first = int(flat[-1]) + 1 if len(flat) else 0
        return float(self.rates[first]) if max(lowest, 2 * _FEWEST) < first < len(self.rates) else None

    def _middle_of_the_valley(self, lowest: int) -> float:
        # The lowest point itself hangs on which rows came then: from seed to seed it moves by a factor of 2.5, the middle by 1.3.
        bottom = self.smoothed[lowest]
        near = self.smoothed <= bottom + _VALLEY * (np.nanmean(self.smoothed[:_FEWEST]) - bottom)
        return float(np.exp(np.log(self.rates[near]).mean()))

    @property
    def survives_from(self) -> float | None:
        """The lowest rate from which on most updates survive rounding; None in float32, and where none is high enough."""
        eaten = np.flatnonzero(self.survival < _SURVIVES)
        if np.isnan(self.survival).all():
            return None
        first = int(eaten[-1]) + 1 if len(eaten) else 0
        return float(self.rates[first]) if first < len(self.rates) else None

    @property
    def notes(self) -> list[str]:
        """What to know about the suggestion."""
        notes = []
        if self.suggestion is None and self.rises_from is not None:
            notes.append(
                f"The loss fell by {self._fall:.2g}, which is no more than batches differ: there is nothing to suggest. A model that has "
                f"learned these rows looks so: no rate makes it better in so few steps, and from {self.rises_from:.2g} on it is worse. "
                "To train on, stay far below that, such as at the rate the training ended with."
            )
        elif self.suggestion is None and self._stays_flat:
            notes.append("The loss changed no more than batches differ at any rate tried: try higher ones (highest=).")
        elif self.suggestion is None:
            notes.append("The loss never fell: there is nothing to suggest. Look at the data, or begin at a lower rate (lowest=).")
        elif self._at_the_end:
            notes.append("The loss still fell at the highest rate tried: try higher ones (highest=).")
        if np.isnan(self.survival).all() or self.suggestion is None:
            return notes
        start = self.survives_from
        if not self.stochastic and (start is None or self.suggestion < start):
            where = f"below {start:.3g}" if start else "at every rate tried"
            notes.append(
                f"{where[0].upper()}{where[1:]} most updates are lost in rounding to {self.dtype}. "
                'Train with TrainConfig(rounding="stochastic"), or in float32.'
            )
        return notes

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line for each step. Raises `MissingDependencyError` without pandas."""
        columns = {"learning_rate": self.rates, "loss": self.losses, "smoothed": self.smoothed, "survival": self.survival}
        return frame({name: values.tolist() for name, values in columns.items()})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss against the rate, with the suggestion, and below which rate rounding eats a bfloat16 model's updates.

        Drawn on `ax` or a new figure.
        """
        from fulltune_nb.plots import curves, mark

        series = [("loss", self.rates, self.losses), ("moving mean", self.rates, self.smoothed)]
        ax = curves(series, "learning rate", "loss (nats per token)", "Learning-rate range test", log_x=True, ax=ax)
        if self.suggestion is not None:
            mark(ax, self.suggestion, f"suggestion {self.suggestion:.2g}")
            mark(ax, self.lowest_loss_rate, f"lowest loss {self.lowest_loss_rate:.2g}")
        elif self.rises_from is not None:
            mark(ax, self.rises_from, f"loss rises from {self.rises_from:.2g}")
        if self.survives_from is not None and not self.stochastic and self.survives_from > self.rates[0]:
            mark(ax, self.survives_from, f"rounding eats updates below {self.survives_from:.2g}")
        return ax

    def __repr__(self) -> str:
        found = "no suggestion" if self.suggestion is None else f"suggestion {self.suggestion:.3g}"
        return f"LearningRateSearch({found}, {len(self.rates)} rates from {self.rates[0]:.3g} to {self.rates[-1]:.3g})"

    def _repr_html_(self) -> str:
        show = [("suggestion", "none" if self.suggestion is None else f"{self.suggestion:.3g}")]
        if self.lowest_loss_rate is not None:
            why = "the schedule keeps its rate" if self.below == _BELOW_THE_MINIMUM else "the schedule lets the rate decay"
            show.append(("lowest loss at", f"{self.lowest_loss_rate:.3g}, {self.below:.2g} times the suggestion, as {why}"))
        show.append(("tried", f"{len(self.rates)} rates from {self.rates[0]:.3g} to {self.rates[-1]:.3g}, a step each; all taken back"))
        show += [("note", note) for note in self.notes]
        try:
            from fulltune_nb.plots import picture_html
        except MissingDependencyError as error:
            picture = f"<div>{esc(error)}</div>"
        else:
            picture = picture_html(self.plot, f"loss against the learning rate, {show[0][0]} {show[0][1]}")
        return f'<div class="{NO_MATH}">{facts("Learning-rate range test", show)}{picture}</div>'


def find_lr(trainer: Trainer, steps: int = 120, lowest: float = 1e-7, highest: float = 1.0) -> LearningRateSearch:
    """Trains for some steps with a rate that grows from each to the next, and suggests one. Everything is then as it was, bit for bit.

    The steps are those that would come next, with this optimizer and its state. Needs memory for a second set of weights and
    optimizer state meanwhile.

    Args:
        trainer: at any step; before the first one is the usual place.
        steps: at most; the test ends when the loss runs away.
        lowest: the rate of the first step.
        highest: the rate of the last step.

    Raises:
        ConfigError: a number out of range.
    """
    steps = whole_number("steps", steps, low=10)
    if not 0 < lowest < highest < math.inf:
        raise ConfigError(f"lowest, highest: expected 0 < lowest < highest, got {lowest!r} and {highest!r}.")
    dtypes = {str(array.dtype).removeprefix("mlx.core.") for _, array in tree_flatten(trainer.lm.model.trainable_parameters())}
    rounded = sorted(dtypes - {"float32"})
    rates, losses, survivals = [], [], []
    meter = UpdateMeter(every=1, sample=_SAMPLE) if rounded else None
    with trainer.rehearsal() as step:
        trainer.optimizers.observers += [meter] if meter else []
        for number, rate in enumerate(np.geomspace(lowest, highest, steps).tolist(), 1):
            try:
                losses.append(step(rate))
            except NonFiniteError:  # all is taken back anyway
                losses.append(math.inf)
            rates.append(rate)
            survivals.append(survival(meter.collect(number)) if meter else math.nan)
            if _ran_away(losses):
                break
    stochastic = getattr(trainer.config, "rounding", None) == "stochastic"
    config, total = trainer.config, trainer.total_steps
    stays = final_share(config.schedule(total), total)
    return LearningRateSearch(rates, losses, survivals, rounded[0] if rounded else "float32", stochastic, stays)


def _ran_away(losses: Sequence[float], recent: int = 5) -> bool:
    """Whether the last loss is not finite, or the last losses are far above the lowest ones."""
    if not math.isfinite(losses[-1]):
        return True
    if len(losses) < 2 * recent:
        return False
    means = np.convolve(losses, np.ones(recent) / recent, mode="valid")
    lowest = means.min()
    return bool(means[-1] > lowest + max(3 * lowest, 1.0) or means[-1] > 1.5 * means[0] + 1.0)
