"""`ft.sweep`: one notebook, many parameters, with the progress shown meanwhile."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import ConfigError, optional_import
from fulltune_nb.files import held, write_text
from fulltune_nb.html import printable

if TYPE_CHECKING:
    from fulltune_nb.experiments.executors import Dispatcher
    from fulltune_nb.experiments.runs import Run
    from fulltune_nb.experiments.table import Sweep

LOCK = "sweep.lock"
"""In the folder of a sweep; locked while it is under way."""
_STATUSES = ("done", "pruned", "failed", "running", "queued", "waiting")
REDRAW_SECONDS = 1.0
"""From one look at what is under way to the next."""
_LINE_SECONDS = 60.0  # from one line about a run under way to the next


def sweep(
    notebook: str | os.PathLike,
    grid: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    out_dir: str | os.PathLike,
    jobs: int | None = None,
    *,
    executor: Any = None,
    rank_by: str = "valid_loss",
    maximize: bool = False,
    stop_on_failure: bool = False,
) -> Sweep:
    """Executes a notebook once for each set of parameters, every run in a process of its own.

    A run that fails is kept with its reason and does not stop the others. Called again with the same `out_dir`, it repeats
    nothing that is done: only failed and new runs are started. Progress shows as a table in a notebook and as lines elsewhere.

    Args:
        notebook: has a cell tagged `parameters`; of these, `run_dir` (or `out` and `result`) is given a place in `out_dir`. A
            bare name such as "10_experiment.ipynb" is found among the package's notebooks too.
        grid: name -> list of values, of which every combination is run, or a list of dicts, such as `experiments.space.random_points`
            draws.
        out_dir: for executed notebooks, logs, runs and results; one folder for each run.
        jobs: runs at a time, each with the memory of a whole training run; None: one, or with an executor as many as that takes.
        executor: has the runs done elsewhere: anything with `submit(function, ...)` that returns a future, such as
            `submitit.AutoExecutor`, Dask's `client.get_executor()` or `experiments.executors.RayExecutor`. Its workers need this
            package and `out_dir` at the same path. A run whose worker is lost is begun again, three times in all.
        rank_by: the name of a number in `result.json`, `outer.inner` for one within another. `valid_loss` is that of the last step's
            weights; the test loss is shown, and chooses nothing unless named here.
        maximize: the highest number is the best.
        stop_on_failure: start no further run once one has failed.

    Returns:
        The runs, the best first by `rank_by`; `.best` is that one.

    Raises:
        ConfigError: the notebook, the parameters (an unknown name, say), `jobs`, `executor` or `rank_by` cannot be used, or another
            sweep is under way in `out_dir`; nothing was run then.
    """
    from fulltune_nb.experiments.executors import Dispatcher, Task
    from fulltune_nb.experiments.parameters import check_names, folder_name, label, parameter_names, points_of, varied
    from fulltune_nb.experiments.ranking import Ranking
    from fulltune_nb.experiments.runs import Run
    from fulltune_nb.experiments.table import Sweep
    from fulltune_nb.settings import whole_number

    ranking = Ranking(rank_by, maximize)
    notebook, out_dir = find(Path(notebook).expanduser()), Path(out_dir).expanduser().resolve()
    jobs = None if jobs is None else whole_number("sweep: jobs", jobs, 1)
    points, known = points_of(grid), parameter_names(notebook)
    check_names(points, known, notebook)
    names = varied(points)
    runs = [Run(point, out_dir / folder_name(point), label(point, names)) for point in points]
    sha256 = hashlib.sha256(notebook.read_bytes()).hexdigest()
    with own_folder(out_dir):
        for run in runs:
            run.recall()
        progress, waiting = progress_of(runs), [run for run in runs if run.status != "done"]
        dispatcher = Dispatcher(out_dir, Task(notebook, sha256, known, first_day(out_dir)), executor, jobs)
        _run_all(waiting, dispatcher, stop_on_failure, progress)
    stale = sum(run.status == "done" and run.notebook_sha256 != sha256 for run in runs)
    notes = [f"{stale} runs were done with another version of the notebook; a new out_dir repeats them."] if stale else []
    notes += [f"{run.label}: {line}" for run in runs for line in run.lost]
    result = Sweep(runs, out_dir, notes, ranking)
    progress.end(result)
    return result


@contextmanager
def own_folder(out_dir: Path, what: str = "sweep") -> Iterator[None]:
    """Within the block no other sweep or search writes into the folder, which is made if need be. `what` asks for it, in messages."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with held(out_dir / LOCK) as ours:
            if not ours:
                raise ConfigError(f"{what}: out_dir {out_dir} is in use by a sweep or search. Wait for its end, or give another out_dir.")
            yield
    except OSError as error:
        raise ConfigError(f"{what}: out_dir {out_dir} cannot be written to: {error}.") from error


def find(notebook: Path) -> Path:
    """The notebook's absolute path, that of the package's where it is a bare name.

    Raises:
        ConfigError: there is none.
    """
    from fulltune_nb.experiments.execution import find_notebook

    if notebook.is_file():
        return notebook.resolve()
    if notebook.name == str(notebook) and notebook.suffix == ".ipynb":
        return find_notebook(notebook.name)
    raise ConfigError(f"{notebook} is no file; expected a notebook.")


def first_day(out_dir: Path) -> str:
    """The day on which the sweep of a folder began. Chat templates that write the date write this one in all its runs."""
    from fulltune_nb.data.settings import today

    path = out_dir / "begun.txt"
    if not path.is_file():
        write_text(path, f"{today()}\n")
    return path.read_text(encoding="utf-8").strip()


def _run_all(runs: list[Run], dispatcher: Dispatcher, stop_on_failure: bool, progress: Progress) -> None:
    """Runs what is to be run, as many at a time as there is room for."""
    waiting = list(reversed(runs))
    with dispatcher:
        while waiting or dispatcher.under_way:
            while waiting and dispatcher.has_room:
                run = waiting.pop()
                dispatcher.begin(run)
                if run.status == "failed":
                    progress.update(run)
            progress.update()
            for run in dispatcher.ended(REDRAW_SECONDS):
                progress.update(run)
                if run.status == "failed" and stop_on_failure:
                    waiting = []
            if dispatcher.refused and not dispatcher.under_way:
                break
    for run in runs:
        run.status = "not started" if run.status == "waiting" else run.status


# -- progress


def progress_of(runs: Sequence[Run], total: int | None = None) -> Progress:
    """Where the progress is shown here: a table in a notebook, lines elsewhere, or nowhere. `total`: of runs, where more are to come."""
    from fulltune_nb.panels.progress import VARIABLE, in_kernel

    wanted = os.environ.get(VARIABLE, "").strip().lower()
    if wanted == "off":
        return Progress()
    return ProgressTable(runs) if wanted != "plain" and in_kernel() else ProgressLines(runs, total)


class Progress:
    """Shows nothing; the base of those that do."""

    def update(self, finished: Run | None = None) -> None:
        """About once a second, and with every run that is done or has failed."""

    def end(self, sweep: Sweep) -> None:
        """After the last run."""


class ProgressLines(Progress):
    """Whole lines on standard output: for terminals and logs."""

    def __init__(self, runs: Sequence[Run], total: int | None = None):
        self._runs, self._told = runs, time.monotonic()
        self._total, self._number = total or len(runs), sum(run.status in ("done", "pruned") for run in runs)
        print(printable(f"{self._total} runs" + (f", {self._number} of them done before" if self._number else "")), flush=True)

    def update(self, finished: Run | None = None) -> None:
        """A line for a run that is done or has failed; now and then one for each that is under way."""
        from fulltune_nb.panels.progress import clock

        if time.monotonic() - self._told >= _LINE_SECONDS:
            self._told = time.monotonic()
            for run in self._runs:
                if run.status == "running" and (text := run.outcome()):
                    print(printable(f"running: {run.label}: {text}"), flush=True)

        if finished is not None:
            self._number += 1
            outcome = f": {text}" if (text := finished.outcome()) else ""
            status = f"[{self._number}/{self._total}] {finished.status}"
            print(printable(f"{status}: {finished.label} ({clock(finished.seconds)}){outcome}"), flush=True)

    def end(self, sweep: Sweep) -> None:
        """The table."""
        print(printable(sweep.text()), flush=True)


class ProgressTable(Progress):
    """One output of the cell that changes, and stays in the saved notebook."""

    def __init__(self, runs: Sequence[Run]):
        with optional_import("Progress in a notebook", "notebook"):
            from IPython.display import HTML, display

        self._runs, self._started = runs, time.monotonic()
        self._shown = self._html()
        self._handle = display(HTML(self._shown), display_id=True)

    def update(self, finished: Run | None = None) -> None:
        """Draws the table anew where something has changed."""
        if (text := self._html()) != self._shown:
            self._show(text)

    def end(self, sweep: Sweep) -> None:
        """The sorted table and the plot take its place."""
        self._show(sweep._repr_html_())

    def _show(self, text: str) -> None:
        from IPython.display import HTML

        self._handle.update(HTML(text))
        self._shown = text

    def _html(self) -> str:
        from fulltune_nb.html import table
        from fulltune_nb.panels.progress import clock

        counts = Counter(run.status for run in self._runs)
        caption = ", ".join(f"{counts[status]} {status}" for status in _STATUSES if counts[status])
        rows = [(run.label, run.status, clock(run.seconds) if run.seconds else "", run.outcome()) for run in self._runs]
        return table(("run", "status", "time", "outcome"), rows, f"{caption}; {clock(time.monotonic() - self._started)} so far")
