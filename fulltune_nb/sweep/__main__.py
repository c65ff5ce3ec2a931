"""`python -m fulltune_nb.sweep sweep.yaml`: runs a notebook with many parameters.

Exit codes: 0 all runs are done, 1 some failed, 2 bad input, 130 interrupted, 143 terminated, 129 hung up.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune_nb.command_line import Parser, run, start, termination_exits
from fulltune_nb.errors import ConfigError, nearest
from fulltune_nb.experiments.sweep import sweep
from fulltune_nb.files import write_text
from fulltune_nb.html import printable
from fulltune_nb.settings import Check, Refused, SettingError, checked, flag, optional, read_yaml, whole

if TYPE_CHECKING:
    from fulltune_nb.experiments.table import Sweep

EPILOG = """\
the file:
  notebook: 10_experiment.ipynb      a path beside the file, or a notebook of the package
  out_dir: runs/sweep                the command again, with the same folder, repeats only what failed or is new
  jobs: 1                            runs at a time
  rank_by: valid_loss                the number in result.json that says which is best
  maximize: false                    true: the highest is the best
  stop_on_failure: false
  fixed: {model: my/model, data: my/data}     the same in all runs
  grid: {learning_rate: [1e-5, 3e-5], seed: [0, 1]}     every combination; or, in its place:
  runs:
    - {learning_rate: 1e-5, seed: 0}
  or
  random: {runs: 20, seed: 0, space: {learning_rate: {low: 1e-5, high: 1e-3, log: true}, batch_size: [2, 4]}}
"""


def build_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(prog="python -m fulltune_nb.sweep", description="Runs a notebook once for each set of parameters.", epilog=EPILOG)
    parser.add_argument("file", metavar="SWEEP_YAML", help="which notebook, and which parameters")
    parser.add_argument("--jobs", type=int, help="runs at a time, in place of what the file says")
    parser.add_argument("--out-dir", help="where to, in place of what the file says")
    return parser


def _of(kind: type, phrase: str) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, kind):
            raise Refused(phrase)
        return value

    return check


_SETTINGS: dict[str, tuple[Any, Check]] = {
    "notebook": (None, _of(str, "a path")),
    "out_dir": (None, _of(str, "a path")),
    "jobs": (1, whole(1)),
    "rank_by": ("valid_loss", _of(str, "the name of a number")),
    "maximize": (False, flag),
    "stop_on_failure": (False, flag),
    "fixed": (None, optional(_of(dict, "names with values"))),
    "grid": ({}, _of(dict, "names with values")),
    "runs": ([], _of(list, "a list")),
    "random": ({}, _of(dict, "runs, seed and space")),
}
"""Key of the file -> (default, check)."""


def read_sweep(path: Path) -> dict[str, Any]:
    """The arguments of `sweep` that a file says.

    Raises:
        ConfigError: an unknown key, a missing one, or a value of the wrong type; with file and line.
    """
    stored = read_yaml(path)
    for key in stored:
        if key not in _SETTINGS:
            raise ConfigError(f"{stored.where(key)}: unknown setting {key!r}. {nearest(key, _SETTINGS)}")
    ways = [key for key in ("grid", "runs", "random") if key in stored]
    if len(ways) != 1:
        found = " and ".join(ways) or "none"
        raise ConfigError(f"{path}: expected one of grid (every combination), runs (a list) and random (a space), found {found}.")
    try:
        values = {key: checked(check, key, stored.get(key, default)) for key, (default, check) in _SETTINGS.items()}
    except SettingError as error:
        raise stored.placed(error) from None
    beside, points = path.parent / values["notebook"], _points(values, ways[0], str(path))
    arguments = {key: values[key] for key in ("out_dir", "jobs", "rank_by", "maximize", "stop_on_failure")}
    return {**arguments, "notebook": beside if beside.is_file() else Path(values["notebook"]), "grid": points}


def _points(values: dict[str, Any], way: str, path: str) -> Any:
    """The grid, or the list of parameters, with what is the same in all runs."""
    fixed, given = values["fixed"] or {}, values[way]
    if way == "grid":
        return {**{name: [value] for name, value in fixed.items()}, **given}
    if way == "runs":
        return [{**fixed, **point} if isinstance(point, dict) else point for point in given]
    from fulltune_nb.experiments.space import random_points

    for key in given:
        if key not in (known := ("runs", "seed", "space")):
            raise ConfigError(f"{path}: random: unknown setting {key!r}. {nearest(key, known)}")
    return [{**fixed, **point} for point in random_points(given.get("space"), given.get("runs"), given.get("seed", 0))]


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = build_parser().parse_args(argv)

    def work() -> int:
        settings = read_sweep(Path(arguments.file).expanduser())
        given = {name: getattr(arguments, name) for name in ("jobs", "out_dir") if getattr(arguments, name) is not None}
        with termination_exits():
            result = sweep(**{**settings, **given})
        print(printable(f"page: {write_page(result)}"))
        return 0 if len(result.done) == len(result) else 1

    return run(work)


def write_page(result: Sweep) -> Path:
    """The table and the plot as one HTML file in the sweep's folder."""
    path = result.out_dir / "sweep.html"
    head = '<!doctype html><meta charset="utf-8"><title>Sweep</title><body style="font-family:sans-serif">'
    write_text(path, f"{head}{result._repr_html_()}\n")
    return path


if __name__ == "__main__":
    start(main)
