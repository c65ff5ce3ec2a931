"""A real JupyterLab, or another front end, in a real browser, for tests. Settings and files are in temporary folders, never the user's."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest

BROWSER_VARIABLE = "FULLTUNE_BROWSER"
"""The path of a Chromium or Chrome; the usual names are looked for where it is not set."""
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def needs(there: object, what: str) -> None:
    """Skips a test where something is missing; in CI (`CI` is set) that is a failure."""
    if not there:
        message = f"no {what} here: the panels cannot be tested with it"
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(message)
        pytest.skip(message)


def needs_front_end(name: str) -> None:
    """As `needs`, of the package of a front end."""
    needs(importlib.util.find_spec(name), f"{name} (pip install -e '.[frontends]')")


def find_browser() -> str | None:
    """The browser's path, or None."""
    given = os.environ.get(BROWSER_VARIABLE)
    return given or next(filter(None, map(shutil.which, _NAMES)), None)


def axe_core() -> str:
    """The script of axe-core, which looks for what people who see little, or use no mouse, cannot use."""
    found = importlib.util.find_spec("axe_playwright_python")
    needs(found, "axe-core (pip install axe-playwright-python)")
    return Path(found.origin).with_name("axe.min.js").read_text("utf-8")


# By front end: how it is started (the port and the folder are put in), and its address, where `{}` stands for the notebook's path.
_JUPYTER = "--no-browser --allow-root --port={port} --ServerApp.port_retries=0 --IdentityProvider.token=t --ServerApp.root_dir={folder}"
_SERVERS = {
    "jupyterlab": (f"jupyterlab {_JUPYTER} --LabApp.expose_app_in_browser=True", "lab/tree/{}?token=t&reset"),
    "notebook": (f"notebook {_JUPYTER} --JupyterNotebookApp.expose_app_in_browser=True", "notebooks/{}?token=t"),
    "voila": ("voila --no-browser --port={port} --Voila.ip=127.0.0.1 --Voila.port_retries=0 {folder}", "voila/render/{}"),
    "marimo": ("marimo -q run {folder}/chart.py --headless --no-token --port={port}", ""),
}
FRONT_ENDS = tuple(_SERVERS)


@contextmanager
def served(front_end: str, folder: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Runs a front end whose notebooks are in `folder` (marimo: chart.py); gives its address, with `{}` where the notebook's path goes."""
    needs_front_end(front_end)
    private = folder / ".jupyter-of-the-test"
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "XDG_CONFIG_HOME")
    names += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    variables = {**os.environ, **{name: str(private / name.lower()) for name in names}, **(environment or {})}
    variables.pop("MPLBACKEND", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command, path = _SERVERS[front_end]
    words = [word.format(port=port, folder=folder) for word in command.split()]
    private.mkdir()
    quiet = private / "jupyterlab_settings_dir/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with open(private / "log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", *words], env=variables, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(f"http://127.0.0.1:{port}/", server, private / "log")
            yield f"http://127.0.0.1:{port}/{path}"
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return  # it answers
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{server.args[2]} does not answer:\n{log.read_text()[-3000:]}") from None
            time.sleep(0.1)


def write_notebook(path: Path, cells: list[str]) -> None:
    """A notebook of code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    nbformat.write(notebook, path)


class Lab:
    """A page with a notebook in JupyterLab."""

    def __init__(self, page: Any, address: str):
        self.page, self.address = page, address
        self._runs = 0

    def open(self, notebook: str, kernel: bool = True) -> None:
        """Opens a notebook; with `kernel` waits for an idle one."""
        self.page.goto(self.address.format(notebook))
        self.page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell.currentWidget?.context?.isReady", timeout=60_000)
        if kernel:
            self.wait_until_idle()

    def command(self, name: str) -> None:
        """A command of JupyterLab, as the menus call it."""
        self.page.evaluate("name => { window.jupyterapp.commands.execute(name); }", name)

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Until the kernel is idle, no cell running or waiting."""
        self.page.wait_for_function(
            "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
            " && !Array.from(document.querySelectorAll('.jp-InputPrompt')).some(prompt => prompt.textContent.includes('*'))",
            timeout=seconds * 1000,
        )

    def run_all(self, seconds: float = 120) -> None:
        """Runs all cells to the end."""
        self._wait_for_run(self._run("notebook:run-all-cells"), seconds)
        self.wait_until_idle(seconds)

    def run_cell(self, number: int) -> int:
        """Starts a cell, counted from 0, and does not wait; the number of this run."""
        self.page.evaluate(
            """number => {
                window.jupyterapp.shell.currentWidget.content.activeCellIndex = number;
                window.jupyterapp.shell.currentWidget.content.deselectAll();
            }""",
            number,
        )
        return self._run("notebook:run-cell")

    def _run(self, command: str) -> int:
        """Starts a command that runs cells, and has the page remember its end: on a busy machine cells may begin much later."""
        self._runs += 1
        self.page.evaluate(
            """([command, run]) => {
                window.endedRuns ??= new Set();
                window.jupyterapp.commands.execute(command).finally(() => window.endedRuns.add(run));
            }""",
            [command, self._runs],
        )
        return self._runs

    def _wait_for_run(self, run: int, seconds: float) -> None:
        self.page.wait_for_function("run => window.endedRuns.has(run)", arg=run, timeout=seconds * 1000)

    def set_source(self, number: int, code: str) -> None:
        """Replaces what stands in a cell."""
        self.page.evaluate(
            "([number, code]) => window.jupyterapp.shell.currentWidget.content.widgets[number].model.sharedModel.setSource(code)",
            [number, code],
        )

    def output(self, number: int) -> Any:
        """Where a cell's outputs are."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number).locator(".jp-Cell-outputArea")

    def result(self, number: int, code: str, seconds: float = 30) -> str:
        """The text output of some code, run in a cell."""
        self.set_source(number, code)
        self._wait_for_run(self.run_cell(number), seconds)
        return self.output(number).inner_text().strip()

    def save(self) -> None:
        """Saves the notebook's file, over what another tab has saved meanwhile: JupyterLab asks, and waits for the answer."""
        self.page.evaluate(
            "() => { window.saved = ''; window.jupyterapp.shell.currentWidget.context.save().then(() => { window.saved = 'yes'; }, "
            "error => { window.saved = String(error); }); }"
        )
        overwrite = self.page.get_by_role("button", name="Overwrite")
        for _ in range(300):
            if saved := self.page.evaluate("() => window.saved"):
                assert saved == "yes", saved
                return
            if overwrite.count():
                overwrite.click()
            self.page.wait_for_timeout(100)
        raise AssertionError("The notebook was not saved within 30 s.")

    def theme(self, name: str) -> None:
        """`JupyterLab Light` or `JupyterLab Dark`."""
        self.page.evaluate("name => { window.jupyterapp.commands.execute('apputils:change-theme', {theme: name}); }", name)
        self.page.wait_for_function("name => document.body.dataset.jpThemeName === name", arg=name, timeout=30_000)
        self.page.wait_for_timeout(500)
