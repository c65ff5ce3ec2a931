"""The door to what MLX needs on a CPU: a fast BLAS, kernels, streams for its cores, exponentials, memory that is used again.

Everything takes and gives plain arrays, and does what MLX does on other devices; what else depends on the device asks `on_cpu`.
Importing the door imports no mlx, because the BLAS and the folder of compiled kernels come before mlx; the other names load when they
are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fulltune_nb.cpu.blas import BlasInfo, BlasWarning, ensure_fast_blas
from fulltune_nb.cpu.kernel_folder import CompileWarning, KernelFolder, ensure_kernel_folder

if TYPE_CHECKING:
    from fulltune_nb.cpu.allocator import cache_limit, cap_cache
    from fulltune_nb.cpu.fast_math import evaluate, exp_and_sum, fast_exp, on_cpu, softmax_statistics
    from fulltune_nb.cpu.kernels import (
        AdamUpdate,
        Kernels,
        available_cores,
        compiler,
        compiles,
        kernels_for,
        lacks_compiler,
        may_use_kernels,
        num_streams,
        sole,
        streams_for,
    )

__all__ = [
    "AdamUpdate", "BlasInfo", "BlasWarning", "CompileWarning", "KernelFolder", "Kernels", "available_cores", "cache_limit", "cap_cache",
    "compiler", "compiles", "ensure_fast_blas", "ensure_kernel_folder", "evaluate", "exp_and_sum", "fast_exp", "kernels_for",
    "lacks_compiler", "may_use_kernels", "num_streams", "on_cpu", "softmax_statistics", "sole", "streams_for",
]  # fmt: skip

_ALLOCATOR, _FAST_MATH = ("cache_limit", "cap_cache"), ("evaluate", "exp_and_sum", "fast_exp", "on_cpu", "softmax_statistics")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "allocator" if name in _ALLOCATOR else "fast_math" if name in _FAST_MATH else "kernels"
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value
