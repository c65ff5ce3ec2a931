"""Ctrl-C and the notebook's stop button, held back until the step they arrive in is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Raises KeyboardInterrupt at the block's end when SIGINT arrived inside; a second SIGINT raises at once.

    Only the main thread gets signals; elsewhere, and where somebody has turned SIGINT off, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    arrived = False
    previous = signal.getsignal(signal.SIGINT)

    def remember(number, frame):
        nonlocal arrived
        if arrived:
            raise KeyboardInterrupt
        arrived = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if arrived:
        raise KeyboardInterrupt
