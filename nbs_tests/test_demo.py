"""The demo command: what it executes, writes and prints, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import fulltune_nb as ft
from fulltune_nb import demo


def notebook_of(path: Path, *sources: str) -> Path:
    """A notebook with a parameters cell and these code cells."""
    parameters = nbformat.v4.new_code_cell('out: str = ""\nresult: str = ""', metadata={"tags": ["parameters"]})
    cells = [parameters, *(nbformat.v4.new_code_cell(source) for source in sources)]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.mark.long
def test_the_demo_does_the_whole_job_and_says_what_came_of_it(tmp_path, monkeypatch, capsys):
    # A user's kernel of the same name that starts something else must not be taken.
    spec = tmp_path / "users" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "users"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("FULLTUNE_PROGRESS", raising=False)
    out = tmp_path / "out"
    assert demo.main(["--out", str(out), "--iters", "3", "--questions", "4", "--batch-size", "8"]) == 0
    printed = capsys.readouterr().out
    assert "step 3/3: done" in printed
    for part in ("test perplexity", " before, ", "exact match", "of 4 held-out questions", "trained tokens/s", "peak memory"):
        assert part in printed
    places = {line[:21].strip(): Path(line[21:]) for line in printed.splitlines() if line[21:].startswith(str(out))}
    assert set(places) == {"exported model", "executed notebook", "HTML copy"}
    assert ft.load_model(places["exported model"]).num_parameters > 1e6
    assert places["HTML copy"].read_text("utf-8").count('src="data:image/png') == 2
    assert nbformat.read(places["executed notebook"], 4).metadata.papermill.exception is None
    assert os.environ["MPLBACKEND"] == "agg" and "FULLTUNE_PROGRESS" not in os.environ


def test_a_cell_that_raises_ends_the_demo_with_its_traceback_and_leaves_the_notebook_to_look_at(tmp_path, capsys):
    notebook = notebook_of(tmp_path / "n.ipynb", "print('so far')", "raise ValueError('too hot')", "print('never')")
    assert demo.main(["--out", str(tmp_path / "out"), "--notebook", str(notebook)]) == 1
    out, err = capsys.readouterr()
    assert "so far" in out and "never" not in out
    assert "ValueError: too hot" in err and "quickstart.ipynb" in err
    assert "too hot" in (tmp_path / "out" / "quickstart.html").read_text("utf-8")


def test_the_kernel_is_this_python_and_knows_nothing_of_the_users_settings(tmp_path, capsys):
    code = "import os, sys; print(sys.executable, os.environ['IPYTHONDIR'], os.environ['JUPYTER_CONFIG_DIR'], os.environ.get('MPLBACKEND'))"
    demo.execute(notebook_of(tmp_path / "n.ipynb", code), tmp_path / "done.ipynb", {})
    executable, ipython, config, backend = capsys.readouterr().out.split()
    assert executable == sys.executable and "fulltune_nb-jupyter-" in ipython and "fulltune_nb-jupyter-" in config
    assert "inline" in backend
    assert not Path(ipython).exists()


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert demo.main(["--out", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_out_each_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("demo_output", "demo_output-2", "demo_output-3"):
        folder = demo.out_folder(None)
        assert folder == tmp_path / expected
        (folder / "something").touch()


def test_a_missing_notebook_is_said_with_what_to_do(tmp_path, monkeypatch, capsys):
    assert demo.main(["--out", str(tmp_path / "out"), "--notebook", str(tmp_path / "none.ipynb")]) == 2
    assert "none.ipynb is no file" in capsys.readouterr().err
    monkeypatch.setattr(demo, "NOTEBOOK", "99_missing.ipynb")
    with pytest.raises(ft.ConfigError, match=r"99_missing.ipynb was not found in .*00_quickstart.ipynb"):
        demo.find_notebook(demo.NOTEBOOK)


def test_bad_flags_end_with_code_2():
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--iter", "3"])
    assert stopped.value.code == 2


def test_help_names_every_flag():
    result = subprocess.run([sys.executable, "-m", "fulltune_nb.demo", "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert all(flag in result.stdout for flag in ("--out", "--iters", "--model", "--data", "--no-mask-prompt", "--answer-after"))
