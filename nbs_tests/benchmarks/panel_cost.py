"""What the training panel costs: the time of a run with it beside one without, and what its chart takes.

    python nbs_tests/benchmarks/panel_cost.py                # 4 rounds of 300 steps of 50 ms, about two minutes
    python nbs_tests/benchmarks/panel_cost.py --steps 40 --rounds 1
    python nbs_tests/benchmarks/panel_cost.py --tab Updates  # with this tab open; what measuring costs a step: insight_cost.py

Steps are the trainer's own, of a tiny model, filled up with sleep to a fixed length, so that all that comes on top is seen: letting
the event loop go, buttons' messages, numbers, the chart. Both ways take turns; the one without a panel is `trainer.steps()` in a plain
loop. Run it on an idle machine. The targets: at most 1.5% of the time, and an update of the chart in less than 1 ms.
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
import time
from pathlib import Path

import fulltune_nb as ft
from fulltune_nb.chart import LossChart
from fulltune_nb.plots import loss_png

os.environ["FULLTUNE_PROGRESS"] = "off"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nbs_tests.panels.kernels import SETUP

GROWTH = (30, 3000, 20_000, 200_000)


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
    """Seconds of a run in the background, behind a panel, and of each update of its chart."""
    updates: list[float] = []
    update = LossChart.update

    def timed(chart: LossChart) -> None:
        started = time.perf_counter()
        update(chart)
        updates.append(time.perf_counter() - started)

    async def run() -> float:
        panel = ft.TrainPanel(make_trainer(steps, step_seconds))
        panel.controls.tabs.selected_index = panel.controls.tabs.titles.index(tab)
        started = time.perf_counter()
        panel.start()
        await panel.wait()
        seconds = time.perf_counter() - started
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--step-seconds", type=float, default=0.05)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--tab", default="Log", help="which tab is open")
    options = parser.parse_args()
    without_panel(5, options.step_seconds), with_panel(5, options.step_seconds, options.tab)  # what is loaded and compiled once
    plain, panel, updates = [], [], []
    for _ in range(options.rounds):
        plain.append(without_panel(options.steps, options.step_seconds))
        seconds, taken = with_panel(options.steps, options.step_seconds, options.tab)
        panel.append(seconds)
        updates += taken
    cost, share = statistics.median(panel) / statistics.median(plain) - 1, sum(updates) / sum(panel)
    print(f"{options.rounds} rounds of {options.steps} steps of {options.step_seconds * 1000:.0f} ms; medians")
    print(f"without panel {statistics.median(plain):.2f} s, with {statistics.median(panel):.2f} s: {cost:+.2%} (target: at most 1.5%)")
    print(f"{len(updates)} updates, {1000 * statistics.median(updates):.2f} ms each (target: 1), {share:.2%} of the time")
    sizes = update_seconds()
    for n, taken in sizes.items():
        words = f"made in {taken['made']:.3f} s, update {1000 * taken['update']:.2f} ms and {taken['bytes']:,.0f} bytes"
        print(f"{n:9,} steps: {words}, picture of the record {taken['picture']:.2f} s")
    if options.json:
        figures = {"plain": plain, "panel": panel, "cost": cost, "updates": updates, "share": share, "sizes": sizes}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
