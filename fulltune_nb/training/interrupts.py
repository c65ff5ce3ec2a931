"""Ctrl-C and the notebook's stop button, held back until the step they arrive in is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Deferral:
    """The SIGINT handler of a block: remembers the first, raises at the second."""

    def __init__(self) -> None:
        self.arrived = False

    def __call__(self, number: int, frame: object) -> None:
        if self.arrived:
            raise KeyboardInterrupt
        self.arrived = True


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Raises KeyboardInterrupt at the block's end when SIGINT arrived inside; a second SIGINT raises at once.

    Of blocks within each other the outermost raises. Only the main thread gets signals; elsewhere, and where somebody has
    turned SIGINT off, this does nothing.
    """
    previous = signal.getsignal(signal.SIGINT)
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or not callable(previous) or isinstance(previous, _Deferral):
        yield
        return
    deferral = _Deferral()
    signal.signal(signal.SIGINT, deferral)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if deferral.arrived:
        raise KeyboardInterrupt
