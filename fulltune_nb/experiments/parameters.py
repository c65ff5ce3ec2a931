"""Parameters of notebooks: what one was given, as checked settings, and what each run of a sweep is given.

Papermill puts values into a cell of their own, behind the notebook's `parameters` cell. Two things are lost on the way: a name
that the notebook does not know is set all the same and changes nothing, and `-p mask_prompt false` arrives as the text
"false", which Python takes for true. Here names are checked, and a text given where no text belongs is read as YAML reads it.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulltune_nb import html
from fulltune_nb.errors import ConfigError, nearest, optional_import
from fulltune_nb.files import is_empty
from fulltune_nb.settings import as_typed, show
from fulltune_nb.training.config import TrainConfig, without_rival
from fulltune_nb.training.run_files import check_holds_no_run

OWN = ("model", "data", "run_dir", "export_dir")
"""Parameters besides the fields of `TrainConfig`; all are texts, "" standing for "not given"."""


@dataclass(frozen=True)
class Experiment:
    """What one run is to do.

    Attributes:
        model: a folder or a hub id, "" where not given.
        data: as `load_data` takes it, "" where not given.
        run_dir: where the run is written.
        export_dir: where the trained model goes; "" for nowhere.
        config: the training settings.
        given: names that were given a value, in the order of the cell.
    """

    model: str
    data: str
    run_dir: str
    export_dir: str
    config: TrainConfig
    given: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        named = [(name, getattr(self, name) or "not given") for name in OWN]
        return html.facts("Experiment", named) + self.config._repr_html_()


def read_experiment(namespace: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Experiment:
    """The settings that a notebook's parameters say.

    A parameter that is None has its default: that of `defaults`, else that of `TrainConfig`.

    Args:
        namespace: `globals()` of the notebook, of which the parameters cell and papermill's are looked at; or a dict of
            parameters, all of whose names count.
        defaults: settings by name to use in place of `TrainConfig`'s defaults. Of their `warmup` a run with fewer `iters` than theirs
            has the same share.

    Raises:
        ConfigError: an unknown name (the nearest valid one is named), a value of the wrong type or range, or an `export_dir` that is
            not empty.
        CheckpointError: `run_dir` holds a run.
    """
    fields = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}
    names = given_names(namespace)
    for name in names:
        if name not in fields and name not in OWN:
            raise ConfigError(f"unknown parameter {name!r}. {nearest(name, [*OWN, *fields])}")
    values = {name: as_typed(namespace[name], fields[name]) for name in names if name in fields}
    settings = {name: value for name, value in values.items() if value is not None}
    usual = without_rival(defaults or {}, settings)
    if settings.get("optimizer", usual.get("optimizer")) != usual.get("optimizer"):
        usual.pop("optimizer_config", None)
    own = dict.fromkeys(OWN, "")
    for name in own.keys() & names:
        value = namespace[name]
        if value is not None and not isinstance(value, (str, Path)):
            raise ConfigError(f"{name}: expected a text, got {show(value)}.")
        own[name] = str(value or "")
    own["run_dir"] = own["run_dir"] or str(unused(Path("runs", "experiment")))
    check_holds_no_run(Path(own["run_dir"]).expanduser())
    if own["export_dir"] and (place := Path(own["export_dir"]).expanduser()).exists() and not is_empty(place):
        raise ConfigError(f"export_dir: expected a new or empty folder, {place} has files in it.")
    config = TrainConfig.from_dict({**usual, **settings})
    if "iters" in settings and "warmup" not in settings and config.iters < usual.get("iters", 0):
        if config.warmup >= 1:
            config = dataclasses.replace(config, warmup=config.warmup * config.iters // usual["iters"])
    return Experiment(**own, config=config, given=tuple(names))


def given_names(namespace: Mapping[str, Any]) -> list[str]:
    """Names of the parameters in a notebook's namespace: those that its parameters cells assign.

    In IPython, the latest cell of nothing but annotated assignments counts, and the latest that papermill put in; elsewhere
    every public name of the mapping.
    """
    cells = namespace.get("In")
    if not isinstance(cells, list):
        return [name for name in namespace if not name.startswith("_")]
    found: dict[str, None] = {}
    for is_wanted in (_has_only_annotated_assignments, lambda cell: cell.lstrip().startswith("# Parameters")):
        latest = next((cell for cell in reversed(cells) if isinstance(cell, str) and is_wanted(cell)), "")
        found.update(dict.fromkeys(_assigned(latest)))
    return [name for name in found if name in namespace]


def _has_only_annotated_assignments(source: str) -> bool:
    body = _statements(source)
    return bool(body) and all(isinstance(node, ast.AnnAssign) for node in body)


def _assigned(source: str) -> Iterator[str]:
    """Names that a cell's statements assign at its top level."""
    for node in _statements(source):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError):  # a cell with IPython's magic
        return []


def unused(path: Path) -> Path:
    """The path, or with -2, -3 ... if something is there: running a cell again overwrites nothing."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


# -- the runs of a sweep

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
    with optional_import("Reading a notebook", "notebook"):
        import nbformat
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except Exception as error:  # nbformat raises many kinds here, json's among them
        raise ConfigError(f"{notebook} cannot be read as a notebook: {str(error)[:200]}") from error
    tagged = [cell for cell in cells if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", [])]
    if not tagged:
        raise ConfigError(f"{notebook} has no cell tagged 'parameters'. Give the cell with its settings this tag.")
    return list(dict.fromkeys(_assigned(tagged[0].source)))


def check_names(points: Sequence[Mapping[str, Any]], known: Sequence[str], notebook: Path) -> None:
    """Refuses parameters that the notebook does not have, before anything is run.

    Raises:
        ConfigError: the nearest valid name is in the message.
    """
    for name in dict.fromkeys(name for point in points for name in point):
        if name not in known:
            raise ConfigError(f"{notebook} has no parameter {name!r}. {nearest(name, known)}")
