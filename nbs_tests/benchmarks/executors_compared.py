"""One sweep of 8 runs by each executor: the same table, and what they cost. `python -m nbs_tests.benchmarks.executors_compared FOLDER`

Needs the extras slurm, dask and ray; nothing of a cluster: all run on this machine. Each executor has one worker killed while it trains.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fulltune_nb as ft
from fulltune_nb.experiments.worker import BEGUN

GRID = {"learning_rate": [5e-4, 1e-3, 2e-3, 4e-3], "seed": [0, 1], "iters": 6, "batch_size": 4, "val_batches": 5}


@contextmanager
def threads(folder: Path) -> Iterator[object]:
    """This process's own, which has no worker to kill."""
    yield None


@contextmanager
def submitit(folder: Path) -> Iterator[object]:
    """Slurm's stand-in on one machine: a process for each job."""
    import submitit

    executor = submitit.AutoExecutor(folder=folder / "jobs", cluster="local")
    executor.update_parameters(timeout_min=30)
    yield executor


@contextmanager
def dask(folder: Path) -> Iterator[object]:
    """Two workers with a nanny each, which starts a killed one again and repeats its task."""
    from dask.distributed import Client, LocalCluster

    quiet = {"local_directory": folder, "dashboard_address": None}
    with LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster, Client(cluster) as client:
        yield client.get_executor()


@contextmanager
def ray(folder: Path) -> Iterator[object]:
    """Two processors, one for each run."""
    import ray

    from fulltune_nb.experiments.executors import RayExecutor

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield RayExecutor(num_cpus=1)
    ray.shutdown()


def kill_one(folder: Path) -> None:
    """Kills the worker of the first run that has begun, as a machine out of memory would."""
    while not (begun := sorted(folder.glob(f"*/1/{BEGUN}"))) or len(parts := begun[0].read_text().split()) < 2:
        time.sleep(0.05)
    time.sleep(2.0)
    os.kill(int(parts[1]), signal.SIGKILL)


def measured(name: str, make: Callable, folder: Path) -> list[tuple]:
    """The table of a sweep, in the order of its parameters."""
    out = folder / name
    out.mkdir(parents=True)
    with make(out) as executor:
        if executor is not None:
            threading.Thread(target=kill_one, args=(out,), daemon=True).start()
        started = time.perf_counter()
        sweep = ft.sweep("10_experiment.ipynb", GRID, out, jobs=2, executor=executor)
        seconds = time.perf_counter() - started
    lost = [line for run in sweep for line in run.lost]
    print(f"{name}: {len(sweep.done)} done in {seconds:.0f} s, lost: {lost}", flush=True)
    rows = [(row["learning_rate"], row["seed"], row["valid_loss"], row["tokens"], row["test_loss"]) for row in sweep.rows()]
    return sorted(rows)


def main(folder: Path) -> int:
    """0 where all tables are equal."""
    os.environ["FULLTUNE_PROGRESS"] = "off"
    tables = {make.__name__: measured(make.__name__, make, folder) for make in (threads, submitit, dask, ray)}
    for row in tables["threads"]:
        print(*row)
    different = [name for name, table in tables.items() if table != tables["threads"]]
    print("the same table by all" if not different else f"other tables: {different}")
    return len(different)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
