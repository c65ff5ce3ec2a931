"""A run wherever an executor has it done: a process that executes the notebook of an attempt's folder, watched until it ends.

The folder is all that the sweep and the worker share, so both may stand on different machines:

    request.json     what to execute, by the sweep
    begun            the first worker that took it, and its process id; or the sweep, so that none takes it
    stop             by the sweep: pause, save and end
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fulltune_nb.data.settings import DATE_VARIABLE

BEGUN, STOP, LOG = "begun", "stop", "log.txt"
OF_ITS_OWN = "*"
"""In place of a folder for temporary files: a new one for each run."""
_POLL_SECONDS = 0.05
_POLLS_BETWEEN_LOOKS = 10  # at files, which may lie on another machine
_LOOKS_WITHOUT_A_BEAT = 240  # some two minutes: files of another machine may be shown a minute late


def work(attempt: str, date: str, temporary: str | None = None, heartbeat: str | None = None) -> dict[str, Any]:
    """One run, from its begin to its end.

    Args:
        attempt: the folder.
        date: that chat templates get which write today's.
        temporary: a folder of which each thread of this process takes one for temporary files; `OF_ITS_OWN`; None: this process's.
        heartbeat: a file whose content changes as long as the sweep lives; the run is ended where it does not. None: the sweep is this
            very process.

    Returns:
        `code` (of the process, -15 where it was to stop before it began), `seconds`, `host`; or `begun_before`, by whom: an executor
        that repeats by itself what was cut off must not write into the same folder again.
    """
    folder, host, started = Path(attempt), socket.gethostname(), time.monotonic()
    if not claim(folder):
        return {"begun_before": (folder / BEGUN).read_text(encoding="utf-8").strip()}
    if (folder / STOP).exists():
        return {"code": -15, "seconds": 0.0, "host": host}
    own = TemporaryDirectory(prefix="fulltune_nb-run-", ignore_cleanup_errors=True) if temporary == OF_ITS_OWN else nullcontext(temporary)
    with own as place:
        if place is not None and temporary != OF_ITS_OWN:
            place = os.path.join(place, threading.current_thread().name)
            os.makedirs(place, exist_ok=True)
        process = _start(folder, date, place)
        _watch(process, folder / STOP, None if heartbeat is None else Path(heartbeat))
    return {"code": process.returncode, "seconds": time.monotonic() - started, "host": host}


def claim(folder: Path) -> bool:
    """Makes an attempt this process's; False where another has it."""
    try:
        with (folder / BEGUN).open("x", encoding="utf-8") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
    except FileExistsError:
        return False
    return True


def _start(folder: Path, date: str, temporary: str | None) -> subprocess.Popen:
    """The process; it ends when its standard input is closed, so also with this process, whatever that ends by."""
    environment = {**os.environ, "FULLTUNE_PROGRESS": "plain", "PYTHONUNBUFFERED": "1", DATE_VARIABLE: date}
    if temporary is not None:
        environment["TMPDIR"] = temporary
    with (folder / LOG).open("wb") as log:
        command = [sys.executable, "-m", "fulltune_nb.experiments.execution", str(folder)]
        own = {"start_new_session": True}  # a terminal's signals reach the sweep, which ends its runs
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, **own)


def _watch(process: subprocess.Popen, stop: Path, heartbeat: Path | None) -> None:
    """Waits until the process ends; has it end where it is to stop, or where the sweep is gone."""
    polls, beat, silent = 0, "", 0
    try:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            polls += 1
            if polls % _POLLS_BETWEEN_LOOKS:
                continue
            if heartbeat is not None:
                now = _read(heartbeat)
                beat, silent = (beat, silent + 1) if now in ("", beat) else (now, 0)
            if silent > _LOOKS_WITHOUT_A_BEAT or stop.exists():
                break
    finally:  # also of a terminal's interrupt, which the processes of a pool get too
        process.stdin.close()  # by which it notices; the run in its kernel pauses and is saved
        process.wait()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
