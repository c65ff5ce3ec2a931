"""What the command modules share: argument parsing and exit codes.

Exit codes: 0 done, 1 the work failed on the way, 2 bad input, 130 interrupted, 143 terminated, 129 hung up.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from fulltune_nb.errors import IN_LOADING, FulltuneError, TrainingError, device_errors, nearest, tells_missing_backend
from fulltune_nb.html import printable
from fulltune_nb.settings import as_typed
from fulltune_nb.training.rank_channel import rank_of_environment
from fulltune_nb.training.signals import ENDING, leave_closed_outputs

PROGRAM = "fulltune"
"""The installed program, whose commands these are."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line and names the nearest flag."""

    def __init__(self, prog: str, **options: Any):
        called = sys.argv[0] if sys.argv[0].startswith(f"{PROGRAM} ") else prog
        super().__init__(prog=called, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args=None, namespace=None):
        """As in argparse."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unknown argument {unknown[0]!r}. {nearest(unknown[0].split('=')[0], flags, '--help lists what there is.')}")
        return found

    def error(self, message: str) -> NoReturn:
        """Exit code 2 and one line."""
        self.exit(2, printable(f"{self.prog}: error: {message}\n"))


class FlagOrWord(argparse.Action):
    """`--name`, `--no-name` or `--name WORD`."""

    def __init__(self, option_strings: list[str], dest: str, kind: str, **options: Any):
        names = [*option_strings, *(name.replace("--", "--no-", 1) for name in option_strings)]
        super().__init__(names, dest, nargs="?", metavar="WORD", **options)
        self.kind = kind

    def __call__(self, parser, namespace, values, option_string=None):
        """As in argparse."""
        is_no = option_string.startswith("--no-")
        if is_no and values is not None:
            parser.error(f"{option_string} takes no value, found {values!r}.")
        setattr(namespace, self.dest, not is_no if values is None else as_typed(values, self.kind))


def add_fields(group: Any, cls: type) -> None:
    """A flag for every setting of a dataclass: `batch_size` is `--batch-size`.

    Flags that are not given leave nothing behind. Texts become the values they stand for; the dataclass checks these.
    """
    for field in dataclasses.fields(cls):
        kind, default = str(field.type), field.default
        shown = isinstance(default, (int, float, str)) and default is not False
        note = f" (default: {'yes' if default is True else default})" if shown else ""
        if kind.startswith("bool | str"):
            options: dict[str, Any] = {"action": FlagOrWord, "kind": kind}
        elif kind.startswith("bool"):
            options = {"action": argparse.BooleanOptionalAction}
        elif kind.startswith("tuple"):
            options = {"nargs": "*", "metavar": "PATTERN"}
        else:
            metavar = "JSON" if "dict" in kind else "N" if "int" in kind or "float" in kind else "TEXT"
            options = {"type": partial(as_typed, kind=kind), "metavar": metavar}
        help = f"{field.metadata['help']}{note}".replace("%", "%%")
        group.add_argument("--" + field.name.replace("_", "-"), dest=field.name, default=argparse.SUPPRESS, help=help, **options)


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The flags that say what becomes of a model's weights when it is loaded."""
    add = parser.add_argument
    add("--model-file", type=Path, help="weights to use in place of the model's own (.npz or .safetensors)")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights in memory (default: as they are stored)")
    add("--dequantize", action="store_true", help="turn the weights of a model that MLX quantized, or of one in MXFP4, into bfloat16")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting of `Sampling`."""
    add = parser.add_argument
    add("--max-tokens", "-m", type=int, default=256, help="tokens after which the answer ends in any case (default: %(default)s)")
    add("--temperature", "--temp", type=float, default=0.0, help="0: always the likeliest token (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="draw among the fewest likeliest tokens with this much probability (default: %(default)s)")
    add("--top-k", type=int, default=0, help="draw among this many likeliest tokens; 0: all (default: %(default)s)")
    add("--min-p", type=float, default=0.0, help="draw among tokens with this share of the likeliest one's (default: %(default)s)")
    add("--stop", action="append", help="text that ends the answer; may be given several times")
    add("--seed", type=int, help="seed of the drawing (default: another one each time)")


def run(work: Callable[[], int]) -> int:
    """Runs a command's work and turns what goes wrong into an exit code and one message on standard error."""
    try:
        with tells_missing_backend(), device_errors(IN_LOADING):  # what else uses the device says so itself
            return work()
    except FulltuneError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has left, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush does not fail again
        return 1


@contextmanager
def silent_unless_first() -> Iterator[None]:
    """Within the block, or the function it decorates, what is printed goes nowhere but in rank 0, which says it for all; errors are
    shown by each."""
    if not rank_of_environment():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def termination_exits() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise SystemExit with the exit code that shells give them, so that what is open can be closed."""

    def leave(number: int, frame: Any) -> NoReturn:
        if number == signal.SIGHUP:
            leave_closed_outputs()
        raise SystemExit(128 + number)

    on_main_thread = threading.current_thread() is threading.main_thread()
    taken = [number for number in ENDING if on_main_thread and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def start(main: Callable[[], int]) -> NoReturn:
    """The end of a command module run with `python -m`."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal in another encoding shows "?" instead of a traceback
    sys.exit(main())
