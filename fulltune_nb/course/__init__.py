"""Checks of what students code: `ft.course.check("03.adamw", my_adamw)` says pass, or what differs and a hint.

    from fulltune_nb import course

    course.exercises()                       # their names and what each asks for
    course.check("01.loss", my_cross_entropy)

A function is called with a few small inputs (numpy arrays), and what it returns is compared with a reference. Where it equals what a
typical mistake gives, the hint is about that mistake.
"""

from __future__ import annotations

from fulltune_nb.course.check import Verdict, check, exercises
from fulltune_nb.course.exercise import Exercise

__all__ = ["Exercise", "Verdict", "check", "exercises"]
