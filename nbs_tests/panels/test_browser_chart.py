"""The chart in a real browser, in JupyterLab, Notebook 7, Voila and marimo; see `nbs_tests/test_browser.py`."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbs_tests.jupyterlab import FRONT_ENDS, Lab, axe_core, needs_front_end, served, write_notebook
from nbs_tests.panels import kernels
from nbs_tests.test_browser import FINDINGS, FOREIGN, browser, folder, lab, server  # noqa: F401

pytestmark = pytest.mark.long
SETUP = """
import fulltune_nb as ft
from fulltune_nb.training.history import EvalReport, Event, History, StepReport
HOSTILE = "<img src=x onerror=alert(1)></pre><script>alert(2)</script>$$x$$"
def report(step, n): return StepReport(step, 1.0, 1 + 3 * (step * 7919 % n) / n, 100, 1e-3, 2.0, 0.1, 1000.0, 300, 200, 100)
def made(n):
    steps = [report(step, n) for step in range(1, n + 1)]
    return History([*steps, EvalReport("valid", n // 2, 1.25, 3.5, 9, 0.1), Event(2, "kind", HOSTILE, 0.0)])
history = made(20_000)
"""


ELSEWHERE = [SETUP, "chart = ft.LossChart(history)\nchart", """
import asyncio
async def go_on():
    for step in range(20_001, 20_006):
        await asyncio.sleep(0.5)
        history.append(report(step, 20_000))
        chart.update()
going_on = asyncio.ensure_future(go_on())
"""]
PANEL = [kernels.SETUP, "panel = TrainPanel(make_trainer())\npanel"]  # of ipywidgets, which marimo does not have


def hovered(chart, share: float) -> tuple[int, float]:
    """Step and training loss that stand there when the cursor is at a share of the width."""
    box = chart.locator(".u-over").bounding_box()
    chart.page.mouse.move(box["x"] + share * box["width"], box["y"] + 50)
    text = chart.locator(".ft-legend").inner_text().replace("\n", " ").replace(",", "")
    return int(re.search(r"step (\d+)", text).group(1)), float(re.search(r"training\s*([\d.]+)", text).group(1))


def zoom(chart, low: float, high: float) -> None:
    """Drags over a share of the width."""
    box, mouse = chart.locator(".u-over").bounding_box(), chart.page.mouse
    mouse.move(box["x"] + low * box["width"], box["y"] + 50)
    mouse.down()
    mouse.move(box["x"] + high * box["width"], box["y"] + 60, steps=4)
    mouse.up()
    chart.get_by_role("button", name="Whole run").wait_for()


def ink(chart) -> tuple[int, int]:
    """How light the canvas' drawn pixels are, 0 to 765, and how many there are."""
    return chart.locator("canvas").evaluate(
        """canvas => {
            const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            let light = 0, count = 0;
            for (let i = 0; i < all.length; i += 4) if (all[i + 3] > 200) { light += all[i] + all[i + 1] + all[i + 2]; count++; }
            return [Math.round(light / count), count];
        }"""
    )


BLUE = """canvas => {
    const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let count = 0;
    for (let i = 0; i < all.length; i += 4) count += all[i] < 40 && Math.abs(all[i + 1] - 114) < 25 && all[i + 2] > 150 && all[i + 3] > 200;
    return count;
}"""  # the first run's colour


@contextmanager
def shown(front_end: str, browser, folder: Path, cells: list[str]):  # noqa: F811
    """The page of a front end that has run some cells, and how it is made dark; of two pixels a unit."""
    needs_front_end(front_end)
    write_notebook(folder / "chart.ipynb", cells)
    if front_end == "marimo":
        (folder / "pyproject.toml").write_text('[tool.marimo.display]\ntheme = "system"\n')
        convert = [sys.executable, "-m", "marimo", "-q", "convert", "chart.ipynb", "-o", "chart.py"]
        subprocess.run(convert, cwd=folder, check=True, timeout=120)
    with served(front_end, folder, {"PYTHONPATH": str(Path(__file__).parents[2])}) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 1000}, device_scale_factor=2)
        page.set_default_timeout(60_000)
        page.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())  # fonts and icons, which come from elsewhere
        lab = Lab(page, address)
        if front_end in ("jupyterlab", "notebook"):
            lab.open("chart.ipynb")
            lab.run_all()
            yield page, lambda: lab.theme("JupyterLab Dark")
            lab.command("kernelmenu:shutdown")
        else:
            page.goto(address.format("chart.ipynb"), wait_until="commit")
            dark = {"voila": lambda: page.goto(address.format("chart.ipynb") + "?theme=dark", wait_until="commit")}
            yield page, dark.get(front_end, lambda: page.emulate_media(color_scheme="dark"))
        page.close()


def runs_and_pauses(panel) -> None:
    """The panel's buttons are heard, its status and chart move, and the record is hidden while the panel is there."""
    status = panel.get_by_role("status").first
    panel.locator("button").filter(has_text=re.compile("^Run$")).click()
    status.filter(has_text="running").wait_for()
    panel.locator("button").filter(has_text=re.compile("^Pause$")).click()
    status.filter(has_text="paused").wait_for()
    panel.get_by_text(re.compile("last step [1-9]")).wait_for()
    records = panel.page.locator("[class^='fulltune-'][class$='-record']")
    assert records.count() == 2 and not any(record.is_visible() for record in records.all())  # the chart's and the panel's


OTHERS = [pytest.param(name, marks=pytest.mark.ci) for name in FRONT_ENDS if name != "jupyterlab"]


@pytest.mark.parametrize("front_end", ["jupyterlab", *OTHERS])
def test_chart_and_panel_in_every_front_end(front_end, browser, tmp_path):  # noqa: F811
    there: dict = {}
    exec(SETUP, there)
    cells = ELSEWHERE if front_end == "marimo" else ELSEWHERE + PANEL
    with shown(front_end, browser, tmp_path, cells) as (page, make_dark):
        chart = page.locator(".ft-chart").first
        chart.get_by_text("last step 20,005").wait_for()  # which came later than the chart
        for share in (0.11, 0.5, 0.93):
            step, loss = hovered(chart, share)
            assert abs(step - 20_000 * share) < 200 and f"{loss:.4f}" == f"{there['report'](step, 20_000).loss:.4f}"
        zoom(chart, 0.5, 0.51)
        page.wait_for_timeout(1000)  # every step of the part has come
        seen = {hovered(chart, share / 100)[0] for share in range(40, 60)}
        assert len(seen) == 20 and 10_000 < min(seen) <= max(seen) < 10_200
        chart.locator(".u-over").dblclick()
        chart.get_by_role("button", name="Whole run").wait_for(state="hidden")
        chart.get_by_label("log").check()
        assert abs(hovered(chart, 0.5)[0] - 10_000) < 200

        if front_end != "marimo":
            runs_and_pauses(page.locator(".fulltune-panel"))
        page.evaluate(axe_core())
        assert page.evaluate(FINDINGS) == []

        canvas = chart.locator("canvas")
        assert canvas.evaluate("canvas => canvas.width / canvas.clientWidth") == pytest.approx(2, abs=0.01)
        light = ink(chart)
        make_dark()
        page.wait_for_function("() => { window.waited = (window.waited ?? 0) + 1; return window.waited > 20; }", polling=50)
        canvas.wait_for()
        dark = ink(chart)
        assert dark[0] > light[0] + 100 and dark[1] > 1000  # the ink is light now
        chart.evaluate("chart => { chart.style.width = '360px'; }")
        page.wait_for_timeout(300)
        assert chart.evaluate("chart => chart.scrollWidth") <= 360 and canvas.evaluate("canvas => canvas.clientWidth") <= 360


def test_a_chart_that_was_out_of_the_page_when_the_theme_changed_has_its_colours(lab, folder):  # noqa: F811
    write_notebook(folder / "theme.ipynb", [SETUP, "ft.LossChart(history)"])
    lab.open("theme.ipynb")
    lab.run_all()
    chart = lab.page.locator(".ft-chart")
    chart.locator("canvas").wait_for()
    light = ink(chart)
    away = "() => { const one = document.querySelector('.ft-chart'); window.kept = [one, one.parentNode]; one.remove(); }"
    lab.page.evaluate(away)  # as a cell that is scrolled out of sight
    lab.theme("JupyterLab Dark")
    lab.page.evaluate("() => { const [one, place] = window.kept; place.append(one); }")
    lab.page.wait_for_timeout(500)
    assert ink(chart)[0] > light[0] + 100, "the ink is light now"
    lab.theme("JupyterLab Light")
    lab.command("kernelmenu:shutdown")


def test_hostile_names_and_events_stay_text_and_the_chart_answers_to_the_keyboard(lab, folder):  # noqa: F811
    write_notebook(folder / "chart.ipynb", [SETUP, "chart = ft.LossChart({HOSTILE: history, 'two': made(60)}); chart", "0"])
    lab.open("chart.ipynb")
    lab.run_all()
    chart = lab.page.locator(".ft-chart")
    chart.locator("canvas").wait_for()
    assert "<img src=x onerror" in chart.inner_text() and chart.locator(FOREIGN).count() == 0
    chart.locator(".ft-events summary").click()
    chart.locator(".ft-events li").nth(1).wait_for()
    assert chart.locator(".ft-events li").count() == 2 and chart.locator(FOREIGN).count() == 0

    chart.get_by_label(re.compile("smoothing")).fill("10")
    chart.get_by_text("two, mean").wait_for()
    chart.get_by_role("button", name="Learning rate").click()
    assert "0.0010" in chart.locator(".ft-legend").inner_text()
    chart.get_by_role("img", name=re.compile("Learning rate over optimizer steps 1 to 20,000")).focus()
    lab.page.keyboard.press("ArrowLeft")
    assert "step" in chart.locator("[aria-live]").inner_text()
    chart.locator(".ft-table summary").click()
    chart.locator(".ft-table tbody tr").first.wait_for()
    assert 10 < chart.locator(".ft-table tbody tr").count() <= 61

    for steps in ("report(1, 9)", "report(1, 9), StepReport(2, 1.0, float('nan'), 1, 1.0, 1.0, 0.1, 1.0, 3, 2, 1), report(3, 9)"):
        lab.result(1, f"ft.LossChart(History([{steps}]))")
        lab.page.wait_for_timeout(500)
        dots = chart.locator("canvas").evaluate(BLUE)
        assert 10 < dots < 300 * len(steps.split("report")), "a step without neighbours is a point"
    lab.command("kernelmenu:shutdown")
