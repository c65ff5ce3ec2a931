"""The drive of a trainer in an event loop: starting, pausing, waiting, interrupts, errors."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref

import pytest

import fulltune_nb as ft
from fulltune_nb.panels import loop as module
from fulltune_nb.panels.loop import loop_of, running_loop
from nbs_tests.panels.conftest import in_loop, until


def losses(trainer):
    return [report.loss for report in trainer.history.steps]


@pytest.fixture
def sigint_ignored():
    """Between its cells, a kernel ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


class AtStep:
    """Calls a function inside a step, where the trainer tells of it."""

    def __init__(self, trainer, step, function):
        self.step, self.function = step, function
        trainer.listeners.append(self)

    def on_step(self, trainer, report):
        if report.step == self.step:
            self.function()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_a_background_run_is_the_blocking_run(make_trainer, tmp_path):
    blocking, driven = (make_trainer(steps_per_eval=3, save_every=5, run_dir=tmp_path / name) for name in "ab")
    blocking.run()

    async def main():
        loop_of(driven).start()
        await loop_of(driven).wait()

    asyncio.run(main())
    assert driven.done and losses(driven) == losses(blocking)
    assert [(r.step, r.loss) for r in driven.history.evals] == [(r.step, r.loss) for r in blocking.history.evals]
    saved = [sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in "ab"]
    assert saved[0] == saved[1]


@in_loop
async def test_start_takes_n_more_steps(make_trainer):
    trainer = make_trainer()
    for expected in (3, 5):
        loop_of(trainer).start(expected - trainer.step_count)
        await loop_of(trainer).wait()
        assert trainer.step_count == expected


@in_loop
async def test_pause_holds_after_the_step_under_way(make_trainer):
    trainer = make_trainer(iters=1000)
    loop = loop_of(trainer)
    AtStep(trainer, 4, lambda: loop.post(loop.pause))
    loop.start()
    await loop.wait()
    assert trainer.step_count == 4 and not loop.running


@in_loop
async def test_pause_from_another_thread_holds_within_a_step(make_trainer):
    trainer = make_trainer(iters=1000)
    asked_at = []
    loop = loop_of(trainer)

    def press():  # a button's callback on a subshell's thread
        asked_at.append(trainer.step_count)
        loop.post(loop.pause)

    AtStep(trainer, 3, lambda: threading.Timer(0.02, press).start())
    loop.start()
    await loop.wait()
    assert trainer.step_count <= asked_at[0] + 2  # the one under way when asked, and the one that may begin meanwhile


def test_other_code_runs_between_steps_and_sees_whole_ones(make_trainer):
    trainer, seen = make_trainer(iters=30), []

    async def main():
        loop_of(trainer).start()
        while loop_of(trainer).running:
            seen.append((trainer.step_count, len(trainer.history.steps)))
            await asyncio.sleep(0)
        await loop_of(trainer).wait()  # its last breath: `running` ends with the last step

    asyncio.run(main())
    assert len({step for step, _ in seen}) > 10
    assert all(step == reports for step, reports in seen)


def test_start_right_after_pause_goes_on(make_trainer):
    trainer = make_trainer()

    async def main():
        loop = loop_of(trainer)
        AtStep(trainer, 3, lambda: loop.post(lambda: (loop.pause(), loop.start())))
        loop.start(5)
        await loop.wait()

    asyncio.run(main())
    assert trainer.done  # the second start goes to the end, not to step 5


@in_loop
async def test_a_step_of_ones_own_is_for_paused_runs(make_trainer):
    trainer = make_trainer()
    loop = loop_of(trainer)
    loop.start(2)
    await asyncio.sleep(0)
    with pytest.raises(ft.TrainingError, match="pause"):
        loop.step()
    loop.pause()
    taken = trainer.step_count
    assert loop.step().step == taken + 1
    assert loop.step(2).step == taken + 3
    await loop.wait()
    assert trainer.step_count == taken + 3


def test_without_an_event_loop_start_names_what_to_call_instead(make_trainer):
    loop = loop_of(make_trainer())
    with pytest.raises(ft.TrainingError, match=r"trainer\.run\(\)"):
        loop.start()
    assert not loop.running
    assert loop.step().step == 1  # this needs none


def test_wait_returns_at_once_where_nothing_runs(make_trainer):
    asyncio.run(loop_of(make_trainer()).wait())


@in_loop
async def test_errors_are_kept_and_raised_by_wait_each_time(make_trainer):
    trainer = make_trainer()

    def fail():
        raise ValueError("on purpose")

    AtStep(trainer, 2, fail)
    loop = loop_of(trainer)
    loop.start()
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            await loop.wait()
    assert isinstance(loop.error, ValueError) and not loop.running
    loop.start()
    await loop.wait()
    assert trainer.done and loop.error is None


@in_loop
async def test_system_exit_in_a_step_does_not_end_the_event_loop(make_trainer):
    trainer = make_trainer()
    AtStep(trainer, 2, lambda: sys.exit(3))
    loop_of(trainer).start()
    with pytest.raises(SystemExit):
        await loop_of(trainer).wait()
    assert trainer.step_count == 2


@pytest.mark.parametrize("waited", [True, False], ids=["while a cell waits", "between cells"])
def test_an_interrupt_in_a_step_pauses_when_it_is_whole_and_evaluated(make_trainer, tmp_path, sigint_ignored, waited):
    straight, trainer = make_trainer(steps_per_eval=3), make_trainer(steps_per_eval=3, run_dir=tmp_path / "run")
    straight.run()

    async def main():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a kernel does; asyncio.run has its own handler
        loop = loop_of(trainer)
        AtStep(trainer, 3, interrupt)
        loop.start()
        await (loop.wait() if waited else until(lambda: not loop.busy))
        assert trainer.step_count == 3 and trainer.interrupted and loop.interrupted
        assert trainer.history[-1].kind == "pause" and trainer.history.evals[-1].step == 3
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert any(path.name.endswith("3") for path in (tmp_path / "run/checkpoints").iterdir())
        loop.start()
        await loop.wait()
        assert not trainer.interrupted

    asyncio.run(main())
    assert losses(trainer) == losses(straight)


@pytest.mark.parametrize("waited", [True, False], ids=["while a cell waits", "between cells"])
@in_loop
async def test_an_interrupt_between_steps_pauses_too(make_trainer, sigint_ignored, monkeypatch, waited):
    monkeypatch.setattr(module, "let_go", lambda: asyncio.sleep(0.05))
    trainer = make_trainer(iters=1000)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop = loop_of(trainer)
    AtStep(trainer, 3, lambda: asyncio.get_running_loop().call_later(0.02, interrupt))
    loop.start()
    await (loop.wait() if waited else until(lambda: not loop.busy))
    assert trainer.step_count == 3 and trainer.interrupted
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_interrupt_cancels_a_cell_that_awaits_something_else_and_pauses(make_trainer, monkeypatch):
    monkeypatch.setattr(module, "let_go", lambda: asyncio.sleep(0.05))
    trainer = make_trainer(iters=1000)

    async def main():
        AtStep(trainer, 3, lambda: asyncio.get_running_loop().call_later(0.02, interrupt))
        loop_of(trainer).start()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            assert trainer.step_count == 3 and not loop_of(trainer).running
            raise

    with pytest.raises(KeyboardInterrupt):  # what asyncio.run makes of an interrupt
        asyncio.run(main())
    assert trainer.step_count == 3


@pytest.mark.parametrize("before", ["a handler", "ignored"])
def test_a_handler_put_back_late_by_the_kernel_passes_on_to_the_one_before(make_trainer, before):
    calls, trainer = [], make_trainer()

    async def main():
        signal.signal(signal.SIGINT, signal.SIG_IGN if before == "ignored" else lambda *_: calls.append("before"))
        loop_of(trainer).start(1)
        await loop_of(trainer).wait()
        signal.signal(signal.SIGINT, module.hear)
        interrupt()

    asyncio.run(main())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert calls == ([] if before == "ignored" else ["before"])


@in_loop
async def test_two_runs_at_a_time_are_both_paused_by_an_interrupt(make_trainer, sigint_ignored):
    trainers = make_trainer(iters=1000), make_trainer(iters=1000)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    AtStep(trainers[0], 3, interrupt)
    for trainer in trainers:
        loop_of(trainer).start()
    await asyncio.gather(*(loop_of(trainer).wait() for trainer in trainers))
    assert all(trainer.interrupted and trainer.step_count < 10 for trainer in trainers)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@in_loop
async def test_cancelling_the_wait_pauses_the_run(make_trainer):
    trainer = make_trainer(iters=100_000)
    loop_of(trainer).start()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(loop_of(trainer).wait(), 0.1)
    await loop_of(trainer).wait()
    assert 0 < trainer.step_count < trainer.total_steps and not loop_of(trainer).running


def test_one_trainer_has_one_loop_and_it_goes_with_the_trainer(make_trainer):
    trainer, other = make_trainer(), make_trainer()
    loop = loop_of(trainer)
    assert loop_of(trainer) is loop and loop_of(other) is not loop

    async def fail(loop):
        loop.start()
        with pytest.raises(SystemExit):
            await loop.wait()

    AtStep(trainer, 2, lambda: sys.exit(3))
    asyncio.run(fail(loop))
    assert loop.error  # its traceback leads to the trainer
    gone = weakref.ref(trainer)
    del trainer, loop
    gc.collect()
    assert gone() is None


@in_loop
async def test_two_trainers_do_not_train_one_model_at_a_time(make_trainer, make_data):
    trainer = make_trainer(iters=100_000)
    other = ft.Trainer(trainer.lm, trainer.data, trainer.config)
    loop_of(trainer).start()
    assert running_loop(trainer.lm.model) is loop_of(trainer)
    with pytest.raises(ft.TrainingError, match="already"):
        loop_of(other).start()
    loop_of(trainer).pause()
    await loop_of(trainer).wait()
    assert running_loop(trainer.lm.model) is None
    loop_of(other).start(1)
    await loop_of(other).wait()


def test_an_event_loop_that_ends_leaves_a_paused_trainer_whole(make_trainer):
    trainer = make_trainer(iters=100_000)

    async def main():
        loop_of(trainer).start()
        await asyncio.sleep(0.05)

    asyncio.run(main())  # cancels what still runs
    assert not loop_of(trainer).running
    assert trainer.step_count == len(trainer.history.steps) > 0
    trainer.step()


def test_the_loop_brings_no_front_end():
    code = "import sys, fulltune_nb.panels.loop; print([m for m in ('ipywidgets', 'IPython', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
