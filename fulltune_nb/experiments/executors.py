"""Where runs are done: threads of this process, or anything with `submit(function, *arguments)` that returns a future.

`concurrent.futures`, `submitit.AutoExecutor` and `dask.distributed.Client.get_executor()` have it; Ray gets it by `RayExecutor`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fulltune_nb.errors import ConfigError, optional_import
from fulltune_nb.experiments.runs import Run
from fulltune_nb.experiments.worker import BEGUN, OF_ITS_OWN, claim, work

HEARTBEAT = "heartbeat"
"""In the folder of a sweep; its content changes as long as the sweep lives."""
_BEAT_SECONDS = 1.0
_POLL_SECONDS = 0.05
_SECONDS_TO_END = 90.0  # that runs have to be saved when the sweep is interrupted
_ATTEMPTS = 3  # of a run whose workers are lost


class RayExecutor:
    """`submit` for Ray, whose session you have begun by `ray.init()`; a worker that is lost is told and not tried again by Ray itself.

    Args:
        options: of `ray.remote`, such as `num_cpus=2`, which also is how many threads a run's BLAS uses.

    Raises:
        MissingDependencyError: Ray is not installed.
    """

    def __init__(self, **options: Any):
        with optional_import("RayExecutor", "ray"):
            import ray
        self._remote = ray.remote(_call).options(max_retries=0, **options)

    def submit(self, function: Any, *arguments: Any) -> Any:
        """A `concurrent.futures.Future` of what the function returns."""
        return self._remote.remote(function, *arguments).future()


def _call(function: Any, *arguments: Any) -> Any:
    return function(*arguments)


@dataclass(frozen=True)
class Task:
    """What is the same for all runs of a sweep.

    Attributes:
        notebook: the file.
        sha256: of its content.
        known: names of its parameters.
        date: that chat templates get which write today's.
    """

    notebook: Path
    sha256: str
    known: list[str]
    date: str


class Dispatcher:
    """The runs under way: submitted, watched, ended, and begun again where their worker was lost. Used as a context.

    An interrupt within the block ends what runs, which then counts as failed.

    Args:
        out_dir: of the sweep; a folder that the workers see at the same path.
        task: what is the same for all runs.
        executor: anything with `submit`; None: threads of this process.
        jobs: runs at a time; None: with an executor as many as are begun, else one.

    Raises:
        ConfigError: the executor has no `submit`.
    """

    def __init__(self, out_dir: Path, task: Task, executor: Any = None, jobs: int | None = None):
        if executor is not None and not callable(getattr(executor, "submit", None)):
            raise ConfigError(
                f"executor: expected something with submit(function, ...), such as concurrent.futures, submitit.AutoExecutor, Dask's"
                f" client.get_executor() or fulltune_nb.experiments.executors.RayExecutor, got {type(executor).__name__}."
            )
        self._out_dir, self._task, self._executor = out_dir, task, executor
        self._jobs = jobs or (1 if executor is None else None)
        self._futures: dict[str, tuple[Run, Any]] = {}  # by folder
        self._stack, self._arguments = ExitStack(), (task.date, OF_ITS_OWN, str(out_dir / HEARTBEAT))
        self._beats, self._beaten, self._losses = 0, 0.0, Counter()
        self.refused = ""
        """Why the executor takes no more runs; empty: it does."""

    def __enter__(self) -> Dispatcher:
        if self._executor is None:
            # MLX writes what it compiles into the temporary folder without a lock: runs side by side must not share one.
            folder = None
            if self._jobs > 1:
                folder = self._stack.enter_context(TemporaryDirectory(prefix="fulltune_nb-sweep-", ignore_cleanup_errors=True))
            self._arguments = (self._task.date, folder, None)
            self._executor = self._stack.enter_context(ThreadPoolExecutor(self._jobs))
        self._beat()
        return self

    def __exit__(self, *raised: Any) -> None:
        with self._stack:
            self._end_all()

    @property
    def under_way(self) -> int:
        """How many are submitted and have not ended."""
        return len(self._futures)

    @property
    def has_room(self) -> bool:
        """Whether one more may be begun."""
        return not self.refused and (self._jobs is None or len(self._futures) < self._jobs)

    def begin(self, run: Run) -> None:
        """Submits a run's next attempt; where the executor refuses, the run has failed, and `refused` says why."""
        attempt = run.begin(self._task.notebook, self._task.sha256, self._task.known)
        try:
            future = self._executor.submit(work, str(attempt), *self._arguments)
        except Exception as error:  # whatever an executor raises: a queue that is closed, a pool whose process was killed
            self.refused = _told(error)
            run.fail(f"the executor takes no run: {self.refused}")
        else:
            self._futures[str(run.folder)] = (run, future)

    def ended(self, seconds: float = 1.0) -> list[Run]:
        """Runs that have ended since the last call, as soon as there is one, or none after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            self._beat()
            found = list(self._take_ended())
            if found or not self._futures or time.monotonic() > until:
                return found
            time.sleep(_POLL_SECONDS)

    def _take_ended(self) -> Iterator[Run]:
        for run, future in list(self._futures.values()):
            if run.status == "queued" and (run.attempt_folder / BEGUN).exists():
                run.status = "running"
            if future.done():
                del self._futures[str(run.folder)]
                if self._finish(run, future):
                    yield run

    def _finish(self, run: Run, future: Any) -> bool:
        """Takes in how a run ended. False: its worker was lost, and it was begun again."""
        try:
            outcome = future.result()
        except BaseException as error:  # what an executor raises when the process that did the work is gone, or what ended that
            return self._repeat(run, _told(error))
        if "begun_before" in outcome:
            return self._repeat(run, f"{outcome['begun_before']} had begun it and is gone")
        run.finish(outcome)
        return True

    def _repeat(self, run: Run, why: str) -> bool:
        if run.stops:
            run.fail(f"it was to end, and so did its worker: {why}")
            return True
        run.lose(why)
        self._losses[str(run.folder)] += 1
        if self.refused or self._losses[str(run.folder)] >= _ATTEMPTS:
            return True
        self.begin(run)
        return run.status == "failed"

    def _beat(self) -> None:
        """Writes that the sweep lives; run folders may lie on another machine, where nothing else would tell."""
        if time.monotonic() - self._beaten >= _BEAT_SECONDS or not self._beats:
            self._beats, self._beaten = self._beats + 1, time.monotonic()
            (self._out_dir / HEARTBEAT).write_text(f"{self._beats}\n", encoding="utf-8")

    def _end_all(self) -> None:
        """What still runs pauses, is saved and ends; so much of it as does within a while is told as interrupted."""
        for run, _ in self._futures.values():
            run.stop()
        for run, future in self._futures.values():
            if claim(run.attempt_folder):  # what has begun saves itself and ends; an engine's cancel would kill it
                with suppress(Exception):  # of any kind, as by `submit`; no worker begins the run now
                    future.cancel()
        until = time.monotonic() + _SECONDS_TO_END
        while self._futures and time.monotonic() < until:
            for run in self.ended():
                run.fail("interrupted")
        for run, _ in self._futures.values():
            run.fail("interrupted; it was told to end, and had not when the sweep did")


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip(": ")[:300]
