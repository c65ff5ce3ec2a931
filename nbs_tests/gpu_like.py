"""Has the package choose as it does on a GPU, while MLX computes on the CPU of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx


def _gather_mm(a: mx.array, b: mx.array, *, of_float32=mx.gather_mm, **settings: object) -> mx.array:
    """As on a GPU, which sums in float32 whatever the dtype is; MLX's for a CPU takes nothing else."""
    return of_float32(a.astype(mx.float32), b.astype(mx.float32), **settings).astype(mx.result_type(a, b))


@contextmanager
def gpu_like(memory: int = 2**35, cuda: bool = False) -> Iterator[None]:
    """Within the block MLX's default device seems to be the GPU of a Mac, or NVIDIA's, with so many bytes of memory."""
    stream = mx.default_stream(mx.default_device())
    info = {"device_name": "Apple M3 Max", "max_recommended_working_set_size": int(memory * 0.75), "memory_size": memory}
    if cuda:
        info = {"device_name": "NVIDIA H200", "total_memory": memory}
    with (
        mock.patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)),
        mock.patch.object(mx, "default_stream", lambda device=None: stream),
        mock.patch.object(mx, "gather_mm", _gather_mm),
        mock.patch.object(mx, "device_info", lambda device=None: info),
        mock.patch.object(mx.metal, "is_available", lambda: not cuda),
        mock.patch.object(mx.cuda, "is_available", lambda: cuda),
    ):
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
