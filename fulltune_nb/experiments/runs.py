"""The runs of a sweep: each with its files, and all of them side by side.

out_dir/<parameters>-<digest>/state.json        status, attempt, reason, seconds, the notebook's sha256
                             /parameters.json
                             /1/                the first attempt; a failed one is kept, the next is 2
                               executed.ipynb, log.txt, run/ (the run_dir), result.json
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune_nb import html
from fulltune_nb.data.settings import DATE_VARIABLE
from fulltune_nb.errors import MissingDependencyError
from fulltune_nb.experiments.execution import OUTCOME, REQUEST
from fulltune_nb.experiments.parameters import label, varied
from fulltune_nb.experiments.result import FILE, read_result
from fulltune_nb.files import write_text
from fulltune_nb.frames import frame
from fulltune_nb.panels.progress import clock
from fulltune_nb.training.history import History
from fulltune_nb.training.run import METRICS_FILE, read_metrics

_STATE = "state.json"
_TAIL = 8192  # bytes at the end of a file that tell how far a run is
_PROGRESS = re.compile(r"^(step \d+/\d+): (loss [-\d.a-z]+)(?:, .*?(\d[\d:]* left))?", re.MULTILINE)
_METRIC = re.compile(r'"kind": "step", "step": (\d{1,15}), .*?"loss": (-?\d{1,30}(?:\.\d{1,30})?(?:e[-+]?\d{1,3})?)[,}]')
_HEADERS = ("run", "status", "split", "loss", "perplexity", "time")


@dataclass
class Run:
    """One run: its parameters, where it stands, what came of it.

    Attributes:
        parameters: by name, as the notebook gets them.
        folder: all its files.
        label: what tells it from the other runs.
        status: "waiting", "running", "done", "failed" or "not started" (the sweep was stopped before).
        reason: of a failure, in a line or two.
        seconds: wall-clock time of the latest attempt.
        attempt: counted from 1; 0 before the first.
        notebook_sha256: of the notebook that it was made with.
    """

    parameters: dict[str, Any]
    folder: Path
    label: str
    status: str = "waiting"
    reason: str = ""
    seconds: float = 0.0
    attempt: int = 0
    notebook_sha256: str = ""

    @property
    def attempt_folder(self) -> Path:
        """Files of the latest attempt."""
        return self.folder / str(self.attempt)

    @property
    def run_dir(self) -> Path:
        """The trainer's folder in the latest attempt, where the notebook takes it from the sweep."""
        return Path(self.parameters.get("run_dir") or self.attempt_folder / "run")

    @property
    def executed(self) -> Path:
        """The executed notebook of the latest attempt."""
        return self.attempt_folder / "executed.ipynb"

    @property
    def result(self) -> dict[str, Any]:
        """What the notebook wrote to its `result.json`; empty where it wrote none."""
        return read_result(self.run_dir / FILE) or read_result(self.attempt_folder / FILE)

    @property
    def history(self) -> History:
        """The trainer's reports; empty where the notebook wrote none."""
        return read_metrics(self.run_dir)[0]

    def damages(self) -> list[str]:
        """What in its files could not be read and was passed over."""
        results = dict.fromkeys((self.run_dir / FILE, self.attempt_folder / FILE))
        return read_metrics(self.run_dir)[1] + [f"{path} is no result" for path in results if path.is_file() and not read_result(path)]

    def loss(self) -> tuple[str, float] | None:
        """(split, loss in nats per trained token) to compare runs by: of the test split where there is one."""
        result = self.result
        reports = {key: value for key, value in result.items() if isinstance(value, Mapping)}
        if (steps := result.get("steps")) is not None:  # a test of earlier weights is not the run's
            reports = {key: report for key, report in reports.items() if report.get("step", steps) == steps}
        after = reports.get("after", {})
        candidates = [
            *((split, result.get(f"{split}_loss")) for split in ("test", "valid", "train")),
            *((split, reports.get(key, {}).get("loss")) for split, key in (("test", "test"), ("valid", "valid_last"))),  # the trainer's own
            (str(after.get("split") or result.get("split") or "held-out"), after.get("loss")),
        ]
        return next(((split, float(loss)) for split, loss in candidates if _is_number(loss)), None)

    def outcome(self) -> str:
        """The loss of a run that is done, the reason of a failure; of one that is under way its step, its loss and the time left."""
        if self.status == "failed":
            return html.cut(" ".join(self.reason.split()))
        if self.status == "running":
            return self._under_way()
        loss = self.loss() if self.status == "done" else None
        return "" if loss is None else f"{loss[0]} loss {loss[1]:.4f}"

    def _under_way(self) -> str:
        """By the last line of progress in its log; of a notebook that shows none, by its metrics, which do not tell the time left."""
        if lines := _PROGRESS.findall(_tail(self.attempt_folder / "log.txt")):
            return ", ".join(part for part in lines[-1] if part)
        if steps := _METRIC.findall(_tail(self.run_dir / METRICS_FILE)):
            return f"step {int(steps[-1][0]):,}, loss {float(steps[-1][1]):.3f}"
        return ""

    def recall(self) -> None:
        """Takes up what an earlier sweep left behind. A run that was cut off is begun anew."""
        state = read_result(self.folder / _STATE)
        self.status = "done" if state.get("status") == "done" else "waiting"
        self.reason = str(state.get("reason", ""))
        self.attempt = state.get("attempt") if isinstance(state.get("attempt"), int) else 0
        self.seconds = float(state["seconds"]) if _is_number(state.get("seconds")) else 0.0
        self.notebook_sha256 = str(state.get("notebook_sha256", ""))

    def remember(self) -> None:
        """Writes where it stands, so that a later sweep knows."""
        names = ("status", "attempt", "reason", "seconds", "notebook_sha256")
        write_text(self.folder / _STATE, json.dumps({name: getattr(self, name) for name in names}, indent=2) + "\n")

    def begin(self, notebook: Path, notebook_sha256: str, known: list[str], date: str, temporary: Path | None = None) -> subprocess.Popen:
        """Starts a process that executes the notebook in a kernel of its own; both write into a new attempt's folder.

        It ends when its standard input is closed, so also with this process, whatever that ends by.

        Args:
            notebook: the file.
            notebook_sha256: of its content.
            known: names of its parameters.
            date: that chat templates get which write today's.
            temporary: the folder for the process's temporary files, made if need be; None: this process's own.
        """
        self.attempt = 1 + max((int(p.name) for p in self.folder.glob("*") if p.name.isdigit()), default=0)
        self.status, self.reason, self.notebook_sha256 = "running", "", notebook_sha256
        attempt = self.attempt_folder
        attempt.mkdir(parents=True)
        write_text(self.folder / "parameters.json", json.dumps(self.parameters, indent=2) + "\n")
        self.remember()
        places = {"run_dir": str(attempt / "run"), "out": str(attempt), "result": str(attempt / FILE)}
        given = {name: place for name, place in places.items() if name in known and not self.parameters.get(name)}
        request = {"notebook": str(notebook), "executed": str(self.executed), "parameters": {**given, **self.parameters}}
        write_text(attempt / REQUEST, json.dumps(request, indent=2) + "\n")
        environment = {**os.environ, "FULLTUNE_PROGRESS": "plain", "PYTHONUNBUFFERED": "1", DATE_VARIABLE: date}
        if temporary is not None:
            temporary.mkdir(exist_ok=True)
            environment["TMPDIR"] = str(temporary)
        with (attempt / "log.txt").open("wb") as log:
            command = [sys.executable, "-m", "fulltune_nb.experiments.execution", str(attempt)]
            own = {"start_new_session": True}  # a terminal's signals reach the sweep, which ends its runs
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, **own)

    def finish(self, code: int, started: float) -> None:
        """Takes in how the process ended; `started` is the time by `time.monotonic`."""
        self.seconds = time.monotonic() - started
        outcome = read_result(self.attempt_folder / OUTCOME)
        self.status = "done" if code == 0 and outcome.get("status") == "done" else "failed"
        if self.status == "failed":
            self.reason = str(outcome.get("reason") or _reason_of(code, self.attempt_folder / "log.txt"))
        self.remember()


def _tail(path: Path) -> str:
    """The end of a file that grows; "" where there is none."""
    if not path.is_file():
        return ""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            return file.read(_TAIL).decode("utf-8", "replace")
    except OSError:
        return ""


def _reason_of(code: int, log: Path) -> str:
    """Why a process ended that could not say so itself."""
    if code < 0:
        killed = ", which is what a machine out of memory does" if code == -9 else ""
        return f"the process was ended by signal {-code}{killed}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return f"the process ended with exit code {code}" + (f": {lines[-1]}" if lines else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
        self._losses = {id(run): run.loss() if run.status == "done" else None for run in runs}
        self.runs = sorted(runs, key=self._rank)
        self._names = varied([run.parameters for run in runs])

    def _rank(self, run: Run) -> tuple[int, float]:
        loss = self._losses[id(run)]
        return {"done": 0, "failed": 1}.get(run.status, 2), float("inf") if loss is None else loss[1]

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
        return next((run for run in self.runs if self._losses[id(run)] is not None), None)

    def rows(self) -> Iterator[dict[str, Any]]:
        """What the table shows, a dict for each run: varied parameters, status, losses, time, folder."""
        for run in self.runs:
            split, loss = self._losses[id(run)] or ("", None)
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

    def summary(self) -> str:
        """How many came to what."""
        left = len(self) - len(self.done) - len(self.failed)
        parts = [f"{len(self.done)} done", f"{len(self.failed)} failed", *([f"{left} not started"] if left else [])]
        return html.printable(f"{len(self)} runs in {self.out_dir}: {', '.join(parts)}")

    def text(self) -> str:
        """The table as text, then the reasons."""
        lines = [list(_HEADERS), *self._cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEADERS))]
        shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        reasons = [f"failed: {run.label}: {run.outcome()}\n        {run.attempt_folder}" for run in self.failed]
        return html.printable("\n".join([*shown, *reasons, *self._notes(), self.summary()]))

    def _cells(self) -> Iterator[list[str]]:
        for row, run in zip(self.rows(), self.runs, strict=True):
            loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
            perplexity = "" if row["perplexity"] is None else f"{row['perplexity']:,.3f}"
            seconds = clock(row["seconds"]) if row["seconds"] else ""
            yield [label(run.parameters, self._names), row["status"], row["split"], loss, perplexity, seconds]

    def _notes(self) -> list[str]:
        """The notes, and what was passed over in the files of the runs that are done."""
        return self.notes + [f"{run.label}: {note}" for run in self.done for note in run.damages()]

    def __repr__(self) -> str:
        return f"Sweep({self.summary()})"

    def _repr_html_(self) -> str:
        parts = [html.table(_HEADERS, self._cells(), self.summary())]
        if self.failed:
            rows = [(run.label, html.cut(run.reason), run.attempt_folder) for run in self.failed]
            parts.append(html.table(("failed", "reason", "files"), rows, "Failures"))
        parts += [f"<div>{html.esc(note)}</div>" for note in self._notes()]
        return "".join([*parts, self._plot_html()])

    def _plot_html(self) -> str:
        if not any(run.history for run in self.done):
            return ""
        try:
            from fulltune_nb.plots import picture_html
        except MissingDependencyError as error:
            return f"<div>{html.esc(error)}</div>"
        return picture_html(self.plot, "loss over the steps, a curve for each run")
