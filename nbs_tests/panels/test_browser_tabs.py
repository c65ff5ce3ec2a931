"""The training panel by keyboard alone, and its tabs that look inside, in a real JupyterLab; see `nbs_tests/test_browser.py`."""

from __future__ import annotations

import re

import pytest

from nbs_tests.jupyterlab import write_notebook
from nbs_tests.panels.kernels import SETUP
from nbs_tests.test_browser import CODE, PANEL, browser, button, folder, lab, look, server, wait_for_text  # noqa: F401

pytestmark = pytest.mark.long

FOCUSED = """() => {
    const one = document.activeElement, style = getComputedStyle(one), text = one.innerText?.trim() || one.title;
    const name = one.labels?.[0]?.innerText || (one.tagName === 'SELECT' ? '' : text);
    return [name.split('\\n')[0].trim(), style.outlineStyle !== 'none' ? parseFloat(style.outlineWidth) : 0,
            Boolean(one.closest('.fulltune-panel'))];
}"""
PLOT = "Drag to zoom, double click back. Keys: arrows move, + and − zoom, Escape shows all."
BY_TAB = ["Run", "Step", "N", "Step N", "Stop", "split", "Evaluate", "Save", "peak learning rate"]
CHART_BY_TAB = ["Loss", "Learning rate", "Gradient norm", "Tokens/s", "Memory", "smoothing", "log", PLOT, "training", "Table", "Log"]
LOOKING = """
from fulltune_nb import insight
HOSTILE = "<img src=x onerror=alert(1)></pre><script>alert(2)</script>$$x$$"
trainer = make_trainer(weights="bfloat16", rounding="nearest", learning_rate=1e-4, steps_per_eval=5)
forgetting = insight.Forgetting(["the quick fox", HOSTILE], "Paris is a city.", max_tokens=12).attach(trainer)
panel = TrainPanel(trainer)
panel
"""


@pytest.fixture
def shown(lab, folder, request):  # noqa: F811
    """Opens a notebook with a panel, and ends its kernel."""

    def show(code: str):
        path = folder / f"{request.node.name}.ipynb"
        write_notebook(path, ["0", SETUP, code, "0", "0"])
        lab.open(path.name)
        lab.run_all()
        button(lab, "Run").wait_for()
        return lab

    yield show
    lab.command("kernelmenu:shutdown")


def test_the_keyboard_alone_runs_pauses_steps_and_changes_the_rate(shown):
    lab = shown("trainer = make_trainer(run_dir='keyboard')\npanel = TrainPanel(trainer)\npanel")  # noqa: F811
    keys = lab.page.keyboard

    def go(key: str, times: int) -> str:
        for _ in range(times):
            keys.press(key)
            name, outline, inside = lab.page.evaluate(FOCUSED)
            assert inside and outline >= 2, f"{name}: the focus cannot be seen"
            names.append(name)
        return names[-1]

    button(lab, "Run").focus()
    names = ["Run"]
    go("Tab", len(BY_TAB + CHART_BY_TAB) - 1)
    assert names == BY_TAB + CHART_BY_TAB
    assert go("Shift+Tab", len(BY_TAB + CHART_BY_TAB) - 1) == "Run"
    keys.press("Space")
    wait_for_text(lab, "running.*step [1-9]")  # the buttons follow the status a moment later
    assert go("Tab", 1) == "Pause"
    keys.press("Enter")
    wait_for_text(lab, "paused")
    taken = int(lab.result(CODE, "print(trainer.step_count)"))
    assert button(lab, "Pause").is_disabled() and button(lab, "Pause").get_attribute("title") == "Nothing is running"
    button(lab, "Run").focus()
    assert go("Tab", 1) == "Step"
    keys.press("Space")
    wait_for_text(lab, f"step {taken + 1:,} of")
    assert go("Tab", 1) == "N"
    keys.press("Control+a")
    keys.type("3")
    assert go("Tab", 1) == "Step N"
    keys.press("Enter")
    wait_for_text(lab, f"paused.*step {taken + 4:,} of")
    assert go("Tab", 5) == "peak learning rate"
    keys.press("Control+a")
    keys.type("0.0005")
    keys.press("Enter")
    lab.output(PANEL).get_by_text("to 0.0005").first.wait_for()
    while go("Tab", 1) != "Log":  # behind the chart, whose legend and events have grown
        assert len(names) < 100
    for title in ("Samples", "Updates", "Batch"):
        assert go("ArrowRight", 1) == title
    keys.press("Enter")
    lab.output(PANEL).get_by_text(re.compile(r"its loss was")).first.wait_for()
    assert go("Tab", 1) == "steps that stand out"
    assert lab.result(CODE, "print(trainer.learning_rate, trainer.step_count)") == f"0.0005 {taken + 4}"


def test_the_tabs_look_inside_while_the_run_goes_on(shown):
    lab = shown(LOOKING)  # noqa: F811
    panel = lab.output(PANEL)
    panel.get_by_role("tab", name="Updates").click()
    panel.get_by_text("nothing measured yet").wait_for()
    button(lab, "Run").click()
    panel.get_by_text(re.compile(r"Only [\d.]+% of the updates .* rounding=.stochastic")).wait_for()
    panel.locator("svg[role=img] rect").nth(20).wait_for()
    button(lab, "Pause").click()
    wait_for_text(lab, "paused")
    panel.get_by_text(re.compile(r"by block and step 1 to \d+")).wait_for()
    lab.page.wait_for_timeout(1500)  # the plot is drawn anew
    look(lab, "train-panel-updates")
    panel.get_by_role("tab", name="Batch").click()
    panel.get_by_text("its loss was").first.wait_for()
    panel.get_by_label("steps that stand out").select_option(index=1)
    button(lab, "Token losses").click()
    panel.get_by_text("losses by the weights after step").first.wait_for()
    look(lab, "train-panel-batch")
    panel.get_by_role("tab", name="Callbacks").click()
    panel.get_by_text("perplexity on general text").wait_for()
    assert "<img src=x onerror=" in panel.inner_text()
    assert panel.locator("script, iframe, img[src='x'], mjx-container, .jupyter-widgets-error-widget").count() == 0
    look(lab, "train-panel-callbacks")
    lab.page.evaluate("() => { window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart(); }")
    gone = lab.page.locator(".fulltune-panel.jupyter-widgets-disconnected")
    gone.wait_for()
    said = gone.aria_snapshot().splitlines()  # what a screen reader is given
    assert "Run the cell again" in said[0], said[:3]
