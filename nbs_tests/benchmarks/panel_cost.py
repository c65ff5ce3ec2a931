"""What the training panel costs: the time of a run with it beside one without, and what a picture takes.

    python nbs_tests/benchmarks/panel_cost.py                # 4 rounds of 300 steps of 50 ms, about two minutes
    python nbs_tests/benchmarks/panel_cost.py --steps 40 --rounds 1
    python nbs_tests/benchmarks/panel_cost.py --tab Updates  # with this tab open; what measuring costs a step: insight_cost.py

Steps are the trainer's own, of a tiny model, filled up with sleep to a fixed length, so that all that comes on top is seen: letting
the event loop go, buttons' messages, numbers, pictures. Both ways take turns; the one without a panel is `trainer.steps()` in a plain
loop. Run it on an idle machine. The targets: at most 5% of the time, a picture in at most 40 ms, and pictures at most 2% of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import fulltune_nb as ft
from fulltune_nb.panels.live_plot import LivePlot

os.environ["FULLTUNE_PROGRESS"] = "off"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nbs_tests.panels.kernels import SETUP

GROWTH = (1, 10, 30, 300, 3000, 20_000)


def make_trainer(steps: int, step_seconds: float) -> ft.Trainer:
    """A trainer whose steps take `step_seconds` each."""
    made: dict = {}
    exec(SETUP, made)
    trainer = made["make_trainer"](iters=steps)
    step = trainer.step

    def filled_up() -> ft.StepReport:
        started = time.perf_counter()
        report = step()
        while (left := step_seconds - (time.perf_counter() - started)) > 0:
            time.sleep(left)
        return report

    trainer.step = filled_up
    return trainer


def without_panel(steps: int, step_seconds: float) -> float:
    """Seconds of a run in a plain loop."""
    trainer = make_trainer(steps, step_seconds)
    started = time.perf_counter()
    for _ in trainer.steps():
        pass
    return time.perf_counter() - started


def with_panel(steps: int, step_seconds: float, tab: str = "Log") -> tuple[float, list[float]]:
    """Seconds of a run in the background, behind a panel, and of each picture drawn meanwhile."""
    pictures: list[float] = []
    draw = LivePlot.draw

    def timed(plot: LivePlot, history: ft.History) -> bytes:
        png = draw(plot, history)
        pictures.append(plot.seconds)
        return png

    async def run() -> float:
        panel = ft.TrainPanel(make_trainer(steps, step_seconds))
        panel.controls.tabs.selected_index = panel.controls.tabs.titles.index(tab)
        pictures.clear()
        started = time.perf_counter()
        panel.start()
        await panel.wait()
        seconds = time.perf_counter() - started
        panel.close()
        return seconds

    LivePlot.draw = timed
    try:
        return asyncio.run(run()), pictures
    finally:
        LivePlot.draw = draw


def picture_seconds() -> dict[int, dict[str, float]]:
    """For some lengths of a history: seconds of a picture whose curves alone are new, and of one that is new all over."""
    found = {}
    for n in GROWTH:
        history = ft.History()
        for step in range(1, n + 1):
            loss = 3 * math.exp(-step / 500) + 0.1 * math.sin(step * 7.0)
            history.append(ft.StepReport(step, step / 100, loss, 100, 1e-3, 1.0, 0.05, 2000.0, 52_000_000, 40_000_000, 10_000_000))
            if step % 100 == 0:
                history.append(ft.EvalReport("valid", step, loss + 0.1, math.exp(loss + 0.1), 100, 0.1))
        plot = LivePlot(24 * 10**9)
        plot.draw(history)
        curves, whole = [], []
        for _ in range(9):
            plot.draw(history)
            curves.append(plot.seconds)
        for _ in range(9):
            for part in plot._parts:
                part.stale = {"axes", "legend"}
            plot.draw(history)
            whole.append(plot.seconds)
        found[n] = {"curves": statistics.median(curves), "whole": statistics.median(whole), "bytes": len(plot.png)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--step-seconds", type=float, default=0.05)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--tab", default="Log", help="which tab is open")
    options = parser.parse_args()
    without_panel(5, options.step_seconds), with_panel(5, options.step_seconds, options.tab)  # what is loaded and compiled once
    plain, panel, pictures = [], [], []
    for _ in range(options.rounds):
        plain.append(without_panel(options.steps, options.step_seconds))
        seconds, drawn = with_panel(options.steps, options.step_seconds, options.tab)
        panel.append(seconds)
        pictures += drawn
    cost = statistics.median(panel) / statistics.median(plain) - 1
    share = sum(pictures) / sum(panel)
    print(f"{options.rounds} rounds of {options.steps} steps of {options.step_seconds * 1000:.0f} ms; medians")
    print(f"without panel {statistics.median(plain):.2f} s, with {statistics.median(panel):.2f} s: {cost:+.2%} (target: at most 5%)")
    print(f"{len(pictures)} pictures, {1000 * max(pictures):.0f} ms at most (target: 40), {share:.2%} of the time (target: at most 2%)")
    sizes = picture_seconds()
    for n, taken in sizes.items():
        print(f"{n:6,} steps: curves {1000 * taken['curves']:4.0f} ms, all {1000 * taken['whole']:4.0f} ms, {taken['bytes']:,} bytes")
    if options.json:
        figures = {"plain": plain, "panel": panel, "cost": cost, "pictures": pictures, "share": share, "sizes": sizes}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
