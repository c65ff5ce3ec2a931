"""`ft.search`: a notebook's parameters chosen by Optuna, trial by trial, and hopeless trials ended early."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import ConfigError, MissingDependencyError, optional_import
from fulltune_nb.experiments.executors import Dispatcher, Task
from fulltune_nb.experiments.parameters import check_names, folder_name, label, parameter_names
from fulltune_nb.experiments.ranking import Ranking
from fulltune_nb.experiments.runs import Run
from fulltune_nb.experiments.space import Space, check_space, is_range, is_whole
from fulltune_nb.experiments.sweep import REDRAW_SECONDS, Progress, find, first_day, own_folder, progress_of
from fulltune_nb.experiments.table import Sweep
from fulltune_nb.settings import whole_number
from fulltune_nb.training.run_files import read_on

if TYPE_CHECKING:
    import optuna

STORAGE, STUDY = "optuna.db", "search"
"""Optuna's own storage (SQLite) in the folder of a search, and the study's name in it."""
_REASON = "reason"  # of a trial that failed by itself; one that was cut off has none
_PRUNED_BY = "valid_loss"


class Search(Sweep):
    """The trials of a search, as a `Sweep` of their runs; pruned ones stand behind those that are done.

    Attributes:
        study: Optuna's.
    """

    def __init__(self, runs: Sequence[Run], out_dir: Path, notes: Sequence[str], ranking: Ranking, study: optuna.Study):
        super().__init__(runs, out_dir, notes, ranking)
        self.study = study

    @property
    def pruned(self) -> list[Run]:
        """Trials that were ended early; `.reason` says when."""
        return [run for run in self.runs if run.status == "pruned"]

    def _notes(self) -> list[str]:
        return super()._notes() + [f"pruned: {run.label}: {run.outcome()}" for run in self.pruned]

    def _pictures(self) -> Iterator[str]:
        try:
            from fulltune_nb.plots import picture_html
        except MissingDependencyError:  # which the others tell
            pass
        else:
            yield picture_html(self.plot_parallel, "parallel coordinates: a line for each trial, the best one thick")
        yield from super()._pictures()


def search(
    notebook: str | os.PathLike,
    space: Space,
    out_dir: str | os.PathLike,
    trials: int = 20,
    jobs: int = 1,
    *,
    executor: Any = None,
    rank_by: str = "valid_loss",
    maximize: bool = False,
    sampler: Any = None,
    pruner: Any = None,
    seed: int = 0,
) -> Search:
    """Looks for the best parameters: each trial is a run of the notebook in a process of its own, with values that Optuna chooses.

    A trial whose validation loss lies behind that of the others is pruned: it pauses, is saved, and its executed notebook is kept as
    that of any run. Called again with the same `out_dir`, after an interrupt or a kill too, a search goes on: what was cut off is begun
    again with the same values, and more `trials` are a continuation.

    Args:
        notebook: as of `ft.sweep`, like `out_dir`, `executor`, `rank_by` and `maximize`.
        space: name -> choices in a list, a range `{"low": 1e-5, "high": 1e-2, "log": True}`, or a single value, the same in all trials.
        trials: how many in all, those that failed or were pruned among them.
        jobs: trials at a time; the fewer, the more each learns from those before.
        sampler: Optuna's; None: `TPESampler(seed=seed)`.
        pruner: Optuna's, asked after each validation of a run; None: `MedianPruner()`. Only where ranked by `valid_loss`.
        seed: of the default sampler.

    Returns:
        The trials, the best first; `.study` is Optuna's.

    Raises:
        ConfigError: as of `ft.sweep`; or the search in `out_dir` was begun with another space or ranking.
        MissingDependencyError: Optuna is not installed.
    """
    with optional_import("ft.search", "optuna"):
        import optuna
    ranking, notebook, out_dir = Ranking(rank_by, maximize), find(Path(notebook).expanduser()), Path(out_dir).expanduser().resolve()
    trials, jobs = whole_number("search: trials", trials, 1), whole_number("search: jobs", jobs, 1)
    check_space(space)
    known = parameter_names(notebook)
    check_names([space], known, notebook)
    sha256 = hashlib.sha256(notebook.read_bytes()).hexdigest()
    seed = whole_number("search: seed", seed, 0)
    with own_folder(out_dir, "search"), _quiet(optuna):
        study = _study(out_dir, pruner or optuna.pruners.MedianPruner(), ranking)
        # A search that goes on draws anew: with the same seed it would draw the values of its first trials again.
        study.sampler = sampler or optuna.samplers.TPESampler(seed=seed + len(study.trials))
        _check_same(study, out_dir, {"space": dict(space), "rank_by": rank_by, "maximize": maximize})
        dispatcher = Dispatcher(out_dir, Task(notebook, sha256, known, first_day(out_dir)), executor, jobs)
        under_way = _Trials(study, space, out_dir, ranking)
        progress = progress_of(under_way.runs, trials)
        _run_all(under_way, dispatcher, trials, progress)
    notes = [f"{run.label}: {line}" for run in under_way.runs for line in run.lost]
    if ranking.name != _PRUNED_BY:
        notes.append(f"Nothing was pruned: runs report their {_PRUNED_BY} on the way, and no {ranking.name}.")
    result = Search(under_way.runs, out_dir, notes, ranking, study)
    progress.end(result)
    return result


def _run_all(trials: _Trials, dispatcher: Dispatcher, wanted: int, progress: Progress) -> None:
    """Trials until there are as many as wanted; an interrupt leaves those under way to the next search in the folder."""
    with dispatcher:
        while True:
            while dispatcher.has_room and trials.count < wanted:
                run = trials.next()
                if run is not None:
                    dispatcher.begin(run)
                    if run.status == "failed":
                        trials.tell(run)
                        progress.update(run)
            progress.update()
            if not dispatcher.under_way:
                return
            for run in dispatcher.ended(REDRAW_SECONDS):
                trials.tell(run)
                progress.update(run)
            trials.prune()


@dataclass
class _UnderWay:
    """A run's trials, which have the same values; the step up to which its validation losses were reported to them, and where in which
    attempt's file these end."""

    trials: list[optuna.Trial] = field(default_factory=list)
    reported: int = 0
    attempt: int = 0
    read: int = 0

    def new_losses(self, run: Run) -> Iterator[tuple[float, int]]:
        """What the run's attempt has written since the last call: validation losses, and their steps."""
        if run.attempt != self.attempt:
            self.attempt, self.read = run.attempt, 0
        reports, self.read = read_on(run.run_dir, self.read)
        for report in reports.evals:
            if report.split == "valid" and report.step > self.reported:
                self.reported = report.step
                yield report.loss, report.step


class _Trials:
    """Optuna's trials and their runs.

    Attributes:
        runs: of all trials, in their order.
    """

    def __init__(self, study: optuna.Study, space: Space, out_dir: Path, ranking: Ranking):
        self._study, self._space, self._out_dir, self._ranking = study, space, out_dir, ranking
        self._names = [name for name, value in space.items() if is_range(value) or isinstance(value, (list, tuple))]
        self._distributions = {name: _distribution(space[name]) for name in self._names}
        self._under_way: dict[str, _UnderWay] = {}  # by the run's folder; of the same values there is one run only
        self.runs: list[Run] = []
        self._take_up()

    def _take_up(self) -> None:
        """What an earlier search left: ended trials as they are; those that were cut off are told so, and to be repeated."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            if set(self._names) <= set(trial.params):  # else it was cut off before it had its values
                self._study.enqueue_trial(trial.params)
        for trial in self._study.get_trials():
            if trial.state.is_finished() and not _was_cut_off(trial):
                run = self._run_of(trial.params)
                if run.status != "done":
                    run.status = "pruned" if trial.state == TrialState.PRUNED else "failed"

    @property
    def count(self) -> int:
        """How many there are, without those that were cut off."""
        return sum(len(entry.trials) for entry in self._under_way.values()) + sum(
            trial.state.is_finished() and not _was_cut_off(trial) for trial in self._study.get_trials(deepcopy=False)
        )

    def _run_of(self, values: Mapping[str, Any]) -> Run:
        """The run of these values, as its files tell it, in `runs` from now on."""
        own = {name: _meant(self._space[name], values[name]) for name in self._names}
        point = {**self._space, **own}
        folder = self._out_dir / folder_name(point)
        found = next((run for run in self.runs if run.folder == folder), None)
        if found is None:
            found = Run(point, folder, label(point, self._names))
            found.recall()
            self.runs.append(found)
        return found

    def next(self) -> Run | None:
        """The run of the next trial; None where a run of the same values is under way, done or pruned, whose end is the trial's too."""
        trial = self._study.ask(self._distributions)
        run = self._run_of(trial.params)
        entry = self._under_way.setdefault(str(run.folder), _UnderWay())
        entry.trials.append(trial)
        if run.status in ("done", "pruned"):
            self.tell(run)
            return None
        return None if len(entry.trials) > 1 else run

    def tell(self, run: Run) -> None:
        """Tells Optuna how the trials of a run ended."""
        from optuna.trial import TrialState

        value = self._ranking.value(run.result) if run.status == "done" else None
        entry = self._under_way.pop(str(run.folder))
        if value is None and run.stops and entry.reported:
            run.status = "pruned"
            run.reason = f"at step {entry.reported:,}, where its validation loss lay behind that of the others"
            run.remember()
        for trial in entry.trials:
            if value is not None:
                self._study.tell(trial, value)
            elif run.status == "pruned":
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                trial.set_user_attr(_REASON, run.reason or f"no {self._ranking.name} in result.json")
                self._study.tell(trial, state=TrialState.FAIL)

    def prune(self) -> None:
        """Reports new validation losses of what runs, and has the hopeless end."""
        if self._ranking.name != _PRUNED_BY:
            return
        running = {str(run.folder): run for run in self.runs if run.status == "running" and not run.stops}
        for folder in self._under_way.keys() & running.keys():
            run, entry = running[folder], self._under_way[folder]
            for loss, step in entry.new_losses(run):
                for trial in entry.trials:
                    trial.report(loss, step)
                if entry.trials[0].should_prune():
                    run.stop()
                    break


def _was_cut_off(trial: optuna.trial.FrozenTrial) -> bool:
    return trial.state.name == "FAIL" and _REASON not in trial.user_attrs


def _distribution(value: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if is_range(value):
        kind = IntDistribution if is_whole(value) else FloatDistribution
        return kind(value["low"], value["high"], log=value.get("log", False))
    return CategoricalDistribution(list(_choices(value)))


def _choices(values: Sequence[Any]) -> dict[str, Any]:
    """A text for Optuna, which takes no lists and dicts -> the choice it stands for."""
    return {value if isinstance(value, str) else json.dumps(value, sort_keys=True): value for value in values}


def _meant(value: Any, chosen: Any) -> Any:
    return chosen if is_range(value) else _choices(value)[chosen]


def _study(out_dir: Path, pruner: Any, ranking: Ranking) -> optuna.Study:
    import optuna
    from sqlalchemy.engine import URL  # Optuna's own dependency

    return optuna.create_study(
        storage=URL.create("sqlite", database=str(out_dir / STORAGE)).render_as_string(),
        study_name=STUDY,
        pruner=pruner,
        direction="maximize" if ranking.maximize else "minimize",
        load_if_exists=True,
    )


def _check_same(study: optuna.Study, out_dir: Path, settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: the search in the folder was begun with others.
    """
    wanted = json.loads(json.dumps(settings))
    for name, value in wanted.items():
        before = study.user_attrs.get(name, value)
        if before != value:
            raise ConfigError(
                f"search: {name}: the search in {out_dir} was begun with {str(before)[:300]}, and cannot go on with {str(value)[:300]}."
                " Give another out_dir."
            )
        study.set_user_attr(name, value)


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Within the block Optuna tells warnings only: the table tells the rest."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
