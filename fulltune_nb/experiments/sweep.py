"""`ft.sweep`: one notebook, many parameters."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import ConfigError

if TYPE_CHECKING:
    from fulltune_nb.experiments.runs import Run, Sweep

_REDRAW_SECONDS = 1.0


def sweep(
    notebook: str | os.PathLike,
    grid: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    out_dir: str | os.PathLike,
    jobs: int = 1,
    *,
    stop_on_failure: bool = False,
) -> Sweep:
    """Executes a notebook once for each set of parameters, every run in a process of its own.

    A run that fails is kept with its reason and does not stop the others. Called again with the same `out_dir`, it repeats
    nothing that is done: only failed and new runs are started. Progress shows as a table in a notebook and as lines elsewhere.

    Args:
        notebook: has a cell tagged `parameters`; of these, `run_dir` (or `out` and `result`) is given a place in `out_dir`. A
            bare name such as "10_experiment.ipynb" is found among the package's notebooks too.
        grid: name -> list of values, of which every combination is run, or a list of dicts.
        out_dir: for executed notebooks, logs, runs and results; one folder for each run.
        jobs: runs at a time. Each needs the memory of a whole training run.
        stop_on_failure: start no further run once one has failed.

    Returns:
        The runs, sorted by test loss.

    Raises:
        ConfigError: the notebook, the parameters (an unknown name, say) or `jobs` cannot be used; nothing was run then.
    """
    from fulltune_nb.experiments.runs import Sweep, watcher

    path = _find(Path(notebook).expanduser())
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ConfigError(f"sweep: jobs: expected a whole number of at least 1, got {jobs!r}.")
    runs, known = _plan(path, grid, Path(out_dir).expanduser().resolve())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    watching = watcher(runs)
    watching.start()
    _run_all([run for run in runs if run.status != "done"], path, sha256, known, jobs, stop_on_failure, watching)
    stale = sum(run.status == "done" and run.notebook_sha256 != sha256 for run in runs)
    notes = [f"{stale} runs were done with another version of the notebook; a new out_dir repeats them."] if stale else []
    result = Sweep(runs, Path(out_dir).expanduser().resolve(), notes)
    watching.end(result)
    return result


def _find(notebook: Path) -> Path:
    from fulltune_nb.experiments.execution import find_notebook

    if notebook.is_file():
        return notebook.resolve()
    if notebook.name == str(notebook) and notebook.suffix == ".ipynb":
        return find_notebook(notebook.name)
    raise ConfigError(f"{notebook} is no file; expected a notebook.")


def _plan(notebook: Path, grid: Any, out_dir: Path) -> tuple[list[Run], list[str]]:
    """The runs with what is known of them from before, and the notebook's parameters."""
    from fulltune_nb.experiments.parameters import check_names, folder_name, label, parameter_names, points_of, varied
    from fulltune_nb.experiments.runs import Run

    points = points_of(grid)
    known = parameter_names(notebook)
    check_names(points, known, notebook)
    names = varied(points)
    runs = [Run(point, out_dir / folder_name(point), label(point, names)) for point in points]
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"sweep: out_dir {out_dir} cannot be made: {error}.") from error
    for run in runs:
        run.recall()
    return runs, known


def _run_all(runs: list[Run], notebook: Path, sha256: str, known: list[str], jobs: int, stop_on_failure: bool, watching: Any) -> None:
    """Runs what is to be run, `jobs` at a time; an interrupt ends those that are running, which count as failed."""
    stopping, waiting = threading.Event(), iter(runs)

    def one(run: Run) -> Run:
        started = time.monotonic()
        own = Path(temporary, threading.current_thread().name) if temporary else None
        process = run.begin(notebook, sha256, known, own)
        while process.poll() is None:
            if stopping.wait(0.05):
                process.terminate()  # its kernel ends itself when its parent is gone
                process.wait()
        run.finish(process.returncode, started)
        if stopping.is_set() and run.status == "failed":
            run.reason = "interrupted"
            run.remember()
        return run

    with _temporary_folder(jobs) as temporary, ThreadPoolExecutor(jobs) as pool:
        futures: set[Future] = set()
        try:
            _start(pool, one, waiting, jobs, futures)
            while futures:
                finished, futures = wait(futures, timeout=_REDRAW_SECONDS, return_when=FIRST_COMPLETED)
                for run in (future.result() for future in finished):
                    watching.finished(run)
                    if run.status == "failed" and stop_on_failure:
                        waiting = iter(())
                _start(pool, one, waiting, jobs, futures)
                watching.tick()
        finally:
            stopping.set()
    for run in runs:
        run.status = "not started" if run.status == "waiting" else run.status


def _temporary_folder(jobs: int) -> AbstractContextManager[str | None]:
    """For runs side by side: MLX writes what it compiles into the temporary folder without a lock, so that they must not share one."""
    return TemporaryDirectory(prefix="fulltune_nb-sweep-", ignore_cleanup_errors=True) if jobs > 1 else nullcontext()


def _start(pool: ThreadPoolExecutor, one: Any, waiting: Iterator[Run], jobs: int, futures: set[Future]) -> None:
    """Hands out as many runs as there is room for."""
    while len(futures) < jobs and (run := next(waiting, None)) is not None:
        futures.add(pool.submit(one, run))
