"""One run directory, one trainer: a lock that its process holds, and that ends with the process however that ends.

The lock file, open and locked, is also what the folder is known by: while the file at its place is that very file, the folder is the one
that was taken up, whatever has been deleted, moved or begun anew meanwhile. filelock is no help here: it does not give the open file away.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from fulltune_nb.errors import CheckpointError
from fulltune_nb.files import UNFINISHED, check_ordinary

LOCK_FILE = "run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of file systems without locks
_MOVE = 'Nothing is written into it. trainer.move_run("another/folder") saves the run there as it is now, and goes on.'


class RunLock:
    """The lock of a run directory. It ends with `release`, when nothing refers to it any more, or with its process.

    A trainer of the same process that takes the directory up again, as when a cell is run twice, takes the lock over; `check` then
    tells the one before. If the later one is refused, its `release` gives the lock back. A forked child has no part in it.

    Args:
        folder: the run directory, which exists; an absolute path.

    Attributes:
        note: what to tell about a process that ended without letting go; None where there was none.
        save: the holder's method that saves what it has not saved, held weakly; see `have_holder_save`.

    Raises:
        CheckpointError: another process holds it, or the file cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder, self.save, self._process = folder, None, os.getpid()
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
        """Whether no later trainer of this process has taken the lock over, and this is no forked child."""
        return self._file is not None and _holders.get(self._file.key) is self

    @property
    def folder_is_gone(self) -> bool:
        """Whether the lock is held, but nothing at all stands where the folder was."""
        with suppress(OSError):  # a folder that cannot be looked at is not gone
            try:
                os.lstat(self.folder)
            except (FileNotFoundError, NotADirectoryError):
                return self.is_ours
        return False

    def check(self) -> None:
        """To be called before each write: whether the folder is still held, and still the one that was taken up.

        Raises:
            CheckpointError: it is not; the message says what has become of it.
        """
        if os.getpid() != self._process:
            raise CheckpointError(
                f"{self.folder} belongs to the process that this one was forked from. Nothing is written into it. Train there, or give a"
                " trainer made here a run_dir of its own."
            )
        if not self.is_ours:
            raise CheckpointError(f"{self.folder} has been taken up by a later trainer of this process; go on with that one.")
        try:
            if self._file.is_at_its_place():
                return
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be looked at: {error}. Nothing was written; go on when it is back.") from error
        if self.folder_is_gone:
            raise CheckpointError(
                f"{self.folder} is gone: it was deleted or moved while the run went on, and its checkpoints with it."
                f" trainer.save() makes it anew, with a checkpoint of now; then go on. {_MOVE}"
            )
        if os.path.lexists(self.folder / LOCK_FILE):
            raise CheckpointError(f"{self.folder} was removed or renamed, and another run has begun there. {_MOVE}")
        raise CheckpointError(f"{self.folder / LOCK_FILE} was removed, so another process may write into the folder. {_MOVE}")

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


_holders: weakref.WeakValueDictionary[tuple[int, int], RunLock] = weakref.WeakValueDictionary()


def have_holder_save(folder: Path) -> None:
    """Has the trainer of this process that holds a folder, if one does, save what it has not saved: another is to go on from there."""
    try:
        holder = _holders.get(_number(os.lstat(folder / LOCK_FILE)))
    except OSError:
        return
    save = holder.save() if holder is not None and holder.save is not None else None
    if save is not None:
        save()


class _LockFile:
    """The open lock file, which the locks of one process share; let go when the last of them is gone. Where a `RunLock` of this process
    has it already, it is not locked again."""

    def __init__(self, path: Path):
        self.path, self.note = path, None
        while True:
            check_ordinary(path)
            self._use(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), os.close)
            if self.key in _holders:
                return
            owner = _owner(self._descriptor)
            if not self._lock(owner):
                self._put_own_file_in_place()
            if self.is_at_its_place():
                break
            self.close()  # its holder let go, and removed it, in this moment
        if owner:
            self.note = f"taken over from {_describe(owner)}, which ended without letting go"
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, (json.dumps(owner) + "\n").encode(), 0)
        self.close.detach()
        self._use(self._descriptor, _let_go, path)
        _files.add(self)

    def _use(self, descriptor: int, close: Any, *arguments: Any) -> None:
        self._descriptor, self.key = descriptor, _number(os.fstat(descriptor))
        self.close = weakref.finalize(self, close, descriptor, *arguments)

    def _lock(self, owner: dict[str, Any]) -> bool:
        """False where the file system has no locks; there the process that the file names counts."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            no_locks = error.errno in _NO_LOCKS
            if no_locks and not _may_be_alive(owner):
                return False
            if not no_locks and error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            gone = f" If that process is gone, remove {self.path}." if no_locks else ""
            raise CheckpointError(
                f"{self.path.parent} is in use by {_describe(owner)}. Two runs never share a run_dir: end that process (in a notebook,"
                f" shut its kernel down), or give another run_dir.{gone}"
            ) from None

    def _put_own_file_in_place(self) -> None:
        """Without locks, of two processes that do this the later one has the folder, and the other's next `check` says so."""
        self.close()
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.stem}-", suffix=f"{UNFINISHED}{self.path.suffix}")
        self._use(descriptor, os.close)
        os.fchmod(descriptor, 0o644)  # others are told whose it is
        os.replace(name, self.path)

    def is_at_its_place(self) -> bool:
        """Whether the file at its path is this one.

        Raises:
            OSError: it cannot be looked at.
        """
        try:
            return _number(os.lstat(self.path)) == self.key
        except (FileNotFoundError, NotADirectoryError):
            return False


_files: weakref.WeakSet[_LockFile] = weakref.WeakSet()


def _leave_to_parent() -> None:
    """In a forked child: the locks are its parent's, and would outlive it as long as the child has them open."""
    for file in _files:
        file.close.detach()
        os.close(file._descriptor)
    _files.clear()
    _holders.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _number(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _let_go(descriptor: int, path: Path) -> None:
    with suppress(OSError):
        if _number(os.fstat(descriptor)) == _number(os.lstat(path)):
            path.unlink()
    os.close(descriptor)


def is_lock_file(path: Path) -> bool:
    """Whether a `run.lock` is one of ours, or has nothing in it, as after a power cut."""
    with suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):
            content = path.read_bytes()[:10_000]
            return not content.strip(b"\0\n ") or b'"process"' in content
    return False


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
    """Whether the process that a lock file names may still run. When it began is not asked: clocks are set while processes run."""
    if not owner or owner.get("host") != socket.gethostname():
        return bool(owner)
    process = owner.get("process")
    return isinstance(process, int) and 0 < process < 2**31 and process != os.getpid() and psutil.pid_exists(process)
