"""The folder of compiled kernels, which only this user can write to.

On a CPU, MLX compiles kernels with g++ and loads them, by names that anybody can foresee, from `mlx/<version>/cpu` in the folder of
temporary files. On a machine with many users that is a way to run code as another user (`docs/decisions/0023`). `import fulltune_nb`
therefore gives MLX a folder in the user's cache, or a new one where that cannot be used; nothing else in the process, and none of its
children, sees another folder of temporary files than before. Our own kernels are compiled there too. Where a folder that goes while
the process runs cannot be made again for this user alone, or its disk is full, what needs a new kernel is a `DeviceError`.

Each process has a folder to itself as long as it lives, since MLX writes in place; a later process finds the kernels of an earlier one.
Where nothing can be compiled and loaded, or where mlx was imported first and its own folder is not safe, MLX goes on uncompiled, as
where g++ is missing, and a warning says so. Neither numpy nor mlx is imported here, but for that.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fulltune_nb.cpu.blas import installed_cuda_backend, warn_caller

SYMBOL = "_ZNSt10filesystem19temp_directory_pathB5cxx11Ev"
"""`std::filesystem::temp_directory_path()`, which libmlx imports."""
TEMPORARY = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
"""Variables that it reads, in this order; g++ reads the first three."""
CUDA_VARIABLE = "MLX_PTX_CACHE_DIR"
"""Environment variable by which MLX's CUDA backend is told where its kernels stand."""
ROOM = 2**24
"""Bytes that have to be free; a kernel takes a fiftieth of that, and g++ some more while it works."""
MOST_BYTES = 2**28
"""Of one process's kernels; a folder that has more is emptied."""
_MOST_PROCESSES = 256
_LONGEST = 4096  # bytes of `folder` in `kernel_folder.cpp`
_SHELL = set('"$`\\\n')  # MLX puts the path between double quotes into a shell's command
_SOURCE = Path(__file__).with_name("kernel_folder.cpp")


class CompileWarning(RuntimeWarning):
    """MLX computes uncompiled on this CPU, which is slower, or it would load what others can write."""


@dataclass(frozen=True)
class KernelFolder:
    """Where kernels are compiled and loaded."""

    path: Path | None
    """Only this user can write to it, and no other process does; None where there is none."""
    problem: str | None = None
    """Why nothing is compiled, and what to do."""


_found: KernelFolder | None = globals().get("_found")  # survives importlib.reload: libraries stay loaded too


def ensure_kernel_folder() -> KernelFolder:
    """Gives MLX its folder where it compiles by g++ or for CUDA; repeated calls return the first one's answer.

    Warns (`CompileWarning`) where MLX cannot compile or must not, saying what to do; it never raises for that.
    """
    global _found
    if _found is None:
        _found = _find()
        if _found.problem is not None:
            warn_caller(f"{_go_on_without()}: {_found.problem}", CompileWarning)
    return _found


def _find() -> KernelFolder:
    cuda, compiles = installed_cuda_backend() is not None, shutil.which("g++") is not None
    if sys.platform != "linux" or importlib.util.find_spec("mlx") is None or not (cuda or compiles):
        return KernelFolder(None)  # on macOS the folder of temporary files is the user's own
    early, refused = "mlx.core" in sys.modules, []
    for place in _places():
        try:
            folder = _own_folder(check_private(place))
            library = _load(folder) if compiles else None
        except (OSError, subprocess.SubprocessError) as error:
            refused.append(f"{place}: {reason(error)}")
            with suppress(OSError):
                place.rmdir()  # if it is empty
            continue
        if cuda:
            os.environ.setdefault(CUDA_VARIABLE, str(folder / "mlx" / "ptx"))  # MLX's alone, so that children may have it too
        if library is None:
            return KernelFolder(folder)
        if early or not _comes_first(library):
            return KernelFolder(folder, _problem_of_mlx_folder() or _problem_of_compiler())
        (ctypes.c_char * _LONGEST).in_dll(library, "folder").value = os.fsencode(folder)
        return KernelFolder(folder, _problem_of_compiler())
    return KernelFolder(
        None,
        f"nothing could be compiled and loaded in a folder that this user alone can write to ({'; '.join(refused)}). Set XDG_CACHE_HOME to "
        "one with some free megabytes from which programs may run, before Python begins.",
    )


def _go_on_without() -> str:
    """Has MLX compile nothing for a CPU; returns what that means."""
    if cuda := installed_cuda_backend():
        return f"{cuda} may load compiled kernels that somebody else has written"
    with suppress(ImportError):
        import mlx.core as mx

        mx.disable_compile()
    return "MLX computes uncompiled on this CPU, which takes longer"


# ---- places --------------------------------------------------------------------------------------------------------------------


def _places() -> Iterator[Path]:
    """Folders of this user, made where they are missing, best first: in the cache, among temporary files, a new one that is removed."""
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))  # as it stands where nobody knows a home
    yield _made(cache, cache / "fulltune_nb", cache / "fulltune_nb" / f"kernels-{platform.machine()}")
    parents = dict.fromkeys([_temporary_folder(), "/tmp", "/var/tmp", "/dev/shm"])
    for parent in parents:
        yield _made(Path(parent, f"fulltune_nb-{os.geteuid()}"))
    for parent in parents:  # somebody else may have taken these names
        with suppress(OSError):
            new = tempfile.mkdtemp(prefix="fulltune_nb-", dir=parent)
            atexit.register(_remove, new, os.getpid())
            yield Path(new)


def _made(*folders: Path) -> Path:
    """The last of these, each made in the one before; what cannot be made is refused later."""
    with suppress(OSError):
        for folder in folders:
            if folder.is_absolute():
                folder.mkdir(0o700, exist_ok=True)
    return folders[-1]


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def check_private(folder: Path) -> Path:
    """The folder's path without links, if nobody else can write into it or put another in its place.

    Raises:
        OSError: somebody else can; or its path cannot stand in MLX's command.
    """
    if not folder.is_absolute() or _SHELL.intersection(str(folder)) or len(os.fsencode(folder)) > _LONGEST // 2:
        raise OSError("its path is not absolute, is long, or holds a quote, a dollar sign or a backslash")
    resolved, me = folder.resolve(strict=True), os.geteuid()
    if folder.is_symlink() or (owner := resolved.stat().st_uid) != me:
        raise OSError("it is a link" if folder.is_symlink() else f"it belongs to user {owner}, not to {me}")
    for path in (*reversed(resolved.parents), resolved):
        about = path.stat()
        writable = about.st_mode & 0o022 and not (about.st_mode & stat.S_ISVTX and path != resolved)
        if about.st_uid not in (0, me) or writable:
            raise OSError(f"others can change {path}: it belongs to user {about.st_uid} and has mode {stat.S_IMODE(about.st_mode):o}")
        if about.st_uid == me and not about.st_mode & 0o077:
            break  # nobody else gets further
    _check_room(resolved)
    return resolved


def _check_room(folder: Path | str) -> None:
    """
    Raises:
        OSError: the file system has too little room.
    """
    room = os.statvfs(folder)
    if (free := room.f_bavail * room.f_frsize) < ROOM or (room.f_files and room.f_favail < 8):
        raise OSError(f"its file system is full ({free / 2**20:.1f} MiB free, {ROOM // 2**20} are needed)")


def _own_folder(base: Path) -> Path:
    """The first of the numbered folders that no other process has, until this one ends; tidied."""
    for number in range(_MOST_PROCESSES):
        folder = base / str(number)
        folder.mkdir(0o700, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends, so the file stays open
        except BlockingIOError:
            os.close(lock)
            continue
        _tidy(folder)
        return folder
    raise OSError(f"{_MOST_PROCESSES} processes have their folders there")


def _tidy(folder: Path) -> None:
    """Leaves the kernels, if they are whole and not too many."""
    kept = {"lock", "mlx", _library_name()}
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    kernels = list(folder.glob("mlx/*/cpu/*"))
    too_many = sum(path.stat().st_size for path in kernels) > MOST_BYTES
    for path in kernels:
        if too_many or path.suffix != ".so" or not _is_whole(path):
            path.unlink()


def _is_whole(library: Path) -> bool:
    """Whether an ELF file ends where its header says, and names the kernel that its own name promises.

    One whose making was cut short has no header, or less behind it; one whose source found no room on the disk has no kernel.
    """
    with library.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:4] != b"\x7fELF":
            return False
        (start,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        is_long_enough = file.seek(0, os.SEEK_END) >= start + size * count
        file.seek(0)
        return is_long_enough and library.stem.removeprefix("lib")[:200].encode() in file.read()  # MLX shortens longer names


# ---- MLX's question ------------------------------------------------------------------------------------------------------------


def _library_name() -> str:
    return f"folder-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]}.so"


def _load(folder: Path) -> ctypes.CDLL:
    """`kernel_folder.cpp`, compiled if need be: what is loaded from here proves that programs may be run from here.

    Raises:
        OSError, SubprocessError: it cannot be compiled or loaded here.
    """
    library = folder / _library_name()
    if not library.exists():
        new = library.with_suffix(".new")
        command = ["g++", "-std=c++17", "-O1", "-fvisibility=hidden", "-shared", "-fPIC", "-o", new, _SOURCE, "-ldl"]
        subprocess.run(command, check=True, capture_output=True, timeout=60, env=compiler_environment(folder))
        os.replace(new, library)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def compiler_environment(folder: Path) -> dict[str, str]:
    """Of a g++ whose temporary files stand in a folder."""
    return {**os.environ, "TMPDIR": str(folder)}


def _comes_first(library: ctypes.CDLL) -> bool:
    """Whether libmlx, which is loaded later, will find our function and not the C++ library's, as where that was preloaded."""
    first, ours = (ctypes.cast(getattr(place, SYMBOL), ctypes.c_void_p).value for place in (ctypes.CDLL(None), library))
    return first == ours


def _temporary_folder() -> str:
    """Where libmlx, if nobody is asked in its place, looks for kernels."""
    return next((value for name in TEMPORARY if (value := os.environ.get(name))), "/tmp")


def _problem_of_mlx_folder() -> str | None:
    """Why MLX, which was imported first, must not use its own folder; that is made where it is missing, for this user alone."""
    temporary = Path(_temporary_folder())
    folder = temporary / "mlx" / metadata.version("mlx") / "cpu"
    try:
        if not temporary.is_dir():
            raise OSError("there is no such folder of temporary files")
        for path in (folder.parents[1], folder.parent, folder):
            path.mkdir(0o700, exist_ok=True)
        if check_private(folder) != folder:
            raise OSError("the path goes through a link")
    except OSError as error:
        return (
            f"mlx was imported before fulltune_nb, and would load kernels from {folder} ({reason(error)}). Restart Python (the kernel) and "
            "`import fulltune_nb` first, or set TMPDIR to a folder of your own before Python begins."
        )
    return None


def _problem_of_compiler() -> str | None:
    """Why g++, whose temporary files stand where the user has them, cannot compile."""
    named = [value for name in TEMPORARY[:3] if (value := os.environ.get(name))]
    for folder in (*named, "/tmp", "/var/tmp"):
        if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            try:
                return _check_room(folder)
            except OSError as error:
                return f"g++ writes its temporary files into {folder}, and {reason(error)}. Make room there, or set TMPDIR to another one."
    return f"g++ finds no folder for its temporary files ({', '.join(named) or '/tmp'}). Set TMPDIR to a folder that can be written to."


def reason(error: Exception) -> str:
    """What a program said last that failed, else the system's words for the error."""
    output = getattr(error, "stderr", None)
    return output.decode(errors="replace").strip()[-300:] if output else getattr(error, "strerror", None) or str(error)
