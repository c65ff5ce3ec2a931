"""Has the package choose as it does on another machine, while MLX computes on the CPU of this one."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import mlx.core as mx

MACHINES = ("gpu", "darwin", "gpu,darwin")
IS_REAL = mx.is_available(mx.gpu)
"""Whether there is a GPU, asked before anything here says so."""
# What Python has on Linux and not on macOS.
LINUX_ONLY = ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "POSIX_FADV_DONTNEED", "memfd_create", "posix_fallocate")
# What decides by `sys.platform` when it is first imported, and so has to be imported before a system is made to seem another.
FIRST = """asyncio ctypes.util hypothesis multiprocessing.pool numpy psutil resource selectors shutil signal subprocess tempfile
torch transformers datasets pandas matplotlib.pyplot ipywidgets IPython mlx_lm""".split()


def _gather_mm(a: mx.array, b: mx.array, *, of_float32=mx.gather_mm, **settings: object) -> mx.array:
    """As on a GPU, which sums in float32 whatever the dtype is; MLX's for a CPU takes nothing else."""
    return of_float32(a.astype(mx.float32), b.astype(mx.float32), **settings).astype(mx.result_type(a, b))


def _gpu(memory: int, cuda: bool) -> list[tuple[object, str, object]]:
    """What MLX says where its default device is the GPU of a Mac, or one of NVIDIA, with so many bytes of memory."""
    info = {"device_name": "Apple M3 Max", "architecture": "applegpu_g15s", "memory_size": memory, "max_buffer_length": memory // 2}
    info |= {"max_recommended_working_set_size": int(memory * 0.75), "resource_limit": 499_000}
    if cuda:
        info = {"device_name": "NVIDIA H200", "architecture": "sm_90", "total_memory": memory, "free_memory": memory}
    here = mx.default_device()
    stream = mx.default_stream(here)
    return [
        (mx, "default_device", lambda: mx.Device(mx.gpu)),
        (mx, "default_stream", lambda device=None: stream),
        # mlx-lm makes one for ever, when it is imported.
        (mx, "new_stream", lambda device, make=mx.new_stream: make(here)),
        (mx, "new_thread_local_stream", lambda device, make=mx.new_thread_local_stream: make(here)),
        (mx, "device_info", lambda device=None: info),
        (mx, "is_available", lambda device=None: True),
        (mx.metal, "is_available", lambda: not cuda),
        (mx.cuda, "is_available", lambda: cuda),
        (mx, "gather_mm", _gather_mm),
    ]


@contextmanager
def gpu_like(memory: int = 2**35, cuda: bool = False) -> Iterator[None]:
    """Within the block MLX's default device seems to be the GPU of a Mac (or one of NVIDIA) with so many bytes of memory."""
    with ExitStack() as patched:
        for module, name, value in _gpu(memory, cuda):
            patched.enter_context(mock.patch.object(module, name, value))
        yield


@contextmanager
def mac_limits(memory: int = 2**34, cache: int = 5 * 10**9) -> Iterator[dict[str, int]]:
    """`gpu_like` for a Mac, and what MLX's limits are set to: "wired" and "cache", in bytes."""
    found = {"wired": 0, "cache": cache}

    def set_limit(name: str, limit: int) -> int:
        before, found[name] = found[name], limit
        return before

    with (
        gpu_like(memory),
        mock.patch.object(mx, "set_wired_limit", lambda limit: set_limit("wired", limit)),
        mock.patch.object(mx, "set_cache_limit", lambda limit: set_limit("cache", limit)),
    ):
        yield found


def believe(machine: str) -> None:
    """From now on this process seems to run on one of MACHINES; "gpu" alone is one of NVIDIA under Linux, with "darwin" a Mac's."""
    if machine not in MACHINES:
        raise ValueError(f"--device-like: expected one of {', '.join(MACHINES)}, found {machine!r}")
    darwin = "darwin" in machine
    if "gpu" in machine:
        for module, name, value in _gpu(2**35, cuda=not darwin):
            setattr(module, name, value)
    if darwin:
        for name in FIRST:
            try:
                importlib.import_module(name)
            except ImportError:
                continue
        sys.platform = "darwin"
        platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"
        for name in LINUX_ONLY:
            if hasattr(os, name):
                delattr(os, name)
