"""Signals that end a run: held back until the step they arrive in is whole.

SIGINT (Ctrl-C, the notebook's stop button) pauses a run at the end of the step; a second one stops at once. SIGTERM, which
schedulers send before they kill, pauses and saves like the first SIGINT, and is then passed on to whoever was to get it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StoppedAtOnce(KeyboardInterrupt):
    """A second SIGINT: the step is not whole. Nothing of it must be saved."""


class _Deferral:
    """The SIGINT handler of a block: remembers the first, raises at the second."""

    def __init__(self) -> None:
        self.arrived = False

    def __call__(self, number: int, frame: object) -> None:
        if self.arrived:
            raise StoppedAtOnce("stopped at once, in the middle of a step")
        self.arrived = True


_block: _Deferral | None = None  # of the outermost block that is under way on the main thread


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Raises KeyboardInterrupt at the block's end when SIGINT arrived inside; a second SIGINT raises `StoppedAtOnce` at once.

    Of blocks within each other the outermost raises. Only the main thread gets signals; elsewhere this does nothing, and where
    somebody has turned SIGINT off, only SIGTERM counts.
    """
    global _block
    if threading.current_thread() is not threading.main_thread() or _block is not None:
        yield
        return
    previous = signal.getsignal(signal.SIGINT)
    deferral = _Deferral()
    try:
        _block = deferral
        if callable(previous):
            signal.signal(signal.SIGINT, deferral)
        yield
    finally:
        _block = None  # first: a signal that arrives from here on meets a whole step
        if callable(previous):
            signal.signal(signal.SIGINT, previous)
    if deferral.arrived:
        raise KeyboardInterrupt


class Termination:
    """SIGTERM while a run goes on: pauses it, and is passed on when the run has been saved.

    Args:
        on_arrival: called when it arrives outside a block of `interrupts_deferred`; raises KeyboardInterrupt where left out.

    Attributes:
        arrived: whether it has.
    """

    def __init__(self, on_arrival: Callable[[], Any] | None = None):
        self.arrived = False
        self._on_arrival = on_arrival
        self._previous: Any = None
        self._watching = False

    def watch(self) -> None:
        """Takes SIGTERM over, unless it is already, or turned off. Only the main thread can; elsewhere nothing happens."""
        if self._watching or threading.current_thread() is not threading.main_thread():
            return
        previous = signal.getsignal(signal.SIGTERM)
        if previous in (None, signal.SIG_IGN) or isinstance(previous, Termination):
            return
        self.arrived, self._previous, self._watching = False, previous, True
        signal.signal(signal.SIGTERM, self)

    def __call__(self, number: int, frame: object) -> None:
        again, self.arrived = self.arrived, True
        if self._on_arrival is not None:
            self._on_arrival()
        elif again:
            return  # it is being seen to
        elif _block is not None:
            _block.arrived = True
        else:
            raise KeyboardInterrupt

    def leave(self) -> None:
        """Puts back the handler from before, and has it called if SIGTERM has arrived: usually this ends the process."""
        if not self._watching:
            return
        self._watching = False
        signal.signal(signal.SIGTERM, self._previous)
        if self.arrived:
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def termination_pauses() -> Iterator[Termination]:
    """Within the block, SIGTERM raises KeyboardInterrupt at the end of the step; when the block has ended, it is passed on."""
    termination = Termination()
    termination.watch()
    try:
        yield termination
    finally:
        termination.leave()
