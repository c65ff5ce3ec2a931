"""Patterns from data, matched within a time: a pattern can be written, by mistake or on purpose, that takes years."""

from __future__ import annotations

import regex

SECONDS = 1.0
_LONGEST = 4000
"""Characters of a pattern: reading one takes time too, which nothing bounds."""


def full_match(pattern: str, text: str, seconds: float = SECONDS) -> tuple[float, str]:
    """1.0 where the pattern matches the whole text, blanks at its ends aside, else 0.0; and why it could not be tried, or "".

    Patterns are those of Python's `re` (of the `regex` package, which takes these); `.` matches line breaks too.
    """
    if len(pattern) > _LONGEST:
        return 0.0, f"the pattern has {len(pattern):,} characters, more than the {_LONGEST:,} that are tried"
    try:
        return float(regex.fullmatch(pattern, text.strip(), flags=regex.DOTALL, timeout=seconds) is not None), ""
    except TimeoutError:
        return 0.0, f"the pattern took longer than {seconds:g} s"
    except (regex.error, RecursionError, MemoryError, OverflowError) as error:
        return 0.0, f"the pattern cannot be used: {error}"
