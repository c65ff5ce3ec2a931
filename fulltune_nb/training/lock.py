"""One run directory, one trainer: a lock that its process holds, and that ends with the process however that ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from fulltune_nb.errors import CheckpointError

LOCK_FILE = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of file systems without locks


class RunLock:
    """The lock of a run directory. It ends with `release`, when nothing refers to it any more, or with its process.

    A trainer of the same process that takes the directory up again, as when a cell is run twice, takes the lock over; `check` then
    tells the one before. If the later one is refused, its `release` gives the lock back.

    Args:
        folder: the run directory, which exists.

    Attributes:
        note: what to tell about a process that ended without letting go; None where there was none.
        save: the holder's method that saves what it has not saved, held weakly; see `have_holder_save`.

    Raises:
        CheckpointError: another process holds it, or the file cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder, self.save = folder, None
        try:
            file = _LockFile(folder / LOCK_FILE)
        except OSError as error:
            raise CheckpointError(f"{folder / LOCK_FILE} cannot be written: {error}. Give a run_dir that can be written to.") from error
        self._before = _holders.get(file.key)
        self._file: _LockFile | None = self._before._file if self._before else file
        self.note = file.note
        _holders[file.key] = self

    @property
    def is_ours(self) -> bool:
        """Whether no later trainer of this process has taken the lock over."""
        return self._file is not None and _holders.get(self._file.key) is self

    def check(self) -> None:
        """
        Raises:
            CheckpointError: a later trainer of this process, or another process after the folder was removed, has taken it over.
        """
        if not self.is_ours:
            raise CheckpointError(f"{self.folder} has been taken up by a later trainer of this process; go on with that one.")
        if self._file.is_replaced():
            raise CheckpointError(
                f"{self.folder} was removed or renamed, and another run has begun there. Nothing is written into it."
                " Give a run_dir of its own to a new trainer."
            )

    def keep(self) -> None:
        """From now on the trainer before does not get the lock back."""
        if self._before is not None:
            self._before._file = self._before = None

    def release(self) -> None:
        """Gives the lock back to the trainer that had it before, or lets go; nothing happens where that is done already."""
        if not self.is_ours:
            return
        if self._before is not None:
            _holders[self._file.key] = self._before
        else:
            del _holders[self._file.key]  # a later file may get the same number
            self._file.close()
        self._file = None


_holders: weakref.WeakValueDictionary[tuple[int, int, int], RunLock] = weakref.WeakValueDictionary()


def have_holder_save(folder: Path) -> None:
    """Has the trainer of this process that holds a folder, if one does, save what it has not saved: another is to go on from there."""
    try:
        status = os.stat(folder / LOCK_FILE)
    except OSError:
        return
    holder = _holders.get((status.st_dev, status.st_ino, os.getpid()))
    save = holder.save() if holder is not None and holder.save is not None else None
    if save is not None:
        save()


class _LockFile:
    """The open lock file, which the locks of one process share; let go when the last of them is gone. Where a `RunLock` of this process
    has it already, it is not locked again."""

    def __init__(self, path: Path):
        self.path, self.note = path, None
        while True:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self.close = weakref.finalize(self, os.close, self._descriptor)
            status = os.fstat(self._descriptor)
            self.key = (status.st_dev, status.st_ino, os.getpid())  # a forked child has its parent's locks before it, not its own
            if self.key in _holders:
                return
            owner = _owner(self._descriptor)
            self._lock(owner)
            if _is_file_at(self._descriptor, path):
                break
            self.close()  # its holder let go, and removed it, in this moment
        if owner:
            self.note = f"taken over from {_describe(owner)}, which ended without letting go"
        this = psutil.Process()
        owner = {"process": this.pid, "process_started": this.create_time(), "host": socket.gethostname()}
        owner["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, (json.dumps(owner) + "\n").encode(), 0)
        self.close.detach()
        self.close = weakref.finalize(self, _let_go, self._descriptor, path, this.pid)

    def _lock(self, owner: dict[str, Any]) -> None:
        """Where the file system has no locks, the process that the file names counts."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            no_locks = error.errno in _NO_LOCKS
            if no_locks and not _may_be_alive(owner):
                return
            if not no_locks and error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            gone = f" If that process is gone, remove {self.path}." if no_locks else ""
            raise CheckpointError(
                f"{self.path.parent} is in use by {_describe(owner)}. Two runs never share a run_dir: end that process (in a notebook,"
                f" shut its kernel down), or give another run_dir.{gone}"
            ) from None

    def is_replaced(self) -> bool:
        """Whether another file stands in its place; not where it cannot be looked at: there the write itself says why."""
        return _is_file_at(self._descriptor, self.path) is False


def _is_file_at(descriptor: int, path: Path) -> bool | None:
    """Whether an open file is the one at a path; None where nothing is there, or it cannot be looked at."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return None


def _let_go(descriptor: int, path: Path, process: int) -> None:
    if os.getpid() != process:
        return
    with suppress(OSError):
        if _is_file_at(descriptor, path):
            path.unlink()
    os.close(descriptor)


def _owner(descriptor: int) -> dict[str, Any]:
    """What a lock file says; empty where it says nothing that can be read."""
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
    if not owner or owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        return abs(psutil.Process(owner["process"]).create_time() - owner["process_started"]) < 1
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
