"""`python -m fulltune_nb.demo`: the whole job once, offline, in a few minutes.

Executes the notebook 00_quickstart.ipynb with no front end, on the tiny model and the text-to-SQL questions that come with
the package, or on a model and data of yours, and says what came of it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fulltune_nb.command_line import Parser, run, start
from fulltune_nb.errors import ConfigError
from fulltune_nb.experiments.execution import execute, find_notebook, write_html
from fulltune_nb.files import is_empty
from fulltune_nb.html import human_bytes, printable

NOTEBOOK = "00_quickstart.ipynb"
DEFAULT_OUT = "demo_output"


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
    notebook = find_notebook(NOTEBOOK) if args.notebook is None else Path(args.notebook)
    parameters = {name: value for name, value in vars(args).items() if value is not None and name not in ("out", "notebook")}
    out = out_folder(args.out)
    executed, page, result = out / "quickstart.ipynb", out / "quickstart.html", out / "result.json"
    print(printable(f"Executing {notebook}; all that is written goes to {out}"), flush=True)
    try:
        execute(notebook, executed, {**parameters, "out": str(out), "result": str(result)})
    finally:
        if executed.exists():  # a notebook that failed is worth a look too
            write_html(executed, page)
    print()
    for name, value in summary(json.loads(result.read_text(encoding="utf-8"))):
        print(printable(f"{name:<21}{value}"))
    places = f"{'executed notebook':<21}{executed}\n{'HTML copy':<21}{page}\n{'time in all':<21}{time.monotonic() - started:.0f} s"
    print(printable(places))
    return 0


def out_folder(given: str | None) -> Path:
    """An empty folder, made where needed; an absolute path.

    Raises:
        ConfigError: the folder that was asked for is not empty, or none can be made.
    """
    out, number = Path(given or DEFAULT_OUT).expanduser().resolve(), 1
    while out.exists() and not is_empty(out):
        if given:
            raise ConfigError(f"--out: {out} is not an empty folder. Name a new one: nothing is ever overwritten.")
        number += 1
        out = out.with_name(f"{DEFAULT_OUT}-{number}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be made: {error}. Name a folder with --out.") from error
    return out


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
