"""Work behind the cells of a notebook: one asyncio task on the kernel's event loop, and the interrupts that are meant for it.

The training loop and the chat both are such work. Nothing here uses a thread, and nothing here knows of MLX.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fulltune_nb.panels.interrupts import InterruptWatch

PAUSE_SECONDS = 0.001
"""How long the event loop is let go after a step or a piece. With 0 a button needs four steps to be heard."""


async def let_go() -> None:
    """Lets go of the event loop for a moment: buttons and cells have their turn."""
    await asyncio.sleep(PAUSE_SECONDS)


class Background:
    """At most one task at a time, in the event loop that ran where this was last captured."""

    def __init__(self, on_interrupt: Callable[[], Any]):
        """
        Args:
            on_interrupt: called for SIGINT while the work is watched.
        """
        self._watch = InterruptWatch(on_interrupt)
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task | None = None
        self._waiting = 0  # cells that wait for the end
        self.capture()

    def capture(self) -> None:
        """Remembers the event loop that is running here, the kernel's. To be called on the thread of the work."""
        try:
            self._event_loop = asyncio.get_running_loop()
        except RuntimeError:
            pass  # plain Python: nothing runs in the background there

    @property
    def in_event_loop(self) -> bool:
        """Whether there is an event loop that work could go on in."""
        return self._event_loop is not None and self._event_loop.is_running()

    @property
    def busy(self) -> bool:
        """Whether there is a task and it has not ended."""
        return self._task is not None and not self._task.done()

    def post(self, action: Callable[[], Any]) -> None:
        """Has `action` called on the thread of the work when it next lets go; from any thread. At once without an event loop."""
        if self.in_event_loop:
            self._event_loop.call_soon_threadsafe(action)
        else:
            action()

    def later(self, seconds: float, action: Callable[[], Any]) -> asyncio.TimerHandle | None:
        """Has `action` called after some time; None where no event loop runs. On the thread of the work only."""
        return self._event_loop.call_later(seconds, action) if self.in_event_loop else None

    def start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Begins a task; there must be an event loop, and no task going on."""
        self._task = self._event_loop.create_task(work, name=name)

    def watch(self) -> None:
        """Takes SIGINT over. To be called before every piece of work: a kernel exchanges the handler when a cell begins or ends."""
        self._watch.watch()

    def leave(self) -> None:
        """Gives SIGINT back at the end of the work, unless a cell waits for it, which does that then."""
        loop_ends = self._task is not None and self._task.cancelling() > 0  # nothing else cancels the task
        if loop_ends or not self._waiting:
            self._watch.leave(loop_ends)

    async def wait(self, give_up: Callable[[], Any]) -> None:
        """Returns at the end of the task; at once where none goes on.

        An interrupt meanwhile is the work's alone. When the wait is cancelled, `give_up()` is called.
        """
        while self.busy:
            self._waiting += 1
            self._watch.forwards = False
            self._watch.watch()
            try:
                await asyncio.wait({self._task})
            except asyncio.CancelledError:
                give_up()
                raise
            finally:
                self._waiting -= 1
                self._watch.forwards = self._waiting == 0
                if not self.busy:
                    self.leave()
