"""A sweep's progress: a table that changes in a notebook, lines elsewhere.

The environment variable `FULLTUNE_PROGRESS` chooses as it does for training: `notebook`, `plain` (`terminal` is the same here) or `off`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fulltune_nb.experiments.outcome import Sweep
from fulltune_nb.experiments.runs import Run
from fulltune_nb.html import cut, table
from fulltune_nb.panels.progress import VARIABLE, clock, in_kernel


def watcher(runs: Sequence[Run]) -> Any:
    """What shows the progress here."""
    wanted = os.environ.get(VARIABLE, "").strip().lower()
    if wanted == "off":
        return Silent(runs)
    return Table(runs) if wanted != "plain" and in_kernel() else Lines(runs)


def _outcome(run: Run) -> str:
    if run.status == "failed":
        return cut(run.reason)
    loss = run.loss() if run.status == "done" else None
    return "" if loss is None else f"{loss[0]} loss {loss[1]:.4f}"


class Silent:
    """Shows nothing; the base of those that do."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs

    def start(self) -> None:
        """Before the first run."""

    def finished(self, run: Run) -> None:
        """A run is done or has failed."""

    def tick(self) -> None:
        """About once a second."""

    def end(self, sweep: Sweep) -> None:
        """After the last run."""


class Lines(Silent):
    """Whole lines on standard output: for terminals and logs."""

    def start(self) -> None:
        """How much there is to do."""
        done = sum(run.status == "done" for run in self.runs)
        print(f"{len(self.runs)} runs" + (f", {done} of them done before" if done else ""), flush=True)
        self._number = done

    def finished(self, run: Run) -> None:
        """A line."""
        self._number += 1
        outcome = " ".join(_outcome(run).split())
        colon = f": {outcome}" if outcome else ""
        print(f"[{self._number}/{len(self.runs)}] {run.status}: {run.label} ({clock(run.seconds)}){colon}", flush=True)

    def end(self, sweep: Sweep) -> None:
        """The table."""
        print(sweep.text(), flush=True)


class Table(Silent):
    """One output of the cell that changes, and stays in the saved notebook."""

    def start(self) -> None:
        """Shows it."""
        from IPython.display import HTML, display

        self._started = time.monotonic()
        self._handle = display(HTML(self._html()), display_id=True)
        self._last = self._html()

    def finished(self, run: Run) -> None:
        """Redraws it."""
        self.tick()

    def tick(self) -> None:
        """Redraws it where something has changed."""
        from IPython.display import HTML

        if (text := self._html()) != self._last:
            self._handle.update(HTML(text))
            self._last = text

    def end(self, sweep: Sweep) -> None:
        """The sorted table and the plot take its place."""
        from IPython.display import HTML

        self._handle.update(HTML(sweep._repr_html_()))

    def _html(self) -> str:
        counts = Counter(run.status for run in self.runs)
        caption = ", ".join(f"{counts[status]} {status}" for status in ("done", "failed", "running", "waiting") if counts[status])
        rows = [(run.label, run.status, clock(run.seconds) if run.seconds else "", _outcome(run)) for run in self.runs]
        return table(("run", "status", "time", "outcome"), rows, f"{caption}; {clock(time.monotonic() - self._started)} so far")
