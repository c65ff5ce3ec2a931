"""Whole runs in a real JupyterLab in a real browser: the quickstart, and a run of 20,000 reports; see `nbs_tests/test_browser.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from fulltune_nb import tiny
from nbs_tests.jupyterlab import Lab, write_notebook
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


@pytest.mark.ci
@pytest.mark.parametrize("saved_before", [True, False])
def test_a_page_loaded_anew_while_paused_saves_where_the_run_stands(lab, folder, saved_before):  # noqa: F811
    path = begin_run(lab, folder, f"paused-{saved_before}.ipynb")
    button(lab, "Pause").click()
    wait_for_text(lab, "paused")
    step = shown_step(lab)
    if saved_before:
        save(lab)
    lab.open(path.name, kernel=False)
    wait_for_text(lab, "paused") if saved_before else lab.output(PANEL).locator("img[src^='data:image/png']").wait_for(timeout=20_000)
    save(lab)
    assert saved_record(path, PANEL).startswith(f"paused: step {step:,} of")
    lab.command("kernelmenu:shutdown")


@pytest.mark.ci
def test_a_notebook_opened_again_after_a_night_saves_how_the_run_ended(lab, folder):  # noqa: F811
    path = begin_run(lab, folder, "overnight.ipynb", iters=300)
    save(lab)
    assert saved_record(path, PANEL).startswith("running: step")
    lab.page.goto("about:blank")
    result = folder / "runs/overnight.ipynb/result.json"
    for _ in range(600):
        if result.exists() and json.loads(result.read_text("utf-8"))["steps"] == 300:
            break
        lab.page.wait_for_timeout(100)
    lab.page.wait_for_timeout(2000)
    lab.open(path.name, kernel=False)
    wait_for_text(lab, "done")
    lab.output(PANEL).locator("img[src^='data:image/png']").wait_for(state="attached", timeout=20_000)
    save(lab)
    assert saved_record(path, PANEL).startswith("done: step 300 of 300")
    lab.command("kernelmenu:shutdown")


@pytest.mark.ci
def test_two_tabs_save_the_same_true_record(lab, browser, server, folder):  # noqa: F811
    path = begin_run(lab, folder, "tabs.ipynb")
    save(lab)
    page = browser.new_page(viewport={"width": 1280, "height": 1800})
    second = Lab(page, server)
    second.open(path.name, kernel=False)
    wait_for_text(second, "running")
    button(lab, "Pause").click()
    for tab in (lab, second):
        wait_for_text(tab, "paused")
        tab.page.wait_for_timeout(1500)
    step = shown_step(second)
    for tab in (second, lab):
        save(tab)  # the other one's was saved before: JupyterLab asks which shall stand
        assert saved_record(path, PANEL).startswith(f"paused: step {step:,} of")
    page.close()
    lab.command("kernelmenu:shutdown")


@pytest.mark.ci
def test_a_cell_that_is_run_again_keeps_the_record_of_its_new_run_alone(lab, folder):  # noqa: F811
    path = begin_run(lab, folder, "again.ipynb")
    button(lab, "Pause").click()
    wait_for_text(lab, "paused")
    lab.result(PANEL, PANEL_OF.format(name="again-2", iters=20), seconds=60)
    button(lab, "Run").click()
    wait_for_text(lab, "done")
    lab.page.wait_for_timeout(1500)
    save(lab)
    lines = [output["data"].get("text/plain", "") for output in nbformat.read(path, as_version=4).cells[PANEL].outputs if "data" in output]
    assert saved_record(path, PANEL).startswith("done: step 20 of 20") and not any("paused" in line for line in lines)
    lab.command("kernelmenu:shutdown")


def test_after_a_restart_of_the_kernel_the_record_says_when_it_was_written(lab, folder):  # noqa: F811
    path = begin_run(lab, folder, "restarted.ipynb")
    lab.page.evaluate("() => { window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart(); }")
    lab.page.wait_for_timeout(3000)
    assert lab.result(CODE, "print('trainer' in globals())", seconds=60) == "False"
    save(lab)
    assert re.search(r"^(running|ready).* Written at \d{4}-\d\d-\d\d .* may have gone on since", saved_record(path, PANEL))
    lab.command("kernelmenu:shutdown")


PANEL_OF = "trainer = make_trainer(iters={iters}, run_dir='runs/{name}')\npanel = TrainPanel(trainer)\npanel"


def begin_run(lab: Lab, folder: Path, name: str, iters: int = 3000) -> Path:  # noqa: F811
    """A notebook whose panel was started by its button; it is at a later step than the first."""
    write_notebook(folder / name, [SETUP, "0", PANEL_OF.format(name=name, iters=iters), "0"])
    lab.open(name)
    lab.result(0, SETUP, seconds=60)
    lab.result(PANEL, PANEL_OF.format(name=name, iters=iters), seconds=60)
    button(lab, "Run").click()
    wait_for_text(lab, "step [1-9][0-9]* of")
    return folder / name


def save(lab: Lab) -> None:  # noqa: F811
    """Saves, when the page has heard what the kernel tells of a record."""
    lab.page.wait_for_timeout(2500)
    lab.save()
    lab.page.wait_for_timeout(1000)


def saved_record(path: Path, cell: int = CODE) -> str:
    """The text of the last output of a cell, by default the one that waits."""
    return nbformat.read(path, as_version=4).cells[cell].outputs[-1]["data"]["text/plain"]
