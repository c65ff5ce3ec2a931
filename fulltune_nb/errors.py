"""Every error this package raises on purpose.

    FulltuneError
    ├── ConfigError            a setting has the wrong name, type or value
    ├── DataError              rows or files that cannot be read; `.problems` lists them by file and line
    ├── ModelError             a model folder that cannot be loaded or saved
    │   └── WeightsError       tensors missing, unexpected or of another shape; listed in the message
    ├── TrainingError          a step or a run that cannot go on
    │   ├── NonFiniteError     loss or gradient is NaN or inf; nothing was updated
    │   ├── TornStepError      a step failed when a part of the weights had been updated
    │   └── MemoryLimitError   a run that would need more memory than the machine has
    ├── CheckpointError        a checkpoint that cannot be written, read or resumed from
    ├── GenerationError        a prompt or a sampling setting that cannot be used
    └── MissingDependencyError an optional package is not installed; the message names the install command

Each message says what was expected, what was found and where, and what to do.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence


class FulltuneError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(FulltuneError, ValueError):
    """A setting has the wrong name, type or value."""


class DataError(FulltuneError, ValueError):
    """Rows or files that cannot be read.

    Attributes:
        problems: one line for each bad row, `"train.jsonl:12: ..."`; all of them, while the message shows the first 20.
    """

    def __init__(self, message: str, problems: list[str] | None = None):
        super().__init__(message)
        self.problems = list(problems or [])


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


class CheckpointError(FulltuneError, RuntimeError):
    """A checkpoint that cannot be written, read or resumed from."""


class GenerationError(FulltuneError, ValueError):
    """A prompt or a sampling setting that cannot be used."""


class MissingDependencyError(FulltuneError, ImportError):
    """An optional package is not installed; the message names the install command."""


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
