"""What this machine and this environment are, for a first look and for bug reports: `ft.system_info()`."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass

from fulltune_nb.cpu import BlasInfo, ensure_fast_blas
from fulltune_nb.html import facts, human_bytes

MEASURED_SIZE = 1024  # rows and columns of the matrices multiplied
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
    arithmetic: dict[str, str]
    matmul_gflops: float | None = None

    def _facts(self) -> list[tuple[str, str]]:
        blas = f"{self.blas.name} ({self.blas.how})"
        speed = "not measured" if self.matmul_gflops is None else f"{self.matmul_gflops:,.0f} GFLOP/s"
        return [
            ("fulltune_nb", self.version),
            ("Python", self.python),
            ("mlx", self.mlx),
            ("transformers", self.transformers),
            ("platform", self.platform),
            ("device", self.device),
            *((name, value) for name, value in self.arithmetic.items() if name == "float32 products"),
            ("cores", str(self.cores)),
            ("memory", human_bytes(self.memory_total)),
            ("BLAS", blas),
            ("C++ compiler", self.compiler or "none"),
            ("float32 matmul", speed),
        ]

    def __repr__(self) -> str:
        return f"SystemInfo({', '.join(f'{name}: {value}' for name, value in self._facts())})"

    def _repr_html_(self) -> str:
        return facts("System", self._facts())


def system_info(measure: bool = False) -> SystemInfo:
    """Look at this machine and environment.

    Args:
        measure: also time a float32 matrix product (1024 x 1024; a fraction of a second).
    """
    import mlx.core as mx
    import psutil

    from fulltune_nb.cpu import available_cores, compiler

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
        arithmetic=arithmetic(),
        matmul_gflops=matmul_gflops() if measure else None,
    )


def _device() -> str:
    import mlx.core as mx

    device = mx.default_device()
    return f"{device.type.name} {mx.device_info(device).get('device_name', '')}".strip()


def arithmetic() -> dict[str, str]:
    """What the last digits of a run's numbers depend on besides versions, by name.

    The device; of a GPU, whether float32 products are made in TF32 (MLX's default on CUDA and on Apple's M5: 10 bits of each factor
    count, not 23); of a CPU, the BLAS with its threads, and whose kernels compute.
    """
    from fulltune_nb.cpu import available_cores, may_use_kernels, on_cpu

    found = {"device": _device()}
    if not on_cpu():
        exact = os.environ.get("MLX_ENABLE_TF32", "1").strip() == "0"
        return found | {"float32 products": "float32" if exact else "TF32 where the device has it (MLX_ENABLE_TF32=0: float32)"}
    threads = next((count for name in _THREADS if (count := os.environ.get(name))), available_cores())
    return found | {"BLAS": f"{ensure_fast_blas().name}, threads: {threads}", "kernels": "fulltune_nb's" if may_use_kernels() else "MLX's"}


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
