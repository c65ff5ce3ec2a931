"""`python -m fulltune_nb.sweep sweep.yaml`: runs a notebook with many parameters.

Exit codes: 0 all runs are done, 1 some failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fulltune_nb import settings as checks
from fulltune_nb.command_line import Parser, run, start
from fulltune_nb.errors import ConfigError, nearest
from fulltune_nb.experiments.sweep import sweep
from fulltune_nb.settings import read_yaml

KEYS = ("notebook", "out_dir", "jobs", "stop_on_failure", "fixed", "grid", "runs")
EPILOG = """\
the file:
  notebook: 10_experiment.ipynb      a path beside the file, or a notebook of the package
  out_dir: runs/sweep                the command again, with the same folder, repeats only what failed or is new
  jobs: 1                            runs at a time
  stop_on_failure: false
  fixed: {model: my/model, data: my/data}     the same in all runs
  grid: {learning_rate: [1e-5, 3e-5], seed: [0, 1]}     every combination; or, in its place:
  runs:
    - {learning_rate: 1e-5, seed: 0}
"""


def build_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(prog="python -m fulltune_nb.sweep", description="Runs a notebook once for each set of parameters.", epilog=EPILOG)
    parser.add_argument("file", metavar="SWEEP_YAML", help="which notebook, and which parameters")
    parser.add_argument("--jobs", type=int, help="runs at a time, in place of what the file says")
    parser.add_argument("--out-dir", help="where to, in place of what the file says")
    return parser


def read_sweep(path: Path) -> dict[str, Any]:
    """The arguments of `sweep` that a file says.

    Raises:
        ConfigError: an unknown key, a missing one, or a value of the wrong type; with file and line.
    """
    settings = read_yaml(path)
    for key in settings:
        if key not in KEYS:
            raise ConfigError(f"{settings.where(key)}: unknown setting {key!r}. {nearest(key, KEYS)}")
    for key in ("notebook", "out_dir"):
        if not isinstance(settings.get(key), str):
            raise ConfigError(f"{settings.where(key)}: {key}: expected a path, got {settings.get(key)!r}.")
    if ("grid" in settings) == ("runs" in settings):
        found = "both" if "grid" in settings else "none"
        raise ConfigError(f"{path}: expected one of grid (every combination) and runs (a list), found {found}.")
    fixed = settings.get("fixed") or {}
    points = settings["grid"] if "grid" in settings else settings["runs"]
    for key, value, kind in (("fixed", fixed, dict), ("grid", points, dict) if "grid" in settings else ("runs", points, list)):
        if not isinstance(value, kind):
            raise ConfigError(f"{settings.where(key)}: {key}: expected {'names with values' if kind is dict else 'a list'}, got {value!r}.")
    beside = path.parent / settings["notebook"]
    return {
        "notebook": beside if beside.is_file() else Path(settings["notebook"]),
        "grid": _with_fixed(points, fixed),
        "out_dir": settings["out_dir"],
        "jobs": settings.get("jobs", 1),
        "stop_on_failure": checks.run(checks.flag, "stop_on_failure", settings.get("stop_on_failure", False)),
    }


def _with_fixed(points: Any, fixed: dict[str, Any]) -> Any:
    if isinstance(points, dict):
        return {**{name: [value] for name, value in fixed.items()}, **points}
    return [{**fixed, **point} if isinstance(point, dict) else point for point in points]


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = build_parser().parse_args(argv)

    def work() -> int:
        settings = read_sweep(Path(arguments.file).expanduser())
        given = {name: getattr(arguments, name) for name in ("jobs", "out_dir") if getattr(arguments, name) is not None}
        result = sweep(**{**settings, **given})
        print(f"page: {write_page(result)}")
        return 0 if len(result.done) == len(result) else 1

    return run(work)


def write_page(result: Any) -> Path:
    """The table and the plot as one HTML file in the sweep's folder."""
    from fulltune_nb.files import write_text

    path = result.out_dir / "sweep.html"
    head = '<!doctype html><meta charset="utf-8"><title>Sweep</title><body style="font-family:sans-serif">'
    write_text(path, f"{head}{result._repr_html_()}\n")
    return path


if __name__ == "__main__":
    start(main)
