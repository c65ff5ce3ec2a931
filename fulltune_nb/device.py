"""Which kind of device MLX computes on, and the memory that the GPU of a Mac is allowed for the length of a run or an answer.

Two limits of MLX are for Metal alone. *Wired* memory stays where it is: macOS neither compresses nor moves it, and the GPU need not ask for
it anew (MLX's pull request 2006: 14% in training). It is nothing by default, and more than the rest of the machine can spare freezes it.
The *cache* keeps freed arrays for those to come; by default it grows up to the recommended working set, which no other program's need makes
smaller. CUDA has memory of its own, and no wired limit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

WIRED_SHARE = 0.85
"""Of the recommended working set, itself two thirds to three quarters of a Mac's memory, as the most that is wired."""


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
