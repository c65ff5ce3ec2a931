"""The tabs of the training panel that look inside: nothing is computed while they are closed, and nothing within a step."""

from __future__ import annotations

import asyncio
import gc
import re
import weakref

import ipywidgets
import pytest

import fulltune_nb as ft
from fulltune_nb.insight import Forgetting, GenerationScore, UpdateMeter
from fulltune_nb.panels import tabs as module
from fulltune_nb.panels.tabs import UpdatesTab, spikes
from nbs_tests.panels.conftest import HOSTILE, in_loop, settled, until

TITLES = ("Log", "Samples", "Updates", "Batch", "Callbacks")


def show(panel, title):
    panel.controls.tabs.selected_index = TITLES.index(title)
    return panel.tabs.get(title)


def meters(trainer):
    return [listener for listener in trainer.listeners if isinstance(listener, UpdateMeter)]


# -- tabs -----------------------------------------------------------------------------------------------------------


def test_the_tabs_are_named_and_all_their_controls_too(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    assert tuple(panel.controls.tabs.titles) == TITLES
    for tab in panel.tabs.values():
        for name, widget in vars(tab).items():
            if isinstance(widget, ipywidgets.ValueWidget | ipywidgets.Button):
                assert widget.tooltip and (isinstance(widget, ipywidgets.HTML) or widget.description), name


@in_loop
async def test_nothing_is_computed_while_the_tabs_are_closed(make_trainer, panel_of, monkeypatch):
    trainer, done = make_trainer(iters=100_000), []
    for name in ("spikes", "token_losses", "survival_html", "view_of"):
        monkeypatch.setattr(module, name, lambda *_, name=name: done.append(name))
    panel = panel_of(trainer)
    panel.start()
    await until(lambda: trainer.step_count > 15)
    assert not done and not trainer.optimizers.observers
    show(panel, "Samples")
    await until(lambda: trainer.step_count > 30)
    assert not done and not trainer.optimizers.observers


@in_loop
async def test_an_open_tab_is_renewed_between_steps_and_seldom(make_trainer, panel_of, monkeypatch):
    trainer, renewed, in_step = make_trainer(iters=100_000), [], []
    step = trainer.step

    def watched():
        in_step.append(1)
        try:
            return step()
        finally:
            in_step.clear()

    monkeypatch.setattr(trainer, "step", watched)
    renew = UpdatesTab.renew
    monkeypatch.setattr(UpdatesTab, "renew", lambda tab: (renewed.append(bool(in_step)), renew(tab)))
    monkeypatch.setattr(module, "MIN_SECONDS", 0.1)
    panel = panel_of(trainer)
    show(panel, "Updates")
    panel.start()
    started = asyncio.get_running_loop().time()
    await until(lambda: len(renewed) >= 5)
    assert asyncio.get_running_loop().time() - started > 0.3 and not any(renewed)
    shown = panel.tabs["Updates"].page.value
    panel.pause()
    await settled(panel)
    await until(lambda: f"Step {meters(trainer)[0].steps[-1]:,}:" in panel.tabs["Updates"].page.value)
    assert "updates survive rounding" in shown


@in_loop
async def test_an_error_of_a_tab_is_shown_and_the_run_goes_on(make_trainer, panel_of, monkeypatch):
    def fail(*_):
        raise ValueError("a tab's own")

    trainer = make_trainer(iters=100_000)
    panel = panel_of(trainer)
    panel.start()
    show(panel, "Updates")
    await until(lambda: trainer.step_count > 3)
    monkeypatch.setattr(module, "survival_html", fail)
    await until(lambda: "a tab's own" in panel.controls.error.value.replace("&#x27;", "'"))
    assert panel.loop.running


@in_loop
async def test_closing_a_panel_with_an_open_tab_leaves_nothing(make_trainer):
    before = len(ipywidgets.Widget.get_manager_state()["state"])
    trainer = make_trainer(iters=100_000)
    panels = [ft.TrainPanel(trainer), ft.TrainPanel(trainer)]
    for panel in panels:
        show(panel, "Updates").always.value = True
    panels[0].start()
    await until(lambda: trainer.step_count > 3)
    panels[0].close()
    assert len(meters(trainer)) == 1
    panels[1].close()
    await panels[1].loop.wait()
    assert trainer.listeners == [panels[1].loop] and not trainer.optimizers.observers
    assert len(ipywidgets.Widget.get_manager_state()["state"]) == before


def test_a_panel_with_an_open_tab_that_is_dropped_does_not_keep_its_trainer(make_trainer):
    panel = ft.TrainPanel(make_trainer())
    for title in panel.tabs:
        show(panel, title)
    trainer = weakref.ref(panel.trainer)
    panel.step()
    del panel
    gc.collect()
    assert trainer() is None


# -- updates --------------------------------------------------------------------------------------------------------


def test_updates_are_measured_while_the_tab_is_open(make_trainer, panel_of):
    panel = panel_of(make_trainer(iters=30))
    tab = show(panel, "Updates")
    assert "nothing measured yet" in tab.page.value and "the next one is step 1 of 30" in tab.page.value
    panel.step(12)
    assert "Step 11:" in tab.page.value and "2 steps measured" in tab.page.value and "layers.0" in tab.page.value
    assert "the next one is step 21" in tab.page.value
    show(panel, "Log")
    panel.step(10)
    show(panel, "Updates")
    assert "2 steps measured" in tab.page.value
    tab.always.value = True
    show(panel, "Log")
    assert meters(panel.trainer)
    tab.every.value = 2
    panel.step(4)
    show(panel, "Updates")
    assert "4 steps measured" in tab.page.value  # 23 and 25


@pytest.mark.parametrize("picture", ["update_ratio", "gradient_norm", "weight_norm"])
def test_the_picture_can_be_of_any_number(make_trainer, panel_of, picture):
    panel = panel_of(make_trainer())
    tab = show(panel, "Updates")
    tab.every.value = 1
    panel.step(3)
    survival = tab.page.value
    tab.picture.value = picture
    label = {"update_ratio": "Update / weight", "gradient_norm": "Gradient norm", "weight_norm": "Weight norm"}[picture]
    assert f"{label}, by block and step 1 to 3: faint is" in tab.page.value and tab.page.value != survival
    assert tab.page.value.count("<rect") == survival.count("<rect") > 9


def test_where_rounding_eats_the_updates_the_switch_is_named(make_trainer, panel_of):
    panel = panel_of(make_trainer(weights="bfloat16", rounding="nearest", learning_rate=1e-6))
    tab = show(panel, "Updates")
    assert 'role="alert"' not in tab.page.value
    panel.step()
    assert 'role="alert"' in tab.page.value and "TrainConfig(rounding=&quot;stochastic&quot;)" in tab.page.value
    kept = panel_of(make_trainer(weights="bfloat16", rounding="stochastic", learning_rate=1e-6))
    tab = show(kept, "Updates")
    kept.step()
    assert 'role="alert"' not in tab.page.value and "Step 1:" in tab.page.value


def test_a_meter_attached_in_code_is_shown_in_place_of_the_panels_own(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    tab = show(panel, "Updates")
    meter = UpdateMeter(every=3).attach(panel.trainer)
    panel.step(4)
    assert len(meters(panel.trainer)) == 1 and "attached in code" in tab.page.value and "Step 4:" in tab.page.value
    assert tab.every.disabled and tab.every.value == 3
    meter.detach()
    panel.step()
    assert len(meters(panel.trainer)) == 1 and not tab.every.disabled


def test_two_panels_share_a_meter_and_its_settings(make_trainer, panel_of):
    trainer = make_trainer()
    one, two = panel_of(trainer), panel_of(trainer)
    show(one, "Updates").every.value = 1
    other = show(two, "Updates")
    one.step(2)
    assert len(meters(trainer)) == 1 and other.every.value == 1
    assert other.page.value == one.tabs["Updates"].page.value
    show(one, "Log")
    assert meters(trainer)
    show(two, "Log")
    assert not meters(trainer)


@in_loop
async def test_measuring_does_not_change_the_run(make_trainer, panel_of):
    straight = make_trainer()
    straight.run()
    panel = panel_of(make_trainer())
    show(panel, "Updates").every.value = 1
    panel.start()
    await panel.wait()
    assert [r.loss for r in panel.trainer.history.steps] == [r.loss for r in straight.history.steps]


# -- batches --------------------------------------------------------------------------------------------------------


def test_a_step_shows_its_rows_and_a_press_their_losses(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    panel.step(3)
    tab = show(panel, "Batch")
    assert "Step 3 (its loss was" in tab.page.value and 'class="trained"' in tab.page.value
    tab.step.value = 2
    tab.rows.click()
    rows = panel.trainer.batch_at(2)
    loss = panel.trainer.history.steps[1].loss
    assert all(row.source in tab.page.value for row in rows) and f"Step 2 (its loss was {loss:.4f})" in tab.page.value
    tab.losses.click()
    expected = ft.token_losses(panel.trainer.lm, rows)
    assert f"losses by the weights after step 3: {expected.loss:.4f}" in tab.page.value
    listed = [float(number) for number in re.findall(r">([\d.]+)</td>", tab.page.value) if len(number.partition(".")[2]) == 4]
    assert listed == sorted((round(row.loss, 4) for row in expected.rows), reverse=True)
    tab.step.value = 8
    tab.rows.click()
    assert "Step 8 (to come)" in tab.page.value


def report(step, loss):
    return ft.StepReport(step, 0.0, loss, 1, 1e-3, 1.0, 0.1, 1.0, 1, 1, 1)


def test_the_steps_that_stand_out_are_those_above_their_neighbours():
    falling = [report(step, 5.0 - step / 100) for step in range(1, 401)]
    falling[199] = report(200, 4.0)  # 1.0 above, and still below the first ones
    falling[299] = report(300, 2.5)
    assert [step for step, *_ in spikes(falling)[:2]] == [200, 300]
    assert len(spikes(falling)) == 10 and spikes([]) == [] and spikes([report(1, 2.0)]) == []
    assert spikes([report(1, float("nan")), report(2, 1.0)]) == []


def test_choosing_a_step_that_stands_out_shows_its_rows(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    panel.step(8)
    tab = show(panel, "Batch")
    label, step = tab.spikes.options[1]
    tab.spikes.value = step
    assert tab.step.value == step and f"Step {step} (its loss was" in tab.page.value and label.startswith(f"step {step}: loss")


def test_rows_without_room_are_counted(make_trainer, panel_of, monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 1)
    monkeypatch.setattr(module, "LISTED", 2)
    panel = panel_of(make_trainer(batch_size=4))
    tab = show(panel, "Batch")
    for press in (tab.rows, tab.losses):
        press.click()
        assert "3 more rows, not drawn" in tab.page.value and "2 more rows, not listed" in tab.page.value


@in_loop
async def test_losses_pressed_while_a_run_goes_on_come_between_steps_and_do_not_change_it(make_trainer, panel_of):
    straight = make_trainer(iters=60)
    straight.run()
    panel = panel_of(make_trainer(iters=60))
    tab = show(panel, "Batch")
    panel.start()
    await until(lambda: panel.trainer.step_count > 2)
    tab.losses.click()
    await until(lambda: "losses by the weights after step" in tab.page.value)
    await panel.wait()
    assert [r.loss for r in panel.trainer.history.steps] == [r.loss for r in straight.history.steps]


# -- callbacks --------------------------------------------------------------------------------------------------------


def test_attached_callbacks_are_shown_and_renewed(make_trainer, panel_of):
    panel = panel_of(make_trainer(steps_per_eval=4))
    tab = show(panel, "Callbacks")
    assert "insight.Forgetting(" in tab.page.value
    forgetting = Forgetting(["the quick"], "lazy dogs and foxes", max_tokens=3).attach(panel.trainer)
    score = GenerationScore(panel.trainer.data.valid[:2], max_tokens=3).attach(panel.trainer)
    panel.step(4)
    assert forgetting.steps == [0, 4] and [r.step for r in score.reports] == [0, 4]
    for text in ("step 0", "step 4", "perplexity on general text", "Answers while training"):
        assert text in tab.page.value
    forgetting.detach()
    score.detach()
    panel.step(4)
    assert "insight.Forgetting(" in tab.page.value and forgetting.steps == [0, 4]


def test_a_callback_that_cannot_be_shown_says_so(make_trainer, panel_of):
    class Broken:
        def _repr_html_(self):
            raise ValueError(HOSTILE)

    panel = panel_of(make_trainer())
    panel.trainer.listeners.append(Broken())
    tab = show(panel, "Callbacks")
    assert "Broken cannot be shown: ValueError" in tab.page.value and "<img" not in tab.page.value


@in_loop
async def test_another_tab_leaves_an_error_in_place(make_trainer, panel_of):
    panel = panel_of(make_trainer())
    panel.controls.learning_rate.value = -1.0
    await until(lambda: "larger than 0" in panel.controls.error.value)
    for title in ("Updates", "Batch", "Log"):
        show(panel, title)
        await asyncio.sleep(0.01)
    assert "larger than 0" in panel.controls.error.value
