"""Checks of single settings: each takes what was given, returns it in its own type, or says what is wrong.

A check is a function `value -> value` that raises `Refused` with a phrase for "expected ...". Types are strict where a slip
would change the meaning: the text "false" is never true, `True` is never 1, "1e-5" in quotes is not a number. A whole
float such as 1e3 is a whole number.
"""

from __future__ import annotations

import difflib
import math
import numbers
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fulltune_nb.errors import ConfigError

Check = Callable[[Any], Any]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlevel = 2


class Refused(Exception):
    """A value is not what was expected; the text is the phrase behind "expected"."""


class SettingError(ConfigError):
    """A `ConfigError` that knows which setting it is about, so that a reader of files can add the line.

    Attributes:
        setting: name of the setting.
    """

    def __init__(self, message: str, setting: str = ""):
        super().__init__(message)
        self.setting = setting


def show(value: Any) -> str:
    """`value` and its type, cut to one short line, for messages. Safe for values that refer to themselves."""
    return f"{_short.repr(value)} ({type(value).__name__})"


def nearest(name: object, valid: Iterable[str]) -> str:
    """"Did you mean ...?" with the closest of `valid`, or all of them where none is close."""
    valid = list(valid)
    by_lower = {v.lower(): v for v in valid}
    close = [by_lower[c] for c in difflib.get_close_matches(str(name).lower().replace("-", "_"), by_lower, n=3, cutoff=0.6)]
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Valid names: {', '.join(valid)}."


def run(check: Check, setting: str, value: Any) -> Any:
    """`check(value)`, with a refusal turned into an error that names the setting.

    Raises:
        SettingError: the value is not what was expected.
    """
    try:
        return check(value)
    except Refused as refused:
        hint = ""
        if isinstance(value, str) and (_is_number(value) or value.strip().lower() in ("true", "false", "none")):
            hint = " That is a text: write it without quotes, or convert it first."
        raise SettingError(f"{setting}: expected {refused}, got {show(value)}.{hint}", setting) from None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold: no text, no True or False, not infinite, not NaN."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond 1e308
        return False


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "" if high is None else f" of at most {high}"
    return f" of at least {low}" if high is None else f" from {low} to {high}"


def whole(low: int | None = None, high: int | None = None, also: tuple[int, ...] = ()) -> Check:
    """A whole number within [low, high], or one of `also`."""
    phrase = f"a whole number{_range(low, high)}" + "".join(f" or {a}" for a in also)

    def check(value: Any) -> int:
        if not is_finite(value) or value != int(value):
            raise Refused(phrase)
        value = int(value)
        if value not in also and ((low is not None and value < low) or (high is not None and value > high)):
            raise Refused(phrase)
        return value

    return check


def number(low: float | None = None, high: float | None = None, above: float | None = None, below: float | None = None) -> Check:
    """A finite number within [low, high], larger than `above` and smaller than `below`."""
    phrase = f"a finite number{_range(low, high)}" + (f" larger than {above}" if above is not None else "")
    phrase += f"{' and' if above is not None or low is not None else ''} smaller than {below}" if below is not None else ""

    def check(value: Any) -> float:
        if not is_finite(value):
            raise Refused(phrase)
        value = float(value)
        outside = (low is not None and value < low) or (high is not None and value > high)
        if outside or (above is not None and value <= above) or (below is not None and value >= below):
            raise Refused(phrase)
        return value

    return check


def flag(value: Any) -> bool:
    """True or False; nothing else counts as either."""
    if not isinstance(value, bool):
        raise Refused("True or False")
    return value


def text(value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise Refused("a text that is not empty")
    return value


def choice(*allowed: str) -> Check:
    """One of a few texts."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise Refused(f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}")
        return value

    return check


def optional(check: Check) -> Check:
    """None, or what `check` takes."""

    def check_or_none(value: Any) -> Any:
        if value is None:
            return None
        try:
            return check(value)
        except Refused as refused:
            raise Refused(f"{refused} (or None)") from None

    return check_or_none


def only(allowed: Any, reason: str) -> Check:
    """Exactly `allowed`; `reason` says why nothing else can be."""

    def check(value: Any) -> Any:
        if value is not allowed:
            raise Refused(f"{allowed} ({reason})")
        return value

    return check


def pair(first: Check, second: Check) -> Check:
    """Two values, each with a check of its own."""

    def check(value: Any) -> tuple:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable) or len(value := list(value)) != 2:
            raise Refused("two values, such as [0.9, 0.999]")
        return first(value[0]), second(value[1])

    return check


def patterns(value: Any) -> tuple[str, ...]:
    """Name patterns as a tuple; a single text counts as one pattern."""
    value = (value,) if isinstance(value, str) else value
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise Refused('a list of name patterns, such as ["*.mlp.*"]')
    value = tuple(value)
    if not all(isinstance(v, str) and v for v in value):
        raise Refused('a list of name patterns, such as ["*.mlp.*"], each a text that is not empty')
    return value


def factors(value: Any) -> dict[str, float]:
    """Name pattern -> factor, in the order given."""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) and k for k in value):
        raise Refused('name patterns with a factor each, such as {"*embed*": 0.1}')
    factor = number(low=0.0)
    try:
        return {k: factor(v) for k, v in value.items()}
    except Refused as refused:
        raise Refused(f"name patterns with a factor each, every factor {refused}") from None
