"""Driving a trainer from the event loop of a notebook's kernel: the run goes on while other cells and buttons work.

Every step is taken on the main thread, whole, in one asyncio task that lets go of the event loop for a moment after each. So
buttons are answered within a step, and other cells see weights that stand still. Nothing here uses a thread.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fulltune_nb.errors import TrainingError
from fulltune_nb.training.history import EvalReport, StepReport
from fulltune_nb.training.signals import StoppedAtOnce, Termination, interrupts_deferred
from fulltune_nb.training.trainer import Trainer

# -- interrupts: Hearing the notebook's stop button while runs go on behind the cells

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


# -- background: Work behind the cells of a notebook: one asyncio task on the kernel's event loop, and the interrupts

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


# -- loop: Driving a trainer from the event loop of a notebook's kernel: the run goes on while other cells and 

_loops: weakref.WeakSet[TrainLoop] = weakref.WeakSet()


def loop_of(trainer: Trainer) -> TrainLoop:
    """The one loop of a trainer, which everything that drives it shares. To be called on the main thread.

    It stands among the trainer's listeners and so lives and goes with the trainer. (In a dictionary with weak keys, a loop's
    last error would keep the trainer for ever by its traceback.)
    """
    loop = next((listener for listener in trainer.listeners if isinstance(listener, TrainLoop)), None)
    if loop is None:
        loop = TrainLoop(trainer)
        trainer.listeners.append(loop)
        _loops.add(loop)
    loop.capture_event_loop()
    return loop


def running_loop(model: Any) -> TrainLoop | None:
    """The loop that is training a model at this moment, if any."""
    return next((loop for loop in list(_loops) if loop.running and loop.trainer.lm.model is model), None)


def loops_of(model: Any) -> list[TrainLoop]:
    """All loops that train a model, running or not."""
    return [loop for loop in list(_loops) if loop.trainer.lm.model is model]


class TrainLoop:
    """Starts, pauses and ends the run of one trainer. Use `loop_of`, which gives each trainer one.

    When a run begins or ends, the trainer's listeners are told: `on_change(trainer)`.

    Attributes:
        trainer: the trainer that is driven.
        between_steps: async functions awaited before the first and after each step of a run.
        shared: what all panels of the trainer share, by its class.
        error: what ended the last run, or None.
        interrupted: whether the last run was ended by an interrupt.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.between_steps: list[Callable[[], Awaitable[None]]] = []
        self.shared: dict[type, Any] = {}
        self.error: BaseException | None = None
        self.interrupted = False
        self._goal = 0
        self._paused = True
        self._background = Background(self._interrupt)
        self._termination = Termination(self._interrupt)

    @property
    def running(self) -> bool:
        """Whether steps are being taken, one after the other."""
        return self._background.busy and self._wants_more()

    @property
    def pause_asked(self) -> bool:
        """Whether no further step is wanted, though one may be under way: what happens between steps should come to an end."""
        return self._paused

    @property
    def goal(self) -> int:
        """The step count at which the current run, or the last one, ends."""
        return self._goal

    def _wants_more(self) -> bool:
        trainer = self.trainer
        return not self._paused and not trainer.stopped_early and trainer.step_count < self._goal

    # -- from other threads ---------------------------------------------------------------------------------------

    def capture_event_loop(self) -> None:
        """Remembers the event loop that is running here, the kernel's."""
        self._background.capture()

    @property
    def in_event_loop(self) -> bool:
        """Whether there is an event loop that a run could go on in."""
        return self._background.in_event_loop

    def post(self, action: Callable[[], Any]) -> None:
        """Has `action` called on the main thread, between two steps; from any thread, such as that of a button's callback.

        Without an event loop it is called at once.
        """
        self._background.post(action)

    def later(self, seconds: float, action: Callable[[], Any]) -> asyncio.TimerHandle | None:
        """Has `action` called on the main thread after some time; None where no event loop runs. On the main thread only."""
        return self._background.later(seconds, action)

    # -- run and pause --------------------------------------------------------------------------------------------

    def start(self, n: int | None = None) -> None:
        """Begins to train in the background, to the end of the run or `n` more steps. While a run goes on, only its end changes.

        With `n` 0 no step is taken, only what stands in `between_steps`.

        Raises:
            TrainingError: no event loop is running, or another trainer is training this model.
        """
        trainer = self.trainer
        self.capture_event_loop()
        if not self.in_event_loop:
            raise TrainingError(
                "Training in the background needs a running event loop, as in a notebook, and there is none here."
                " Use trainer.run(), which trains and returns when done; or, within async code, start() and then `await wait()`."
            )
        other = running_loop(trainer.lm.model)
        if other is not None and other is not self:
            raise TrainingError(f"This model is being trained already, by {other.trainer!r}. Pause that run first.")
        self.error, self.interrupted, trainer.interrupted = None, False, False
        self._goal = trainer.total_steps if n is None else min(trainer.total_steps, trainer.step_count + n)
        self._paused = False
        if not self._background.busy:  # else: the run goes on, or was paused a moment ago and takes this up
            self._background.start(self._drive(), "fulltune_nb training")
        self.tell_change()

    def pause(self) -> None:
        """Ends the run after the step that is under way; `start` goes on from there."""
        self._paused = True

    async def wait(self) -> None:
        """Returns when the run is over: paused, done or interrupted. At once where none goes on.

        An interrupt meanwhile pauses the run at a whole step. So does cancelling the wait.

        Raises:
            Exception: the run's own error.
        """
        await self._background.wait(self.pause)
        if self.error is not None:
            raise self.error

    async def _drive(self) -> None:
        steps = self.trainer.steps()
        try:
            await self._between_steps()
            while self._wants_more():
                self._background.watch()
                self._termination.watch()
                with interrupts_deferred():
                    next(steps, None)
                await self._between_steps()
                await let_go()
        except StoppedAtOnce as error:
            self.error = error
        except KeyboardInterrupt:
            hear()  # every run that goes on is meant
        except asyncio.CancelledError:  # the event loop is closing
            raise
        except BaseException as error:  # a task's exceptions are shown nowhere: kept for `wait` and for the panels
            self.error = error
        finally:
            self._paused = True
            steps.close()  # the trainer's state is the run's ending from here on
            self._end()

    async def _between_steps(self) -> None:
        self._background.watch()
        for function in list(self.between_steps):
            await function()

    def _interrupt(self) -> None:
        self._paused = self.interrupted = True

    def _end(self) -> None:
        trainer = self.trainer
        self._background.leave()
        try:
            if self.interrupted and self.error is None:
                trainer.interrupted = True
                message = f"interrupted; paused after step {trainer.step_count} of {trainer.total_steps}"
                trainer.event("pause", message)
                if trainer.run_dir:
                    trainer.save()
        except Exception as error:
            self.error = error
        self.tell_change()
        self._termination.leave()  # last: SIGTERM, if it has arrived, takes effect

    def tell_change(self) -> None:
        """Has everything that shows the run look anew."""
        self.trainer.tell("on_change")

    # -- one thing at a time, between the steps of a run -----------------------------------------------------------

    def step(self, n: int = 1) -> StepReport | None:
        """Takes `n` steps here and now, with evaluations and checkpoints when due; returns the last report, None when done.

        Raises:
            TrainingError: a run goes on.
        """
        if self.running:
            raise TrainingError("A run goes on in the background: a step of your own would come on top. Call pause() first.")
        self.error = None
        reports = list(self.trainer.steps(n))
        self.tell_change()
        return reports[-1] if reports else None

    def evaluate(self, split: str = "valid") -> EvalReport:
        """Evaluates a whole split, between two steps of a run that goes on."""
        return self.trainer.evaluate(split)

    def save(self) -> Path:
        """Writes a checkpoint, between two steps of a run that goes on."""
        return self.trainer.save()

    def __repr__(self) -> str:
        state = "running" if self.running else "paused"
        return f"TrainLoop({state}, {self.trainer!r})"


# -- hold: Holding a training run between two steps while something else uses its model

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
