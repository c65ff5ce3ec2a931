"""`python -m fulltune_nb.demo`: the whole job once, offline, in a few minutes.

Executes the notebook 00_quickstart.ipynb with no front end, on the tiny model and the text-to-SQL questions that come with
the package, or on a model and data of yours, and says what came of it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fulltune_nb.command_line import Parser, run, start
from fulltune_nb.errors import ConfigError, TrainingError
from fulltune_nb.html import human_bytes

NOTEBOOK = "00_quickstart.ipynb"
DEFAULT_OUT = "demo_output"


class NotebookError(TrainingError):
    """A cell of the notebook raised."""


def main(arguments: list[str] | None = None) -> int:
    """Executes the notebook and prints what came of it. Returns the exit code."""
    args = build_parser().parse_args(arguments)
    return run(lambda: _demo(args))


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m fulltune_nb.demo", description=__doc__.split("\n\n", 1)[1])
    parser.add_argument("--out", help=f"a new or empty folder for all that is written (default: {DEFAULT_OUT}, or {DEFAULT_OUT}-2 ...)")
    parser.add_argument("--notebook", help=f"the notebook to execute (default: the package's {NOTEBOOK})")
    own = parser.add_argument_group("parameters of the notebook; where left out, the notebook's own values hold")
    own.add_argument("--model", help="a model folder or hub id")
    own.add_argument("--data", help="a folder with train.jsonl, valid.jsonl, test.jsonl")
    own.add_argument("--iters", type=int, help="optimizer steps")
    own.add_argument("--batch-size", type=int, help="rows in a step")
    own.add_argument("--learning-rate", type=float, help="its peak")
    own.add_argument("--warmup", type=int, help="steps in which the learning rate rises")
    own.add_argument("--mask-prompt", action=argparse.BooleanOptionalAction, help="train on answers only; not for plain text")
    own.add_argument("--max-seq-length", type=int, help="tokens after which a row is cut")
    own.add_argument("--answer-after", help="plain text only: what stands before the answer in each row")
    own.add_argument("--questions", type=int, help="held-out questions asked at the end")
    own.add_argument("--max-tokens", type=int, help="tokens of an answer at most")
    own.add_argument("--seed", type=int, help="of the order of the rows")
    return parser


def _demo(args: argparse.Namespace) -> int:
    started = time.monotonic()
    notebook = find_notebook() if args.notebook is None else Path(args.notebook)
    parameters = {name: value for name, value in vars(args).items() if value is not None and name not in ("out", "notebook")}
    out = _out_folder(args.out)
    executed, page, result = out / "quickstart.ipynb", out / "quickstart.html", out / "result.json"
    print(f"Executing {notebook}; all that is written goes to {out}", flush=True)
    try:
        execute(notebook, executed, {**parameters, "out": str(out), "result": str(result)})
    finally:
        if executed.exists():  # a notebook that failed is worth a look too
            write_html(executed, page)
    print()
    for name, value in summary(json.loads(result.read_text(encoding="utf-8"))):
        print(f"{name:<21}{value}")
    print(f"{'executed notebook':<21}{executed}\n{'HTML copy':<21}{page}\n{'time in all':<21}{time.monotonic() - started:.0f} s")
    return 0


def find_notebook() -> Path:
    """The quickstart notebook: of the checkout, or where an installed package keeps it.

    Raises:
        ConfigError: it is at neither place.
    """
    places = [Path(__file__).parents[1] / "notebooks", Path(sysconfig.get_path("data"), "share", "fulltune_nb", "notebooks")]
    for place in places:
        if (place / NOTEBOOK).is_file():
            return place / NOTEBOOK
    looked = " and ".join(map(str, places))
    raise ConfigError(f"{NOTEBOOK} was not found in {looked}. Install from a checkout (pip install -e .), or name it with --notebook.")


def _out_folder(given: str | None) -> Path:
    """An empty folder, made where needed; an absolute path.

    Raises:
        ConfigError: the folder that was asked for is not empty, or none can be made.
    """
    out, number = Path(given or DEFAULT_OUT).expanduser().resolve(), 1
    while out.exists() and (not out.is_dir() or any(out.iterdir())):
        if given:
            raise ConfigError(f"--out: {out} is not an empty folder. Name a new one: nothing is ever overwritten.")
        number += 1
        out = out.with_name(f"{DEFAULT_OUT}-{number}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error}. Name a folder with --out.") from error
    return out


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
    import papermill

    if not notebook.is_file():
        raise ConfigError(f"{notebook} is no file; expected a notebook.")
    with _own_jupyter():
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
        except papermill.PapermillExecutionError as error:
            raise NotebookError(f"{error}\nThe notebook up to there: {executed}") from error


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
        folders = {f"JUPYTER_{kind}_DIR": str(Path(temporary, kind.lower())) for kind in ("CONFIG", "DATA", "RUNTIME")}
        wanted: dict[str, str | None] = {"JUPYTER_PATH": str(spec.parents[1]), "IPYTHONDIR": str(Path(temporary, "ipython")), **folders}
        wanted["MPLBACKEND"] = None  # the kernel's own choice shows plots in the notebook
        wanted["FULLTUNE_PROGRESS"] = os.environ.get("FULLTUNE_PROGRESS") or "plain"
        before = {name: os.environ.get(name) for name in wanted}
        _set_environment(wanted)
        try:
            yield
        finally:
            _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def write_html(notebook: Path, page: Path) -> None:
    """A copy of an executed notebook as one HTML file, plots included."""
    import nbformat
    from nbconvert import HTMLExporter

    text, _ = HTMLExporter().from_notebook_node(nbformat.read(notebook, as_version=4))
    page.write_text(text, encoding="utf-8")


def summary(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What came of it, as names and values to print; `results` is what the notebook wrote."""
    before, after, match = (results[name] for name in ("before", "after", "exact_match"))
    yield f"{results['split']} perplexity", f"{before['perplexity']:.3f} before, {after['perplexity']:.3f} after"
    yield f"{results['split']} loss", f"{before['loss']:.3f} before, {after['loss']:.3f} after (nats per token)"
    yield "exact match", "not measured" if match is None else f"{match:.1%} of {results['questions']} held-out questions"
    yield "speed", f"{results['tokens_per_second']:.0f} trained tokens/s"
    yield "peak memory", human_bytes(results["peak_memory"])
    yield "exported model", results["exported"]


if __name__ == "__main__":
    start(main)
