"""How much freed memory MLX keeps for reuse."""

from __future__ import annotations

import mlx.core as mx
import psutil

CPU_CACHE_BYTES = 2_000_000_000


def cap_cache() -> None:
    """On the CPU, lets MLX keep up to 2 GB (an eighth of the memory at most) of freed arrays.

    MLX's own CPU limit is 32 MiB: larger arrays are then paged in afresh by the system at every operation, which makes
    element-wise work on them 4 to 5 times slower. Other devices keep MLX's default. The cache is not part of the peak that
    reports show; `cache_memory` shows it.
    """
    if mx.default_device().type == mx.DeviceType.cpu:
        mx.set_cache_limit(min(CPU_CACHE_BYTES, psutil.virtual_memory().total // 8))
