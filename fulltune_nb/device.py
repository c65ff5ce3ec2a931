"""Which kind of device MLX computes on, its memory, and what of it the GPU of a Mac is allowed for the length of a run or an answer.

Two limits of MLX are for Metal alone. *Wired* memory stays where it is: macOS neither compresses nor moves it, and the GPU need not ask for
it anew (MLX's pull request 2006: 14% in training). It is nothing by default, and more than the rest of the machine can spare freezes it.
The *cache* keeps freed arrays for those to come; by default it grows up to the recommended working set, which no other program's need makes
smaller. CUDA has memory of its own, and no wired limit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import mlx.core as mx
import psutil

WIRED_SHARE = 0.85
"""Of the recommended working set, itself two thirds to three quarters of a Mac's memory, as the most that is wired."""
_DEVICE_KEYS = ("max_recommended_working_set_size", "total_memory", "memory_size")  # Metal's, then CUDA's
_UNLIMITED = 2**60  # cgroup v1 writes a number near 2**63 where there is no limit


def device_kind() -> str:
    """What MLX computes on unless told otherwise: on a "cpu", by "metal" or by "cuda"."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def length_multiple() -> int:
    """What the length T of a training batch is a multiple of.

    On CUDA the fused backward pass of attention is for multiples of 128 only. Metal computes matrix products in tiles of 32 or 64 rows, and
    has faster kernels for those without a remainder.
    """
    return {"cpu": 1, "metal": 32, "cuda": 128}[device_kind()]


def recommended_working_set() -> int:
    """Bytes that Metal recommends to use at most; 0 on other devices."""
    return int(mx.device_info(mx.default_device()).get("max_recommended_working_set_size", 0)) if device_kind() == "metal" else 0


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
    return min([psutil.virtual_memory().total, *cgroup_limits()])


def cgroup_limits(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
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
            try:
                text = (top / str(parent).lstrip("/") / name).read_text().strip()
            except OSError:  # a group seen from within its container has another path
                continue
            if text.isdigit() and int(text) < _UNLIMITED:
                yield int(text)


@contextmanager
def memory_limits(needed: int, cache: int | None = None) -> Iterator[None]:
    """Within the block the GPU of a Mac keeps what is needed wired, and no more freed arrays than these. Nothing on other devices.

    Blocks may stand within each other, and beside each other in several threads, and end in any order: what they need is added up, and
    behind the last one the limits are those of before.

    Args:
        needed: bytes of all arrays at the largest moment. Of the recommended working set at most `WIRED_SHARE` is wired.
        cache: bytes of freed arrays that are kept; None: as many as MLX keeps by default.
    """
    if not (working_set := recommended_working_set()):
        yield
        return
    block = object()
    _LIMITS.add(block, needed, cache, int(working_set * WIRED_SHARE))
    try:
        yield
    finally:
        try:
            mx.synchronize()  # the limit is not to change while something is computed
        finally:
            _LIMITS.remove(block)


class _Limits:
    """What the open blocks need, and MLX's limits as they were before the first of them."""

    def __init__(self):
        self._lock = threading.Lock()
        self._needs: dict[object, tuple[int, int | None]] = {}
        self._most = self._wired = self._cache = 0

    def add(self, block: object, needed: int, cache: int | None, most: int) -> None:
        """Begins a block; `most` bytes may be wired."""
        with self._lock:
            if not self._needs:
                self._wired, self._cache = mx.set_wired_limit(0), mx.set_cache_limit(0)
            self._needs[block], self._most = (needed, cache), most
            self._set()

    def remove(self, block: object) -> None:
        """Ends a block."""
        with self._lock:
            del self._needs[block]
            self._set()

    def _set(self) -> None:
        caches = [cache for _, cache in self._needs.values() if cache is not None]
        mx.set_cache_limit(min(self._cache, sum(caches)) if caches else self._cache)
        mx.set_wired_limit(max(self._wired, min(self._most, sum(needed for needed, _ in self._needs.values()))))


_LIMITS = _Limits()
