"""One run of a sweep and its files.

out_dir/<parameters>-<digest>/state.json        status, attempt, reason, seconds, the notebook's sha256
                             /parameters.json
                             /1/                the first attempt; a failed one is kept, the next is 2
                               executed.ipynb, log.txt, run/ (the run_dir), result.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fulltune_nb.experiments.result import FILE, read_result
from fulltune_nb.models.saving import write_text
from fulltune_nb.training.history import History
from fulltune_nb.training.run_directory import read_metrics

REQUEST, OUTCOME, STATE = "request.json", "outcome.json", "state.json"


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
        repeated: whether it was done by this sweep, rather than an earlier one.
    """

    parameters: dict[str, Any]
    folder: Path
    label: str
    status: str = "waiting"
    reason: str = ""
    seconds: float = 0.0
    attempt: int = 0
    notebook_sha256: str = ""
    repeated: bool = field(default=False, repr=False)

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
        after = result.get("after")
        after = after if isinstance(after, Mapping) else {}
        candidates = [(split, result.get(f"{split}_loss")) for split in ("test", "valid", "train")]
        for split, key in (("test", "test"), ("valid", "valid_last")):  # as the trainer itself writes them
            own = result.get(key)
            candidates.append((split, own.get("loss") if isinstance(own, Mapping) else None))
        candidates.append((str(after.get("split") or result.get("split") or "held-out"), after.get("loss")))
        return next(((split, float(loss)) for split, loss in candidates if _is_number(loss)), None)

    # -- remembered between sweeps --------------------------------------------------------------------------------

    def recall(self) -> None:
        """What an earlier sweep left behind. One that was cut off counts as failed: it is begun anew."""
        state = read_result(self.folder / STATE)
        self.status = "done" if state.get("status") == "done" else "waiting"
        self.reason = str(state.get("reason", ""))
        self.attempt = state.get("attempt") if isinstance(state.get("attempt"), int) else 0
        self.seconds = float(state["seconds"]) if _is_number(state.get("seconds")) else 0.0
        self.notebook_sha256 = str(state.get("notebook_sha256", ""))

    def remember(self) -> None:
        """Writes where it stands, so that a later sweep knows."""
        names = ("status", "attempt", "reason", "seconds", "notebook_sha256")
        write_text(self.folder / STATE, json.dumps({name: getattr(self, name) for name in names}, indent=2) + "\n")

    # -- run ------------------------------------------------------------------------------------------------------

    def begin(self, notebook: Path, notebook_sha256: str, known: list[str], temporary: Path | None = None) -> subprocess.Popen:
        """Starts a process that executes the notebook in a kernel of its own; both write into a new attempt's folder.

        Args:
            notebook: the file.
            notebook_sha256: of its content.
            known: names of its parameters.
            temporary: the folder for the process's temporary files, made if need be; None: this process's own.
        """
        self.attempt = 1 + max((int(p.name) for p in self.folder.glob("*") if p.name.isdigit()), default=0)
        self.status, self.reason, self.notebook_sha256, self.repeated = "running", "", notebook_sha256, True
        self.attempt_folder.mkdir(parents=True)
        write_text(self.folder / "parameters.json", json.dumps(self.parameters, indent=2) + "\n")
        self.remember()
        attempt = self.attempt_folder
        places = {"run_dir": str(attempt / "run"), "out": str(attempt), "result": str(attempt / FILE)}
        given = {name: place for name, place in places.items() if name in known and not self.parameters.get(name)}
        request = {"notebook": str(notebook), "executed": str(self.executed), "parameters": {**given, **self.parameters}}
        write_text(attempt / REQUEST, json.dumps(request, indent=2) + "\n")
        environment = {**os.environ, "FULLTUNE_PROGRESS": "plain", "PYTHONUNBUFFERED": "1"}
        if temporary is not None:
            temporary.mkdir(exist_ok=True)
            environment["TMPDIR"] = str(temporary)
        with (attempt / "log.txt").open("wb") as log:
            command = [sys.executable, "-m", "fulltune_nb.experiments.one_run", str(attempt)]
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def finish(self, code: int, started: float) -> None:
        """Takes in how the process ended; `started` is the time by `time.monotonic`."""
        self.seconds = time.monotonic() - started
        outcome = read_result(self.attempt_folder / OUTCOME)
        if code == 0 and outcome.get("status") == "done":
            self.status = "done"
        else:
            self.status = "failed"
            self.reason = str(outcome.get("reason") or _reason_of(code, self.attempt_folder / "log.txt"))
        self.remember()


def _reason_of(code: int, log: Path) -> str:
    """Why a process ended that could not say so itself."""
    if code < 0:
        killed = ", which is what a machine out of memory does" if code == -9 else ""
        return f"the process was ended by signal {-code}{killed}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return f"the process ended with exit code {code}" + (f": {lines[-1]}" if lines else "")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
