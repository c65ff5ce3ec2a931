"""Whole runs in a real JupyterLab in a real browser: the quickstart, and a run of 20,000 reports; see `nbs_tests/test_browser.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from fulltune_nb import tiny
from nbs_tests.jupyterlab import write_notebook
from nbs_tests.panels.kernels import SETUP
from nbs_tests.test_browser import CODE, PANEL, WAITING, browser, button, folder, lab, server, shown_step, wait_for_text  # noqa: F401  fixtures among them

pytestmark = pytest.mark.long

# Steps that compute nothing, ten at a time, so that thousands come in seconds; loop, history, evaluations and panel are the real ones.
QUICK_STEPS = """
trainer = make_trainer(iters=20_000, steps_per_eval=100, val_batches=1)
def step():
    return [one() for _ in range(10)][-1]
def one():
    trainer.step_count += 1
    trainer.optimizers.step += 1
    loss = 3 / (1 + trainer.step_count / 500) + 0.1 * float(np.sin(trainer.step_count * 7))
    made = ft.StepReport(trainer.step_count, trainer.step_count / 5, loss, 100, 1e-3, 1.0, 0.001, 1e5, 52_000_000, 40_000_000, 9_000_000)
    trainer.record(made)
    if trainer.step_count % 50 == 0:
        trainer.event("note", "a line of the log, as long as such lines are " * 5)
    return made
trainer.step = step
panel = TrainPanel(trainer)
panel
"""


def test_run_all_of_the_quickstart(lab, folder, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    data.mkdir()
    for name, rows in tiny.text_to_sql(train=12, valid=8, test=8).items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    notebook = nbformat.read(Path(__file__).parents[2] / "notebooks/00_quickstart.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\ndata, out, iters, batch_size, questions, max_tokens = {str(data)!r}, {str(tmp_path / 'out')!r}, 4, 4, 4, 8"
    nbformat.write(notebook, folder / "00.ipynb")
    lab.open("00.ipynb")
    lab.run_all(seconds=180)
    for kind in ("error", "stderr"):
        assert lab.page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").count() == 0
    places = {cell.id: number for number, cell in enumerate(notebook.cells)}
    for cell in ("plot-loss", "plot-memory"):
        lab.run_cell(places[cell])  # only what is near the window is on the page
        lab.wait_until_idle()
        lab.output(places[cell]).locator("img").wait_for(timeout=20_000)
    assert json.loads((tmp_path / "out/result.json").read_text("utf-8"))["config"]["iters"] == 4
    lab.command("kernelmenu:shutdown")


def test_twenty_thousand_reports_leave_the_panel_responsive_and_the_file_small(lab, folder):  # noqa: F811
    path = folder / "long.ipynb"
    write_notebook(path, [SETUP, "0", QUICK_STEPS, "0", "0"])
    lab.open(path.name)
    lab.run_all()
    button(lab, "Run").click()
    wait_for_text(lab, r"step [2-9],\d+ of", seconds=240)
    button(lab, "Pause").click()
    wait_for_text(lab, "paused")
    assert 2000 < int(lab.result(CODE, "print(trainer.step_count)")) < 20_000
    lab.result(WAITING, "panel.start(); await panel.wait()", seconds=240)
    wait_for_text(lab, "done")
    assert int(lab.result(CODE, "print(len(trainer.history.steps))")) == 20_000
    button(lab, "Evaluate").click()
    lab.output(PANEL).get_by_text(re.compile("valid loss")).first.wait_for(timeout=10_000)
    lab.page.wait_for_timeout(1500)
    lab.save()
    lab.page.wait_for_timeout(1000)
    assert path.stat().st_size < 2_000_000
    saved = nbformat.read(path, as_version=4)
    assert any("image/png" in output.get("data", {}) for output in saved.cells[WAITING].outputs)
    print(f"the notebook's file: {path.stat().st_size:,} bytes")
    lab.command("kernelmenu:shutdown")


def test_a_page_loaded_anew_during_a_run_still_saves_how_it_ended(lab, folder):  # noqa: F811
    path = folder / "reloaded.ipynb"
    panel = "trainer = make_trainer(iters=3000)\npanel = TrainPanel(trainer)\npanel"
    write_notebook(path, [SETUP, "0", panel, "panel.start(); await panel.wait()"])
    lab.open(path.name)
    for number in (0, PANEL):
        lab.result(number, [SETUP, "", panel][number], seconds=60)
    lab.run_cell(CODE)
    wait_for_text(lab, "step [1-9][0-9]* of")
    lab.save()
    lab.page.wait_for_timeout(1000)
    record = saved_record(path)
    assert record.startswith("running: step") and re.search(r"Written at \d{4}-\d\d-\d\d .* may have gone on since", record)
    lab.open(path.name, kernel=False)
    wait_for_text(lab, "running")
    button(lab, "Pause").click()
    wait_for_text(lab, "paused")
    lab.output(CODE).locator("img[src^='data:image/png']").wait_for(timeout=20_000)
    lab.save()
    lab.page.wait_for_timeout(1000)
    assert saved_record(path).startswith(f"paused: step {shown_step(lab):,} of")
    lab.command("kernelmenu:shutdown")


def saved_record(path: Path) -> str:
    """The text of the last output of the cell that waits."""
    return nbformat.read(path, as_version=4).cells[CODE].outputs[-1]["data"]["text/plain"]
