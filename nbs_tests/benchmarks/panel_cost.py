"""What the training panel costs: the time of a run with it beside one without, and what its chart takes.

    python nbs_tests/benchmarks/panel_cost.py                # 4 rounds of 300 steps of 50 ms, about two minutes
    python nbs_tests/benchmarks/panel_cost.py --steps 40 --rounds 1
    python nbs_tests/benchmarks/panel_cost.py --tab Updates  # with this tab open; what measuring costs: insight_cost.py
    python nbs_tests/benchmarks/panel_cost.py --page  # what a page takes to draw an update, in JupyterLab in Chromium

Steps are the trainer's own, of a tiny model, filled up with sleep to a fixed length, so that all that comes on top is seen: letting
the event loop go, buttons' messages, numbers, the chart. Both ways take turns; the one without a panel is `trainer.steps()` in a plain
loop. Run it on an idle machine. The targets: at most 1.5% of the time, and an update of the chart in less
than 1 ms, in the page in less than 16.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import fulltune_nb as ft
from fulltune_nb.chart import LossChart
from fulltune_nb.plots import loss_png

os.environ["FULLTUNE_PROGRESS"] = "off"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nbs_tests.jupyterlab import Lab, find_browser, served, write_notebook
from nbs_tests.panels.kernels import SETUP

GROWTH = (30, 20_000, 200_000, 1_000_000)
IN_PAGE = (20_000, 1_000_000)
HISTORY = """
import asyncio, dataclasses, math
import fulltune_nb as ft
one = ft.StepReport(1, 1.0, 3.0, 100, 1e-3, 1.0, 0.05, 2000.0, 52_000_000, 40_000_000, 10_000_000)
history = ft.History(dataclasses.replace(one, step=step, loss=3 + math.sin(step * 7.0)) for step in range(1, {steps} + 1))
chart = ft.LossChart(history)
chart
"""
UPDATES = """
for _ in range(50):
    await asyncio.sleep(0.1)
    history.extend(dataclasses.replace(one, step=len(history) + more) for more in (1, 2))
    chart.update()
"""
# The chart draws when the page is about to be shown anew, and uPlot after it, before the page goes on.
WATCH = """
window.drawn = [];
const usual = window.requestAnimationFrame.bind(window);
window.requestAnimationFrame = call => usual(now => {
    const started = performance.now();
    call(now);
    if (String(call).includes('store.waiting')) queueMicrotask(() => window.drawn.push(performance.now() - started));
});
"""


def make_trainer(steps: int, step_seconds: float) -> ft.Trainer:
    """A trainer whose steps take `step_seconds` each."""
    made: dict = {}
    exec(SETUP, made)
    trainer = made["make_trainer"](iters=steps)
    step = trainer.step

    def filled_up() -> ft.StepReport:
        started, of_processor = time.perf_counter(), time.process_time()
        trainer.between.append(started - trainer.ended)
        report = step()
        while (left := step_seconds - (time.perf_counter() - started)) > 0:
            time.sleep(left)
        trainer.in_steps += time.process_time() - of_processor
        trainer.ended = time.perf_counter()
        return report

    trainer.step, trainer.in_steps, trainer.between, trainer.ended = filled_up, 0.0, [], math.nan
    return trainer


def clocks(trainer: ft.Trainer) -> np.ndarray:
    """Seconds that have passed, seconds of the processor that this process had outside of steps, and the median between two steps."""
    between = statistics.median(trainer.between[1:]) if trainer.between[2:] else 0.0
    return np.array([time.perf_counter(), time.process_time() - trainer.in_steps, between])


def without_panel(steps: int, step_seconds: float) -> np.ndarray:
    """The three `clocks` of a run in a plain loop."""
    trainer = make_trainer(steps, step_seconds)
    started = clocks(trainer)
    for _ in trainer.steps():
        pass
    return clocks(trainer) - started


def with_panel(steps: int, step_seconds: float, tab: str = "Log") -> tuple[np.ndarray, list[float]]:
    """The three `clocks` of a run in the background, behind a panel, and the seconds of each update of its chart."""
    updates: list[float] = []
    update = LossChart.update

    def timed(chart: LossChart) -> None:
        started = time.perf_counter()
        update(chart)
        updates.append(time.perf_counter() - started)

    async def run() -> np.ndarray:
        trainer = make_trainer(steps, step_seconds)
        panel = ft.TrainPanel(trainer)
        panel.controls.tabs.selected_index = panel.controls.tabs.titles.index(tab)
        started = clocks(trainer)
        panel.start()
        await panel.wait()
        seconds = clocks(trainer) - started
        panel.close()
        return seconds

    LossChart.update = timed
    try:
        return asyncio.run(run()), updates
    finally:
        LossChart.update = update


def update_seconds() -> dict[int, dict[str, float]]:
    """For lengths of a history: seconds to make a chart, seconds and bytes of an update by five steps, seconds of a picture."""
    found = {}
    for n in GROWTH:
        history = ft.History()

        def grow(to: int, history: ft.History = history) -> None:
            for step in range(len(history.steps) + 1, to + 1):
                loss = 3 * math.exp(-step / 500) + 0.1 * math.sin(step * 7.0)
                history.append(ft.StepReport(step, step / 100, loss, 100, 1e-3, 1.0, 0.05, 2000.0, 52_000_000, 40_000_000, 10_000_000))

        grow(n)
        started = time.perf_counter()
        chart = LossChart(history)
        made = time.perf_counter() - started
        taken, sent = [], []
        chart.send = lambda content, buffers, sent=sent: sent.append(sum(map(len, buffers)))
        for _ in range(50):
            history.extend(dataclasses.replace(history[-1], step=history[-1].step + more) for more in range(1, 6))
            started = time.perf_counter()
            chart.update()
            taken.append(time.perf_counter() - started)
        started = time.perf_counter()
        loss_png([("", history)])
        picture = time.perf_counter() - started
        found[n] = {"made": made, "update": statistics.median(taken), "bytes": statistics.median(sent), "picture": picture}
    return found


def page_milliseconds(steps: int) -> list[float]:
    """What JupyterLab in Chromium takes to draw each update of the chart of a run of so many steps."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        write_notebook(Path(folder, "page.ipynb"), [HISTORY.format(steps=steps), UPDATES])
        with served("jupyterlab", Path(folder), {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}) as address:
            browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.add_init_script(WATCH)
            lab = Lab(page, address)
            lab.open("page.ipynb")
            lab.run_all()
            drawn = page.evaluate("() => window.drawn")
            lab.command("kernelmenu:shutdown")
            browser.close()
    return drawn[1:]  # without the first, which may make the chart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--step-seconds", type=float, default=0.05)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--tab", default="Log", help="which tab is open")
    parser.add_argument("--page", action="store_true", help="measure the page alone")
    options = parser.parse_args()
    if options.page:
        for steps in IN_PAGE:
            drawn = sorted(page_milliseconds(steps))
            spread = f"{drawn[len(drawn) // 20]:.1f} to {drawn[-1 - len(drawn) // 20]:.1f}"
            print(f"{steps:9,} steps: {len(drawn)} pictures of {statistics.median(drawn):.1f} ms, nine tenths {spread} (target: 16)")
        return
    without_panel(5, options.step_seconds), with_panel(5, options.step_seconds, options.tab)  # what is loaded and compiled once
    plain, panel, updates = [], [], []
    for _ in range(options.rounds):
        plain.append(without_panel(options.steps, options.step_seconds))
        seconds, taken = with_panel(options.steps, options.step_seconds, options.tab)
        panel.append(seconds)
        updates += taken
    (plain_time, plain_cpu, plain_between), (panel_time, panel_cpu, panel_between) = np.median(plain, 0), np.median(panel, 0)
    cost, cpu, share = panel_time / plain_time - 1, (panel_cpu - plain_cpu) / plain_time, sum(updates) / sum(taken[0] for taken in panel)
    rounds = [after[0] / before[0] - 1 for before, after in zip(plain, panel, strict=True)]
    print(f"{options.rounds} rounds of {options.steps} steps of {options.step_seconds * 1000:.0f} ms; medians")
    print(f"without panel {plain_time:.2f} s, with it {panel_time:.2f}: {cost:+.2%}, rounds {min(rounds):+.2%} to {max(rounds):+.2%}")
    print(f"processor outside of steps, little disturbed by others: {plain_cpu:.3f} s and {panel_cpu:.3f}: {cpu:+.2%} of the time")
    more = (panel_between - plain_between) / options.step_seconds
    between = f"{1000 * plain_between:.2f} ms and {1000 * panel_between:.2f}"
    print(f"between two steps, median: {between}: {more:+.2%} of a step, without updates")
    print(f"{len(updates)} updates, {1000 * statistics.median(updates):.2f} ms each (target: 1), {share:.2%} of the time")
    sizes = update_seconds()
    for n, taken in sizes.items():
        words = f"made in {taken['made']:.3f} s, update {1000 * taken['update']:.2f} ms and {taken['bytes']:,.0f} bytes"
        print(f"{n:9,} steps: {words}, picture of the record {taken['picture']:.2f} s")
    if options.json:
        both = {"plain": np.array(plain).tolist(), "panel": np.array(panel).tolist()}
        figures = {**both, "cost": cost, "cpu": cpu, "updates": updates, "share": share, "sizes": sizes}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
