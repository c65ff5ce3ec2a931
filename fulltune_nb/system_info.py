"""What this machine and this environment are, for a first look and for bug reports: `ft.system_info()`."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass

from fulltune_nb.cpu import BlasInfo, ensure_fast_blas
from fulltune_nb.cpu.blas import processor_kernels
from fulltune_nb.errors import tells_missing_backend
from fulltune_nb.html import facts, human_bytes, printable

MEASURED_SIZE = 1024  # rows and columns of the matrices multiplied
_TRIED_SIZE = 512  # large enough for the units that compute in TF32
_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class SystemInfo:
    """Versions, device, memory and the BLAS in use.

    Attributes:
        version: of this package.
        python, mlx, transformers: versions; "not installed" where that is so.
        platform: operating system and processor architecture.
        device: MLX's default device and its hardware's name.
        cores: logical processors that this process may run on.
        memory_total: bytes of main memory (on Apple silicon the GPU shares it).
        blas: what computes float32 matrix products on the CPU.
        compiler: path of the g++ that kernels for the CPU are compiled with; None: there is none.
        kernel_folder: where these stand; None: where MLX puts them, or nowhere.
        compile_problem: why nothing is compiled although there is a compiler; None: it is.
        arithmetic: see `arithmetic`.
        matmul_gflops: measured 10^9 floating point operations a second of a float32 product on the default device; None
            when not measured.
    """

    version: str
    python: str
    mlx: str
    transformers: str
    platform: str
    device: str
    cores: int
    memory_total: int
    blas: BlasInfo
    compiler: str | None
    kernel_folder: str | None
    compile_problem: str | None
    arithmetic: dict[str, str]
    matmul_gflops: float | None = None

    def facts(self, limit: int | None = None) -> list[tuple[str, str]]:
        """Names and values to be shown; `limit`: bytes of the memory that training may take, where that is to be told."""
        blas = f"{self.blas.name} ({self.blas.how})"
        speed = "not measured" if self.matmul_gflops is None else f"{self.matmul_gflops:,.0f} GFLOP/s"
        return [
            ("fulltune_nb", self.version),
            ("Python", self.python),
            ("mlx", self.mlx),
            ("transformers", self.transformers),
            ("platform", self.platform),
            ("device", self.device),
            *((name, _with_what_to_do(value)) for name, value in self.arithmetic.items() if name == "float32 products"),
            ("cores", str(self.cores)),
            ("memory", human_bytes(self.memory_total) + ("" if limit is None else f", of which training may take {human_bytes(limit)}")),
            ("BLAS", blas),
            ("C++ compiler", self.compiler or "none"),
            ("compiled kernels", f"none: {self.compile_problem}" if self.compile_problem else self.kernel_folder or "MLX's"),
            ("float32 matmul", speed),
        ]

    def __repr__(self) -> str:
        return printable(f"SystemInfo({', '.join(f'{name}: {value}' for name, value in self.facts())})")

    def _repr_html_(self) -> str:
        return facts("System", self.facts())


def system_info(measure: bool = False) -> SystemInfo:
    """Look at this machine and environment.

    Args:
        measure: also time a float32 matrix product (1024 x 1024; a fraction of a second).

    Raises:
        MissingDependencyError: MLX is installed without a backend.
    """
    with tells_missing_backend():
        import mlx.core as mx
    import psutil

    from fulltune_nb.cpu import available_cores, compiler, ensure_kernel_folder

    kernels = ensure_kernel_folder()
    versions = package_versions(("fulltune_nb", "transformers"))
    return SystemInfo(
        version=versions["fulltune_nb"],
        python=platform.python_version(),
        mlx=mx.__version__,
        transformers=versions["transformers"],
        platform=f"{platform.system()} {platform.machine()}",
        device=_device(),
        cores=available_cores(),
        memory_total=psutil.virtual_memory().total,
        blas=ensure_fast_blas(),
        compiler=compiler(),
        kernel_folder=None if kernels.path is None else str(kernels.path),
        compile_problem=kernels.problem,
        arithmetic=arithmetic(),
        matmul_gflops=matmul_gflops() if measure else None,
    )


def _device() -> str:
    import mlx.core as mx

    device = mx.default_device()
    return f"{device.type.name} {mx.device_info(device).get('device_name', '')}".strip()


def arithmetic() -> dict[str, str]:
    """What the last digits of a run's numbers depend on besides versions, by name.

    The device; of a GPU, how float32 products are made; of a CPU, the BLAS with its threads and the processor that it computes for,
    whose kernels compute, and whether MLX compiles.
    """
    from fulltune_nb.cpu import available_cores, compiles, may_use_kernels, on_cpu

    found = {"device": _device()}
    if not on_cpu():
        return found | {"float32 products": "float32" if keeps_float32(found["device"]) else "TF32"}
    threads = next((count for name in _THREADS if (count := os.environ.get(name))), available_cores())
    return found | {
        "BLAS": f"{ensure_fast_blas().name}, threads: {threads}",
        "BLAS kernels": processor_kernels() or "the BLAS's own",
        "kernels": "fulltune_nb's" if may_use_kernels() else "MLX's",
        "mx.compile": "on" if compiles() else "off",
    }


@functools.cache
def keeps_float32(device: str) -> bool:
    """Whether products of float32 matrices count all 24 bits of a factor on MLX's default device, which is called so; tried once.

    TF32, MLX's default on NVIDIA's GPUs since Ampere and on Apple's since the M5 (macOS 26.2), counts 11 and is some 1,000 times less
    exact. MLX reads MLX_ENABLE_TF32 at its first product; what is set later has no effect, so it is tried, not read.
    """
    import mlx.core as mx

    factor = 1 + 2**-12  # 1 in TF32
    product = mx.full((_TRIED_SIZE, _TRIED_SIZE), factor) @ mx.eye(_TRIED_SIZE)
    return product.max().item() == factor


def _with_what_to_do(products: str) -> str:
    return "TF32: some 1,000 times less exact. MLX_ENABLE_TF32=0, set before Python begins, is float32" if products == "TF32" else products


def matmul_gflops(size: int = MEASURED_SIZE, seconds: float = 0.5) -> float:
    """The best speed seen of a float32 (size, size) matrix product on MLX's default device, in GFLOP/s.

    Args:
        size: rows and columns.
        seconds: how long to go on trying; there are at least two tries, as the first pays for threads and memory pages.
    """
    import mlx.core as mx

    a = mx.ones((size, size), dtype=mx.float32)
    mx.eval(a)
    best, tries, until = float("inf"), 0, time.perf_counter() + seconds
    while tries < 2 or time.perf_counter() < until:
        start = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - start)
        tries += 1
    return 2 * size**3 / best / 1e9


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Package -> installed version, or "not installed"."""
    from importlib import metadata

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
