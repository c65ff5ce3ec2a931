"""How a student's function is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fulltune_nb import html
from fulltune_nb.course.exercise import Exercise, Mistake
from fulltune_nb.course.training import ADAMW, LOSS, SCHEDULE
from fulltune_nb.errors import ConfigError, nearest

TOLERANCE = 1e-4
"""Relative to the largest number of a result, as of float32 arithmetic with some sums in another order."""


@dataclass(frozen=True)
class Verdict:
    """What came of a check; true where it passed.

    Attributes:
        name: of the exercise.
        passed: whether all results are right.
        message: what differs.
        hint: what to think about; "" where all is right.
    """

    name: str
    passed: bool
    message: str
    hint: str = ""

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        hint = f" Hint: {self.hint}" if self.hint else ""
        return html.printable(f"{'✓' if self.passed else '✗'} {self.name}: {self.message}{hint}")

    def _repr_html_(self) -> str:
        hint = f"<div><b>Hint.</b> {html.esc(self.hint)}</div>" if self.hint else ""
        return f"<div><b>{'✓' if self.passed else '✗'} {html.esc(self.name)}</b> {html.esc(self.message)}</div>{hint}"


class _WrongKind(Exception):
    """What a function returned is no result of the exercise."""


def exercises() -> dict[str, Exercise]:
    """All exercises by name."""
    return {exercise.name: exercise for exercise in (LOSS, ADAMW, SCHEDULE)}


def check(name: str, function: Callable) -> Verdict:
    """Whether a student's function does what an exercise asks for; if not, what differs and a hint.

    Args:
        name: of the exercise, such as "01.loss".
        function: takes the arguments of the exercise by position.

    Raises:
        ConfigError: there is no such exercise, or `function` is none.
    """
    known = exercises()
    if name not in known:
        raise ConfigError(f"course.check: there is no exercise {name!r:.80}. {nearest(name, known)}")
    if not callable(function):
        raise ConfigError(f"course.check: expected a function, got {type(function).__name__}. Pass it without calling it.")
    exercise = known[name]
    for about, arguments in exercise.cases:
        where = f" ({about})" if about else ""
        try:
            found = _of(exercise, function, arguments)
        except _WrongKind as error:
            return Verdict(name, False, f"{error}{where}", exercise.hint)
        except Exception as error:  # a student's code may raise anything
            called = f"your function, called with ({', '.join(exercise.arguments)}){where}"
            return Verdict(name, False, f"{called}, raised {type(error).__name__}: {html.cut(str(error))}", exercise.hint)
        if difference := _difference(exercise, found, _of(exercise, exercise.solution, arguments)):
            hint = next((mistake.hint for mistake in exercise.mistakes if _gives(exercise, mistake, arguments, found)), exercise.hint)
            return Verdict(name, False, difference + where, hint)
    return Verdict(name, True, f"right in all of {len(exercise.cases)} cases.")


def _of(exercise: Exercise, function: Callable, arguments: Mapping[str, Any]) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        return _results(exercise, function(*copy.deepcopy(list(arguments.values()))))


def _results(exercise: Exercise, returned: Any) -> list[np.ndarray]:
    """What a solution returned, as arrays.

    Raises:
        _WrongKind: it is not what the exercise asks for.
    """
    several = len(exercise.results) > 1
    if returned is None:
        raise _WrongKind(f"your function returned nothing; expected {' and '.join(exercise.results)}")
    if several and not (isinstance(returned, (tuple, list)) and len(returned) == len(exercise.results)):
        raise _WrongKind(f"expected {len(exercise.results)} results ({', '.join(exercise.results)}), got {type(returned).__name__}")
    try:
        return [np.asarray(value, dtype=np.float64) for value in (returned if several else [returned])]
    except (TypeError, ValueError):
        raise _WrongKind(f"expected numbers ({', '.join(exercise.results)}), got {html.cut(repr(returned), 80)}") from None


def _difference(exercise: Exercise, found: list[np.ndarray], expected: list[np.ndarray]) -> str:
    """What differs first, in words; "" where nothing does."""
    for name, own, right in zip(exercise.results, found, expected, strict=True):
        if own.shape != right.shape:
            return f"{name}: expected shape {right.shape}, got {own.shape}"
        if not _near(own, right):
            worst = np.unravel_index(np.argmax(np.nan_to_num(np.abs(own - right), nan=np.inf)), right.shape)
            place = f" at {tuple(map(int, worst))}" if right.shape else ""
            return f"{name}{place}: expected {right[worst]:.6g}, got {own[worst]:.6g}"
    return ""


def _near(own: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.isfinite(own).all() and np.abs(own - right).max(initial=0) <= TOLERANCE * max(np.abs(right).max(initial=0), 1e-12))


def _gives(exercise: Exercise, mistake: Mistake, arguments: Mapping[str, Any], found: list[np.ndarray]) -> bool:
    """Whether a mistake gives what was found, infinities and NaN included."""
    return all(
        own.shape == wrong.shape and (_near(own, wrong) or not (np.isfinite(own).all() or np.isfinite(wrong).all()))
        for own, wrong in zip(found, _of(exercise, mistake.solution, arguments), strict=True)
    )
