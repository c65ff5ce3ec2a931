"""How fast a run goes, from its latest steps."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable

from fulltune_nb.training.history import StepReport


class Pace:
    """Loss, speed and time left over the last steps."""

    def __init__(self, steps: int, reports: Iterable[StepReport] = ()):
        """
        Args:
            steps: how many of the latest count.
            reports: those there are already.
        """
        self._reports: deque[StepReport] = deque(reports, maxlen=max(1, steps))
        self._moments: deque[float] = deque(maxlen=max(1, steps) + 1)

    def add(self, report: StepReport) -> None:
        """Takes in a step that has just ended."""
        self._reports.append(report)
        self._moments.append(time.monotonic())

    def rest(self) -> None:
        """The time from here to the next step does not count: the run begins or ends."""
        self._moments.clear()

    @property
    def last(self) -> StepReport | None:
        """The latest step."""
        return self._reports[-1] if self._reports else None

    @property
    def loss(self) -> float:
        """Mean over the trained tokens, in nats; NaN before the first step."""
        tokens = sum(report.tokens for report in self._reports)
        return sum(report.loss * report.tokens for report in self._reports) / tokens if tokens else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens a second, within steps."""
        seconds = sum(report.seconds for report in self._reports)
        return sum(report.tokens for report in self._reports) / seconds if seconds else math.nan

    def seconds_left(self, steps: int) -> float:
        """What so many more steps will take, evaluations and all that comes between steps included; NaN before the first step."""
        if len(self._moments) > 1:
            return steps * (self._moments[-1] - self._moments[0]) / (len(self._moments) - 1)
        return steps * self._reports[-1].seconds if self._reports else math.nan
