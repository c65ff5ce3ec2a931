"""The runs of a sweep: which parameters each gets, checked against the notebook, and a folder's name for it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulltune_nb.errors import ConfigError
from fulltune_nb.experiments.parameters import assigned
from fulltune_nb.training.checks import nearest

_NAME_LENGTH = 60  # characters of a folder's name that say what is in it; some systems allow 255 in all


def points_of(grid: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One dict of parameters for each run.

    Args:
        grid: name -> list of values, of which every combination is a run (a single value is the same in all), or a list of
            dicts, each a run.

    Raises:
        ConfigError: neither of the two, nothing to run, the same run twice, or a value that a notebook cannot be given.
    """
    if isinstance(grid, Mapping):
        values = [value if isinstance(value, (list, tuple)) else [value] for value in grid.values()]
        points = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*values)]
    elif isinstance(grid, Iterable) and not isinstance(grid, (str, bytes)):
        points = [dict(point) if isinstance(point, Mapping) else point for point in grid]
    else:
        points = [grid]
    if not all(isinstance(point, dict) for point in points):
        wrong = next(point for point in points if not isinstance(point, dict))
        raise ConfigError(f"sweep: expected {{name: [values]}} or a list of dicts of parameters, got {str(wrong)[:80]!r} in its place.")
    if not points:
        raise ConfigError("sweep: there is nothing to run: the list is empty, or a name of the grid has no value.")
    seen: dict[str, int] = {}
    for number, point in enumerate(points):
        key = digest(point)
        if key in seen:
            raise ConfigError(f"sweep: runs {seen[key] + 1} and {number + 1} have the same parameters: {point}. Take one out.")
        seen[key] = number
    return points


def digest(point: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the parameters, whatever their order.

    Raises:
        ConfigError: a value is nothing that JSON can hold, so that no notebook can be given it, and no file remember it.
    """
    for name, value in point.items():
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise ConfigError(f"sweep: {name!r} is no parameter's name.")
        if not _is_plain(value):
            raise ConfigError(
                f"sweep: {name}: expected a number, text, True, False, None, or a list or dict of these, got {str(value)[:80]!r} "
                f"({type(value).__name__})."
            )
    return hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def varied(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the parameters that are not the same in all runs; all of them where there is one run only."""
    names = list(dict.fromkeys(name for point in points for name in point))
    if len(points) == 1:
        return names
    return [name for name in names if len({json.dumps(point.get(name), sort_keys=True) for point in points}) > 1]


def label(point: Mapping[str, Any], names: Iterable[str]) -> str:
    """What tells a run from the others, such as `learning_rate=0.001, seed=1`."""
    return ", ".join(f"{name}={_short(point[name])}" for name in names if name in point) or "no parameters"


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def folder_name(point: Mapping[str, Any]) -> str:
    """A name for a run's folder: readable, the same for the same parameters, safe on every system."""
    readable = re.sub(r"[^A-Za-z0-9._=+,-]+", "_", label(point, point).replace(", ", ","))[:_NAME_LENGTH].strip("._")
    return f"{readable or 'run'}-{digest(point)[:8]}"


def parameter_names(notebook: Path) -> list[str]:
    """Names that a notebook's cell tagged `parameters` assigns.

    Raises:
        ConfigError: no notebook, or one without such a cell: papermill's values would be overwritten by the notebook's own.
    """
    import nbformat

    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except Exception as error:  # nbformat raises many kinds here, json's among them
        raise ConfigError(f"{notebook} cannot be read as a notebook: {str(error)[:200]}") from error
    tagged = [cell for cell in cells if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        raise ConfigError(f"{notebook} has no cell tagged 'parameters'. Give the cell with its settings this tag.")
    return list(dict.fromkeys(assigned(tagged[0].source)))


def check_names(points: Sequence[Mapping[str, Any]], known: Sequence[str], notebook: Path) -> None:
    """Refuses parameters that the notebook does not have, before anything is run.

    Raises:
        ConfigError: the nearest valid name is in the message.
    """
    for name in dict.fromkeys(name for point in points for name in point):
        if name not in known:
            raise ConfigError(f"{notebook} has no parameter {name!r}. {nearest(name, known)}")
