"""The training panel in real kernels, without a browser: buttons, interrupts, errors, re-run cells.

The ipykernel that is installed is tested; other versions' Pythons can be named in the variable FULLTUNE_KERNEL_PYTHONS.
"""

from __future__ import annotations

import statistics
import time

import pytest

from nbs_tests.jupyterlab import needs
from nbs_tests.panels.kernels import VARIABLE, pythons, until, version_of

pytestmark = pytest.mark.long
STEPS_OF_50_MS = """
import time
heard, ends, of_trainer = [], [], trainer.step
def step():
    report = of_trainer()
    time.sleep(0.05)
    ends.append(time.monotonic())
    return report
trainer.step = step
panel.controls.step.on_click(lambda _: heard.append(time.monotonic()))
"""

SLOWED = """
import time
def slowed(function):
    def slow(*args):
        time.sleep(0.8)
        return function(*args)
    return slow
"""
LONG = {  # status -> what makes it last
    "a step": "trainer.step = slowed(trainer.step)",
    "evaluating": "trainer._tell_evaluated = slowed(trainer._tell_evaluated)",
    "saving": "trainer._directory.save_checkpoint = slowed(trainer._directory.save_checkpoint)",
    "answering samples": "trainer.lm.stream_chat = lambda *_, **__: (time.sleep(0.8) or 'word' for _ in range(3))",
}


@pytest.fixture
def panel(kernel):
    """Button names to the widgets' ids, of a new panel `panel` of a new trainer `trainer`; closed after the test."""
    kernel.run("trainer = make_trainer(); panel = TrainPanel(trainer); panel", cell_id="the panel's")
    yield kernel.value("{name: getattr(panel.controls, name).model_id for name in ('run', 'pause', 'step', 'stop', 'learning_rate')}")
    kernel.run("panel.closed or panel.close(); await asyncio.sleep(0.05)")


def steps(kernel):
    return kernel.value("trainer.step_count")


@pytest.mark.parametrize("least, below", [((6, 31), (6, 32)), ((7, 3), (7, 4)), ((7, 4), (8, 0))], ids=["6.31", "7.3", "7.4"])
def test_the_kernels_that_differ_are_all_there_in_ci(least, below):
    found = [tuple(map(int, version_of(python).split(".")[:2])) for python in pythons()]
    there = any(least <= version < below for version in found)
    needs(there, f"ipykernel {'.'.join(map(str, least))} (name a Python that has it in {VARIABLE}, as .ci/run does)")


def test_run_and_pause_are_heard_within_a_step(kernel, panel, way):
    kernel.run("heard = []; panel.controls.pause.on_click(lambda _: heard.append(trainer.step_count))")
    kernel.press(panel["run"])
    until(lambda: steps(kernel) > 5)
    assert kernel.value("panel.loop.running")
    kernel.press(panel["pause"])
    until(lambda: not kernel.value("panel.loop.running"))
    taken = steps(kernel)
    assert taken <= kernel.value("heard")[0] + 1
    time.sleep(0.3)
    assert steps(kernel) == taken == kernel.value("panel.controls.progress.value")
    kernel.run("trainer.step()")  # MLX works on the main thread as before


def test_a_button_is_heard_when_the_step_under_way_ends(kernel, panel, way):
    kernel.run(STEPS_OF_50_MS)
    kernel.press(panel["run"])
    until(lambda: kernel.value("len(ends)") > 2)
    pressed = []
    for _ in range(9):
        pressed.append(time.monotonic())  # the clock of all processes
        kernel.press(panel["step"])  # which does nothing while a run goes on
        time.sleep(0.13)
    heard, ends = kernel.value("[heard, ends]")
    assert len(heard) == len(pressed)
    steps_between = [sum(before < end < after for end in ends) for before, after in zip(pressed, heard, strict=True)]
    assert statistics.median(steps_between) <= 1, steps_between


@pytest.mark.parametrize("doing", LONG)
@pytest.mark.parametrize("driver", ["the panel", "a cell"])
def test_pause_is_told_within_half_a_second_of_what_takes_long(kernel, panel, driver, doing, tmp_path):
    if kernel.version < (7, 0):
        pytest.skip("this ipykernel has no subshells: a button is heard when the step under way ends")
    if (driver, doing) == ("a cell", "answering samples"):
        pytest.skip("samples are the panel's")
    kernel.use_subshell()
    try:
        kernel.run(f"panel.close(); trainer = make_trainer({str(tmp_path / 'run')!r}, steps_per_eval=2, save_every=2)")
        kernel.run(f"panel = TrainPanel(trainer, ['the quick'], 2)\ntrainer.run(1)\n{SLOWED}{LONG[doing]}\npanel", cell_id="the panel's")
        run, pause, status = kernel.value("[getattr(panel.controls, name).model_id for name in ('run', 'pause', 'status')]")
        cell = None
        for _ in range(2):  # the second time it was the subshell that sent the button's last state
            if driver == "a cell":
                cell = kernel.send("trainer.run()")
            else:
                kernel.press(run)
            kernel.told(status, doing if doing != "a step" else "running")
            time.sleep(0.2)
            pressed = time.monotonic()
            kernel.press(pause)
            assert kernel.told(status, "then pausing" if doing != "a step" else "pausing after this step") - pressed < 0.5
            kernel.told(status, "paused")
            if cell:
                kernel.outcome(cell)
            until(lambda: not kernel.value("panel.loop.running"))
        assert steps(kernel) <= 5
    finally:
        kernel.subshell = None


def test_step_advances_by_exactly_one(kernel, panel, way):
    for expected in (1, 2, 3):
        kernel.press(panel["step"])
        until(lambda: steps(kernel))
        time.sleep(0.2)
        assert steps(kernel) == expected


def test_tabs_that_look_inside_compute_on_the_main_thread_between_steps(kernel, panel, way):
    tabs, losses = kernel.value("[panel.controls.tabs.model_id, panel.tabs['Batch'].losses.model_id]")
    kernel.press(panel["run"])
    kernel.enter(tabs, selected_index=2)
    until(lambda: "updates survive rounding" in kernel.value("panel.tabs['Updates'].page.value"))
    kernel.enter(tabs, selected_index=3)
    kernel.press(losses)
    until(lambda: "losses by the weights after step" in kernel.value("panel.tabs['Batch'].page.value"))
    assert kernel.value("[panel.loop.running, panel.error, len(trainer.optimizers.observers)]") == [True, None, 0]
    kernel.press(panel["pause"])
    until(lambda: not kernel.value("panel.loop.running"))
    kernel.run("trainer.step()")  # MLX works on the main thread as before


def test_the_learning_rate_typed_while_paused_is_an_event(kernel, panel, way):
    kernel.enter(panel["learning_rate"], value=0.25)
    until(lambda: kernel.value("trainer.learning_rate") == 0.25)
    assert kernel.value("[event.kind for event in trainer.history.events]") == ["learning_rate"]


def test_other_cells_read_history_and_weights_while_the_run_goes_on(kernel, panel):
    kernel.press(panel["run"])
    seen = []
    for _ in range(4):
        seen.append(kernel.value("[trainer.step_count, len(trainer.history.steps), float(np.array(trainer.lm.model.norm.weight).sum())]"))
        time.sleep(0.1)
    assert seen[-1][0] > seen[0][0] and all(step == reports for step, reports, _ in seen)
    assert len({total for _, _, total in seen}) > 1
    assert kernel.value("panel.loop.running")


def test_pause_is_heard_while_a_cell_waits(kernel, panel, way):
    if way == "main shell" and kernel.version < (7, 4):
        pytest.skip("this ipykernel handles no message of the main shell while a cell awaits something")
    waiting = kernel.send("panel.start(); await panel.wait(); print('over')")
    time.sleep(0.5)
    kernel.press(panel["pause"])
    assert "over" in kernel.outcome(waiting).text
    assert 0 < steps(kernel) < 100_000


def test_an_interrupt_between_cells_pauses_and_the_losses_stay_the_same(kernel, panel):
    kernel.press(panel["run"])
    until(lambda: steps(kernel) > 5)
    kernel.interrupt()
    until(lambda: not kernel.value("panel.loop.running"))
    assert kernel.value("trainer.interrupted")
    taken = steps(kernel)
    kernel.run("panel.start(5); await panel.wait()")
    kernel.run(f"straight = make_trainer(); straight.run({taken + 5})")
    assert kernel.value("[r.loss for r in straight.history.steps] == [r.loss for r in trainer.history.steps]")


@pytest.mark.parametrize("pause_seconds", [0.001, 0.2], ids=["mostly in steps", "mostly between steps"])
def test_an_interrupt_of_the_cell_that_waits_pauses_and_is_no_error(kernel, panel, pause_seconds):
    kernel.run(f"from fulltune_nb.panels import loop; usual = loop.let_go; loop.let_go = lambda: asyncio.sleep({pause_seconds})")
    waiting = kernel.send("panel.start(); await panel.wait(); print('over')")
    time.sleep(0.7)
    kernel.interrupt()
    cell = kernel.outcome(waiting)
    kernel.run("loop.let_go = usual")
    assert cell.status == "ok" and "over" in cell.text, cell.error
    assert kernel.value("trainer.interrupted and not panel.loop.running")
    kernel.run("panel.start(2); await panel.wait()")


def test_an_interrupt_of_a_blocking_run_pauses_at_a_whole_step(kernel, panel):
    running = kernel.send("trainer.run(); print('over')")
    time.sleep(0.7)
    kernel.interrupt()
    assert "over" in kernel.outcome(running).text
    assert kernel.value("trainer.interrupted and trainer.step_count == len(trainer.history.steps) > 0")


def test_an_interrupt_of_another_cell_stops_that_and_the_run(kernel, panel):
    kernel.press(panel["run"])
    other = kernel.send("await asyncio.sleep(60)")
    time.sleep(0.5)
    kernel.interrupt()
    assert kernel.outcome(other, timeout=20).status == "error"
    until(lambda: not kernel.value("panel.loop.running"))


def test_the_runs_own_error_is_raised_by_the_cell_that_waits(kernel, panel):
    kernel.run("trainer.lm.model.norm.weight = trainer.lm.model.norm.weight * float('nan')")
    cell = kernel.outcome(kernel.send("panel.start(); await panel.wait()"))
    assert cell.status == "error" and "NonFiniteError" in cell.error and "train:" in cell.error
    assert "NonFiniteError" in kernel.run("print(panel.controls.error.value)").text
    assert any("NonFiniteError" in bundle.get("text/html", "") for bundle in cell.bundles + cell.updates)


def test_the_cell_that_waits_keeps_a_picture_and_a_table(kernel, panel):
    cell = kernel.run("panel.start(3); await panel.wait()")
    bundles = cell.bundles + cell.updates
    assert any("image/png" in bundle for bundle in bundles)
    assert any("step 3 of" in bundle.get("text/html", "").lower() for bundle in bundles)


def test_the_panels_cell_keeps_them_when_nobody_waits(kernel, panel):
    shown = kernel.run("panel", cell_id="another")
    assert any("application/vnd.jupyter.widget-view+json" in bundle for bundle in shown.bundles)
    stepped = kernel.run("panel.step(); await asyncio.sleep(1.5)")  # the second picture may come a second after the first
    assert any("image/png" in bundle for bundle in stepped.updates)


def test_running_the_panels_cell_again_is_safe(kernel, panel):
    kernel.press(panel["run"])
    until(lambda: steps(kernel) > 2)
    kernel.run("old = panel; panel = TrainPanel(trainer); panel", cell_id="the panel's")
    assert kernel.value("[old.closed, panel.closed, panel.loop.running]") == [True, False, True]
    kernel.run("old_trainer = weakref.ref(trainer); trainer = make_trainer(); panel = TrainPanel(trainer); panel", cell_id="the panel's")
    kernel.run("old = None; await asyncio.sleep(0.1); gc.collect()")
    assert kernel.value("old_trainer() is None"), "a panel shown before keeps its trainer"


def test_closing_the_panel_ends_the_run(kernel, panel):
    kernel.press(panel["run"])
    until(lambda: steps(kernel) > 2)
    kernel.run("panel.close(); await asyncio.sleep(0.05)")
    taken = steps(kernel)
    time.sleep(0.2)
    assert steps(kernel) == taken
    assert kernel.value("[task.get_name() for task in asyncio.all_tasks() if 'fulltune' in task.get_name()]") == []
