"""Files and folders that are whole or not there at all, whatever happens meanwhile.

They are written beside their place, flushed to the disk, and renamed. What a killed process leaves behind begins with a dot.
The standard library has the pieces of this (`mkstemp`, `fsync`, `replace`), and no package that is needed anyway has more.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from sys import intern
from typing import Any, BinaryIO

from fulltune_nb.errors import FulltuneError

REMOVED_AT_ONCE = 2**26
"""Bytes of a folder that are gone so fast that no thread is worth it."""
_SLICE = 2**23  # bytes handed to the system at a time
FINDER_FILE = ".DS_Store"
"""What the Mac's Finder writes into a folder that somebody looks at."""
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # what fsync says where names may be lost; all else says that a folder has no fsync
UNFINISHED = ".unfinished"
"""In the name of what is still being written, so that nothing of anybody else has such a name."""
_removals: list[threading.Thread] = []
_not_removed: list[Path] = []


def absolute(path: str | os.PathLike) -> Path:
    """The path from the root, `~` and `..` resolved but no links: a later change of the working directory does not matter to it.

    Raises:
        FulltuneError: it is relative, and the working directory has been removed.
    """
    try:
        return Path(os.path.abspath(os.path.expanduser(os.fsdecode(path))))
    except FileNotFoundError as error:
        raise FulltuneError(f"{path}: the working directory is gone, so a relative path leads nowhere. Give an absolute one.") from error


# ---- what may be opened --------------------------------------------------------------------------------------------------------


_KINDS = {
    stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def check_ordinary(path: Path, kind: int = stat.S_IFREG) -> None:
    """Looks at what stands at a path without opening it: a pipe is waited for, a device may have no end, a link leads elsewhere.

    Args:
        path: where nothing may stand.
        kind: what should: a file, or `stat.S_IFDIR`.

    Raises:
        OSError: something else does.
    """
    try:
        found = stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if found != kind:
        expected = "a folder" if kind == stat.S_IFDIR else "an ordinary file"
        raise OSError(errno.EINVAL, f"{path} is {_KINDS.get(found, 'a file')}, expected {expected}; it was not opened")


def open_ordinary(path: Path) -> BinaryIO:
    """A file to read.

    Raises:
        OSError: there is none, or it is a link or no file.
    """
    check_ordinary(path)
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def check_own_file(path: Path, where: str, folder: Path | None = None) -> None:
    """A folder that came from elsewhere holds its files itself: a link may stay within it, or lead to the blobs of the hub's cache.

    The folder itself, and those above it, may be links.

    Args:
        path: of what is in the folder; nothing may be there.
        where: "the model folder", for the message.
        folder: the folder; None: the one that the path is directly in.

    Raises:
        OSError: what is in it at this path is a link to a file elsewhere, a pipe, a socket or a device.
    """
    inside = Path(os.path.realpath(folder or path.parent))
    target = Path(os.path.realpath(path))
    if target.is_dir() or not os.path.lexists(path):
        return
    if not target.is_relative_to(inside) and not target.is_relative_to(inside.parent.parent / "blobs"):
        raise OSError(errno.EINVAL, f"{path} is a link out of {where}, to {target}; it was not opened")
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, f"{path} is {_KINDS[stat.S_IFMT(target.stat().st_mode)]}, expected an ordinary file; it was not opened")


# ---- files ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its ending; renamed to it when the block ends well, removed when not."""
    with _unfinished(path, path.stem, path.suffix) as temporary:
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)


@contextmanager
def unfinished_folder(place: Path) -> Iterator[Path]:
    """A new folder beside `place`, to be moved there by `put_in_place`; what stands under its name when the block ends is removed."""
    with _unfinished(place, place.name, "", is_folder=True) as temporary:
        yield temporary


@contextmanager
def _unfinished(place: Path, stem: str, suffix: str, is_folder: bool = False) -> Iterator[Path]:
    """A file or folder that its writer holds by a lock, so that those of killed writers can be told from it; they are removed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    left = re.compile(rf"\.{re.escape(stem)}-[0-9a-f]{{8}}{re.escape(UNFINISHED + suffix)}")
    with suppress(OSError):  # a folder that can be written to, but not listed
        for name in filter(left.fullmatch, os.listdir(place.parent)):
            _remove_unless_held(place.parent / name)
    path = place.parent / f".{stem}-{uuid.uuid4().hex[:8]}{UNFINISHED}{suffix}"
    if is_folder:
        path.mkdir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with suppress(OSError):  # where there are no locks, nothing is removed either
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        finally:
            os.close(descriptor)
    finally:
        _remove(path)


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Within the block the file is locked, made if need be; False where another process, or thread, has it. It ends with the process.

    Where the file system has no locks, it is True.

    Raises:
        OSError: the file cannot be made.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        ours = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            ours = False
        except OSError:
            pass
        yield ours
    finally:
        os.close(descriptor)


def _remove_unless_held(path: Path) -> None:
    with suppress(OSError):  # somebody else's, or gone
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        finally:
            os.close(descriptor)


def flush_to_disk(path: Path) -> None:
    """Returns when a file's content, or a folder's list of names, is on the disk; of a folder, where its file system can say so.

    Raises:
        OSError: it is not.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, where fsync leaves the data in the disk's own memory
                with suppress(OSError):  # not every file system can
                    fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_folder or error.errno in _LOST:
            raise


def write_text(path: Path, text: str) -> None:
    """A small text file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str, on_disk: bool = False) -> None:
    """One line at the end of a file, handed to the system at once; where not all of it fits, none of it stays.

    A line that was cut short, because its writer was killed, is ended first. With `on_disk` the line is there when the machine fails too.

    Raises:
        OSError: it cannot be written, or is a link or no file.
    """
    check_ordinary(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        cut_short = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (b"\n" if cut_short else b"") + line.encode() + b"\n"
        try:
            if os.write(descriptor, data) < len(data):
                raise OSError(28, "No space left on device")
            if on_disk:
                os.fsync(descriptor)
        except OSError:
            if os.fstat(descriptor).st_size > size:
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Checksum of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """A file of these bytes one after the other, in place; `flush_to_disk` then has little left to do."""
    descriptor, place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 0
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                written = os.write(descriptor, rest[:_SLICE])
                if hasattr(os, "posix_fadvise"):  # Linux begins to write out what it is told will not be read; macOS does without
                    with suppress(OSError):  # a hint
                        os.posix_fadvise(descriptor, place, written, os.POSIX_FADV_DONTNEED)
                rest, place = rest[written:], place + written
    finally:
        os.close(descriptor)


Checksum = Callable[[], str]
"""Waits until a SHA-256 has been computed and returns it, hex."""


def begin_checksum(parts: Iterable[bytes | memoryview]) -> Checksum:
    """Computes the SHA-256 of bytes one after the other in a thread, beside what the caller does next.

    They must not change until the checksum has been returned.
    """
    digest = hashlib.sha256()

    def work() -> None:
        for part in parts:
            digest.update(part)  # without Python's lock

    thread = threading.Thread(target=work, name="fulltune_nb checksum", daemon=True)
    thread.start()

    def wait() -> str:
        thread.join()
        return digest.hexdigest()

    return wait


# ---- folders -------------------------------------------------------------------------------------------------------------------


def is_empty(folder: Path) -> bool:
    """Whether it is a folder with nothing in it but what the Mac's Finder leaves."""
    return folder.is_dir() and all(path.name == FINDER_FILE for path in folder.iterdir())


def has_to_stay(folder: Path) -> bool:
    """Whether a folder cannot be exchanged for a new one: a mount point, the working directory, another user's or group's, or one that
    stands where nothing can be written."""
    about, parent = folder.stat(), folder.parent.stat()
    is_ours = about.st_uid == os.geteuid() and about.st_gid in (parent.st_gid, os.getegid())
    is_here = os.path.exists(os.curdir) and os.path.samefile(folder, os.curdir)
    return not is_ours or is_here or os.path.ismount(folder) or not os.access(folder.parent, os.W_OK | os.X_OK)


def put_in_place(new: Path, place: Path) -> None:
    """Moves a folder to its place, from beside it. What stood there goes only when the new one stands there.

    Where the system can exchange two names in one go, there is no moment without either. Elsewhere the old one is called
    `.<name>-<random>-old` for a moment, from where `tidy` brings it back if the process is killed then.
    """
    aside = place.parent / f".{place.name}-{uuid.uuid4().hex[:8]}-old"
    if not place.exists():
        os.rename(new, place)
    elif exchange_names(new, place):
        aside = new
    else:
        os.rename(place, aside)
        try:
            os.rename(new, place)
        except OSError:
            os.rename(aside, place)
            raise
    try:
        flush_to_disk(place.parent)
    finally:
        _remove(aside)


def exchange_names(one: Path, other: Path) -> bool:
    """Exchanges two names in one go; False where the system or the file system cannot."""
    library, paths = ctypes.CDLL(None), (os.fsencode(one.absolute()), os.fsencode(other.absolute()))
    if hasattr(library, "renamex_np"):  # macOS
        return library.renamex_np(*paths, ctypes.c_uint(2)) == 0  # RENAME_SWAP
    if hasattr(library, "renameat2"):  # Linux
        here = ctypes.c_int(-100)  # AT_FDCWD: paths are absolute, so it does not matter
        return library.renameat2(here, paths[0], here, paths[1], ctypes.c_uint(2)) == 0  # RENAME_EXCHANGE
    return False


def remove_folder(folder: Path) -> None:
    """Removes a folder; it loses its name first, so that a half-removed one is never taken for a whole one, nor brought back."""
    aside = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}{UNFINISHED}"
    os.rename(folder, aside)
    _remove(aside)


def _remove(path: Path) -> None:
    """Removes a file, or a folder that has lost its name; a large one in a thread, as that takes a third of the time of writing it."""
    try:
        size = sum(inside.lstat().st_size for inside in path.iterdir())
    except OSError:  # no folder, or somebody else is removing it too
        size = 0
    if size <= REMOVED_AT_ONCE:
        _remove_now(path)
        return
    thread = threading.Thread(target=_remove_now, args=(path,), name="fulltune_nb removal")
    thread.start()
    _removals.append(thread)


def _remove_now(path: Path) -> None:
    """What cannot be removed is tried again by `wait_for_removals`."""
    try:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    except FileNotFoundError:  # somebody else is removing it too
        pass
    except OSError:
        _not_removed.append(path)


def wait_for_removals() -> None:
    """Returns when everything that was removed is gone, as far as the system lets it."""
    while _removals:
        _removals.pop().join()
    for path in [_not_removed.pop() for _ in range(len(_not_removed))]:
        _remove_now(path)


LEFT = re.compile(r"\.(?P<place>.+)-(?P<random>[a-z0-9_]{8})(?P<kind>-old|\.unfinished)?(?:\.[a-z]+)?")
"""The names of what killed writers leave; earlier versions did not write `.unfinished`."""


def tidy(folder: Path, ours: str, is_ours: Callable[[Path], bool] = lambda path: True) -> list[str]:
    """Removes what killed writers left in a folder, and brings back what they had only set aside.

    To be called by the only one who writes there.

    Args:
        folder: need not exist.
        ours: regular expression for the names, without their endings, of what is written there; nothing else is touched.
        is_ours: whether what has such a name was really left by a writer; where not it stays, and is told.

    Returns:
        A line for each thing done.
    """
    wait_for_removals()
    done = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        left = LEFT.fullmatch(path.name)
        if left is None or not re.fullmatch(ours, left["place"]) or path.is_symlink():
            continue
        place = folder / left["place"]
        if not is_ours(path):
            done.append(f"left {path.name} alone: it has the name of what a killed write leaves, but not its content")
        elif left["kind"] == "-old" and path.is_dir() and not place.exists():
            os.rename(path, place)
            done.append(f"brought back {place}, which a killed write had set aside")
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            done.append(f"removed {path.name}, left by a killed write")
    return done


def check_space(folder: Path, needed: int, what: str) -> None:
    """
    Raises:
        OSError: the disk that a folder is on, or will be, has fewer than `needed` bytes left.
    """
    wait_for_removals()
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(28, f"No space left on device: {what} needs {needed:,} bytes, {there} has {free:,} free")


def is_within(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a path is a folder or stands somewhere in it, links followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


# ---- JSON ----------------------------------------------------------------------------------------------------------------------


class KeyTwice(ValueError):
    """An object gives a key twice."""


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for `json.loads`: Python keeps the last of two equal keys without a word.

    Raises:
        KeyTwice: names the key.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyTwice(f"the key {key[:60]!r} is given twice in one object")
        found[intern(key)] = value  # rows have the same keys: each is held once
    return found
