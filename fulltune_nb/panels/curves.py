"""A history's numbers, taken in as they come, and curves with few points made of them.

Letters: n reports, m points drawn.
"""

from __future__ import annotations

import math
from operator import attrgetter

import numpy as np

from fulltune_nb import plots
from fulltune_nb.plots import stretches
from fulltune_nb.training.history import History, StepReport

MOST_POINTS = 400
"""Stretches of a curve: the wider of the plots has as many pixels."""
_FIELDS = ("step", "loss", "peak_memory", "active_memory", "cache_memory")
_numbers_of = attrgetter(*_FIELDS)


class Columns:
    """A history's numbers, taken in as they come: of 20,000 reports only the new ones are looked at.

    Attributes:
        evals: for each split, the steps and the losses.
        events: steps at which something happened.
        taken: reports taken in.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._numbers = np.empty((len(_FIELDS), 1024))
        self._count = self.taken = 0
        self.evals: dict[str, tuple[list[float], list[float]]] = {}
        self.events: list[int] = []

    def take(self, history: History) -> None:
        """Takes in what has come since."""
        if len(history) < self.taken:  # another history, or one that was cut
            self._forget()
        new = history[self.taken :]
        self._add([_numbers_of(report) for report in new if isinstance(report, StepReport)])
        for report in (report for report in new if not isinstance(report, StepReport)):
            if report.kind_of_report == "eval":
                steps, losses = self.evals.setdefault(report.split, ([], []))
                steps.append(report.step)
                losses.append(report.loss if math.isfinite(report.loss) else math.nan)
            elif report.step > 0:  # step 0 is where every run begins
                self.events.append(report.step)
        self.taken = len(history)

    def _add(self, rows: list[tuple[float, ...]]) -> None:
        count = self._count + len(rows)
        while count > self._numbers.shape[1]:
            self._numbers = np.concatenate([self._numbers, np.empty_like(self._numbers)], axis=1)
        if rows:
            values = np.array(rows, np.float64).T
            self._numbers[:, self._count : count] = np.where(np.isfinite(values), values, np.nan)
        self._count = count

    @property
    def last_step(self) -> float:
        """The last step there is anything about, or -1."""
        return max([*self["step"][-1:], *(steps[-1] for steps, _ in self.evals.values())], default=-1)

    def __getitem__(self, name: str) -> np.ndarray:
        """The column of a field, (n,) float64, NaN where not finite."""
        return self._numbers[_FIELDS.index(name), : self._count]


def envelope(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """A curve with few points that keeps every spike and every break."""
    return plots.envelope(x, y, most)


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each stretch, NaN where it holds one; (m,) each."""
    return stretches(x, most).mean(axis=1), stretches(y, most).mean(axis=1)
