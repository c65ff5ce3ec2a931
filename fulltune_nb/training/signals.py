"""Signals that end a run: held back until the step they arrive in is whole.

SIGINT (Ctrl-C, the notebook's stop button) pauses a run at the end of the step; a second one stops at once. SIGTERM, which
schedulers send before they kill, and SIGHUP, which comes when a connection drops, pause and save like the first SIGINT, and are then passed
on to whoever was to get them.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""They end a process that does not handle them."""


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


_OTHERS_END = 50  # milliseconds in which other processes that got the same SIGHUP, such as tee, have ended
_block: _Deferral | None = None  # of the outermost block that is under way on the main thread


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Raises KeyboardInterrupt at the block's end when SIGINT arrived inside; a second SIGINT raises `StoppedAtOnce` at once.

    Of blocks within each other the outermost raises. Only the main thread gets signals; elsewhere this does nothing, and where
    somebody has turned SIGINT off, only those of `ENDING` count.
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


@contextmanager
def interrupts_passed_on(to: Callable[[], Any]) -> Iterator[None]:
    """Within the block `to()` is called by SIGINT, SIGTERM and SIGHUP; a second SIGINT raises `StoppedAtOnce`. Of the other two the
    first takes effect behind the block. Only the main thread gets signals; elsewhere this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deferral, termination = _Deferral(), Termination(to)

    def hear(number: int, frame: object) -> None:
        deferral(number, frame)
        to()

    previous = signal.getsignal(signal.SIGINT)
    if callable(previous):
        signal.signal(signal.SIGINT, hear)
    termination.watch()
    try:
        yield
    finally:
        if callable(previous):
            signal.signal(signal.SIGINT, previous)
        termination.leave()


class Termination:
    """SIGTERM or SIGHUP while a run goes on: pauses it, and is passed on when the run has been saved.

    Args:
        on_arrival: called when one arrives outside a block of `interrupts_deferred`; raises KeyboardInterrupt where left out.

    Attributes:
        arrived: the first that has, or None.
    """

    def __init__(self, on_arrival: Callable[[], Any] | None = None):
        self.arrived: int | None = None
        self._on_arrival = on_arrival
        self._previous: dict[int, Any] = {}

    def watch(self) -> None:
        """Takes those over that are not yet, nor turned off (as by nohup). Only the main thread can; elsewhere nothing happens."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        self.arrived = None
        for number in ENDING:
            previous = signal.getsignal(number)
            if previous not in (None, signal.SIG_IGN) and not isinstance(previous, Termination):
                self._previous[number] = signal.signal(number, self)

    def __call__(self, number: int, frame: object) -> None:
        again, self.arrived = self.arrived is not None, self.arrived or number
        if number == signal.SIGHUP:
            leave_closed_outputs()
        if self._on_arrival is not None:
            self._on_arrival()
        elif again:
            return  # it is being seen to
        elif _block is not None:
            _block.arrived = True
        else:
            raise KeyboardInterrupt

    def leave(self) -> None:
        """Puts back the handlers from before, and has that of the signal called that has arrived: usually this ends the process."""
        if not self._previous:
            return
        while self._previous:
            signal.signal(*self._previous.popitem())
        if self.arrived:
            os.kill(os.getpid(), self.arrived)


def leave_closed_outputs() -> None:
    """Has standard output and error go nowhere where whoever read them is gone: printing there would end the run before it is saved."""
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, 0)  # told are errors only
    for descriptor, _ in outputs.poll(_OTHERS_END):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


@contextmanager
def termination_pauses() -> Iterator[Termination]:
    """Within the block, SIGTERM and SIGHUP raise KeyboardInterrupt at the end of the step; when it has ended, they are passed on."""
    termination = Termination()
    termination.watch()
    try:
        yield termination
    finally:
        termination.leave()
