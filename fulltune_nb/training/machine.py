"""How much memory this machine has for training, and how much is in use. All in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import mlx.core as mx
import psutil

from fulltune_nb import html

_DEVICE_KEYS = ("max_recommended_working_set_size", "total_memory", "memory_size")  # Metal's, then CUDA's
_UNLIMITED = 2**60  # cgroup v1 writes a number near 2**63 where there is no limit


@dataclass(frozen=True)
class MemoryReading:
    """MLX's counters at one moment."""

    active: int
    """Bytes of arrays in use."""
    peak: int
    """Most bytes in use since the counter was reset; the cache is not in it."""
    cache: int
    """Bytes of freed arrays kept for reuse."""

    def __repr__(self) -> str:
        return f"MemoryReading({', '.join(f'{name} {html.human_bytes(size)}' for name, size in vars(self).items())})"

    def _repr_html_(self) -> str:
        return html.facts("Memory in use by MLX", [(name, html.human_bytes(size)) for name, size in vars(self).items()])


def read_memory() -> MemoryReading:
    """MLX's memory counters now. They count on the CPU too."""
    return MemoryReading(mx.get_active_memory(), mx.get_peak_memory(), mx.get_cache_memory())


def machine_limit() -> int:
    """Bytes that arrays may take on MLX's default device.

    Metal: what the system recommends as the largest working set (most of the memory, which the GPU shares). CUDA: the device's
    memory. CPU: main memory, or the limit of the control group (a container's) where that is smaller.
    """
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info(mx.default_device())
        for key in _DEVICE_KEYS:
            if info.get(key):
                return int(info[key])
    return min([psutil.virtual_memory().total, *_cgroup_limits()])


def _cgroup_limits(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Every memory limit that holds for this process: of its own control group and of those above, version 1 and 2."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        path = PurePosixPath(group)
        for parent in (path, *path.parents):
            limit = _read_number(top / str(parent).lstrip("/") / name)
            if limit is not None and limit < _UNLIMITED:
                yield limit


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:  # a group seen from within its container has another path
        return None
    return int(text) if text.isdigit() else None
