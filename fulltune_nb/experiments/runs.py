"""A run of a sweep, with its files.

out_dir/<parameters>-<digest>/state.json        status, attempt, reason, seconds, the notebook's sha256, host, attempts lost
                             /parameters.json
                             /1/                the first attempt; a failed one is kept, the next is 2
                               executed.ipynb, log.txt, run/ (the run_dir), result.json
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fulltune_nb import html
from fulltune_nb.experiments.execution import OUTCOME, REQUEST
from fulltune_nb.experiments.ranking import SPLITS, Ranking, is_number
from fulltune_nb.experiments.result import FILE, read_result
from fulltune_nb.experiments.worker import LOG, STOP
from fulltune_nb.files import write_text
from fulltune_nb.training.history import History
from fulltune_nb.training.run import METRICS_FILE, read_metrics

_STATE = "state.json"
_TAIL = 8192  # bytes at the end of a file that tell how far a run is
_PROGRESS = re.compile(r"^(step \d+/\d+): (loss [-\d.a-z]+)(?:, .*?(\d[\d:]* left))?", re.MULTILINE)
_METRIC = re.compile(r'"kind": "step", "step": (\d{1,15}), .*?"loss": (-?\d{1,30}(?:\.\d{1,30})?(?:e[-+]?\d{1,3})?)[,}]')


@dataclass
class Run:
    """One run: its parameters, where it stands, what came of it.

    Attributes:
        parameters: by name, as the notebook gets them.
        folder: all its files.
        label: what tells it from the other runs.
        status: "waiting", "queued" (an executor has it), "running", "done", "pruned" (by a search), "failed" or "not started" (the sweep
            was stopped before).
        reason: of a failure, in a line or two.
        seconds: wall-clock time of the latest attempt.
        attempt: counted from 1; 0 before the first.
        notebook_sha256: of the notebook that it was made with.
        host: the machine that the latest attempt ran on.
        lost: a line for each attempt whose worker was lost.
    """

    parameters: dict[str, Any]
    folder: Path
    label: str
    status: str = "waiting"
    reason: str = ""
    seconds: float = 0.0
    attempt: int = 0
    notebook_sha256: str = ""
    host: str = ""
    lost: list[str] = field(default_factory=list)

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

    def outcome(self) -> str:
        """The loss of a run that is done, the reason of a failure; of one that is under way its step, its loss and the time left."""
        if self.status in ("failed", "pruned"):
            return html.cut(" ".join(self.reason.split()))
        if self.status == "running":
            return self._under_way()
        losses = [(split, Ranking(f"{split}_loss").value(self.result)) for split in SPLITS] if self.status == "done" else []
        return next((f"{split} loss {loss:.4f}" for split, loss in losses if loss is not None), "")

    def _under_way(self) -> str:
        """By the last line of progress in its log; of a notebook that shows none, by its metrics, which do not tell the time left."""
        if lines := _PROGRESS.findall(_tail(self.attempt_folder / LOG)):
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
        self.seconds = float(state["seconds"]) if is_number(state.get("seconds")) else 0.0
        self.notebook_sha256, self.host = str(state.get("notebook_sha256", "")), str(state.get("host", ""))
        lost = state.get("lost")
        self.lost = [str(line) for line in lost] if isinstance(lost, list) else []

    def remember(self) -> None:
        """Writes where it stands, so that a later sweep knows."""
        names = ("status", "attempt", "reason", "seconds", "notebook_sha256", "host", "lost")
        write_text(self.folder / _STATE, json.dumps({name: getattr(self, name) for name in names}, indent=2) + "\n")

    def begin(self, notebook: Path, notebook_sha256: str, known: list[str]) -> Path:
        """A new attempt's folder with all that `worker.work` needs to execute the notebook.

        Args:
            notebook: the file.
            notebook_sha256: of its content.
            known: names of its parameters.
        """
        if self.attempt_folder.is_dir() and not (self.attempt_folder / OUTCOME).exists():
            self.stop()  # where its sweep was killed a moment ago its worker is at it still, and this one's heartbeat would keep it
        self.attempt = 1 + max((int(p.name) for p in self.folder.glob("*") if p.name.isdigit()), default=0)
        self.status, self.reason, self.notebook_sha256 = "queued", "", notebook_sha256
        attempt = self.attempt_folder
        attempt.mkdir(parents=True)
        write_text(self.folder / "parameters.json", json.dumps(self.parameters, indent=2) + "\n")
        self.remember()
        places = {"run_dir": str(attempt / "run"), "out": str(attempt), "result": str(attempt / FILE)}
        given = {name: place for name, place in places.items() if name in known and not self.parameters.get(name)}
        request = {"notebook": str(notebook), "executed": str(self.executed), "parameters": {**given, **self.parameters}}
        write_text(attempt / REQUEST, json.dumps(request, indent=2) + "\n")
        return attempt

    def finish(self, outcome: Mapping[str, Any]) -> None:
        """Takes in what `worker.work` said of how the process ended."""
        self.seconds, self.host = outcome["seconds"], outcome["host"]
        told = read_result(self.attempt_folder / OUTCOME)
        if outcome["code"] == 0 and told.get("status") == "done":
            self.status = "done"
            self.remember()
        else:
            self.fail(str(told.get("reason") or _reason_of(outcome["code"], self.attempt_folder / LOG)))

    def fail(self, reason: str) -> None:
        """The attempt came to nothing."""
        if self.status != "done":
            self.status, self.reason = "failed", reason
            self.remember()

    def lose(self, reason: str) -> None:
        """The attempt's worker is gone, with or without its process."""
        self.lost.append(f"attempt {self.attempt} was lost with its worker: {reason}")
        self.fail(self.lost[-1])

    def stop(self) -> None:
        """Has the attempt pause, save and end, wherever it runs."""
        (self.attempt_folder / STOP).touch()

    @property
    def stops(self) -> bool:
        """Whether the attempt was told to."""
        return (self.attempt_folder / STOP).exists()


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
