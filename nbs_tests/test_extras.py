"""The package without its extras: the core does all its work, and what needs more names the command that installs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fulltune_nb as ft

NOTEBOOK = ("matplotlib", "PIL", "ipywidgets", "anywidget", "traitlets", "IPython", "ipykernel", "papermill", "nbclient", "nbformat")
NOTEBOOK += ("nbconvert", "jupyterlab")
OTHERS = ("pandas", "datasets", "tensorboard", "wandb", "trackio", "swanlab", "mlflow", "optuna", "ray", "lm_eval", "mlx_lm")
EXTRA = dict.fromkeys(NOTEBOOK, "notebook") | {package: package for package in OTHERS} | {"lm_eval": "eval", "mlx_lm": "mlx-lm"}
COMMAND = {package: f"pip install 'fulltune_nb[{extra}]'" for package, extra in EXTRA.items()}

BLOCK = """
import sys

for package in {packages!r}:
    sys.modules[package] = None  # it cannot be imported, and `find_spec` finds nothing, as if it were not installed

def told(what):
    try:
        what()
    except ft.errors.MissingDependencyError as error:
        return str(error)
    return "nothing was missing"

import fulltune_nb as ft
"""


def without(packages: tuple[str, ...], code: str, cwd: Path) -> str:
    """What a program prints in which these packages are not there."""
    program = BLOCK.format(packages=packages) + code
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


CORE = """
import contextlib, io
rows = [{"prompt": "Say a word.", "completion": "word " * n} for n in range(1, 9)]
lm = ft.load_model(ft.tiny.BASE_MODEL)
data = ft.load_data({"train": rows, "valid": rows}, lm.tokenizer, mask_prompt=True)
config = ft.TrainConfig(iters=3, batch_size=2, learning_rate=1e-4, steps_per_report=1, mask_prompt=True)
assert ft.preflight(lm, data, config).fits
trainer = ft.Trainer(lm, data, config, run_dir="run")
shown = io.StringIO()
with contextlib.redirect_stdout(shown):
    trainer.run()
assert "step 3/3: loss" in shown.getvalue(), shown.getvalue()
assert isinstance(lm.generate("Say", max_tokens=4), str)
lm.save("folder")
search = ft.find_lr(trainer, steps=10)
shows = [ft.compare(["run"]), search, trainer, data, data.train, data.train[0], lm, config, trainer.history, ft.system_info()]
shows += [ft.trace(lm, "a word"), ft.token_losses(lm, data.train[0]), ft.inspect(trainer, data.train[0])]
for value in shows:
    assert value._repr_html_() and repr(value), type(value)
assert "fulltune_nb[notebook]" in search._repr_html_()
print(told(search.plot), told(shows[0].chart), told(shows[0].plot), told(trainer.history.to_frame), sep="\\n")
"""


def test_the_core_loads_trains_answers_and_looks_inside_with_no_extra_installed(tmp_path):
    lines = without(NOTEBOOK + OTHERS, CORE, tmp_path).splitlines()
    assert [line.split("pip install")[1] for line in lines] == [" 'fulltune_nb[notebook]'."] * 3 + [" 'fulltune_nb[pandas]'."]
    assert (tmp_path / "folder" / "model.safetensors").is_file()


NEEDS = {
    "ChatPanel": ("anywidget", "ipywidgets", "traitlets", "IPython"),
    "DataPanel": ("anywidget", "ipywidgets", "traitlets", "IPython", "matplotlib", "PIL"),
    "LossChart": ("anywidget", "ipywidgets", "traitlets", "IPython", "matplotlib", "PIL"),
    "TrainPanel": ("anywidget", "ipywidgets", "traitlets", "IPython", "matplotlib", "PIL"),
    "plot_loss": ("matplotlib", "PIL"),
    "plot_memory": ("matplotlib", "PIL"),
}
EACH = """
for name in ft.__all__:
    said = told(lambda: getattr(ft, name))
    if said != "nothing was missing":
        print(name, said, sep="|")
"""


@pytest.mark.parametrize("package", ["matplotlib", "PIL", "ipywidgets", "anywidget", "traitlets", "IPython"])
def test_public_names_that_need_a_package_name_the_command_and_the_others_are_there(package, tmp_path):
    lines = [line.split("|") for line in without((package,), EACH, tmp_path).splitlines()]
    assert sorted(name for name, _ in lines) == sorted(name for name, packages in NEEDS.items() if package in packages)
    assert all(f"{package!r}, which is not installed: {COMMAND[package]}." in said for _, said in lines)


OTHERWISE = """
from pathlib import Path
from fulltune_nb.experiments import executors, loggers
from fulltune_nb.experiments.execution import execute, find_notebook
quickstart = find_notebook("00_quickstart.ipynb")
Path("train.parquet").write_bytes(b"")
lm = ft.load_model(ft.tiny.BASE_MODEL)
for what in (
    lambda: execute(quickstart, Path("executed.ipynb"), {}),
    lambda: ft.sweep(quickstart, grid={"seed": [0]}, out_dir="sweep"),
    lambda: ft.search(quickstart, {"seed": [0]}, "search", trials=1),
    lambda: executors.RayExecutor(),
    lambda: ft.load_data(".", lm.tokenizer), ft.History().to_frame,
    lambda: loggers.Tensorboard("logs"), lambda: loggers.Wandb("a"), lambda: loggers.Trackio("a"), lambda: loggers.SwanLab("a"),
    lambda: loggers.MLflow("a"),
    lambda: __import__("fulltune_nb.insight.harness"),
    lambda: lm.export("folder", to="mlx-4bit"),
):
    print(told(what))
"""


def test_notebooks_tables_and_loggers_name_the_command_too(tmp_path):
    lines = without(NOTEBOOK + OTHERS, OTHERWISE, tmp_path).splitlines()
    extras = ["notebook", "notebook", "optuna", "ray", "datasets", "pandas", "tensorboard", "wandb", "trackio", "swanlab", "mlflow"]
    extras += ["eval", "mlx-lm"]
    assert [line.split("not installed: ")[1] for line in lines] == [f"pip install 'fulltune_nb[{extra}]'." for extra in extras]


@pytest.mark.parametrize("command", [("demo",), ("sweep", "sweep.yaml")])
def test_a_command_whose_extra_is_missing_ends_with_one_line(command, tmp_path):
    (tmp_path / "sweep.yaml").write_text("notebook: 10_experiment.ipynb\nout_dir: out\ngrid: {seed: [0]}\n")
    module = "fulltune_nb.sweep.__main__" if command[0] == "sweep" else f"fulltune_nb.{command[0]}"
    work = f"import importlib; sys.exit(importlib.import_module({module!r}).main({list(command[1:])!r}))"
    program = BLOCK.format(packages=NOTEBOOK) + work
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.endswith(f"not installed: {COMMAND['papermill']}.\n")


KERNEL = """
import os, warnings
os.environ["IPYTHONDIR"] = "ipython"
from IPython.core.interactiveshell import InteractiveShell
from fulltune_nb import record
from fulltune_nb.insight.comparison import Comparison
record.in_kernel, record.current_cell = lambda: True, lambda: ("cell", "execution")
InteractiveShell.instance()
output = record.Record("", with_picture=False)
output.place("<p>0%</p>", "0%")
output.renew("<p>50%</p>", "50%", missing="More may have come since.")
with warnings.catch_warnings(record=True) as caught:
    try:
        Comparison([])._ipython_display_()
    except NotImplementedError:  # so that IPython shows the table
        print(caught[0].message)
"""


def test_in_a_kernel_without_widgets_progress_is_shown_and_a_comparison_is_its_table(tmp_path):
    without_widgets = tuple(package for package in NOTEBOOK if package not in ("IPython", "traitlets"))
    assert without(without_widgets, KERNEL, tmp_path).splitlines()[-1].endswith(f"not installed: {COMMAND['matplotlib']}.")


def test_mlx_without_a_backend_names_the_extras_that_bring_one():
    with pytest.raises(ft.errors.MissingDependencyError, match=r"fulltune_nb\[cpu\].*fulltune_nb\[cuda13\]"):
        with ft.errors.tells_missing_backend():
            raise ImportError("libmlx.so: cannot open shared object file: No such file or directory")


def test_a_package_that_is_there_but_broken_is_no_missing_one():
    with pytest.raises(ImportError) as caught, ft.errors.optional_import("A plot", "notebook"):
        raise ImportError("libfreetype.so.6: cannot open shared object file")
    assert not isinstance(caught.value, ft.FulltuneError)


def test_a_missing_package_keeps_python_s_error_as_its_cause():
    with pytest.raises(ft.errors.MissingDependencyError, match="A chart needs the package 'no_such_package'") as caught:
        with ft.errors.optional_import("A chart", "notebook"):
            import no_such_package.inner  # noqa: F401
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
