"""The training panel without a kernel: buttons, fields, what is shown, several panels, closing."""

from __future__ import annotations

import asyncio
import gc
import html
import re
import threading
import weakref
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.chart import LossChart
from fulltune_nb.panels.controls import TrainControls
from fulltune_nb.panels.panel import error_html
from fulltune_nb.panels.samples import Sample
from fulltune_nb.panels.train import TrainPanel
from fulltune_nb.panels.train_view import REFRESH_SECONDS, TrainView
from fulltune_nb.panels.ways_on import how_to_go_on
from nbs_tests.panels.conftest import HOSTILE, in_loop, settled, until


def shown(panel):
    """All that the panel shows as HTML."""
    controls = panel.controls
    return " ".join(widget.value for widget in (controls.status, controls.error, controls.log, controls.samples))


# -- buttons ------------------------------------------------------------------------------------------------------------


@in_loop
async def test_run_and_pause_buttons(make_trainer, panel_of):
    panel = panel_of(make_trainer(iters=100_000))
    assert "ready" in panel.controls.status.value
    panel.controls.run.click()
    await until(lambda: panel.trainer.step_count > 3)
    assert panel.loop.running and panel.controls.learning_rate.disabled and "running" in panel.controls.status.value
    panel.controls.pause.click()
    await settled(panel)
    taken = panel.trainer.step_count
    assert not panel.controls.learning_rate.disabled and "paused" in panel.controls.status.value
    await asyncio.sleep(0.1)
    assert panel.trainer.step_count == taken == panel.controls.progress.value
    assert f"step {taken} of 100,000" in panel.controls.status.value


@in_loop
async def test_pause_pressed_on_another_thread_is_heard(make_trainer, panel_of):
    panel = panel_of(make_trainer(iters=100_000))
    panel.start()
    await until(lambda: panel.trainer.step_count > 1)
    thread = threading.Thread(target=panel.controls.pause.click)  # a subshell's thread, with no event loop of its own
    thread.start()
    thread.join()
    pressed_at = panel.trainer.step_count
    await settled(panel)
    assert panel.trainer.step_count <= pressed_at + 1


@in_loop
async def test_step_buttons_take_exactly_so_many_steps(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    for expected in (1, 2):
        panel.controls.step.click()
        await until(lambda: panel.trainer.step_count)
        await settled(panel)
        assert panel.trainer.step_count == expected
    panel.controls.step_count.value = 3
    panel.controls.step_n.click()
    await asyncio.sleep(0.01)
    await settled(panel)
    assert panel.trainer.step_count == 5
    panel.controls.step.click()
    panel.controls.step.click()
    await asyncio.sleep(0.01)
    await settled(panel)
    assert panel.trainer.step_count == 7


@in_loop
async def test_step_during_a_run_to_the_end_changes_nothing(make_trainer, panel_of):
    panel = panel_of(make_trainer(iters=60))
    panel.start()
    await until(lambda: panel.trainer.step_count > 2)
    panel.controls.step.click()
    await settled(panel)
    assert panel.trainer.done


@in_loop
async def test_evaluate_save_and_stop_buttons(make_trainer, panel_of, tmp_path):
    panel = panel_of(make_trainer(run_dir=tmp_path / "run", val_batches=0, save_every=1000))
    panel.step(2)
    panel.controls.split.value = "test"
    panel.controls.evaluate.click()
    panel.controls.save.click()
    await asyncio.sleep(0.01)
    assert panel.trainer.history.evals[-1].split == "test"
    assert "test loss" in panel.controls.log.value and str(tmp_path / "run/checkpoints") in panel.controls.log.value
    panel.start()
    await until(lambda: panel.trainer.step_count > 3)
    panel.controls.stop.click()
    await settled(panel)
    assert panel.trainer.history.events[-1].kind == "stop"
    assert ft.Trainer.resume(tmp_path / "run", data=panel.trainer.data).step_count == panel.trainer.step_count


def test_without_a_run_dir_save_is_disabled_and_says_why(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    assert panel.controls.save.disabled and "run_dir" in panel.controls.save.tooltip
    panel.stop()  # needs none
    assert panel.trainer.history.events[-1].kind == "stop"


def test_every_control_has_a_description_or_a_tooltip():
    controls = TrainControls(["train"], False, LossChart([]))
    for name, widget in vars(controls).items():
        if name not in ("box", "chart", "tabs", "_tooltips"):
            assert widget.tooltip, name
    for widget in (controls.tabs, *controls.tabs.children):
        assert not getattr(widget, "tooltip", None)  # the front end cannot show a box that has one
    assert controls.split.value == "train"


# -- without an event loop -------------------------------------------------------------------------------------------------


def test_everything_but_start_works_in_plain_python(make_trainer, panel_of):
    panel = panel_of(make_trainer(), prompts=["the quick"], max_tokens=3)
    assert panel.step().step == 1
    assert panel.evaluate().split == "valid"
    panel.controls.step.click()
    panel.controls.step_n.click()
    assert panel.trainer.done
    assert [sample.step for sample in panel.sample()] == [8]
    assert "done" in panel.controls.status.value and panel.controls.progress.value == 8
    assert repr(panel.controls.chart) == "LossChart(1 run, 8 steps)"
    assert "loss" in panel._repr_html_() and "data:image/png" in panel._repr_html_()
    assert repr(panel) == "TrainPanel(done, step 8 of 8)"


def test_start_in_plain_python_names_what_to_call(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    with pytest.raises(ft.TrainingError, match=r"trainer\.run\(\)"):
        panel.start()
    panel.controls.run.click()
    assert "trainer.run()" in panel.controls.error.value and isinstance(panel.error, ft.TrainingError)


# -- what is shown ----------------------------------------------------------------------------------------------------------


@in_loop
async def test_errors_are_shown_with_what_to_do_and_raised_by_wait(make_trainer, panel_of):
    trainer = make_trainer(iters=20)
    panel = panel_of(trainer)
    panel.step(2)
    good = trainer.lm.model.norm.weight
    trainer.lm.model.norm.weight = good * float("nan")
    panel.start()
    with pytest.raises(ft.errors.NonFiniteError):
        await panel.wait()
    assert "lower the learning rate" in panel.controls.error.value and panel.controls.error.layout.display != "none"
    assert "failed" in panel.controls.status.value
    trainer.lm.model.norm.weight = good
    panel.start(1)
    await panel.wait()
    assert panel.error is None and panel.controls.error.value == "" and panel.controls.error.layout.display == "none"
    assert trainer.step_count == 3


@pytest.mark.parametrize("error", [ValueError("unexpected"), MemoryError(), RuntimeError("[malloc] Unable to allocate 9 bytes")])
def test_errors_from_elsewhere_come_with_advice(error):
    page = error_html(error)
    assert str(error) in page and ("Trainer.resume" in page or "batch_size" in page)


def test_hostile_text_stays_text_wherever_it_comes_from(make_trainer, panel_of, monkeypatch):
    panel = panel_of(make_trainer(), prompts=[HOSTILE])
    trainer = panel.trainer
    monkeypatch.setattr(trainer.lm, "stream_chat", lambda *_, **__: iter([HOSTILE, "x" * 1_000_000]))
    panel.sample()
    trainer.event(HOSTILE, HOSTILE)
    trainer.tell("on_save", HOSTILE)
    monkeypatch.setattr(trainer, "evaluate", lambda split: (_ for _ in ()).throw(ValueError(HOSTILE)))
    panel.controls.evaluate.click()
    page = shown(panel) + panel._repr_html_()
    assert page.count("&lt;img src=x onerror") >= 5
    for forbidden in ("<img src=x", "<script", "\x1b", "\u202e", "</pre>&lt;"):
        assert forbidden not in page
    assert len(page) < 100_000
    assert panel.controls.prompts.value == HOSTILE  # a text field shows text as it is


def test_the_learning_rate_field_changes_it_as_an_event(make_trainer, panel_of):
    panel = panel_of(make_trainer(learning_rate=1e-3))
    assert panel.controls.learning_rate.value == 1e-3
    assert not panel.trainer.history.events
    panel.controls.learning_rate.value = 5e-4
    assert panel.trainer.learning_rate == 5e-4
    assert [event.kind for event in panel.trainer.history.events] == ["learning_rate"]
    for wrong in (-1.0, float("inf"), float("nan")):
        panel.controls.learning_rate.value = wrong
        assert "finite number larger than 0" in panel.controls.error.value
        assert panel.controls.learning_rate.value == 5e-4 == panel.trainer.learning_rate


def test_the_learning_rate_field_is_the_schedules_peak_and_the_status_says_the_present_rate(make_trainer, panel_of):
    panel = panel_of(make_trainer(iters=40, warmup=20, lr_schedule="cosine"))
    for number in range(3):
        assert panel.controls.learning_rate.value == 1e-3
        assert f"learning rate {1e-3 * (number + 1) / 21:.3g}" in panel.controls.status.value
        panel.step()
    assert not panel.trainer.history.events and panel.error is None
    panel.controls.learning_rate.value = 2e-3  # during the warm-up
    panel.step(37)
    assert max(report.learning_rate for report in panel.trainer.history.steps) == 2e-3


@in_loop
async def test_a_rate_typed_before_the_run_began_is_refused_during_it(make_trainer, panel_of):
    panel = panel_of(make_trainer(iters=100_000))
    panel.start()
    panel.controls.learning_rate.value = 0.5
    await until(lambda: panel.trainer.step_count > 1)
    assert panel.trainer.learning_rate == 1e-3 and "paused" in panel.controls.error.value
    panel.pause()
    await settled(panel)
    assert panel.controls.learning_rate.value == 1e-3


def test_a_run_in_a_cell_moves_the_panel_too(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    states = []

    class Look:
        def on_step(self, trainer, report):
            states.append(panel.controls.status.value)

    panel.trainer.run(callbacks=[Look()])
    assert "running in a cell" in states[-1]
    assert "done" in panel.controls.status.value and panel.controls.progress.value == 8


def test_after_steps_in_a_cell_the_panel_says_that_it_is_paused(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    panel.trainer.step()
    assert "paused" in panel.controls.status.value
    for _ in panel.trainer.steps(2):
        assert panel.trainer.state == "running"
    assert "paused" in panel.controls.status.value and "step 3 " in panel.controls.status.value


def test_a_resumed_runs_log_and_plot_hold_what_was_before(make_trainer, panel_of, tmp_path):
    trainer = make_trainer(run_dir=tmp_path / "run", steps_per_eval=2)
    trainer.run(4)
    trainer.save()
    panel = panel_of(ft.Trainer.resume(tmp_path / "run", data=trainer.data))
    assert "resumed at step 4" in panel.controls.log.value and "valid loss" in panel.controls.log.value
    assert panel.loop.trainer.step_count == 4 and "step 4 of 8" in panel.controls.status.value


# -- samples ----------------------------------------------------------------------------------------------------------------


@in_loop
async def test_samples_are_taken_every_n_steps_from_before_the_first(make_trainer, panel_of):
    panel = panel_of(make_trainer(), prompts=["the quick", "lazy dog"], sample_every=4, max_tokens=3)
    panel.start()
    await panel.wait()
    assert [(sample.step, sample.prompt) for sample in panel.samples.rows] == [
        (step, prompt) for step in (0, 4, 8) for prompt in ("the quick", "lazy dog")
    ]
    assert panel.trainer.lm.chat([{"role": "user", "content": "lazy dog"}], max_tokens=3) == panel.samples.rows[-1].answer
    table = panel.controls.samples.value
    assert table.count("lazy dog") == 1 and re.findall(r">step (\d)<", table) == ["8", "4", "0"]  # prompts are rows, steps are columns


@in_loop
async def test_samples_do_not_change_the_run(make_trainer, panel_of):
    straight, sampled = make_trainer(), make_trainer()
    straight.run()
    panel = panel_of(sampled, prompts=["the quick"], sample_every=1, max_tokens=2)
    panel.start()
    await panel.wait()
    assert [r.loss for r in sampled.history.steps] == [r.loss for r in straight.history.steps]


@in_loop
async def test_sample_now_answers_while_paused_and_takes_no_step(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    panel.controls.prompts.value = "the quick\n\nlazy"
    panel.controls.max_tokens.value = 3
    await asyncio.sleep(0.01)
    assert panel.samples.prompts == ("the quick", "lazy") and panel.samples.max_tokens == 3
    panel.controls.sample_now.click()
    await asyncio.sleep(0.01)
    await settled(panel)
    assert len(panel.samples.rows) == 2 and panel.trainer.step_count == 0


@in_loop
async def test_pause_cuts_a_long_answer_off(make_trainer, panel_of, monkeypatch):
    panel = panel_of(make_trainer(), prompts=["the"], sample_every=1)
    pieces = iter(["word "] * 10_000)
    monkeypatch.setattr(panel.trainer.lm, "stream_chat", lambda *_, **__: pieces)
    panel.start()
    await until(lambda: panel.samples.rows and len(panel.samples.rows[-1].answer) > 20)
    panel.pause()
    await panel.wait()
    assert panel.trainer.step_count == 0 and next(pieces)


def test_a_prompt_that_cannot_be_used_is_a_row_and_not_the_end(make_trainer, panel_of, monkeypatch):
    panel = panel_of(make_trainer(), prompts=["a", "b"])

    def refuse(*_, **__):
        raise ft.errors.GenerationError("no such prompt")

    monkeypatch.setattr(panel.trainer.lm, "stream_chat", refuse)
    assert [sample.answer for sample in panel.sample()] == ["[GenerationError: no such prompt]"] * 2


@pytest.mark.parametrize(
    "settings", [{"prompts": "one text"}, {"prompts": [3]}, {"sample_every": -1}, {"max_tokens": 0}, {"max_tokens": True}], ids=str
)
def test_unusable_sample_settings_are_errors(make_trainer, settings):
    with pytest.raises(ft.ConfigError, match="expected a"):
        TrainPanel(make_trainer(), **settings)


def test_prompts_with_line_breaks_are_kept_whole(make_trainer, panel_of):
    panel = panel_of(make_trainer(), prompts=["one\ntwo"])
    assert panel.controls.prompts.value == "one⏎two" and not panel.controls.prompts.disabled
    panel.controls.prompts.value = "one⏎two\nthree"
    assert panel.samples.prompts == ("one\ntwo", "three")
    panel.samples.set(["a ⏎ of one's own"])
    panel.refresh()
    assert panel.controls.prompts.disabled  # it would become a line break


def test_the_table_of_samples_is_bounded_and_tells_what_is_left_out(make_trainer, panel_of):
    samples = panel_of(make_trainer()).samples
    samples.set([f"prompt {i}" for i in range(50)])
    samples.rows.extend(Sample(step, prompt, f"{prompt} at {step}") for step in range(40) for prompt in samples.prompts)
    shown = samples.to_html(most_prompts=30, most_steps=8)
    assert shown.count("<tr>") == 1 + 30 and re.findall(r">step (\d+)<", shown) == [str(step) for step in range(39, 31, -1)]
    assert "prompt 0 at 39" in shown and "20 more prompts" in shown and "32 more steps before these" in shown


# -- several panels, closing ---------------------------------------------------------------------------------------------------


@in_loop
async def test_two_panels_of_one_trainer_agree(make_trainer, panel_of):
    trainer = make_trainer(iters=100_000)
    one, two = panel_of(trainer), panel_of(trainer)
    one.controls.run.click()
    await until(lambda: trainer.step_count > 3)
    two.controls.pause.click()
    await settled(one)
    two.controls.learning_rate.value = 2e-3
    one.controls.prompts.value = "the"
    await asyncio.sleep(0.05)
    assert one.loop is two.loop and not one.loop.running
    for name in ("status", "progress", "learning_rate", "log", "prompts"):
        assert getattr(one.controls, name).value == getattr(two.controls, name).value, name


@in_loop
async def test_closing_the_last_panel_pauses_and_leaves_nothing(make_trainer, panel_of):
    import ipywidgets

    before = len(ipywidgets.Widget.get_manager_state()["state"])
    trainer = make_trainer(iters=100_000)
    one, two = panel_of(trainer), panel_of(trainer)
    one.start()
    one.close()
    one.close()
    await until(lambda: trainer.step_count > 2)
    assert two.loop.running
    two.close()
    await two.loop.wait()
    assert not two.loop.running and trainer.listeners == [two.loop]
    taken = trainer.step_count
    await asyncio.sleep(0.05)
    assert trainer.step_count == taken
    assert len(ipywidgets.Widget.get_manager_state()["state"]) == before
    with pytest.raises(ft.TrainingError, match="closed"):
        one.start()
    assert repr(one) == "TrainPanel(closed)"


def test_a_panel_that_is_dropped_does_not_keep_its_trainer(make_trainer):
    panel = TrainPanel(make_trainer())
    trainer = weakref.ref(panel.trainer)
    del panel
    gc.collect()
    assert trainer() is None


def test_a_panel_without_a_name_of_its_own_lives_as_long_as_its_trainer(make_trainer):
    trainer = make_trainer()
    controls = TrainPanel(trainer).controls  # as by display(TrainPanel(trainer))
    gc.collect()
    controls.step.click()
    assert trainer.step_count == 1 and "step 1 of 8" in controls.status.value


# -- cost ---------------------------------------------------------------------------------------------------------------------


@in_loop
async def test_curves_and_numbers_come_seldom(make_trainer, panel_of, monkeypatch):
    sent, drawn = [], []
    panel = panel_of(make_trainer(iters=100_000, steps_per_eval=100_000))
    monkeypatch.setattr(panel.controls.chart, "send", lambda content, buffers: sent.append(sum(map(len, buffers))))
    monkeypatch.setattr("fulltune_nb.panels.train_view.loss_png", lambda runs: drawn.append(1))
    panel.start()
    started = asyncio.get_running_loop().time()
    refreshed = []
    panel.controls.status.observe(lambda _: refreshed.append(1), "value")
    await until(lambda: asyncio.get_running_loop().time() > started + 2.0)
    panel.pause()
    await settled(panel)
    assert 2 < len(sent) <= 12 and not drawn
    assert len(refreshed) <= 2.5 / REFRESH_SECONDS + 4


def test_memory_of_old_reports_does_not_grow_in_the_log(make_trainer, panel_of):
    trainer = make_trainer()
    trainer.history += [ft.Event(0, "note", f"number {number}", 0.0) for number in range(1500)]
    panel = panel_of(trainer)
    trainer.event("note", "number 1500")
    assert "number 1500" in panel.controls.log.value and "… and 940 before" in panel.controls.log.value
    assert mx.get_active_memory() > 0


def test_the_chart_has_the_runs_to_compare_with_besides(make_trainer, panel_of):
    other = make_trainer()
    other.run(2)
    panel = panel_of(make_trainer(), compare={"before": other})
    panel.step(3)
    state = panel.controls.chart.get_state()["_whole"]
    assert state["names"] == ["this run", "before"] and [run["count"] for run in state["runs"]] == [3, 2]
    with pytest.raises(ft.ConfigError, match="compare"):
        TrainPanel(make_trainer(), compare="runs/a")


def test_twenty_thousand_reports_make_a_small_record_and_a_small_panel(make_trainer, panel_of):
    trainer = make_trainer()
    for step in range(1, 20_001):
        trainer.history.append(ft.StepReport(step, step / 3, 2.0, 10, 1e-3, 1.0, 0.05, 200.0, 1000, 1000, 1000))
        if step % 50 == 0:
            trainer.history.append(ft.EvalReport("valid", step, 2.0, 7.4, 10, 0.1))
            trainer.history.append(ft.Event(step, "note", "x" * 1000, 0.0))
    panel = panel_of(trainer)
    assert len(panel._repr_html_()) < 150_000
    panel.refresh()  # how long it takes: nbs_tests/benchmarks/drawing_time.py
    assert len(shown(panel)) < 150_000


@pytest.mark.parametrize("name", ["pause", "stop"])
def test_pause_pressed_while_a_cell_trains_is_shown_at_once_and_ends_it_after_the_step(make_trainer, panel_of, monkeypatch, name):
    """The press comes on another thread, as JupyterLab's subshells have it, in the middle of a step."""
    panel = panel_of(make_trainer(iters=40))
    take, statuses = panel.trainer._take_step, []

    def pressed_in_step_3(number, *args):
        statuses.append(panel.controls.status.value)
        if number == 3:
            thread = threading.Thread(target=panel.controls.pause.click if name == "pause" else panel._stop_pressed)
            monkeypatch.setattr(panel, "_post", lambda action: None)  # what is for the main thread comes after the cell
            thread.start()
            thread.join()
            statuses.append(panel.controls.status.value)
        return take(number, *args)

    monkeypatch.setattr(panel.trainer, "_take_step", pressed_in_step_3)
    panel.trainer.run()
    assert "running in a cell</b>" in statuses[0] and "pausing after this step</b>" in statuses[-1]
    assert panel.trainer.step_count == 3 and "paused</b>" in panel.controls.status.value


def test_the_status_says_what_is_done_between_steps_and_why_a_run_failed(make_trainer, panel_of, tmp_path):
    panel = panel_of(make_trainer(run_dir=tmp_path / "run", steps_per_eval=1), prompts=["the"], max_tokens=2)
    seen = []
    panel.controls.status.observe(lambda change: seen.append(change.new), "value")
    panel.step()
    panel.sample()
    for words in ("evaluating valid 0 of", "saving", "answering samples"):
        assert any(words in status for status in seen), words
    assert "paused</b>" in panel.controls.status.value
    panel.trainer.lm.model.norm.weight = panel.trainer.lm.model.norm.weight * float("nan")
    with pytest.raises(ft.errors.NonFiniteError):
        panel.step()
    assert "failed</b> (NonFiniteError: " in panel.controls.status.value


def reasons(panel):
    """Of each button that is disabled what its tooltip says."""
    names = ("run", "pause", "step", "step_n", "stop", "sample_now", "save", "evaluate")
    return {name: getattr(panel.controls, name).tooltip for name in names if getattr(panel.controls, name).disabled}


@in_loop
async def test_buttons_that_can_do_nothing_are_disabled_and_say_why(make_trainer, panel_of, tmp_path):
    panel = panel_of(make_trainer(iters=100_000, run_dir=tmp_path / "run"), prompts=["the"])
    tooltip = panel.controls.run.tooltip
    assert reasons(panel) == {"pause": "Nothing is running"}
    panel.start()
    assert reasons(panel).keys() == {"run", "step", "step_n"} and "already" in panel.controls.run.tooltip
    await until(lambda: panel.trainer.step_count > 1)
    panel.controls.pause.click()
    assert panel.controls.pause.disabled and panel.controls.pause.tooltip == "It pauses after this step"
    await settled(panel)
    assert reasons(panel) == {"pause": "Nothing is running"} and panel.controls.run.tooltip == tooltip


@pytest.mark.parametrize("length", [{"iters": 2}, {"epochs": 1}])
def test_at_the_end_the_panel_says_how_to_go_on_and_that_works(make_trainer, panel_of, length):
    panel = panel_of(make_trainer(**{"iters": None, **length}))
    panel.step(100)
    assert reasons(panel).keys() == {"run", "pause", "step", "step_n", "stop", "sample_now", "save"}
    call = re.search(r"trainer\.fork\((.*?)\)", html.unescape(panel.controls.status.value))
    more = eval(call[0], {"trainer": panel.trainer})
    assert call[0] in panel.controls.run.tooltip and more.state == "paused" and more.total_steps == 2 * panel.trainer.total_steps
    more.run()
    assert more.state == "done"


@in_loop
async def test_at_the_end_one_click_trains_on_with_a_copy_in_the_same_panel(make_trainer, panel_of, tmp_path):
    trainer = make_trainer(iters=2, run_dir=tmp_path / "run")
    panel = panel_of(trainer, ["the"], 1)
    widget, shown = panel.widget, len(panel.widget.children)
    assert panel.controls.train_on.layout.display == "none"
    panel.start()
    await settled(panel)
    assert panel.controls.train_on.layout.display is None
    weights = np.array(trainer.lm.model.norm.weight)
    (tmp_path / "run-2").mkdir()  # somebody's
    panel.controls.tabs.selected_index = 1
    panel.controls.train_on.click()
    await until(lambda: panel.trainer is not trainer)
    await settled(panel)
    more = panel.trainer
    assert (more.state, more.step_count, trainer.step_count) == ("done", 4, 2) and more.run_dir == tmp_path / "run-3"
    assert np.array_equal(np.array(trainer.lm.model.norm.weight), weights)
    straight = make_trainer(iters=4)
    straight.run()
    assert [report.loss for report in more.history.steps] == [report.loss for report in straight.history.steps]
    assert panel.widget is widget and len(widget.children) == shown and "step 4 of 4" in panel.controls.status.value
    assert panel.controls.chart in widget.children and panel.samples.prompts == ("the",) and panel.controls.tabs.selected_index == 1
    assert [sample.step for sample in panel.samples.rows] == [0, 1, 2, 3, 4] and "(mean of 4 steps)" in panel.controls.status.value
    assert not any(isinstance(listener, TrainView) for listener in trainer.listeners)


@pytest.mark.parametrize(("step", "words"), [(3, "fork(patience=None)"), (4, "fork(patience=None, iters=8)")])
def test_behind_an_early_stop_a_run_goes_on_with_steps_that_are_left_or_with_more(step, words):
    config = SimpleNamespace(epochs=None)
    ended = SimpleNamespace(stopped_early=True, step_count=step, total_steps=4, run_dir=None, config=config)
    assert words in how_to_go_on(ended)


def test_a_run_that_is_not_done_is_not_forked(make_trainer, panel_of):
    panel = panel_of(make_trainer(iters=2))
    with pytest.raises(ft.TrainingError, match=r"step 0 of 2: start\(\) goes on"):
        panel.train_on()


def test_buttons_that_begin_something_are_disabled_while_a_cell_trains(make_trainer, panel_of):
    panel, seen = panel_of(make_trainer(iters=2)), []
    panel.controls.run.observe(lambda change: seen.append((change.new, panel.trainer.state)), "disabled")
    panel.trainer.run(1)
    assert seen == [(True, "running"), (False, "paused")] and not panel.controls.step.disabled
