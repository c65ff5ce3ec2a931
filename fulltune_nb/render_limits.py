"""A bound on the time and the memory that a chat template takes: it is a program, and comes with a downloaded tokenizer.

transformers runs templates in jinja's sandbox, which keeps them away from Python and cuts `range` off at 100,000, but nothing there
ends loops within loops or `"a" * 10**10`. Two things of the system do, from outside, without touching transformers or jinja:

- A timer that counts the process's computing time wakes a handler of ours every few hundredths of a second; it raises when the thread
  has computed for too long, or when the process has grown too much. Python lets a handler in between any two operations, and
  within long ones on large numbers.
- One operation that asks for very much memory at once is refused by the system: while a template runs, the process may have only
  so much more address space than it had (Linux; elsewhere that limit does not count, and the handler comes after the fact).

Signals go to the main thread; on another one nothing is bounded.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS = 10.0
"""Of computing; rendering a conversation takes thousandths of one."""
MEMORY = 2**30
"""Bytes, on top of what the process has."""
T = TypeVar("T")
_TICK = 0.03  # seconds between two looks
_PAGE = os.sysconf("SC_PAGE_SIZE") if resource else 0
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


class LimitReached(Exception):
    """The template took too much time or memory; the message says which."""


class _Watch:
    """The timer's handler. It stays when the timer has ended: a late signal must not meet the default, which ends the process."""

    def __init__(self) -> None:
        self.active = False
        self._until = 0.0
        self._most = 0

    def start(self) -> None:
        self._until, self._most = time.thread_time() + SECONDS, _largest_size() + MEMORY
        self.active = True

    def __call__(self, number: int, frame: object) -> None:
        if not self.active:
            return
        if time.thread_time() > self._until:
            raise LimitReached(f"it was not done after {SECONDS:g} seconds of computing")
        if _largest_size() > self._most:
            raise LimitReached(_too_large())


_watch = _Watch()


def bounded(render: Callable[[], T]) -> T:
    """What `render()` gives, which runs a template.

    Raises:
        LimitReached: it took more than `SECONDS` or `MEMORY`.
    """
    if resource is None or _watch.active or threading.current_thread() is not threading.main_thread():
        return render()
    timer, limits = _timer_is_free(), resource.getrlimit(resource.RLIMIT_AS)
    lower = _lower_limit(*limits)
    # The reason is raised at the end, anew: an error from within would hold on to what the template has made.
    try:
        if lower is not None:
            resource.setrlimit(resource.RLIMIT_AS, (lower, limits[1]))
        if timer:
            _watch.start()
            signal.setitimer(signal.ITIMER_VIRTUAL, _TICK, _TICK)
        return render()
    except MemoryError:
        reason = _too_large()
    except LimitReached as error:
        reason = str(error)
    finally:  # nothing but these calls, so that an interrupt cannot come between them
        _watch.active = False
        try:
            if timer:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        finally:
            if lower is not None:
                resource.setrlimit(resource.RLIMIT_AS, limits)
    raise LimitReached(reason)


def _too_large() -> str:
    return f"it would take more than {MEMORY / 2**20:,.0f} MiB of memory"


def _timer_is_free() -> bool:
    """Whether nobody else uses the timer; then its signal is ours."""
    handler = signal.getsignal(signal.SIGVTALRM)
    if handler is _watch:
        return True
    if handler != signal.SIG_DFL or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        return False
    signal.signal(signal.SIGVTALRM, _watch)
    return True


def _lower_limit(soft: int, hard: int) -> int | None:
    """Bytes of address space: `MEMORY` more than there is, or the limits if they are lower. None where the system does not say."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)  # Python's files take three times as long, and rows are many
        try:
            size = int(os.read(descriptor, 100).split()[0]) * _PAGE
        finally:
            os.close(descriptor)
    except (OSError, ValueError, IndexError):
        return None
    return min(size + MEMORY, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY), 2**62)


def _largest_size() -> int:
    """Bytes of memory that the process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT
