"""Spaces of parameters, and points drawn from them by chance."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from fulltune_nb.errors import ConfigError
from fulltune_nb.experiments.parameters import digest
from fulltune_nb.experiments.ranking import is_number
from fulltune_nb.settings import show, whole_number

Space = Mapping[str, Any]
"""Name -> a list of choices, a range `{"low": 1e-5, "high": 1e-2, "log": True}` with both ends (whole numbers where both are),
or a single value, the same in all runs."""
_TRIES = 100  # for a point that was not drawn before


def is_range(value: Any) -> bool:
    """Whether a value of a space is a range, and not a choice or a dict that a notebook is to be given."""
    return isinstance(value, Mapping) and {"low", "high"} <= set(value) <= {"low", "high", "log"}


def is_whole(span: Mapping[str, Any]) -> bool:
    """Whether a range is of whole numbers."""
    return isinstance(span["low"], int) and isinstance(span["high"], int)


def check_space(space: Space) -> None:
    """
    Raises:
        ConfigError: no names with values, a range without two numbers in order (above 0 where it is logarithmic), an empty list, or a
            value that no notebook can be given.
    """
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(f"space: expected {{name: [choices] or {{'low': 1e-5, 'high': 1e-2, 'log': True}}}}, got {str(space)[:80]!r}.")
    for name, value in space.items():
        if is_range(value):
            low, high, log = value["low"], value["high"], value.get("log", False)
            if not (is_number(low) and is_number(high) and math.isfinite(low) and math.isfinite(high) and low < high):
                raise ConfigError(f"space: {name}: expected a range from a lower to a higher number, got {show(low)} to {show(high)}.")
            if not isinstance(log, bool):
                raise ConfigError(f"space: {name}: log: expected True or False, got {show(log)}.")
            if log and low <= 0:
                raise ConfigError(f"space: {name}: expected a range above 0, as it has log, got {show(low)} to {show(high)}.")
            digest({name: low})
        else:
            choices = value if isinstance(value, (list, tuple)) else [value]
            if not choices:
                raise ConfigError(f"space: {name}: expected choices, got an empty list.")
            for choice in choices:
                digest({name: choice})


def random_points(space: Space, runs: int, seed: int = 0) -> list[dict[str, Any]]:
    """Points for a random search, the grid of a sweep: `ft.sweep(notebook, random_points(space, 20), out_dir)`.

    Args:
        space: see `Space`. A range is drawn from evenly, by its logarithm with `log`.
        runs: how many, all different.
        seed: the same gives the same points, of which more runs are a continuation.

    Raises:
        ConfigError: the space cannot be used, or has not that many points.
    """
    check_space(space)
    runs, draw = whole_number("random_points: runs", runs, 1), random.Random(whole_number("random_points: seed", seed, 0))
    points: dict[str, dict[str, Any]] = {}
    for _ in range(runs):
        for _ in range(_TRIES):
            point = {name: _draw(value, draw) for name, value in space.items()}
            if (key := digest(point)) not in points:
                points[key] = point
                break
        else:
            raise ConfigError(f"random_points: expected {runs} different points, of this space {len(points)} were found. Ask for fewer.")
    return list(points.values())


def _draw(value: Any, draw: random.Random) -> Any:
    if not is_range(value):
        return draw.choice(value) if isinstance(value, (list, tuple)) else value
    low, high = value["low"], value["high"]
    if is_whole(value) and not value.get("log"):
        return draw.randint(low, high)
    if value.get("log"):
        drawn = math.exp(draw.uniform(math.log(low), math.log(high)))
    else:
        drawn = draw.uniform(low, high)
    drawn = round(drawn) if is_whole(value) else float(f"{drawn:.4g}")
    return type(drawn)(min(max(drawn, low), high))  # rounding, and the logarithm's, may lead beyond an end: 0.99999 would be 1.0
