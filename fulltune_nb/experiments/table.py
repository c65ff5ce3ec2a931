"""The runs of a sweep side by side: ranked, with means over seeds, as a table and as plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune_nb import html
from fulltune_nb.errors import ConfigError, MissingDependencyError, listed
from fulltune_nb.experiments.parameters import label, varied
from fulltune_nb.experiments.ranking import SEED, Ranking, numbers_of, over_seeds
from fulltune_nb.experiments.runs import Run
from fulltune_nb.frames import frame
from fulltune_nb.panels.progress import clock

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEST = Ranking("test_loss")
_ENDED = {"done": 0, "pruned": 1, "failed": 2}


class Sweep(Sequence[Run]):
    """The runs of a sweep, the best first, then those without a value to rank by.

    Runs whose losses are means over other tokens (with another `mask_prompt`, say) say nothing about each other: they stand in groups,
    each ranked by itself.

    Attributes:
        out_dir: where their files are.
        runs: all runs, in this order.
        ranking: what they are ranked by.
        notes: lines to announce.
    """

    def __init__(self, runs: Sequence[Run], out_dir: Path, notes: Sequence[str] = (), ranking: Ranking | None = None):
        self.out_dir = out_dir
        self.ranking = ranking or Ranking()
        results = {id(run): run.result if run.status == "done" else {} for run in runs}
        self._values = {id(run): self.ranking.value(results[id(run)]) for run in runs}
        self._tokens = {id(run): self.ranking.tokens(results[id(run)]) for run in runs}
        self._tests = {id(run): _TEST.value(results[id(run)]) for run in runs}
        self.runs = sorted(runs, key=self._order)
        self._names = varied([run.parameters for run in runs])
        self.notes = [*notes, *self._what_is_not_ranked(results)]

    def _order(self, run: Run) -> tuple[float, ...]:
        value, tokens = self._values[id(run)], self._tokens[id(run)]
        return _ENDED.get(run.status, 3), value is None, -(tokens or 0), self.ranking.order(value)

    def _what_is_not_ranked(self, results: dict[int, dict[str, Any]]) -> Iterator[str]:
        name, without = self.ranking.name, [run for run in self.done if self._values[id(run)] is None]
        if without:
            there = dict.fromkeys(number for run in without for number in numbers_of(results[id(run)]))
            has = f"they have {listed(list(there))}" if there else "they have no numbers at all"
            yield f"{len(without)} of {len(self.done)} runs that are done have no {name} in result.json and are not ranked; {has}."
        if len(self.groups) > 1:
            parts = [f"{tokens or 0:,} tokens: {listed([run.label for run in runs], 3, ' | ')}" for tokens, runs in self.groups.items()]
            yield (
                f"{name} is a mean over other tokens in some runs, which cannot be compared by it: {'; '.join(parts)}. Each group is ranked"
                " by itself. Rank by a number that means the same in all, such as a share of right answers."
            )

    def __getitem__(self, index):
        return self.runs[index]

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def done(self) -> list[Run]:
        """Runs with a result."""
        return [run for run in self.runs if run.status == "done"]

    @property
    def failed(self) -> list[Run]:
        """Runs that failed; `.reason` says why, `.executed` is the notebook up to there."""
        return [run for run in self.runs if run.status == "failed"]

    @property
    def groups(self) -> dict[int | None, list[Run]]:
        """Trained tokens that the loss is a mean over -> the runs with so many, the best first; None where results do not tell, or
        where what is ranked by is no loss."""
        found: dict[int | None, list[Run]] = {}
        for run in self.runs:
            if self._values[id(run)] is not None:
                found.setdefault(self._tokens[id(run)], []).append(run)
        return found

    @property
    def best(self) -> Run | None:
        """The best run by what they are ranked by, or None where none has it.

        Raises:
            ConfigError: the runs are of several `groups`, which have a best run each.
        """
        groups = list(self.groups.values())
        if len(groups) > 1:
            raise ConfigError(
                f"best: {self.ranking.name} is a mean over other tokens in some runs, as with another mask_prompt or other validation rows,"
                f" so it does not say which of {len(groups)} groups is the best. Take one of .groups, or rank_by a number that means the"
                " same in all."
            )
        return groups[0][0] if groups else None

    def rows(self) -> Iterator[dict[str, Any]]:
        """What the table shows, a dict for each run: varied parameters, status, the number ranked by, its tokens, seconds, test loss."""
        for run in self.runs:
            own = {name: run.parameters.get(name) for name in self._names}
            ranked = {self.ranking.name: self._values[id(run)], "tokens": self._tokens[id(run)]}
            yield {**own, "status": run.status, **ranked, "seconds": run.seconds, "test_loss": self._tests[id(run)]}

    def over_seeds(self) -> list[dict[str, Any]]:
        """Mean and standard deviation of the number ranked by, over runs that differ in `seed` alone; the best mean first.

        A dict for each setting: `parameters` (without the seed), `tokens`, `runs`, `mean`, `sd` (None of fewer than two runs).
        """
        found = [(run.parameters, self._tokens[id(run)], value) for run in self.runs if (value := self._values[id(run)]) is not None]
        return over_seeds(found, self.ranking)

    def to_frame(self):
        """A pandas DataFrame of `rows()`, with the reason of a failure and the folder.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        rows = zip(self.rows(), self.runs, strict=True)
        return frame({**row, "reason": run.reason, "folder": str(run.attempt_folder)} for row, run in rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Curves of all runs that are done, on matplotlib axes: see `fulltune_nb.plots.plot_runs`."""
        from fulltune_nb.plots import plot_runs

        return plot_runs({label(run.parameters, self._names): run.history for run in self.done}, ax)

    def plot_parameters(self) -> Figure:
        """The number ranked by against each varied parameter, a point for each run and a line through the means."""
        from fulltune_nb.experiments.figures import plot_parameters

        return plot_parameters(self._points(), self._plotted(), self.ranking.name)

    def plot_parallel(self, ax: Axes | None = None) -> Axes:
        """Parallel coordinates: an upright axis for each varied parameter and the number ranked by, a line for each run."""
        from fulltune_nb.experiments.figures import plot_parallel

        names = self._plotted(with_seed=True)
        return plot_parallel(self._points(), names, self.ranking.name, self.ranking.maximize, ax)

    def _plotted(self, with_seed: bool = False) -> list[str]:
        return [name for name in self._names if with_seed or name != SEED]

    def _points(self) -> list[tuple[dict[str, Any], float]]:
        return [(run.parameters, value) for run in self.runs if (value := self._values[id(run)]) is not None]

    def summary(self) -> str:
        """How many came to what."""
        counts = {status: sum(run.status == status for run in self.runs) for status in _ENDED}
        left = len(self) - sum(counts.values())
        pruned = [f"{counts['pruned']} pruned"] if counts["pruned"] else []
        parts = [f"{counts['done']} done", *pruned, f"{counts['failed']} failed", *([f"{left} not started"] if left else [])]
        return html.printable(f"{len(self)} runs in {self.out_dir}: {', '.join(parts)}")

    def text(self) -> str:
        """The table as text, means over seeds where there are several, then the reasons."""
        lines = [*_aligned(self._headers(), self._cells())]
        if seeds := self._seed_cells():
            lines += ["", *_aligned(self._seed_headers(), seeds), ""]
        reasons = [f"failed: {run.label}: {run.outcome()}\n        {run.attempt_folder}" for run in self.failed]
        return html.printable("\n".join([*lines, *reasons, *self._notes(), self.summary()]))

    def _headers(self) -> list[str]:
        return ["run", "status", self.ranking.name, *(["of tokens"] if any(self.groups) else []), "time", "test_loss"]

    def _cells(self) -> Iterator[list[str]]:
        for row, run in zip(self.rows(), self.runs, strict=True):
            tokens = [f"{row['tokens']:,}" if row["tokens"] else ""] if any(self.groups) else []
            seconds = clock(row["seconds"]) if row["seconds"] else ""
            ranked = _digits(row[self.ranking.name])
            yield [label(run.parameters, self._names), row["status"], ranked, *tokens, seconds, _digits(row["test_loss"])]

    def _seed_headers(self) -> list[str]:
        return ["setting", "runs", f"mean {self.ranking.name}", "standard deviation"]

    def _seed_cells(self) -> list[list[str]]:
        """Nothing where no setting was run with several seeds."""
        rows = self.over_seeds()
        if all(row["sd"] is None for row in rows):
            return []
        return [[label(row["parameters"], self._plotted()), str(row["runs"]), _digits(row["mean"]), _digits(row["sd"])] for row in rows]

    def _notes(self) -> list[str]:
        """The notes, and what was passed over in the files of the runs that are done."""
        return self.notes + [f"{run.label}: {note}" for run in self.done for note in run.damages()]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"

    def _repr_html_(self) -> str:
        parts = [html.table(self._headers(), self._cells(), self.summary())]
        if seeds := self._seed_cells():
            parts.append(html.table(self._seed_headers(), seeds, "Over seeds"))
        if self.failed:
            rows = [(run.label, html.cut(run.reason), run.attempt_folder) for run in self.failed]
            parts.append(html.table(("failed", "reason", "files"), rows, "Failures"))
        parts += [f"<div>{html.esc(note)}</div>" for note in self._notes()]
        return "".join([*parts, *self._pictures()])

    def _pictures(self) -> Iterator[str]:
        try:
            from fulltune_nb.experiments.figures import draw_parameters
            from fulltune_nb.plots import PNG_WIDTH, picture_html, png
        except MissingDependencyError as error:
            yield f"<div>{html.esc(error)}</div>"
            return
        if any(run.history for run in self.done):
            yield picture_html(self.plot, "loss over the steps, a curve for each run")
        if len(points := self._points()) > 1 and (names := self._plotted()):
            picture = png(lambda figure: draw_parameters(figure, points, names, self.ranking.name))
            yield html.image(picture, f"{self.ranking.name} against each parameter", PNG_WIDTH)


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _aligned(headers: Sequence[str], cells: Iterator[list[str]] | list[list[str]]) -> Iterator[str]:
    """Lines of text whose columns stand below each other."""
    lines = [list(headers), *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
