"""Holding a training run between two steps while something else uses its model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fulltune_nb.panels.background import let_go
from fulltune_nb.panels.loop import TrainLoop, loops_of


class Hold:
    """Keeps the weights of some models as they are, from when `ready` returns until `release`.

    A run that goes on, or is started meanwhile, waits between two steps. One that is paused in that time is let go: it takes no
    further step. The event loop stays free.
    """

    def __init__(self, models: Iterable[Any]):
        self._halts = {loop: partial(self._halt, loop) for model in models for loop in loops_of(model)}
        self._halted: set[TrainLoop] = set()
        self._released = False
        for loop, halt in self._halts.items():
            loop.between_steps.append(halt)

    @property
    def running(self) -> list[TrainLoop]:
        """The runs that go on, held or about to be."""
        return [loop for loop in self._halts if loop.running]

    async def ready(self, given_up: Callable[[], bool]) -> None:
        """Returns when every run has come to the end of its step, or when `given_up()`."""
        while any(loop not in self._halted for loop in self.running) and not given_up():
            await let_go()

    def release(self) -> None:
        """Lets all runs go on."""
        self._released = True
        for loop, halt in self._halts.items():
            if halt in loop.between_steps:
                loop.between_steps.remove(halt)

    async def _halt(self, loop: TrainLoop) -> None:
        self._halted.add(loop)
        while not self._released and not loop.pause_asked:
            await let_go()
        self._halted.discard(loop)
