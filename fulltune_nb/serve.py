"""`python -m fulltune_nb.serve MODEL`: hands over to mlx-lm's server, which answers requests of OpenAI's API."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fulltune_nb.command_line import Parser, run, start
from fulltune_nb.errors import ModelError, optional_import
from fulltune_nb.html import printable

EPILOG = """\
What stands behind -- goes to the server; `python -m mlx_lm server --help` lists it.

examples:
  python -m fulltune_nb.serve model_hf
  python -m fulltune_nb.serve model_hf --port 9000 -- --max-tokens 1024
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    usage = "%(prog)s [-h] [--host HOST] [--port PORT] MODEL [-- FLAGS]"
    about = "A server with OpenAI's API, by mlx-lm."
    parser = Parser(prog="python -m fulltune_nb.serve", usage=usage, description=about, epilog=EPILOG)
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, as lm.save and lm.export write it, or hub id")
    add("--host", default="127.0.0.1", help="address that it listens on (default: %(default)s, this machine alone)")
    add("--port", type=int, default=8080, help="port (default: %(default)s)")
    return parser


def server_command(model: str, host: str, port: int, rest: list[str]) -> list[str]:
    """The command that serves a model.

    Raises:
        MissingDependencyError: mlx-lm is not installed.
        ModelError: a path that is no model folder.
    """
    with optional_import("serving", "mlx-lm"):
        import mlx_lm  # noqa: F401
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: it is no model folder. Write one by lm.save, or name a run's best/.")
    if path.is_file():
        raise ModelError(f"{path} is a file. A server needs a model folder: load it with model_file= and write one by lm.save.")
    model = str(path) if path.is_dir() else model
    return [sys.executable, "-m", "mlx_lm", "server", f"--model={model}", f"--host={host}", f"--port={port}", *rest]


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code; where the server starts, it takes this process over."""
    words = sys.argv[1:] if argv is None else argv
    own = words[: words.index("--")] if "--" in words else words
    arguments = build_parser().parse_args(own)

    def work() -> int:
        command = server_command(arguments.model, arguments.host, arguments.port, words[len(own) + 1 :])
        print(printable(f"This is mlx-lm's server from here on: {' '.join(command)}"), file=sys.stderr, flush=True)
        os.execv(command[0], command)

    return run(work)


if __name__ == "__main__":
    start(main)
