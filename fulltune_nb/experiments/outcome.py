"""What a sweep came to: its runs by test loss, those that failed with their reasons, and a plot."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fulltune_nb import html
from fulltune_nb.experiments.points import label, varied
from fulltune_nb.experiments.runs import Run
from fulltune_nb.frames import frame
from fulltune_nb.panels.progress import clock


class Sweep(Sequence[Run]):
    """The runs of a sweep, the lowest test loss first, then those without one.

    Attributes:
        out_dir: where their files are.
        runs: all runs, in this order.
        notes: lines to announce.
    """

    def __init__(self, runs: Sequence[Run], out_dir: Path, notes: Sequence[str] = ()):
        self.out_dir = out_dir
        self.notes = list(notes)
        losses = {id(run): run.loss() if run.status == "done" else None for run in runs}
        order = {"done": 0, "failed": 1}
        self.runs = sorted(runs, key=lambda r: (order.get(r.status, 2), losses[id(r)] is None, (losses[id(r)] or ("", 0.0))[1]))
        self._names = varied([run.parameters for run in runs])

    def __getitem__(self, index):
        return self.runs[index]

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def done(self) -> list[Run]:
        """Runs with a result."""
        return [run for run in self.runs if run.status == "done"]

    @property
    def failed(self) -> list[Run]:
        """Runs that failed; `.reason` says why, `.executed` is the notebook up to there."""
        return [run for run in self.runs if run.status == "failed"]

    @property
    def best(self) -> Run | None:
        """The run with the lowest test loss, or None."""
        return next((run for run in self.done if run.loss() is not None), None)

    def rows(self) -> Iterator[dict[str, Any]]:
        """What the table shows, a dict for each run: varied parameters, status, losses, time, folder."""
        for run in self.runs:
            split, loss = (run.loss() if run.status == "done" else None) or ("", None)
            perplexity = run.result.get(f"{split}_perplexity") if loss is not None else None
            own = {name: run.parameters.get(name) for name in self._names}
            yield {**own, "status": run.status, "split": split, "loss": loss, "perplexity": perplexity, "seconds": run.seconds}

    def to_frame(self):
        """A pandas DataFrame of `rows()`, with the reason of a failure and the folder.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        rows = zip(self.rows(), self.runs, strict=True)
        return frame({**row, "reason": run.reason, "folder": str(run.attempt_folder)} for row, run in rows)

    def plot(self, ax=None):
        """Curves of all runs that are done, on matplotlib axes: see `fulltune_nb.plots.plot_runs`."""
        from fulltune_nb.plots import plot_runs

        return plot_runs({label(run.parameters, self._names): run.history for run in self.done}, ax)

    def text(self) -> str:
        """The table as text, then the reasons."""
        lines = [list(_HEADERS), *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADERS))]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        reasons = [f"failed: {run.label}: {_one_line(run.reason)}\n        {run.attempt_folder}" for run in self.failed]
        return "\n".join([*shown, *reasons, *self.notes, *self._damages(), self.summary()])

    def _damages(self) -> list[str]:
        """What was passed over in the files of the runs that are done."""
        return [f"{run.label}: {note}" for run in self.done for note in run.damages()]

    def _cells(self) -> Iterator[list[str]]:
        for row, run in zip(self.rows(), self.runs, strict=True):
            yield _cells(row, label(run.parameters, self._names))

    def summary(self) -> str:
        """How many came to what."""
        left = len(self) - len(self.done) - len(self.failed)
        parts = [f"{len(self.done)} done", f"{len(self.failed)} failed", *([f"{left} not started"] if left else [])]
        return f"{len(self)} runs in {self.out_dir}: {', '.join(parts)}"

    def __repr__(self) -> str:
        return f"Sweep({self.summary()})"

    def _repr_html_(self) -> str:
        parts = [html.table(_HEADERS, self._cells(), self.summary())]
        if self.failed:
            rows = [(run.label, html.cut(run.reason), run.attempt_folder) for run in self.failed]
            parts.append(html.table(("failed", "reason", "files"), rows, "Failures"))
        parts += [f"<div>{html.esc(note)}</div>" for note in [*self.notes, *self._damages()]]
        parts.append(self._plot_html())
        return "".join(parts)

    def _plot_html(self) -> str:
        if not any(run.history for run in self.done):
            return ""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.0, 4.0), layout="constrained", facecolor="white")
        self.plot(figure.add_subplot())
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100)
        encoded = base64.b64encode(picture.getvalue()).decode()
        return f'<img alt="loss over the steps, a curve for each run" src="data:image/png;base64,{encoded}">'


_HEADERS = ("run", "status", "split", "loss", "perplexity", "time")


def _cells(row: dict[str, Any], name: str) -> list[str]:
    loss, perplexity = row["loss"], row["perplexity"]
    numbers = ["" if loss is None else f"{loss:.4f}", "" if perplexity is None else f"{perplexity:,.3f}"]
    return [name, row["status"], row["split"], *numbers, clock(row["seconds"]) if row["seconds"] else ""]


def _one_line(text: str) -> str:
    return html.cut(" ".join(text.split()))
