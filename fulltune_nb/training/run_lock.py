"""One run directory, one trainer: a lock that its process holds, and that ends with the process however it ends.

`run.lock` names the process that holds it. It is the system's lock on that file (`flock`) that counts, so a file that a killed
process left behind locks nobody out. Where the file system has no locks, the process named in the file is looked for.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any

import psutil

from fulltune_nb.errors import CheckpointError

LOCK_FILE = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: weakref.WeakValueDictionary[tuple[int, int], RunLock] = weakref.WeakValueDictionary()  # by the file's device and number


class RunLock:
    """The lock of a run directory. Let go by `release`, when nothing refers to it any more, or when the process ends.

    A trainer of the same process that takes the directory up again, as when a cell is run twice, takes the lock over; `check`
    then tells the one before.

    Args:
        folder: the run directory, which exists.

    Attributes:
        note: what to tell about a process that ended without letting go; None where there was none.
        is_ours: False once a later trainer of this process has taken it over.

    Raises:
        CheckpointError: another process holds it, or the file cannot be written.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK_FILE
        self.note: str | None = None
        self.is_ours = True
        try:
            descriptor = self._open()
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}. Give a run_dir that can be written to.") from error
        self._release = weakref.finalize(self, _let_go, descriptor, self.path, os.getpid())
        status = os.fstat(descriptor)
        _held[status.st_dev, status.st_ino] = self

    def _open(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if (before := self._of_this_process(descriptor)) is not None:
                    before.is_ours = False
                    os.close(descriptor)
                    descriptor = before._hand_over()
                    return descriptor
                owner = _owner(descriptor)
                self._lock(descriptor, owner)
                if not self._is_at_its_place(descriptor):
                    os.close(descriptor)  # its holder let go and removed it in this moment
                    continue
                if owner:
                    self.note = f"taken over from {_describe(owner)}, which ended without letting go"
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, (json.dumps(_this_process()) + "\n").encode(), 0)
                return descriptor
            except BaseException:
                os.close(descriptor)
                raise

    def _of_this_process(self, descriptor: int) -> RunLock | None:
        status = os.fstat(descriptor)
        before = _held.get((status.st_dev, status.st_ino))
        return before if before is not None and before._release.alive and before._release.peek()[2][2] == os.getpid() else None

    def _hand_over(self) -> int:
        return self._release.detach()[2][0]

    def _lock(self, descriptor: int, owner: dict[str, Any]) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS and not _may_be_alive(owner):
                return
            if error.errno not in (*_NO_LOCKS, errno.EWOULDBLOCK, errno.EACCES):
                raise
            gone = f" If that process is gone, remove {self.path}." if error.errno in _NO_LOCKS else ""
            raise CheckpointError(
                f"{self.path.parent} is in use by {_describe(owner)}. Two runs never share a run_dir: end that process (in a notebook,"
                f" shut its kernel down), or give another run_dir.{gone}"
            ) from None

    def _is_at_its_place(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """
        Raises:
            CheckpointError: a later trainer of this process has taken the directory over.
        """
        if not self.is_ours:
            raise CheckpointError(
                f"{self.path.parent} has been taken up by a later trainer of this process; go on with that one."
            )

    def release(self) -> None:
        """Lets go; nothing happens where that is done already."""
        self._release()


def _let_go(descriptor: int, path: Path, process: int) -> None:
    if os.getpid() != process:  # a forked child has the parent's lock before it, not one of its own
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass
    os.close(descriptor)


def _this_process() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _owner(descriptor: int) -> dict[str, Any]:
    """What the file says; empty where it says nothing that can be read."""
    try:
        owner = json.loads(os.pread(descriptor, 10_000, 0))
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _describe(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('process')} on {str(owner.get('host'))[:80]}, which holds it since {str(owner.get('since'))[:40]}"


def _may_be_alive(owner: dict[str, Any]) -> bool:
    if not owner:
        return False
    if owner.get("host") != socket.gethostname():
        return True
    try:
        return abs(psutil.Process(owner["process"]).create_time() - owner["process_started"]) < 1
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
