"""Executing a notebook: a kernel that cannot be started is tried again, and nothing else is."""

from __future__ import annotations

import nbformat
import papermill
import pytest

from fulltune_nb.experiments.execution import NotebookError, execute

DIED = RuntimeError("Kernel died before replying to kernel_info")


@pytest.fixture
def notebook(tmp_path):
    cells = [nbformat.v4.new_code_cell("n = 1", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("print(n + 1)")]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "given.ipynb")
    return tmp_path / "given.ipynb"


def failing(monkeypatch, *errors):
    """The next executions raise these before a kernel has answered; counted are all."""
    executions, left, run = [], list(errors), papermill.execute_notebook

    def instead(*given, **more):
        executions.append(given)
        if left:
            raise left.pop(0)
        return run(*given, **more)

    monkeypatch.setattr(papermill, "execute_notebook", instead)
    return executions


@pytest.mark.long
def test_a_kernel_that_died_before_it_answered_is_started_again(notebook, tmp_path, monkeypatch):
    executions = failing(monkeypatch, DIED, DIED)
    execute(notebook, tmp_path / "executed.ipynb", {"n": 41})
    assert len(executions) == 3
    assert nbformat.read(tmp_path / "executed.ipynb", as_version=4).cells[-1].outputs[0].text == "42\n"


def test_where_none_starts_the_error_says_so(notebook, tmp_path, monkeypatch):
    failing(monkeypatch, DIED, DIED, DIED)
    with pytest.raises(NotebookError, match="no kernel could be started, in 3 attempts: Kernel died"):
        execute(notebook, tmp_path / "executed.ipynb", {})


def test_another_error_is_raised_at_once(notebook, tmp_path, monkeypatch):
    executions = failing(monkeypatch, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        execute(notebook, tmp_path / "executed.ipynb", {})
    assert len(executions) == 1
