"""Freed arrays' memory, kept for the next ones.

MLX's CPU backend allocates with `malloc` and caches 32 MiB of freed arrays itself. The C library takes a large array from the
system, zeroed page by page, and gives it back when freed: every operation pays for its result's pages, which takes as long
as element-wise arithmetic on them. Two remedies:

- glibc (Linux): let `malloc` keep large blocks in its heap, where they are cut and joined to any size. Measured on a 20M
  Llama: 15% less processor time a step than the other remedy, as batches differ in length.
- elsewhere: a larger cache of MLX's own. It finds a block only for an array of nearly its size, so it grows large.
"""

from __future__ import annotations

import ctypes
import sys

import mlx.core as mx
import psutil

from fulltune_nb.cpu.fast_math import on_cpu

CPU_CACHE_BYTES = 2_000_000_000
HEAP_CACHE_BYTES = 2**25  # MLX's own default
GIVEN_BACK_BYTES = 2**22

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MMAP_MAX = 65536  # glibc's default
_NEVER_TRIM = 2**31 - 1


def cap_cache(gives_back: bool = False) -> None:
    """On the CPU, makes freed arrays' memory stay with the process, for the arrays to come. Other devices keep MLX's default.

    With glibc that holds for everything the process allocates from then on: what it holds from the system stays near the
    highest it ever needed. Elsewhere MLX keeps up to 2 GB (an eighth of the memory at most); this cache is not part of the
    peak that reports show, `cache_memory` shows it.

    Args:
        gives_back: arrays of 4 MiB and more are given back to the system when they are freed, so that what the process holds stays near
            what it uses.
    """
    if on_cpu():
        if (mallopt := _mallopt()) is not None:
            mallopt(_M_MMAP_MAX, _MMAP_MAX if gives_back else 0)
            mallopt(_M_MMAP_THRESHOLD, GIVEN_BACK_BYTES)
            mallopt(_M_TRIM_THRESHOLD, GIVEN_BACK_BYTES if gives_back else _NEVER_TRIM)
        mx.set_cache_limit(cache_limit())


def cache_limit() -> int:
    """Bytes of freed arrays that `cap_cache` allows; 0 on other devices, where MLX gives its cache back when memory is short."""
    if not on_cpu():
        return 0
    return HEAP_CACHE_BYTES if _mallopt() is not None else min(CPU_CACHE_BYTES, psutil.virtual_memory().total // 8)


def _mallopt():
    """glibc's `mallopt`; None with another C library, whose `malloc` knows no such parameters."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library.mallopt if hasattr(library, "gnu_get_libc_version") else None
