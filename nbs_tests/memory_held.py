"""Where a test begins to measure memory."""

import gc

import mlx.core as mx


def memory_held() -> int:
    """Bytes that MLX holds now; its peak counts from here.

    What earlier tests left is freed first, and not in the middle of what is measured; what one collection frees may be the last that held
    something else.
    """
    held = None
    while held != (held := _collected()):
        pass
    mx.reset_peak_memory()
    return held


def _collected() -> int:
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()
