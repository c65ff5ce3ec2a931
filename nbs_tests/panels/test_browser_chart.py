"""The chart in a real JupyterLab in a real browser; see `nbs_tests/test_browser.py`."""

from __future__ import annotations

import re

import pytest

from nbs_tests.jupyterlab import write_notebook
from nbs_tests.test_browser import FOREIGN, browser, folder, lab, server  # noqa: F401

pytestmark = pytest.mark.long
SETUP = """
import fulltune_nb as ft
from fulltune_nb.training.history import EvalReport, Event, History, StepReport
HOSTILE = "<img src=x onerror=alert(1)></pre><script>alert(2)</script>$$x$$"
def report(step, n): return StepReport(step, 1.0, 1 + 3 * (step * 7919 % n) / n, 100, 1e-3, 2.0, 0.1, 1000.0, 300, 200, 100)
def made(n):
    steps = [report(step, n) for step in range(1, n + 1)]
    return History([*steps, EvalReport("valid", n // 2, 1.25, 3.5, 9, 0.1), Event(2, "kind", HOSTILE, 0.0)])
history = made(600)
"""
CHART, CODE = 1, 2


def hovered(lab, share: float) -> tuple[int, float]:  # noqa: F811
    """Step and training loss that stand there when the cursor is at a share of the width."""
    box = lab.output(CHART).locator(".u-over").bounding_box()
    lab.page.mouse.move(box["x"] + share * box["width"], box["y"] + 50)
    text = lab.output(CHART).locator(".ft-legend").inner_text().replace("\n", " ").replace(",", "")
    return int(re.search(r"step (\d+)", text).group(1)), float(re.search(r"training\s*([\d.]+)", text).group(1))


def drawn(lab) -> list[int]:  # noqa: F811
    """Red, green and blue of the canvas' most frequent colour that is seen, and how many of its pixels are seen."""
    return lab.output(CHART).locator("canvas").evaluate(
        """canvas => {
            const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, sum = [0, 0, 0, 0];
            for (let i = 0; i < all.length; i += 4) if (all[i + 3] > 200) { for (let j = 0; j < 3; j++) sum[j] += all[i + j]; sum[3]++; }
            return [...sum.slice(0, 3).map(value => Math.round(value / sum[3])), sum[3]];
        }"""
    )


def test_the_chart_shows_the_historys_values_and_answers_to_the_hand(lab, folder):  # noqa: F811
    write_notebook(folder / "chart.ipynb", [SETUP, "ft.LossChart({HOSTILE: history, 'two': made(60)})", "0"])
    lab.open("chart.ipynb")
    lab.run_all()
    output = lab.output(CHART)
    output.locator("canvas").wait_for()
    assert "<img src=x onerror" in output.inner_text() and output.locator(FOREIGN).count() == 0
    output.locator(".ft-events summary").click()
    output.locator(".ft-events li").nth(1).wait_for()
    assert output.locator(".ft-events li").count() == 2 and output.locator(FOREIGN).count() == 0

    assert lab.result(CODE, "history = made(20_000); print('ok')") == "ok"
    lab.set_source(CHART, "chart = ft.LossChart(history); chart")
    lab.run_cell(CHART)
    lab.wait_until_idle()
    output.get_by_text("last step 20,000").wait_for()
    values = {}
    for share in (0.11, 0.5, 0.93):
        step, loss = hovered(lab, share)
        values[step] = loss
        assert abs(step - 20_000 * share) < 200
    assert lab.result(CODE, f"print(all(f'{{history.steps[s - 1].loss:.4f}}' == f'{{v:.4f}}' for s, v in {values!r}.items()))") == "True"

    box = output.locator(".u-over").bounding_box()
    lab.page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 50)
    lab.page.mouse.down()
    lab.page.mouse.move(box["x"] + 0.51 * box["width"], box["y"] + 60, steps=4)
    lab.page.mouse.up()
    back = output.get_by_role("button", name="Whole run")
    back.wait_for()
    lab.page.wait_for_timeout(500)  # every step of the part has come
    seen = {hovered(lab, share / 100)[0] for share in range(40, 60)}
    assert len(seen) == 20 and 10_000 < min(seen) <= max(seen) < 10_200
    output.locator(".u-over").dblclick()
    back.wait_for(state="hidden")

    lab.result(CODE, "history.append(report(20_001, 20_000)); chart.update()")
    lab.page.mouse.move(5, 5)
    output.get_by_text("last step 20,001").wait_for()
    output.get_by_label("log").check()
    output.get_by_label(re.compile("smoothing")).fill("10")
    output.get_by_text("training, mean").wait_for()
    output.get_by_role("button", name="Learning rate").click()
    assert "0.0010" in output.locator(".ft-legend").inner_text()
    plot = output.get_by_role("img", name=re.compile("Learning rate over optimizer steps 1 to 20,001"))
    plot.focus()
    lab.page.keyboard.press("ArrowLeft")
    assert "step" in output.locator("[aria-live]").inner_text()
    output.locator(".ft-table summary").click()
    output.locator(".ft-table tbody tr").first.wait_for()
    assert 10 < output.locator(".ft-table tbody tr").count() <= 61

    light = drawn(lab)
    lab.theme("JupyterLab Dark")
    lab.page.wait_for_timeout(300)
    dark = drawn(lab)
    assert sum(dark[:3]) > sum(light[:3]) + 100 and dark[3] > 1000  # the ink is light now
    lab.theme("JupyterLab Light")
    output.locator(".ft-chart").evaluate("chart => { chart.style.width = '360px'; }")
    lab.page.wait_for_timeout(300)
    assert output.locator(".ft-chart").evaluate("chart => chart.scrollWidth") <= 360
    assert output.locator(".ft-plot canvas").evaluate("canvas => canvas.clientWidth") <= 360
    lab.command("kernelmenu:shutdown")
