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
from typing import Any, TypeVar

from fulltune_nb.errors import TrainingError
from fulltune_nb.panels.progress import Pace
from fulltune_nb.training.history import StepReport
from fulltune_nb.training.signals import StoppedAtOnce, Termination, interrupts_deferred
from fulltune_nb.training.trainer import Trainer

Shared = TypeVar("Shared")

PASSES = 16
"""Turns that the event loop has after a step or a piece. A button's message needs up to four, from the socket to its handler. They cost
some microseconds each; to sleep would cost a millisecond at least, as epoll counts in milliseconds."""
POLL_SECONDS = 0.001
"""From one look to the next of work that waits for other work."""

# -- interrupts: the notebook's stop button, heard while work goes on behind the cells ----------------------------------

listening: list[Background] = []
"""Whose work SIGINT is to end."""
_previous: Any = signal.SIG_IGN  # the handler that was there before ours


def hear(number: int = signal.SIGINT, frame: Any = None) -> None:
    """The SIGINT handler: tells all that listen, and the handler from before, unless a cell waits for just this work.

    Python's own handler is left out: it would raise in the event loop. A kernel may put this one back when nobody listens any more;
    then it only passes on.
    """
    told = list(listening)
    for background in told:
        background.interrupt()
    is_own = _previous is signal.default_int_handler and told
    if callable(_previous) and not is_own and not any(background.waiting for background in told):
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


# -- work behind the cells -----------------------------------------------------------------------------------------------


async def let_go() -> None:
    """Lets go of the event loop for a moment: buttons and cells have their turn. Not for waiting: what waits sleeps."""
    for _ in range(PASSES):
        await asyncio.sleep(0)


class Background:
    """Work behind the cells: at most one asyncio task at a time, and its interrupts. Base of what trains and of what answers.

    Attributes:
        waiting: how many cells wait for the end of the task.
    """

    def __init__(self) -> None:
        self.waiting = 0
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task | None = None
        self.capture_event_loop()

    def interrupt(self) -> None:
        """What SIGINT asks for while the task works."""
        raise NotImplementedError

    def capture_event_loop(self) -> None:
        """Remembers the event loop that is running here, the kernel's. To be called on the main thread."""
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
        """Has `action` called on the main thread when the task next lets go; from any thread. At once without an event loop."""
        if self.in_event_loop:
            self._event_loop.call_soon_threadsafe(action)
        else:
            action()

    def later(self, seconds: float, action: Callable[[], Any]) -> asyncio.TimerHandle | None:
        """Has `action` called after some time; None where no event loop runs. On the main thread only."""
        return self._event_loop.call_later(seconds, action) if self.in_event_loop else None

    # -- for subclasses, on the main thread -------------------------------------------------------------------------------

    def _begin_task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Begins the task; there must be an event loop, and no task going on."""
        self._task = self._event_loop.create_task(work, name=name)

    def _listen(self) -> None:
        """Takes SIGINT over, unless that is already so. To be called before every piece of work: a kernel exchanges the handler
        whenever a cell begins or ends. Only the main thread can; elsewhere nothing happens."""
        global _previous
        current = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or current is None:  # None: not a handler of Python's
            return
        if self not in listening:
            listening.append(self)
        if current is not hear:
            _previous = current
            signal.signal(signal.SIGINT, hear)

    def _stop_listening(self) -> None:
        """At the end of the work, unless a cell waits for it, which does this then. The last one puts back the handler from before."""
        loop_ends = self._task is not None and self._task.cancelling() > 0  # nothing else cancels the task
        if self not in listening or (self.waiting and not loop_ends):
            return
        listening.remove(self)
        if not listening and signal.getsignal(signal.SIGINT) is hear:
            # With its event loop, the handler that `asyncio.run` had for it ends too: then Python's own comes back.
            dead = loop_ends and callable(_previous)
            signal.signal(signal.SIGINT, signal.default_int_handler if dead else _previous)

    async def _wait_for_task(self, give_up: Callable[[], Any]) -> None:
        """Returns at the end of the task. An interrupt meanwhile is the work's alone; when the wait is cancelled, `give_up()` is called."""
        while self.busy:
            self.waiting += 1
            self._listen()
            try:
                await asyncio.wait({self._task})
            except asyncio.CancelledError:
                give_up()
                raise
            finally:
                self.waiting -= 1
                if not self.busy:
                    self._stop_listening()


# -- the run of a trainer --------------------------------------------------------------------------------------------------

_loops: weakref.WeakSet[TrainLoop] = weakref.WeakSet()


def loop_of(trainer: Trainer) -> TrainLoop:
    """The one loop of a trainer, which everything that drives it shares. To be called on the main thread.

    It stands among the trainer's listeners and so lives and goes with it. (In a dictionary with weak keys, a loop's last error would
    keep the trainer for ever by its traceback.)
    """
    loop = next((listener for listener in trainer.listeners if isinstance(listener, TrainLoop)), None)
    if loop is None:
        loop = TrainLoop(trainer)
        trainer.listeners.append(loop)
        _loops.add(loop)
    loop.capture_event_loop()
    return loop


def loops_of(model: Any) -> list[TrainLoop]:
    """All loops that train a model, running or not."""
    return [loop for loop in list(_loops) if loop.trainer.lm.model is model]


def running_loop(model: Any) -> TrainLoop | None:
    """The loop that is training a model at this moment, if any."""
    return next((loop for loop in loops_of(model) if loop.running), None)


class TrainLoop(Background):
    """Starts, pauses and ends the run of one trainer. Use `loop_of`, which gives each trainer one.

    When a run begins or ends, the trainer's listeners are told: `on_change(trainer)`.

    Attributes:
        trainer: the trainer that is driven.
        between_steps: async functions of the loop, awaited before the first and after each step of a run.
        goal: the step count at which the current run, or the last one, ends.
        error: what ended the last run, or None.
        interrupted: whether the last run was ended by an interrupt.
        pace: of the latest steps, whoever took them; measured once, so that all panels show the same.
    """

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer = trainer
        steps = trainer.config.steps_per_report
        self.pace = Pace(steps, trainer.history.steps[-steps:])
        self.between_steps: list[Callable[[TrainLoop], Awaitable[None]]] = []
        self.goal = 0
        self.error: BaseException | None = None
        self.interrupted = False
        self._shared: dict[type, Any] = {}
        self._termination = Termination(self.interrupt)

    def shared(self, kind: Callable[[TrainLoop], Shared]) -> Shared:
        """What all panels of the trainer share, one of each class: `kind(loop)`, made when it is first asked for."""
        if kind not in self._shared:
            self._shared[kind] = kind(self)
        return self._shared[kind]

    @property
    def running(self) -> bool:
        """Whether steps are being taken, one after the other."""
        return self.busy and self._wants_more()

    @property
    def pausing(self) -> bool:
        """Whether no further step is wanted; what happens between steps should come to an end."""
        return self.trainer.pausing

    def _wants_more(self) -> bool:
        return not self.pausing and not self.trainer.stopped_early and self.trainer.step_count < self.goal

    def on_step(self, trainer: Trainer, report: StepReport) -> None:
        self.pace.add(report)

    def on_change(self, trainer: Trainer) -> None:
        self.pace.rest()

    def on_end(self, trainer: Trainer) -> None:
        self.pace.rest()

    def tell_change(self) -> None:
        """Has everything that shows the run look anew."""
        self.trainer.tell("on_change")

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
        self.goal = trainer.total_steps if n is None else min(trainer.total_steps, trainer.step_count + n)
        trainer.pausing = False
        if not self.busy:  # else: the run goes on, or was paused a moment ago and takes this up
            self._begin_task(self._run(), "fulltune_nb training")
        self.tell_change()

    def pause(self) -> None:
        """Ends the run after the step that is under way, a cell's too; `start` goes on from there. From any thread."""
        self.trainer.pausing = self.busy or self.trainer.state == "running"
        self.goal = min(self.goal, self.trainer.step_count)  # though a step, or another run, is asked for before this one has ended

    def interrupt(self) -> None:
        """As `pause`, and the history and the checkpoint tell of it."""
        self.pause()
        self.interrupted = True

    async def wait(self) -> None:
        """Returns when the run is over: paused, done or interrupted. At once where none goes on.

        An interrupt meanwhile pauses the run at a whole step. So does cancelling the wait.

        Raises:
            Exception: the run's own error.
        """
        await self._wait_for_task(self.pause)
        if self.error is not None:
            raise self.error

    async def _run(self) -> None:
        steps = self.trainer.steps()
        try:
            await self._between_steps()
            while self._wants_more():
                self._listen()
                self._termination.watch()
                with interrupts_deferred():
                    if next(steps, None) is None:
                        break  # a pause has come this moment
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
            steps.close()
            self.goal, self.trainer.pausing = self.trainer.step_count, False
            self._end_run()

    async def _between_steps(self) -> None:
        self._listen()
        for function in list(self.between_steps):
            await function(self)

    def _end_run(self) -> None:
        trainer = self.trainer
        self._stop_listening()
        try:
            if self.interrupted and self.error is None:
                trainer.interrupted = True
                trainer.event("pause", f"interrupted; paused after step {trainer.step_count} of {trainer.total_steps}")
                if trainer.run_dir:
                    trainer.save()
        except Exception as error:
            self.error = error
        self.tell_change()
        self._termination.leave()  # last: SIGTERM or SIGHUP, if one has arrived, takes effect

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


class Hold:
    """Keeps the weights of some models as they are, from when `ready` returns until `release`.

    A run that goes on, or is started meanwhile, waits between two steps. One that is paused in that time is let go: it takes no
    further step. The event loop stays free.
    """

    def __init__(self, models: Iterable[Any]):
        self._loops = [loop for model in models for loop in loops_of(model)]
        self._halted: set[TrainLoop] = set()
        self._released = False
        for loop in self._loops:
            loop.between_steps.append(self._halt)

    @property
    def running(self) -> list[TrainLoop]:
        """The runs that go on, held or about to be."""
        return [loop for loop in self._loops if loop.running]

    async def ready(self, given_up: Callable[[], bool]) -> None:
        """Returns when every run has come to the end of its step, or when `given_up()`."""
        while any(loop not in self._halted for loop in self.running) and not given_up():
            await asyncio.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Lets all runs go on."""
        self._released = True
        for loop in self._loops:
            loop.between_steps.remove(self._halt)

    async def _halt(self, loop: TrainLoop) -> None:
        self._halted.add(loop)
        with loop.trainer.now_doing("waiting for an answer in a chat"):
            while not self._released and not loop.pausing:
                await asyncio.sleep(POLL_SECONDS)
        self._halted.discard(loop)
