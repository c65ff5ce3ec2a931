"""Several cores for independent element-wise work on the CPU.

MLX's CPU backend runs a stream's operations one after the other on one core; only the BLAS uses more. Operations on different
streams run at the same time, so that work on many arrays, such as an optimizer's, can be dealt out to the cores. What is
computed does not change, only where.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager

import mlx.core as mx

MOST_CORES = 4
"""Element-wise work is bound by memory soon: more cores than this gain little."""

_of_thread = threading.local()  # a stream can be used only in the thread that made it


def cpu_streams() -> list[mx.Stream]:
    """Streams of this thread for independent work, the default one first; only that on other devices than the CPU."""
    default = mx.default_stream(mx.default_device())
    if mx.default_device().type != mx.DeviceType.cpu:
        return [default]
    if not hasattr(_of_thread, "more"):
        _of_thread.more = [mx.new_stream(mx.cpu) for _ in range(worker_cores() - 1)]
    return [default, *_of_thread.more]


def worker_cores() -> int:
    """How many cores element-wise work is dealt out to."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MOST_CORES)


class LeastLoaded:
    """Which of several workers gets the next piece of work: the one that has got the least so far."""

    def __init__(self, workers: int) -> None:
        self._dealt = [0] * workers

    def next(self, size: int) -> int:
        """The worker's number. `size`: how much work the piece is, in any unit."""
        least = self._dealt.index(min(self._dealt))
        self._dealt[least] += size
        return least


class Dealer:
    """Deals work out: each piece goes to the stream that has got the least so far.

        dealer = Dealer()
        for array in arrays:
            with dealer.stream_for(array.size):
                results.append(work(array))
        mx.eval(results)
    """

    def __init__(self) -> None:
        self._streams = cpu_streams()
        self._workers = LeastLoaded(len(self._streams))

    def stream_for(self, size: int) -> AbstractContextManager:
        """A context whose operations go to the chosen stream. `size`: how much work the piece is, in any unit."""
        return mx.stream(self._streams[self._workers.next(size)])
