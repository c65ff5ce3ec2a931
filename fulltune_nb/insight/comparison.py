"""Runs side by side: their curves in one plot, where their settings differ, and what came out."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fulltune_nb.errors import CheckpointError, ConfigError, MissingDependencyError
from fulltune_nb.frames import frame
from fulltune_nb.html import NO_MATH, counted, cut, esc, in_one_unit, more, printable, table
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.history import History, RunSummary
from fulltune_nb.training.run import CONFIG_FILE, METRICS_FILE, RESULT_FILE, read_metrics
from fulltune_nb.training.trainer import Trainer

if TYPE_CHECKING:
    from fulltune_nb.chart import LossChart
    from fulltune_nb.plots import Axes

_WORDS = {
    "steps": "steps taken",
    "last_loss": "training loss of the last step",
    "best_valid_loss": "best validation loss",
    "last_valid_loss": "last validation loss",
    "test_loss": "test loss at the end",
    "tokens_per_second": "trained tokens a second",
    "peak_memory": "most memory in use",
    "seconds": "seconds in steps",
}
"""Figures of the table, as it calls them."""
_MEANINGS = {setting.name: setting.metadata["help"].replace("`", "") for setting in dataclasses.fields(TrainConfig)}
_RESULTS = 12  # entries of result.json that the table shows
_SETTING = 120  # characters of a value


@dataclass
class ComparedRun:
    """What a run's folder tells; what is missing there is empty, and noted."""

    name: str
    path: Path | None
    config: dict[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=History)
    result: dict[str, Any] = field(default_factory=dict)
    """Of `result.json`, where there is one."""
    notes: list[str] = field(default_factory=list)

    def results(self) -> dict[str, Any]:
        """The figures of the table, None for what is not known; then single values of `result.json`, under `result.<name>`."""
        summary = RunSummary.of(self.history)
        last, best, end = summary.last_evals, summary.best_evals, summary.evals_at_end
        return {
            "steps": summary.steps,
            "last_loss": summary.last_loss,
            "best_valid_loss": best["valid"].loss if "valid" in best else None,
            "last_valid_loss": last["valid"].loss if "valid" in last else None,
            "test_loss": end["test"].loss if "test" in end else None,
            "tokens_per_second": summary.tokens_per_second,
            "peak_memory": summary.peak_memory,
            "seconds": summary.seconds,
            **{f"result.{name}": value for name, value in _flat(self.result).items()},
        }


class Comparison:
    """What `compare` returns.

    Attributes:
        runs: a `ComparedRun` for each folder, in their order.
    """

    def __init__(self, runs: Sequence[ComparedRun]):
        self.runs = list(runs)

    @property
    def differences(self) -> dict[str, list[Any]]:
        """Setting -> its value in each run, for those that are not the same in all; a run without the setting has None."""
        names = dict.fromkeys(name for run in self.runs for name in run.config)
        values = {name: [run.config.get(name) for run in self.runs] for name in names}
        return {name: own for name, own in values.items() if any(value != own[0] for value in own[1:])}

    @property
    def results(self) -> dict[str, list[Any]]:
        """Figure -> its value in each run: from the metrics, and single values of `result.json`, under `result.<name>`."""
        found = [run.results() for run in self.runs]
        names = dict.fromkeys(name for own in found for name in own)
        return {name: [own.get(name) for own in found] for name in names}

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line for each run: its results, then the settings that differ.

        Raises `MissingDependencyError` without pandas.
        """
        columns = {"run": [run.name for run in self.runs], **self.results, **{f"config.{k}": v for k, v in self.differences.items()}}
        return frame(columns)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Training losses, smoothed, and validation losses of all runs, on `ax` or a new figure."""
        from fulltune_nb.plots import plot_runs

        return plot_runs([(run.name, run.history) for run in self.runs], ax, training=True)

    def chart(self) -> LossChart:
        """The same and more, to look around in: a `LossChart` of all runs."""
        from fulltune_nb.chart import LossChart

        return LossChart([(run.name, run.history) for run in self.runs])

    def _ipython_display_(self) -> None:
        try:
            from fulltune_nb.chart import show
        except MissingDependencyError as error:
            warnings.warn(printable(error), stacklevel=2)
            raise NotImplementedError from error  # by which IPython goes on to `_repr_html_`
        show(self.chart(), self._tables_html(), repr(self))

    def _own_results(self) -> list[str]:
        """Entries of `result.json` that are not the same in all runs, where there are several, nor said by one above them."""
        told, found = [], []
        for name, values in self.results.items():
            differs = len(values) == 1 or any(value != values[0] for value in values)
            if name.startswith("result.") and differs and values not in told:
                found.append(name)
            told.append(values)
        return found

    def __repr__(self) -> str:
        return f"Comparison({counted(len(self.runs), 'run')}, {len(self.differences)} settings differ)"

    def _repr_html_(self) -> str:
        try:
            from fulltune_nb.plots import picture_html
        except MissingDependencyError as error:
            picture = f"<div>{esc(error)}</div>"
        else:
            picture = picture_html(self.plot, f"training and validation losses of {counted(len(self.runs), 'run')}")
        return picture + self._tables_html()

    def _tables_html(self) -> str:
        names, results = [run.name for run in self.runs], self.results
        own = self._own_results()
        shown = [name for name in results if not name.startswith("result.")] + own[:_RESULTS]
        hidden = more(len(results) - len(shown), "entries of result.json, in .results")
        rows = [(_in_words(name), *_readable(name, results[name])) for name in shown]
        given = {name: [_text(value, "not set") for value in values] for name, values in self.differences.items()}
        differing = [(name, *values, _MEANINGS.get(name, "")) for name, values in given.items()]
        headers, caption = ("setting", *names, "meaning"), "Settings that differ"
        settings = table(headers, differing, caption) if differing else "<div>All settings are the same.</div>"
        notes = "".join(f"<div>⚠ {esc(run.name)}: {esc(note)}</div>" for run in self.runs for note in run.notes)
        return f'<div class="{NO_MATH}">{table(("", *names), rows, "Results")}{hidden}{settings}{notes}</div>'


def compare(runs: Sequence[str | os.PathLike | Trainer] | Mapping[str, str | os.PathLike | Trainer]) -> Comparison:
    """Runs side by side, from their folders; nothing of a model is loaded.

    Read are `metrics.jsonl`, `config.yaml` and, where it is there, `result.json`.

    Args:
        runs: the `run_dir` of each, or trainers; as a list, or under names of your own.

    Raises:
        ConfigError: not a list of at least one, or names with one each.
        CheckpointError: a folder that holds no run.
    """
    if isinstance(runs, Mapping) and runs:
        found = compare(list(runs.values())).runs
        return Comparison([dataclasses.replace(run, name=str(name)) for name, run in zip(runs, found, strict=True)])
    if isinstance(runs, (str, os.PathLike)) or not isinstance(runs, Sequence) or not runs:
        raise ConfigError(f'compare: expected a list of run folders, such as ["runs/a", "runs/b"], got {runs!r:.80}.')
    paths = [None if isinstance(run, Trainer) else Path(run).expanduser() for run in runs]
    return Comparison([
        _of_trainer(run, number) if path is None else _read(path, _name(path, paths))
        for number, (run, path) in enumerate(zip(runs, paths, strict=True), 1)
    ])


def _of_trainer(trainer: Trainer, number: int) -> ComparedRun:
    name = trainer.run_dir.name if trainer.run_dir else f"trainer {number}"
    return ComparedRun(name, trainer.run_dir, trainer.config.to_dict(), History(trainer.history))


def _name(path: Path, paths: Sequence[Path | None]) -> str:
    """The folder's name, with as much of what stands before it as tells it from the others."""
    others = [other for other in paths if other is not None and other != path]
    parts = path.resolve().parts
    for count in range(1, len(parts)):
        if all(other.resolve().parts[-count:] != parts[-count:] for other in others):
            return "/".join(parts[-count:])
    return str(path)


def _read(path: Path, name: str) -> ComparedRun:
    run = ComparedRun(name, path)
    there = [file for file in (METRICS_FILE, CONFIG_FILE, RESULT_FILE) if (path / file).is_file()]
    if not there:
        what = "no such folder" if not path.is_dir() else f"the folder holds neither {METRICS_FILE} nor {CONFIG_FILE} nor {RESULT_FILE}"
        raise CheckpointError(f"{path}: {what}. Give the run_dir of a Trainer.")
    run.notes += [f"{file} is missing" for file in (METRICS_FILE, CONFIG_FILE) if file not in there]
    run.history, notes = read_metrics(path)
    run.notes += notes
    for file, attribute, parse in ((CONFIG_FILE, "config", yaml.safe_load), (RESULT_FILE, "result", json.loads)):
        if file in there:
            try:
                setattr(run, attribute, _mapping(parse((path / file).read_text(encoding="utf-8"))))
            except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
                run.notes.append(f"{file} cannot be read: {error}")
    return run


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected names and values, found {type(value).__name__}")
    return {str(key): own for key, own in value.items()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Single values, those within others under `outer.inner`; lists and the settings, which have a table of their own, are left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= {} if key == "config" else _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (str, int, float)) or value is None:
            found[f"{prefix}{key}"] = value
    return found


def _in_words(name: str) -> str:
    """What a figure is called in the table."""
    own = name.removeprefix("result.")
    return _WORDS.get(name) or f"{own.replace('.', ', ').replace('_', ' ')}, by result.json"


def _readable(name: str, values: Sequence[Any]) -> list[str]:
    """A figure of each run, all in one unit, with ✓ at the lowest loss where they differ."""
    if name.endswith("peak_memory") and all(value is None or type(value) in (int, float) for value in values):
        sizes = iter(in_one_unit([value for value in values if value is not None]))
        return ["not known" if value is None else next(sizes) for value in values]
    losses = [value for value in values if value is not None and value == value] if name in _WORDS and name.endswith("loss") else []
    best = min(losses) if len(set(losses)) > 1 else None
    return [_text(value, "not known") + (" ✓ lowest" if best is not None and value == best else "") for value in values]


def _text(value: Any, missing: str) -> str:
    if value is None:
        return missing
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return cut(str(value), _SETTING)
