"""`python -m fulltune_nb.generate`: a model's answer to a prompt, as it comes.

The answer alone goes to standard output, everything else to standard error. On a terminal what it would act on is spelled (`\\x1b`); a
file or a pipe gets the answer as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from fulltune_nb.chat_template import ensure_chat_template
from fulltune_nb.command_line import Parser, add_sampling, add_weights, run, start
from fulltune_nb.errors import ConfigError, GenerationError
from fulltune_nb.html import printable

EPILOG = """\
chat or raw: what the weights were trained on decides, where the model file or folder tells: rows of the chat and completions
formats were trained through the chat template, rows of the text format were not. Where nothing tells, the template is used if
the tokenizer has one. --chat and --no-chat decide otherwise.

examples:
  python -m fulltune_nb.generate --model-file model.npz --prompt "Which city has the most people?"
  python -m fulltune_nb.generate --model model_hf --prompt "Once upon" --no-chat --temp 0.8 --top-p 0.95 --seed 1
  cat question.txt | python -m fulltune_nb.generate --model model_hf --prompt - --max-tokens 64
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(prog="python -m fulltune_nb.generate", description="Prints a model's answer to a prompt.", epilog=EPILOG)
    add = parser.add_argument
    add("--model", help="model folder or hub id; may be left out where --model-file tells where it came from")
    add("--prompt", "-p", required=True, help=r"the prompt; \n and \t stand for a line break and a tab; - reads it from standard input")
    add("--system-prompt", help="system message put before the prompt; implies --chat")
    add("--chat", action=argparse.BooleanOptionalAction, help="send the prompt through the chat template, or raw")
    add("--ignore-chat-template", dest="chat", action="store_false", default=argparse.SUPPRESS, help="the same as --no-chat")
    add_sampling(parser)
    add_weights(parser)
    return parser


def read_prompt(text: str) -> str:
    """The prompt: standard input for `-` (without the line break at its end), else the text with `\\n` and `\\t` put in."""
    return sys.stdin.read().removesuffix("\n") if text == "-" else text.replace("\\n", "\n").replace("\\t", "\t")


def uses_chat(arguments: argparse.Namespace, data_format: str | None, has_template: bool) -> bool:
    """Whether the prompt goes through the chat template; see `EPILOG`.

    Raises:
        ConfigError: a system prompt and no template to put it in.
    """
    if arguments.system_prompt is not None and arguments.chat is False:
        raise ConfigError("--system-prompt goes through the chat template, --no-chat leaves it out. Give one of them.")
    if arguments.chat is not None or arguments.system_prompt is not None:
        return arguments.chat is not False
    if data_format in ("text", "chat", "completions"):
        return data_format != "text"
    return has_template


def answer(arguments: argparse.Namespace) -> Iterator[str]:
    """Loads the model and returns the pieces of its answer."""
    from fulltune_nb.models.generation import Sampling
    from fulltune_nb.models.model_file import load_with_model_file, trained_format
    from fulltune_nb.settings import names_of

    settings = {name: getattr(arguments, name) for name in names_of(Sampling)}
    Sampling(**settings)  # what is wrong with it is said before a model is loaded
    prompt = read_prompt(arguments.prompt)
    lm = load_with_model_file(arguments.model, arguments.model_file, arguments.dtype, arguments.dequantize)
    if arguments.model is None:
        _note(f"model: {lm.source} (named by {arguments.model_file})")
    data_format = trained_format(lm, arguments.model_file)
    chat = uses_chat(arguments, data_format, bool(lm.tokenizer.chat_template))
    if arguments.chat is None and arguments.system_prompt is None:
        reason = f", as the rows it was trained on ({data_format})" if data_format else ""
        way, other = ("through the chat template", "--no-chat") if chat else ("raw", "--chat")
        _note(f"prompt sent {way}{reason}; {other} for the other way")
    if not chat:
        return lm.stream(prompt, **settings)
    if note := ensure_chat_template(lm.tokenizer):
        _note(note)
    system = [] if arguments.system_prompt is None else [{"role": "system", "content": arguments.system_prompt}]
    if not prompt and not system:
        raise GenerationError("The prompt is empty. Give at least one word.")
    return lm.stream_chat([*system, {"role": "user", "content": prompt}], **settings)


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _for_output(piece: str) -> str:
    """A terminal must not act on what a model says; a file or a pipe gets it as it is."""
    return printable(piece) if sys.stdout.isatty() else piece


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = build_parser().parse_args(argv)

    def work() -> int:
        for piece in answer(arguments):
            print(_for_output(piece), end="", flush=True)
        print()
        return 0

    return run(work)


if __name__ == "__main__":
    start(main)
