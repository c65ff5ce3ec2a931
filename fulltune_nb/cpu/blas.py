"""A fast BLAS for MLX on a Linux CPU.

The `mlx-cpu` wheel computes float32 matrix products with netlib's reference BLAS, at about 8 GFLOP/s. libmlx takes three
functions from it, `cblas_sgemm`, `cblas_dgemm` and `cblas_cgemm`, and the dynamic linker gives it the first ones it finds.
A better BLAS that is loaded with global symbols *before* libmlx is therefore used in its place, about 30 times faster.

`import fulltune_nb` does this. Sources, in order: what was preloaded, the environment's or the system's OpenBLAS, MKL, and
PyPI's `scipy-openblas32`. The environment variable `FULLTUNE_BLAS` overrides it: `off` leaves MLX as it is, a path names
the library to load. On macOS (Accelerate) and with MLX's CUDA backend there is nothing to do. Neither numpy nor mlx is
imported here.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass

from fulltune_nb.cpu import blas_stub

FUNCTIONS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
OPENBLAS_NAMES = ("libopenblasp.so.0", "libopenblas.so.0")  # Fedora's second one has no threads
MKL_NAMES = ("libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so.1", "libmkl_rt.so")
MLX_CUDA_PACKAGES = ("mlx-cuda-13", "mlx-cuda-12", "mlx-cuda")
VARIABLE = "FULLTUNE_BLAS"
HOW_TO_INSTALL = "`pip install scipy-openblas32` (or `conda install libopenblas`, or `apt-get install libopenblas0`)"


class BlasWarning(RuntimeWarning):
    """MLX computes matrix products on the CPU far slower than this machine could."""


@dataclass(frozen=True)
class BlasInfo:
    """What computes MLX's float32 matrix products."""

    name: str
    """Such as "OpenBLAS 0.3.34", "MKL" or "bundled reference BLAS"."""
    path: str | None
    """The library's file; None where MLX's own is used."""
    how: str
    """Where it came from: "preloaded", "environment or system", "scipy-openblas32", `"FULLTUNE_BLAS=..."`, or why nothing was done."""


_BUNDLED = "bundled reference BLAS"
_info: BlasInfo | None = globals().get("_info")  # survives importlib.reload: libraries stay loaded too


def ensure_fast_blas() -> BlasInfo:
    """Give MLX a fast BLAS where it needs one and it is not too late. Repeated calls return the first one's answer.

    Warns (`BlasWarning`) where matrix products will be slow, saying what to do; it never raises for that.
    """
    global _info
    if _info is None:
        _info = find_fast_blas()
    return _info


def find_fast_blas() -> BlasInfo:
    """As `ensure_fast_blas`, looking anew."""
    return _not_needed() or _find_and_load()


def _not_needed() -> BlasInfo | None:
    if sys.platform != "linux":
        return BlasInfo("MLX's own", None, f"nothing to do on {sys.platform}")
    if importlib.util.find_spec("mlx") is None:
        return BlasInfo("none", None, "mlx is not installed")
    if cuda := installed_cuda_backend():
        return BlasInfo("MLX's own", None, f"nothing to do: {cuda} is installed")
    if os.environ.get(VARIABLE, "").strip().lower() in ("off", "0", "none"):
        return BlasInfo(_BUNDLED, None, f"{VARIABLE}=off")
    return None


@functools.cache
def installed_cuda_backend() -> str | None:
    """Name and version of MLX's package for CUDA; None: there is none."""
    from importlib import metadata

    for package in MLX_CUDA_PACKAGES:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return None


def processor_kernels() -> str | None:
    """The processor whose kernels the BLAS has chosen, such as "Haswell"; None where it is no OpenBLAS."""
    info = ensure_fast_blas()
    if info.path is None:
        return None
    try:
        library = ctypes.CDLL(info.path)
        name = getattr(library, "openblas_get_corename", None) or library.scipy_openblas_get_corename
    except (OSError, AttributeError):
        return None
    name.restype = ctypes.c_char_p
    return (name() or b"").decode(errors="replace") or None


def _find_and_load() -> BlasInfo:
    # OpenBLAS's threads spin for a while after each product, in case another follows. Read when it is loaded; at its default the
    # spinning takes the cores that element-wise work on other streams needs (`kernels.py`).
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "14")
    if present := _already_global():
        return present
    if "mlx.core" in sys.modules:
        warn_caller(
            "mlx was imported before fulltune_nb, too late to give it a fast BLAS: float32 matrix products on the CPU will run "
            "about 30 times slower than they could. Restart Python (the kernel) and `import fulltune_nb` before `mlx`."
        )
        return BlasInfo(_BUNDLED, None, "mlx was imported before fulltune_nb")
    tried: list[str] = []
    for source in (_from_variable, _from_openblas, _from_mkl, _from_pypi):
        if info := source(tried):
            return info
    details = f" Tried in vain: {'; '.join(tried)}." if tried else ""
    warn_caller(
        "No fast BLAS was found: MLX's CPU package brings a reference BLAS, and float32 matrix products will run about 30 times "
        f"slower than they could. Install one with {HOW_TO_INSTALL}, then restart Python (the kernel).{details}"
    )
    return BlasInfo(_BUNDLED, None, "no other was found")


def warn_caller(message: str, category: type[Warning] = BlasWarning) -> None:
    """Warn in the name of the line that imported the package, past this package's and the import system's own frames."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((package, "<frozen importlib")):
        frame = frame.f_back
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno)


def _already_global() -> BlasInfo | None:
    """The BLAS that libmlx's symbols go to (or will go to) without our doing: LD_PRELOAD, or this module loaded twice."""
    everything = ctypes.CDLL(None)
    if not _has_functions(everything):
        return None
    path = _file_of(everything.cblas_sgemm)
    if "mlx.core" in sys.modules:
        order = _loaded_libraries()
        before_mlx = order[: next((i for i, name in enumerate(order) if os.path.basename(name) == "libmlx.so"), 0)]
        if path not in before_mlx:
            return None
    return BlasInfo(_name_of(everything, path), path, "preloaded")


def _from_variable(tried: list[str]) -> BlasInfo | None:
    path = os.environ.get(VARIABLE, "").strip()
    if path.lower() in ("", "auto"):
        return None
    info = _load(path, f"{VARIABLE}={path}", tried)
    if info is None:
        warn_caller(f"{VARIABLE} names a library that cannot be used as a BLAS, so another is looked for: {tried[-1]}.")
    return info


def _from_openblas(tried: list[str]) -> BlasInfo | None:
    return _load_first(OPENBLAS_NAMES, tried)


def _from_mkl(tried: list[str]) -> BlasInfo | None:
    if not any(opens(path) for path in _candidates(MKL_NAMES)):
        return None
    # MKL looks for its threading library at the first call and ends the process when it is missing, so look beforehand.
    if not any(opens(path) for path in _candidates(("libiomp5.so",))):
        tried.append("MKL (its libiomp5.so is missing: install intel-openmp)")
        return None
    return _load_first(MKL_NAMES, tried)


def _from_pypi(tried: list[str]) -> BlasInfo | None:
    """`scipy-openblas32`: forward the plain names to its prefixed ones by a small library made in memory."""
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = os.path.join(spec.submodule_search_locations[0], "lib", "libscipy_openblas.so")
    machine = os.uname().machine
    try:
        library = ctypes.CDLL(path)
        targets = {name: ctypes.cast(getattr(library, f"scipy_{name}"), ctypes.c_void_p).value for name in FUNCTIONS}
        blas_stub.load(blas_stub.image(targets, machine))
    except (OSError, AttributeError, KeyError) as error:
        tried.append(f"{path} ({error if machine in blas_stub.MACHINES else f'no forwarding stubs for {machine}'})")
        return None
    return BlasInfo(_name_of(library, path, prefix="scipy_"), path, "scipy-openblas32")


def _load_first(names: tuple[str, ...], tried: list[str]) -> BlasInfo | None:
    for path in _candidates(names):
        if opens(path) and (info := _load(path, "environment or system", tried)):
            return info
    return None


def _candidates(names: tuple[str, ...]) -> list[str]:
    """Files in the lib folders of this (conda) environment, then bare names for the dynamic linker's own search."""
    prefixes = dict.fromkeys(p for p in (sys.prefix, os.environ.get("CONDA_PREFIX"), sys.base_prefix) if p)
    files = [os.path.join(prefix, "lib", name) for prefix in prefixes for name in names]
    return [file for file in files if os.path.exists(file)] + list(names)


def opens(path: str) -> bool:
    """Whether the dynamic linker can load a library."""
    try:
        ctypes.CDLL(path)
    except OSError:
        return False
    return True


def _load(path: str, how: str, tried: list[str]) -> BlasInfo | None:
    """Load `path` for all later libraries to see, if it has what libmlx asks for; else note why not."""
    try:
        if not _has_functions(ctypes.CDLL(path)):
            tried.append(f"{path} (it lacks {', '.join(FUNCTIONS)})")
            return None
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        tried.append(f"{path} ({error})")
        return None
    file = _file_of(library.cblas_sgemm) or path
    return BlasInfo(_name_of(library, file), file, how)


def _has_functions(library: ctypes.CDLL) -> bool:
    return all(hasattr(library, name) for name in FUNCTIONS)


def _name_of(library: ctypes.CDLL, path: str | None, prefix: str = "") -> str:
    if path is not None and path.startswith(blas_stub.MEMORY_FILES):
        return "OpenBLAS (scipy-openblas32)"
    try:
        get_config = getattr(library, f"{prefix}openblas_get_config")
    except AttributeError:
        return "MKL" if "mkl" in os.path.basename(path or "") else os.path.basename(path or "unknown")
    get_config.restype = ctypes.c_char_p
    words = (get_config() or b"").decode(errors="replace").split()
    return " ".join(words[:2]) if words[:1] == ["OpenBLAS"] else "OpenBLAS"


class _DlInfo(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char_p), ("base", ctypes.c_void_p), ("symbol", ctypes.c_char_p), ("address", ctypes.c_void_p)]


def _file_of(function: ctypes._CFuncPtr) -> str | None:
    """The file of the library that holds a function, by `dladdr`."""
    info = _DlInfo()
    found = ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    return os.fsdecode(info.file) if found and info.file else None


class _PhdrInfo(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("file", ctypes.c_char_p)]  # the first two fields of struct dl_phdr_info


def _loaded_libraries() -> list[str]:
    """Files of the loaded libraries in the order they were loaded, by `dl_iterate_phdr`."""
    files: list[str] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_PhdrInfo), ctypes.c_size_t, ctypes.c_void_p)
    def note(info, _size, _data):
        files.append(os.fsdecode(info.contents.file or b""))
        return 0

    ctypes.CDLL(None).dl_iterate_phdr(note, None)
    return files
