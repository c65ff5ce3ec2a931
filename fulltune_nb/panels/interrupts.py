"""Hearing the notebook's stop button while runs go on behind the cells.

Between cells a kernel ignores SIGINT, and in a cell that awaits something SIGINT cancels that cell. While a watch is on, SIGINT
pauses its run; a cell that awaits something else is cancelled as well. The kernel exchanges the handler whenever a cell begins
or ends, so a run calls `watch` again before each step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_watches: list[InterruptWatch] = []
_previous: Any = signal.SIG_IGN  # the handler that was there before ours


class InterruptWatch:
    """Turns SIGINT into a call for as long as it watches.

    Attributes:
        forwards: whether the handler from before is called too; False while the cell awaits this very run.
    """

    def __init__(self, on_interrupt: Callable[[], Any]):
        self.on_interrupt = on_interrupt
        self.forwards = True

    def watch(self) -> None:
        """Takes SIGINT over, unless that is already so. Only the main thread can; elsewhere nothing happens."""
        global _previous
        current = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or current is None:  # None: not a handler of Python's
            return
        if self not in _watches:
            _watches.append(self)
        if current is not hear:
            _previous = current
            signal.signal(signal.SIGINT, hear)

    def leave(self, loop_ends: bool = False) -> None:
        """Ends this watch; the last one puts back the handler from before.

        Args:
            loop_ends: the event loop is about to end, and with it the handler that `asyncio.run` had for it: Python's own is put
                back, unless SIGINT was ignored.
        """
        if self in _watches:
            _watches.remove(self)
            if not _watches and signal.getsignal(signal.SIGINT) is hear:
                dead = loop_ends and callable(_previous)
                signal.signal(signal.SIGINT, signal.default_int_handler if dead else _previous)


def hear(number: int = signal.SIGINT, frame: Any = None) -> None:
    """Tells every watch, and the handler from before. Python's own one is left out: it would raise in the event loop.

    It may be put back by a kernel when all watches are over; then it only passes on.
    """
    watches = list(_watches)
    for watch in watches:
        watch.on_interrupt()
    is_own = _previous is signal.default_int_handler and watches
    if callable(_previous) and not is_own and all(watch.forwards for watch in watches):
        _previous(number, frame)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block SIGINT raises KeyboardInterrupt, even where a kernel ignores it: for work that may be broken off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if previous is None else previous)
