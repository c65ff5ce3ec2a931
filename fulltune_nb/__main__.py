"""`fulltune COMMAND`, or `python -m fulltune_nb COMMAND`: all commands under one name. A module is imported when it is asked for."""

from __future__ import annotations

import importlib
import sys

from fulltune_nb.command_line import PROGRAM, start
from fulltune_nb.errors import nearest
from fulltune_nb.html import printable

COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "demo": ("demo", (), "fine-tunes a tiny model in a notebook, offline, in a few minutes"),
    "train": ("full", ("--train",), "trains a model; with --test it is tested too"),
    "test": ("full", ("--no-train", "--test"), "loss and perplexity of a model on a test split"),
    "generate": ("generate", (), "answers a prompt"),
    "chat": ("chat", (), "a conversation in the terminal"),
    "serve": ("serve", (), "a server with OpenAI's API, by mlx-lm"),
    "convert": ("convert", (), "a model file from .npz to .safetensors, or back"),
    "export": ("export", (), "a model taken elsewhere: quantized for mlx-lm, GGUF, Ollama, the hub"),
    "sweep": ("sweep.__main__", (), "runs a notebook with many parameters"),
    "ranks": ("ranks", (), "runs a command in several processes that train together"),
    "doctor": ("doctor", (), "says what this machine is, which models fit, and what is missing"),
}
"""Command -> its module, the arguments that come first, and what it does."""


def overview() -> str:
    """Which commands there are."""
    lines = [f"  {PROGRAM} {name:<9} {what}" for name, (_, _, what) in COMMANDS.items()]
    lines += ["", f"Each takes --help. Without the program's folder on the PATH: python -m fulltune_nb {next(iter(COMMANDS))} ..."]
    return "\n".join(["Full fine-tuning of language models with MLX.", "", *lines, ""])


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; without one shows which there are: 2, as nothing was done."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", ""):
        print(printable(overview()), end="")
        return 0 if name else 2
    if name == "--version":
        from fulltune_nb.system_info import package_versions

        print(printable(package_versions(["fulltune_nb"])["fulltune_nb"]))
        return 0
    if name not in COMMANDS:
        print(printable(f"{PROGRAM}: error: there is no command {name!r:.80}. {nearest(name, COMMANDS)}"), file=sys.stderr)
        return 2
    module, first, _ = COMMANDS[name]
    sys.argv = [f"{PROGRAM} {name}", *first, *rest]  # by the first its help and its mistakes call it
    return importlib.import_module(f"fulltune_nb.{module}").main()


def program() -> None:
    """The installed program `fulltune`."""
    start(main)


if __name__ == "__main__":
    program()
