"""What the command modules share: argument parsing and exit codes.

Exit codes: 0 done, 1 the work failed on the way, 2 bad input, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import json
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from fulltune_nb.errors import FulltuneError, TrainingError


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line and names the nearest flag."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args=None, namespace=None):
        """As in argparse."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            self.error(f"unknown argument {unknown[0]!r}." + (f" Did you mean {near[0]}?" if near else " --help lists what there is."))
        return found

    def error(self, message: str) -> NoReturn:
        """Exit code 2 and one line."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def field_names(cls: type) -> frozenset[str]:
    """Names of a dataclass's fields."""
    return frozenset(field.name for field in dataclasses.fields(cls))


def add_fields(group: Any, cls: type) -> None:
    """A flag for every field of a dataclass: `batch_size` is `--batch-size`, its help the text below the field.

    Flags that are not given leave nothing behind. Values are only brought into Python's form here; the dataclass checks them.
    """
    helps = field_docs(cls)
    for field in dataclasses.fields(cls):
        flag, kind = "--" + field.name.replace("_", "-"), str(field.type)
        settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": _help(helps.get(field.name, ""), field)}
        if kind == "bool":
            settings["action"] = argparse.BooleanOptionalAction
        elif kind.startswith("tuple"):
            settings.update(nargs="*", metavar="PATTERN")
        elif "dict" in kind:
            settings.update(type=_json_or_text, metavar="JSON")
        elif "int" in kind or "float" in kind:
            settings.update(type=_number_or_text, metavar="N")
        else:
            settings["metavar"] = "TEXT"
        group.add_argument(flag, **settings)


def field_docs(cls: type) -> dict[str, str]:
    """The texts below the fields of a dataclass, which Python itself does not keep."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    except OSError:  # no source at hand
        return {}
    docs = {}
    for field, below in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[field.target.id] = inspect.cleandoc(str(below.value.value))
    return docs


def _help(text: str, field: dataclasses.Field) -> str:
    shown = isinstance(field.default, (int, float, str)) and not isinstance(field.default, bool)
    default = f" (default: {field.default})" if shown else " (default: yes)" if field.default is True else ""
    return (" ".join(text.split()) + default).replace("%", "%%")


def _number_or_text(text: str) -> int | float | str | None:
    if text.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text  # the dataclass says what is expected


def _json_or_text(text: str) -> Any:
    if text.lower() == "none":
        return None
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None


def run(work: Callable[[], int]) -> int:
    """Runs a command's work and turns what goes wrong into an exit code and one message on standard error."""
    try:
        return work()
    except FulltuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has left, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush does not fail again
        return 1


@contextmanager
def termination_exits() -> Iterator[None]:
    """Within the block SIGTERM raises SystemExit with the exit code that shells give it, so that what is open can be closed."""

    def leave(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def start(main: Callable[[], int]) -> NoReturn:
    """The end of a command module run with `python -m`."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal in another encoding shows "?" instead of a traceback
    sys.exit(main())
