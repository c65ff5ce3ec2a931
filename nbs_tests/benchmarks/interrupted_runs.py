"""SIGINT at random instants of a run, under `trainer.run()`, under the panel's loop and under the command; often a second one.

    python -m nbs_tests.benchmarks.interrupted_runs --interrupts 100

After each, the newest checkpoint is compared, weights and optimizer state, with those of the same step of a run that nobody
interrupted; so is the trainer in memory after a single interrupt. `--signal term` or `hup` sends SIGTERM or SIGHUP instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from nbs_tests.benchmarks import small_run
from nbs_tests.benchmarks.small_run import SETTINGS, begin, digest, fork, losses, run_to_end, send

READY = "ready"
SIGNALS = {"int": signal.SIGINT, "term": signal.SIGTERM, "hup": signal.SIGHUP}
ENDED = (0, 130, 143, 129, -signal.SIGTERM, -signal.SIGHUP)
"""Exit codes of a process that ended as it should."""


class Ready:
    """Says when steps are being taken, and checks the trainer when `run` has returned."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_step(self, trainer, report) -> None:
        (self.folder / READY).touch()


def by_run(folder: Path, run_dir: Path) -> None:
    """`trainer.run()`, as a script or a cell has it."""
    trainer = begin(folder, run_dir)
    trainer.run(callbacks=[Ready(folder)])
    check_memory(folder, trainer)


def by_panel(folder: Path, run_dir: Path) -> None:
    """The panel's loop, within an event loop that ignores SIGINT between cells, as a kernel does."""
    from fulltune_nb.panels.loop import loop_of

    trainer = begin(folder, run_dir)
    trainer.listeners.append(Ready(folder))

    async def main() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        loop = loop_of(trainer)
        loop.start()
        await loop.wait()

    asyncio.run(main())
    check_memory(folder, trainer)


def by_command(folder: Path, run_dir: Path) -> None:
    """`python -m fulltune_nb.full`."""
    from fulltune_nb.full import main
    from fulltune_nb.training.run import holds_run
    from fulltune_nb.training.trainer import Trainer

    record = Trainer.record
    Trainer.record = lambda trainer, report: (record(trainer, report), (folder / READY).touch())
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = ["--train", "--run-dir", str(run_dir), "--model-file", str(run_dir / "model.npz"), "--no-export", *flags]
    known = ["--resume"] if holds_run(run_dir) else ["--model", str(folder / "base"), "--data", str(folder / "data")]
    raise SystemExit(main([*command, *known]))


WAYS = {"run": by_run, "panel": by_panel, "command": by_command}


def check_memory(folder: Path, trainer) -> None:
    """The trainer in memory is that of a whole step; exits as a command would."""
    assert digest(trainer) == expected(folder)["digests"][trainer.step_count], "the trainer is not that of a whole step"
    assert trainer.done or trainer.interrupted, "it returned without being done"
    raise SystemExit(130 if trainer.interrupted else 0)


def expected(folder: Path) -> dict:
    """The losses and checksums of the reference."""
    return json.loads((folder / "reference.json").read_text())


def check_disk(folder: Path, run_dir: Path) -> None:
    """The newest checkpoint is that of a whole step, and the history up to it is the reference's."""
    trainer = begin(folder, run_dir)
    reference = expected(folder)
    assert digest(trainer) == reference["digests"][trainer.step_count], "the checkpoint is not that of a whole step"
    assert losses(trainer) == reference["losses"][: len(losses(trainer))], "the history differs"
    assert not [event for event in trainer.history.events if "damaged" in event.message]


def one(way: Callable, folder: Path, run_dir: Path, rng, number: int, longest: float) -> int:
    """A run that is interrupted once or twice; the exit code of its process."""
    (folder / READY).unlink(missing_ok=True)
    child = fork(lambda: way(folder, run_dir), folder / "output.txt")
    while not (folder / READY).exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, longest))
    send(child, number)
    if number == signal.SIGINT and rng.random() < 0.4:
        time.sleep(rng.uniform(0, 0.03))
        send(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(interrupts: int, seed: int, number: int, ways: list[str]) -> int:
    """Returns the exit code: 0 where the state was that of a whole step each time."""
    folder, rng = small_run.workplace(), small_run.rng(seed)
    failed = 0
    for name in ways:
        run_dir, whole, hit, ended = folder / f"run-{name}", 0, 0, 0
        while hit < interrupts:
            code = one(WAYS[name], folder, run_dir, rng, number, longest=0.5)
            good = code in ENDED and run_to_end(lambda run_dir=run_dir: check_disk(folder, run_dir), folder / "output.txt") == 0
            if code == 0:
                ended += 1
            else:
                hit, whole = hit + 1, whole + good
            if not good:
                failed += 1
                print(code, (folder / "output.txt").read_text()[-3000:])
            if code == 0 or not good:
                shutil.rmtree(run_dir, ignore_errors=True)
        print(f"{name}: {whole} of {hit} interrupts left the state of a whole step ({ended} runs ended before)", flush=True)
    if not failed:
        small_run.remove(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interrupts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=list(SIGNALS), default="int")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    raise SystemExit(main(arguments.interrupts, arguments.seed, SIGNALS[arguments.signal], arguments.ways))
