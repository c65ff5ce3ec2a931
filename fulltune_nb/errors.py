"""Every error this package raises on purpose.

    FulltuneError
    ├── ConfigError            a setting has the wrong name, type or value
    ├── DataError              rows or files that cannot be read; `.problems` lists them by file and line
    ├── ModelError             a model folder that cannot be loaded or saved
    │   └── WeightsError       tensors missing, unexpected or of another shape; listed in the message
    ├── TrainingError          a step or a run that cannot go on
    │   ├── NonFiniteError     loss or gradient is NaN or inf; nothing was updated
    │   ├── TornStepError      a step failed when a part of the weights had been updated
    │   ├── MemoryLimitError   a run that would need more memory than the machine has
    │   └── DeviceError        the device broke a computation off, in training or elsewhere
    │       └── OutOfMemoryError   because memory ran out
    ├── CheckpointError        a checkpoint that cannot be written, read or resumed from
    ├── GenerationError        a prompt or a sampling setting that cannot be used
    └── MissingDependencyError an optional package is not installed; the message names the install command

Each message says what was expected, what was found and where, and what to do.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

from fulltune_nb.html import printable


class FulltuneError(Exception):
    """Base of every error this package raises on purpose.

    Its text, and that of the errors that led to it, is safe on a terminal, whatever names and rows it quotes: see `html.printable`.
    """

    def __init__(self, *parts: object):
        super().__init__(*(printable(part) if isinstance(part, str) else part for part in parts))
        _make_printable(sys.exc_info()[1])  # a traceback shows it above this one


_OWN_TEXTS = ("args", "__notes__", "strerror", "reason", "msg", "filename", "text")
"""Attributes in which Python's own errors have what a traceback shows of them."""


def _make_printable(error: BaseException | None) -> None:
    """Spells what a terminal would act on in the texts of an error of others, and of those that led to it or are grouped in it."""
    waiting, seen = [error], set()
    while waiting:
        error = waiting.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        waiting += [error.__cause__, error.__context__, *getattr(error, "exceptions", ())]
        for name in _OWN_TEXTS:
            with suppress(Exception):  # an attribute that the error has not, or lets nobody set
                _spell(error, name)
        with suppress(Exception):  # one whose text cannot be had
            if (safe := printable(error)) != str(error):
                _give_text(error, safe)


def _spell(error: BaseException, name: str) -> None:
    value = getattr(error, name)
    is_text = isinstance(value, str)
    safe = printable(value) if is_text else type(value)(printable(part) if isinstance(part, str) else part for part in value)
    if safe != value:
        setattr(error, name, safe)


def _give_text(error: BaseException, text: str) -> None:
    """To an error whose class makes its text of something else, by a class that differs in nothing but that."""
    own = type(error)
    error.__class__ = type(own.__name__, (own,), {"__str__": lambda self: text, "__module__": own.__module__, "__slots__": ()})


class ConfigError(FulltuneError, ValueError):
    """A setting has the wrong name, type or value."""


class DataError(FulltuneError, ValueError):
    """Rows or files that cannot be read.

    Attributes:
        problems: one line for each bad row, `"train.jsonl:12: ..."`; all of them, while the message shows the first 20.
    """

    def __init__(self, message: str, problems: list[str] | None = None):
        super().__init__(message)
        self.problems = [printable(problem) for problem in problems or []]


class ModelError(FulltuneError, ValueError):
    """A model folder that cannot be loaded or saved."""


class WeightsError(ModelError):
    """Tensors are missing, unexpected or of another shape than the model's."""


class TrainingError(FulltuneError, RuntimeError):
    """A step or a run that cannot go on."""


class NonFiniteError(TrainingError):
    """Loss or gradient is NaN or inf. Weights, optimizer and data position are as before the step."""


class TornStepError(TrainingError):
    """A step failed when a part of the weights had been updated: some are new, some old. Go back to a snapshot or checkpoint."""


class MemoryLimitError(TrainingError):
    """A run would need more memory than this machine has. The message says what would make it fit."""


class DeviceError(TrainingError):
    """The device broke a computation off: it took too long, the driver failed, or a kernel could not be compiled.

    The message says what helps; MLX's error is the cause.

    Attributes:
        late: it was told of only when a result was waited for, so that what was sent to the GPU before may be what failed.
    """

    late: bool = False


class OutOfMemoryError(DeviceError):
    """The device broke a computation off because memory ran out."""


class CheckpointError(FulltuneError, RuntimeError):
    """A checkpoint that cannot be written, read or resumed from."""


class GenerationError(FulltuneError, ValueError):
    """A prompt or a sampling setting that cannot be used."""


class MissingDependencyError(FulltuneError, ImportError):
    """An optional package is not installed; the message names the install command."""


@contextmanager
def optional_import(what: str, extra: str) -> Iterator[None]:
    """Within the block an import of a package that is not installed raises `MissingDependencyError`, which names the command.

    Args:
        what: is needed, such as "plot_loss".
        extra: of this package, which brings it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        command = f"pip install 'fulltune_nb[{extra}]'"
        raise MissingDependencyError(f"{what} needs the package {package!r}, which is not installed: {command}.") from error


@contextmanager
def tells_missing_backend() -> Iterator[None]:
    """Within the block an import of MLX without its backend, on Linux a package of its own, raises `MissingDependencyError`."""
    try:
        yield
    except ImportError as error:
        if "libmlx" not in str(error):
            raise
        raise MissingDependencyError(
            f"MLX is installed without what computes ({error}): pip install 'fulltune_nb[cpu]', or with an NVIDIA GPU"
            " 'fulltune_nb[cuda13]' or 'fulltune_nb[cuda12]'. Never two of them in one environment."
        ) from error


def closest(name: object, valid: Iterable[str], most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Up to `most` of `valid` that are spelt much like `name`, the likest first; upper case, - and _ make no difference."""
    by_lower = {v.lower().replace("-", "_"): v for v in valid}
    return [by_lower[c] for c in difflib.get_close_matches(str(name).lower().replace("-", "_"), by_lower, n=most, cutoff=cutoff)]


def nearest(name: object, valid: Iterable[str], otherwise: str | None = None, cutoff: float = 0.6) -> str:
    """"Did you mean ...?" with the closest of `valid`; where none is close `otherwise`, or all that is valid."""
    valid = list(valid)
    if close := closest(name, valid, cutoff=cutoff):
        return f"Did you mean {' or '.join(map(repr, close))}?"
    return f"Valid names: {', '.join(valid)}." if otherwise is None else otherwise


def misspelt(name: object, valid: Iterable[str]) -> str:
    """"Did you mean ...?" with those of `valid` from which one letter is wrong, missing, too many or out of place; else "".

    For names whose versions are names too: another digit, or more behind a name, is another thing, as `qwen3` is no `qwen2`.
    """
    given = str(name).lower().replace("-", "_")

    def differs_by_a_letter(known: str) -> bool:
        start = len(os.path.commonprefix([given, known]))
        end = len(os.path.commonprefix([given[start:][::-1], known[start:][::-1]]))
        wrong, right = given[start : len(given) - end], known[start : len(known) - end]
        appended = start == len(known) and wrong not in ("", known[-1:])
        swapped = len(right) == 2 and wrong == right[::-1]
        return not appended and not re.search("[0-9]", wrong + right) and (swapped or max(len(wrong), len(right)) <= 1)

    close = [known for known in valid if differs_by_a_letter(known)]
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else ""


def listed(items: Sequence[object], most: int = 5, separator: str = ", ") -> str:
    """The first `most` items and how many more there are: "a, b and 3 more"."""
    more = len(items) - most
    return separator.join(map(str, items[:most])) + (f" and {more:,} more" if more > 0 else "")


# ---- what MLX says when a device breaks a computation off --------------------------------------------------------------------------

IN_TRAINING = (
    'a smaller batch_size (with more grad_accumulation_steps a step has as many rows) or max_seq_length, memory="lean"'
    ' (backward="layerwise") or grad_checkpoint=True, optimizer="adamw8bit" or "adafactor", and weights="bfloat16"'
)
"""What takes less memory; `ft.preflight` counts how much."""
IN_EVALUATION = "a smaller batch_size, and shorter rows (max_seq_length)"
IN_GENERATION = "a shorter prompt, fewer max_tokens, a smaller batch_size where many are answered, and bfloat16 weights"
IN_LOADING = 'dtype="bfloat16", a smaller model, and closing what else uses memory'
_SHORTER = (
    "On a Mac with a display the system ends what keeps the GPU from drawing. What helps: smaller pieces ({helps}), nothing else on the"
    " GPU, and letting the display sleep (`caffeinate -i` keeps the Mac awake meanwhile): docs/howto/on_a_mac.md."
)
_MORE_MEMORY = "What helps: {helps}."
_ROOM = (
    "Make room (some megabytes) on the disk of the folder of kernels, which nobody else may write to, and of TMPDIR, where g++ has its"
    " temporary files; then go on. Or restart Python with XDG_CACHE_HOME and TMPDIR set to other folders of your own."
)
_DEVICE_ERRORS: tuple[tuple[type[DeviceError], str, str, str], ...] = (  # class, pattern, what it means, what helps; the first that matches
    (
        DeviceError, r"\[Compile::eval_cpu\]|Could not load C\+\+ shared library|filesystem error: ",
        "MLX could not compile a kernel, or not load it", _ROOM,
    ),
    (OutOfMemoryError, r"maximum allowed buffer size", "One array would be larger than the device allows", _MORE_MEMORY),
    (
        OutOfMemoryError, r"Resource limit \(\d+\) exceeded", "There are more arrays than Metal keeps",
        "Restart Python (the kernel) and go on from the last checkpoint. If it comes again: compile=False, and {helps}.",
    ),
    (
        OutOfMemoryError,
        r"Insufficient Memory|OutOfMemory|Unable to allocate|out of memory|bad_alloc|ALLOC_FAILED|cublas.* failed with code: 3\b",
        "Memory ran out", _MORE_MEMORY,
    ),
    (DeviceError, r"GPU Timeout|Impacting ?Interactivity|GPU Hang|launch timed out", "The GPU was stopped, as it took too long", _SHORTER),
    (
        DeviceError, r"\[METAL\] Command buffer execution failed|\[Event::\w+\]|\bcu(da|blas|dnn)?[A-Z]\w*\(.*\) failed",
        "The GPU failed", "Restart Python (the kernel) and go on from the last checkpoint; a GPU that has failed often fails on.",
    ),
)  # fmt: skip
_SHOWN = 400  # characters of MLX's text
_LATE = re.compile(r"Command buffer execution failed|\[Event::|\bcu\w*(Synchronize|Query|PeekAtLastError|Launch\w*)\(")


def device_error(error: BaseException, helps: str) -> DeviceError | None:
    """What MLX raised because of its device, as an error of ours that says what helps; None: it is something else.

    Args:
        error: MLX raises RuntimeError, MemoryError where C++ found no memory.
        helps: what takes less memory in what was done, such as `IN_TRAINING`.

    The texts are those of MLX 0.32 (`backend/metal/allocator.cpp`, `device.cpp`, `backend/cuda/allocator.cpp`, `utils.cpp`,
    `backend/cpu/compiled.cpp`) and those that Metal and CUDA put into them.
    """
    if isinstance(error, FulltuneError) or not isinstance(error, (RuntimeError, MemoryError)):
        return None
    text = str(error).strip().rstrip(".") or type(error).__name__
    for kind, pattern, meaning, remedy in _DEVICE_ERRORS:
        if re.search(pattern, text) or (text == "MemoryError" and meaning == "Memory ran out"):
            shown = text if len(text) <= _SHOWN else f"{text[:100]} … {text[100 - _SHOWN :]}"  # a compiler's reason comes last
            found = kind(f"{meaning}: {shown}. {remedy.format(helps=helps)}")
            found.late = _LATE.search(text) is not None
            return found
    return None


@contextmanager
def readable(folder: os.PathLike) -> Iterator[None]:
    """Within the block, what the system does not let be read of a model folder is a `ModelError` that names it."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{folder} could not be read: {error}. Check its permissions and the disk.") from error


@contextmanager
def device_errors(helps: str) -> Iterator[None]:
    """Within the block, what MLX raises because of its device becomes a `DeviceError`; see `device_error`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        found = device_error(error, helps)
        if found is None:
            raise
        traceback.clear_frames(error.__traceback__)  # a notebook keeps the last error, and with it would keep all arrays of the step
        raise found from error


_Call = TypeVar("_Call", bound=Callable[..., Any])


def tells_device_errors(helps: str) -> Callable[[_Call], _Call]:
    """`device_errors` around every call of a function, or of all that a generator function does."""

    def around(function: _Call) -> _Call:
        def iterate(*args: Any, **settings: Any) -> Iterator[Any]:
            with device_errors(helps):
                yield from function(*args, **settings)

        def call(*args: Any, **settings: Any) -> Any:
            with device_errors(helps):
                return function(*args, **settings)

        return cast(_Call, functools.wraps(function)(iterate if inspect.isgeneratorfunction(function) else call))

    return around
