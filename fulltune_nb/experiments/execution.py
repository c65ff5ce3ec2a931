"""Executing a notebook with no front end, in a Jupyter of its own, by papermill.

As a program, `python -m fulltune_nb.experiments.execution FOLDER`, it is the process of one run of a sweep.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil

from fulltune_nb.errors import ConfigError, FulltuneError, TrainingError, nearest, optional_import
from fulltune_nb.files import write_text
from fulltune_nb.html import printable

REQUEST, OUTCOME = "request.json", "outcome.json"
_SECONDS_TO_SAVE = 60  # that a kernel has from SIGTERM on
_STARTS = 3  # attempts to start a kernel; no cell has run by the time one fails
_NOT_STARTED = "Kernel died before replying to kernel_info"


class NotebookError(TrainingError):
    """A cell of the notebook raised, or was never reached.

    Attributes:
        reason: what happened, in a line or two, without the traceback.
    """

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason or message


def execute(notebook: Path, executed: Path, parameters: dict[str, Any]) -> None:
    """Runs a notebook in a kernel of this very Python; what its cells print is printed here as it comes.

    Args:
        notebook: has a cell tagged `parameters`.
        executed: where the notebook with its outputs goes, also when a cell raises.
        parameters: by name.

    Raises:
        NotebookError: a cell raised; the message has its traceback.
        ConfigError: there is no such notebook.
    """
    with optional_import("Executing a notebook", "notebook"):
        import ipykernel  # noqa: F401  the kernel's own process would fail for the lack of it
        import nbconvert  # noqa: F401  write_html comes after the work
        import papermill
        from nbclient.exceptions import DeadKernelError

    if not notebook.is_file():
        raise ConfigError(f"{notebook} is no file; expected a notebook.")
    with _own_jupyter():
        try:
            _execute(notebook, executed, parameters)
        except papermill.PapermillExecutionError as error:
            raise NotebookError(f"{error}\nThe notebook up to there: {executed}", f"{error.ename}: {error.evalue}") from error
        except DeadKernelError as error:
            reason = "the kernel died; most often the machine was out of memory (ft.preflight tells beforehand)"
            raise NotebookError(f"{notebook}: {reason}. The notebook up to there: {executed}", reason) from error
    _check_every_cell_ran(executed)


def _execute(notebook: Path, executed: Path, parameters: dict[str, Any]) -> None:
    import papermill

    for attempt in range(1, _STARTS + 1):
        try:
            papermill.execute_notebook(
                str(notebook),
                str(executed),
                parameters,
                kernel_name="python3",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                coalesce_streams=True,  # of many lines one output
            )
            return
        except RuntimeError as error:
            # Kernels choose free ports before they open them: of two that start at once, one may find its port taken, and ends.
            if _NOT_STARTED not in str(error):
                raise
            if attempt == _STARTS:
                reason = f"no kernel could be started, in {_STARTS} attempts: {error}"
                raise NotebookError(f"{notebook}: {reason}", reason) from error


def _check_every_cell_ran(executed: Path) -> None:
    """An `exit()` in a cell ends the kernel, and papermill takes that for success.

    Raises:
        NotebookError: a code cell was never reached.
    """
    import nbformat

    cells = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code" and cell.source.strip()]
    missed = [cell for cell in cells if cell.execution_count is None and "skip-execution" not in cell.metadata.get("tags", [])]
    if missed:
        reason = f"{len(missed)} of {len(cells)} cells were never run, as if a cell had called exit()"
        raise NotebookError(f"{executed}: {reason}. The first of them:\n{missed[0].source[:500]}", reason)


def find_notebook(name: str) -> Path:
    """A notebook of the package.

    Raises:
        ConfigError: it has none of this name.
    """
    folder = Path(str(files("fulltune_nb"))) / "notebooks"  # of a checkout, a link to its folder of that name
    if (folder / name).is_file():
        return (folder / name).resolve()
    raise ConfigError(f"{name} was not found in {folder}. {nearest(name, (path.name for path in folder.glob('*.ipynb')))}")


@contextmanager
def _own_jupyter() -> Iterator[None]:
    """Within the block, kernels named python3 run this Python, with nothing of the user's Jupyter and IPython settings.

    A kernel of the same name in the user's folder would otherwise be taken first, whichever Python it belongs to.
    """
    with tempfile.TemporaryDirectory(prefix="fulltune_nb-jupyter-") as temporary:
        spec = Path(temporary, "path", "kernels", "python3")
        spec.mkdir(parents=True)
        # Its warning that TCP is not encrypted is for kernels elsewhere: this one talks to us within the machine.
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3 (ipykernel)", "language": "python"}))
        wanted = {f"JUPYTER_{kind}_DIR": str(Path(temporary, kind.lower())) for kind in ("CONFIG", "DATA", "RUNTIME")}
        wanted |= {"JUPYTER_PATH": str(spec.parents[1]), "IPYTHONDIR": str(Path(temporary, "ipython"))}
        wanted["FULLTUNE_PROGRESS"] = os.environ.get("FULLTUNE_PROGRESS") or "plain"
        before = {name: os.environ.get(name) for name in (*wanted, "MPLBACKEND")}
        os.environ.update(wanted)
        os.environ.pop("MPLBACKEND", None)  # the kernel's own choice shows plots in the notebook
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def write_html(notebook: Path, page: Path) -> None:
    """A copy of an executed notebook as one HTML file, plots included."""
    import nbformat
    from nbconvert import HTMLExporter

    text, _ = HTMLExporter().from_notebook_node(nbformat.read(notebook, as_version=4))
    page.write_text(text, encoding="utf-8")


def main(folder: Path) -> int:
    """Executes the notebook that `request.json` names, and writes how it went to `outcome.json`."""
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    outcome = {"status": "done"}
    try:
        execute(Path(request["notebook"]), Path(request["executed"]), request["parameters"])
    except FulltuneError as error:
        print(printable(error), file=sys.stderr)
        outcome = {"status": "failed", "reason": error.reason if isinstance(error, NotebookError) else str(error)}
    write_text(folder / OUTCOME, json.dumps(outcome) + "\n")
    return 0 if outcome["status"] == "done" else 1


def end_with_the_sweep() -> None:
    """Waits until standard input is closed, by the sweep or because that is gone; then the run pauses and is saved, and all end."""
    os.read(0, 1)
    below = psutil.Process().children(recursive=True)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(below, _SECONDS_TO_SAVE)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_sweep, daemon=True).start()
    sys.exit(main(Path(sys.argv[1])))
