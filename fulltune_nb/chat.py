"""`python -m fulltune_nb.chat MODEL`: a conversation in the terminal, each answer as it comes.

Ctrl-C ends an answer, not the program; Ctrl-D, or /quit, ends that. What a terminal would act on in an answer is spelled (`\\x1b`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from fulltune_nb.command_line import Parser, add_sampling, add_weights, run, start
from fulltune_nb.errors import GenerationError
from fulltune_nb.html import printable

COMMANDS = {
    "/new": "begins a new conversation",
    "/system TEXT": "sets the system message, and begins a new conversation; without TEXT there is none",
    "/help": "lists these",
    "/quit": "ends, as Ctrl-D does",
}
_LISTED = "\n".join(f"  {name:13} {meaning}" for name, meaning in COMMANDS.items())
EPILOG = f"""\
in the conversation:
{_LISTED}
A prompt that begins with a slash is typed with two. Ctrl-C ends an answer.

examples:
  python -m fulltune_nb.chat model_hf
  python -m fulltune_nb.chat model_hf --system "You answer in one word." --temp 0.7 --top-p 0.9
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(prog="python -m fulltune_nb.chat", description="A conversation with a model in the terminal.", epilog=EPILOG)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="model folder or hub id; may be left out where --model-file tells where it came from")
    add("--system", metavar="TEXT", help="system message")
    alone = "ask each prompt alone (default: where the model's card says that each training row was one question and its answer)"
    add("--alone", action=argparse.BooleanOptionalAction, help=alone)
    add_sampling(parser)
    add_weights(parser)
    return parser


class Conversation:
    """What was said, and what is typed next.

    Attributes:
        messages: so far, the system message among them.
        alone: whether each prompt is asked without what was said before.
    """

    def __init__(self, answer: Callable[[list[dict[str, str]]], Iterator[str]], system: str | None = None, alone: bool = False):
        self._answer, self._system, self.alone = answer, system, alone
        self.new()

    def new(self) -> None:
        """Forgets what was said but the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def take(self, line: str) -> bool:
        """A line that was typed: a command or a prompt. Returns whether the program goes on."""
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return False
        if word == "/new":
            self.new()
        elif word == "/system":
            self._system = rest.strip() or None
            self.new()
        elif word == "/help":
            _note(_LISTED)
        elif word.startswith("/") and not word.startswith("//"):
            _note(f"There is no command {word}.\n{_LISTED}\nA prompt that begins with a slash is typed with two.")
        elif line.strip():
            self.ask(line.strip().removeprefix("/") if line.strip().startswith("//") else line)
        return True

    def ask(self, prompt: str) -> None:
        """Prints the answer as it comes and keeps it, also the beginning of one that was ended; a question that got none is forgotten."""
        if self.alone:
            self.new()
        said = ""
        question = {"role": "user", "content": prompt}
        try:
            for piece in self._answer([*self.messages, question]):
                said += piece
                print(printable(piece), end="", flush=True)
            print()
        except KeyboardInterrupt:
            print("\n(ended)")
        except GenerationError as error:
            _note(f"error: {error}")
        if said:
            self.messages += [question, {"role": "assistant", "content": said}]


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _loaded(arguments: argparse.Namespace) -> Conversation:
    from fulltune_nb.models.generation import Sampling
    from fulltune_nb.models.model_file import load_with_model_file
    from fulltune_nb.settings import names_of
    from fulltune_nb.training.card import training_of

    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names_of(Sampling)}
    Sampling(**settings)  # what is wrong with it is said before a model is loaded
    lm = load_with_model_file(arguments.model, arguments.model_file, arguments.dtype, arguments.dequantize)
    alone = training_of(lm)[0] if arguments.alone is None else arguments.alone
    way = "each prompt is asked alone; --no-alone for a conversation" if alone else "/new begins again"
    _note(f"{lm!r}\n{way}; /help lists the commands, Ctrl-C ends an answer, Ctrl-D the program.")
    return Conversation(lambda messages: lm.stream_chat(messages, **settings), arguments.system, alone)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = build_parser().parse_args(argv)

    def work() -> int:
        conversation = _loaded(arguments)
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  gives `input` a line that can be edited, and a history
        going = True
        while going:
            try:
                going = conversation.take(input("> "))
            except KeyboardInterrupt:
                _note("\nCtrl-D, or /quit, ends the program.")
            except EOFError:
                print()
                going = False
        return 0

    return run(work)


if __name__ == "__main__":
    start(main)
