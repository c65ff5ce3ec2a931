"""Where a test begins to measure memory."""

import gc

import mlx.core as mx


def memory_held() -> int:
    """Bytes that MLX holds now; its peak counts from here.

    What earlier tests left is freed first, and not in the middle of what is measured.
    """
    gc.collect()
    mx.synchronize()
    mx.reset_peak_memory()
    return mx.get_active_memory()
