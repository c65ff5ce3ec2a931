"""The training panel in notebooks that are executed with no front end, as by papermill and nbclient, and what they look like after."""

from __future__ import annotations

import nbformat
import pytest
from nbconvert import HTMLExporter
from papermill import execute_notebook
from papermill.exceptions import PapermillExecutionError

from nbs_tests.jupyterlab import write_notebook
from nbs_tests.panels.kernels import ROOT, SETUP

pytestmark = pytest.mark.long


def execute(folder, *cells):
    write_notebook(folder / "in.ipynb", [SETUP, *cells])
    execute_notebook(folder / "in.ipynb", folder / "out.ipynb", progress_bar=False, cwd=str(ROOT))


def test_a_cell_that_waits_gives_the_whole_run_and_the_executed_notebook_tells_of_it(tmp_path):
    result = tmp_path / "steps"
    make = "trainer = make_trainer(iters=12, steps_per_eval=6)\npanel = TrainPanel(trainer, prompts=['the quick'], sample_every=6)\npanel"
    write = f"import pathlib; pathlib.Path({str(result)!r}).write_text(str([trainer.step_count, trainer.done, panel.loop.running]))"
    execute(tmp_path, make, "panel.start(); await panel.wait()", write)
    assert result.read_text() == "[12, True, False]"
    notebook = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    bundles = [output.get("data", {}) for output in notebook.cells[2].outputs]
    assert any("image/png" in bundle for bundle in bundles)
    assert any("Done at step 12 of 12" in bundle.get("text/html", "") for bundle in bundles)
    for with_widgets in (True, False):  # papermill keeps the widgets' state; a notebook saved from JupyterLab has none
        if not with_widgets:
            notebook.metadata.pop("widgets", None)
        page, _ = HTMLExporter().from_notebook_node(notebook)
        assert "data:image/png;base64," in page and "Done at step 12 of 12" in page and "Samples, newest first" in page


def test_the_runs_own_error_ends_the_execution(tmp_path):
    spoil = "trainer = make_trainer(iters=12); panel = TrainPanel(trainer)\n"
    spoil += "trainer.lm.model.norm.weight = trainer.lm.model.norm.weight * float('nan')"
    with pytest.raises(PapermillExecutionError, match="NonFiniteError"):
        execute(tmp_path, spoil, "panel.start(); await panel.wait()", "print('went on')")
    notebook = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert not any("went on" in output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
