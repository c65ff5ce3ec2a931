"""Runs of 2 or 3 ranks, one of which is harmed at a random instant: killed, stopped, or cut off the network. Each is then resumed.

    python -m nbs_tests.benchmarks.killed_ranks --kills 50 --stops 20 --cuts 10

One instant in five lies at the start, before the first step, the others anywhere behind it. Each time every rank that was not killed must
end by itself, within the deadline and ten seconds, with an exit code that is not 0 and an error that says why; one that was stopped, too,
when it is woken behind that. At the start it is the time that the others have for coming that must have passed. Where the run was through
when the rank was harmed, the others may end well. What is left is resumed with 1, 2 or 3 ranks, and must come to the weights, the
optimizer's state, the losses and the order of rows of one process that nobody disturbed.

Ranks that are cut off have network namespaces of their own, for which this has to be root on Linux.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from fulltune_nb.training.start_ranks import kill
from nbs_tests.training.rank_network import Network, start_ranks
from nbs_tests.training.test_parallel import results_of, run_ranks, same

SETTINGS = {"grad_accumulation_steps": 3, "iters": 40, "save_every": 3, "steps_per_eval": 3, "val_batches": 2, "keep": 2}
SCENARIO = {"settings": {**SETTINGS, "shard_optimizer": True}}
DEADLINE, JOIN = 5.0, 10.0
"""Seconds: of silence after which a rank is lost; within which, from its own coming, all others must have come."""
LIMIT, LIMIT_AT_START = DEADLINE + 10, JOIN + 25
"""Seconds within which all must have ended; at the start, before they have come together, with the loading that they still have to do."""
START_SECONDS = 8.0
AT_START = ("starting", "loading")
AT_ONCE = 5
"""So many runs are harmed before all of them are resumed, by the same processes."""


class Doing:
    """A listener that writes down at which step rank 0 is, and what it does."""

    def __init__(self, place: Path):
        self.place = place

    def on_doing(self, trainer) -> None:
        self.place.write_text(f"{trainer.step_count} {trainer.doing or 'stepping'}")

    def on_step(self, trainer, report) -> None:
        self.on_doing(trainer)

    on_change = on_doing


def step_and_doing(folder: Path) -> tuple[int, str]:
    """What is written there."""
    step, _, what = (folder / "doing").read_text().partition(" ")
    return (int(step), " ".join(what.split()[:2])) if what else (0, "between")  # just being written


def child(folder: Path) -> None:
    """One of the ranks."""
    from nbs_tests.training.rank_program import trained

    rank, place = int(os.environ["MLX_RANK"]), folder / "doing"
    place.write_text("0 loading")
    result = trained(json.loads((folder / "scenario.json").read_text()), [] if rank else [Doing(place)])
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    if rank == 0:
        place.write_text(f"{SETTINGS['iters']} ending")


@dataclass
class Outcome:
    """What came of one harm."""

    harm: str
    size: int
    lost: int
    doing: str
    """What rank 0 was at."""
    ends: dict[int, tuple[int | None, float]] = field(default_factory=dict)
    """Rank -> exit code (None: it had to be killed) and seconds behind the harm, of those that had to end by themselves."""
    said: dict[int, str] = field(default_factory=dict)
    through: bool = False
    """Whether rank 0 had finished its run."""
    resumed_by: int = 0
    """So many ranks."""
    same: bool = False
    """Whether the run has come to the bits of one that nobody disturbed."""

    @property
    def ended(self) -> bool:
        """All ended by themselves, in time, and with an error unless the run was through."""
        return all(code is not None and (self.through or (code > 0 and error_in(self.said[rank]))) for rank, (code, _) in self.ends.items())

    def __str__(self) -> str:
        ends = ", ".join(f"rank {rank} ended with {code} after {seconds:.1f} s" for rank, (code, seconds) in sorted(self.ends.items()))
        why = sorted({error_in(self.said[rank]) for rank in self.ends} - {""})
        good = ("" if self.ended else " NOT AS IT SHOULD") + ("" if self.same else " OTHER BITS")
        return f"{self.harm} rank {self.lost} of {self.size}, rank 0 {self.doing}: {ends}; resumed by {self.resumed_by}{good} {why}"


def error_in(said: str) -> str:
    """The last line that tells an error of the package's about ranks."""
    lines = re.findall(r"^(?:[\w.]*Error|error): (.*(?:[Rr]anks? |MLX's engine).*)", said, re.MULTILINE)
    return lines[-1] if lines else ""


@contextmanager
def started(folder: Path, size: int, network: Network | None) -> Iterator[list[subprocess.Popen]]:
    """The ranks of a run that begins."""
    folder.mkdir()
    constants = {"training.rank_channel.JOIN_SECONDS": JOIN}
    (folder / "scenario.json").write_text(json.dumps({**SCENARIO, "run_dir": str(folder / "run"), "constants": constants}))
    (folder / "doing").write_text("0 starting")
    command = [sys.executable, "-m", "nbs_tests.benchmarks.killed_ranks", "--child", str(folder)]
    ranks = start_ranks(command, folder, size, network, {"FULLTUNE_NB_DEADLINE": str(DEADLINE)})
    try:
        yield ranks
    finally:
        kill(ranks)


def await_instant(folder: Path, ranks: list[subprocess.Popen], draw: random.Random) -> None:
    """Waits for a random instant: one time in five some seconds after the start, else some moments after some step."""
    step = 0 if draw.random() < 0.2 else draw.randint(1, SETTINGS["iters"])
    while step_and_doing(folder)[0] < step and ranks[0].poll() is None:
        time.sleep(0.002)
    time.sleep(draw.uniform(0, START_SECONDS if step == 0 else 0.5))


def harmed(folder: Path, harm: str, draw: random.Random) -> Outcome | None:
    """Begins a run and harms one of its ranks; None where that had ended before."""
    size = draw.choice((2, 3))
    lost = draw.randrange(size)
    with Network(size) if harm == "cut" else nullcontext() as network, started(folder, size, network) as ranks:
        await_instant(folder, ranks, draw)
        if ranks[lost].poll() is not None:
            return None
        outcome = Outcome(harm, size, lost, step_and_doing(folder)[1])
        if network is not None:
            network.cut(lost)
        else:
            ranks[lost].send_signal(signal.SIGKILL if harm == "killed" else signal.SIGSTOP)
        must_end = {rank: process for rank, process in enumerate(ranks) if rank != lost or harm == "cut"}
        limit = LIMIT_AT_START if outcome.doing in AT_START else LIMIT
        outcome.ends = ends_of(must_end, limit)
        if harm == "stopped":
            ranks[lost].send_signal(signal.SIGCONT)
            outcome.ends |= ends_of({lost: ranks[lost]}, limit)
        outcome.said = {rank: (folder / f"said-{rank}").read_text() for rank in range(size)}
        outcome.through = step_and_doing(folder)[1] == "ending"
    return outcome


def ends_of(processes: dict[int, subprocess.Popen], limit: float) -> dict[int, tuple[int | None, float]]:
    """Waits for them, for so many seconds at most: the exit code of each (None: it runs on), and after how many seconds it came."""
    began, ends = time.monotonic(), {}
    while len(ends) < len(processes) and (seconds := time.monotonic() - began) < limit:
        for rank, process in processes.items():
            if rank not in ends and process.poll() is not None:
                ends[rank] = (process.returncode, seconds)
        time.sleep(0.02)
    return {rank: ends.get(rank, (None, limit)) for rank in processes}


def bits_of(result: dict) -> dict:
    """What a run came to; without the tests behind its end, of which a run that was resumed then has two."""
    return same(result) | {"evals": [one for one in result["evals"] if one[0] != "test"]}


def outcomes_of(harm: str, count: int, draw: random.Random) -> Iterator[Outcome]:
    """So many harms, each of a run of its own; all are resumed."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        assert run_ranks(place / "alone", 1, {"alone": SCENARIO}) == 0
        expected = bits_of(results_of(place / "alone")["alone"])
        runs = (place / str(number) for number in itertools.count())
        while count:
            found: dict[Path, Outcome] = {}
            while len(found) < min(count, AT_ONCE):
                if (outcome := harmed(folder := next(runs), harm, draw)) is not None:
                    found[folder] = outcome
            again = {str(folder): {**SCENARIO, "run_dir": str(folder / "run"), "resume": "auto"} for folder in found}
            assert run_ranks(place / "again", size := draw.choice((1, 2, 3)), again) == 0
            results = results_of(place / "again")
            for folder, outcome in found.items():
                outcome.resumed_by, outcome.same = size, bits_of(results[str(folder)]) == expected
                shutil.rmtree(folder)
                yield outcome
            count -= len(found)


def main() -> None:
    """Harms as often as was asked for; prints a line for each, and what they come to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.child:
        return child(given.child)
    draw = random.Random(given.seed)
    for harm, count in (("killed", given.kills), ("stopped", given.stops), ("cut", given.cuts)):
        outcomes = []
        for outcome in outcomes_of(harm, count, draw) if count else ():
            outcomes.append(outcome)
            print(f"  {outcome}", flush=True)
            if not (outcome.ended and outcome.same):
                print("\n".join(f"    rank {rank}: {said}" for rank, said in outcome.said.items()), flush=True)
        if outcomes:
            print(summary(harm, outcomes), flush=True)


def summary(harm: str, outcomes: list[Outcome]) -> str:
    """The counts."""
    slowest = {True: 0.0, False: 0.0}
    for outcome in outcomes:
        at_start = outcome.doing in AT_START
        slowest[at_start] = max(slowest[at_start], *(seconds for _, seconds in outcome.ends.values()))
    counts = {
        "ended by themselves, in time, with an error": sum(outcome.ended and not outcome.through for outcome in outcomes),
        "were through": sum(outcome.ended and outcome.through for outcome in outcomes),
        "came to the same bits": sum(outcome.same for outcome in outcomes),
    }
    said = "; ".join(f"{count} {what}" for what, count in counts.items())
    doing = ", ".join(f"{what} {count}" for what, count in Counter(outcome.doing for outcome in outcomes).most_common())
    lost = ", ".join(f"rank {rank} {count}" for rank, count in sorted(Counter(outcome.lost for outcome in outcomes).items()))
    return (
        f"{harm} {len(outcomes)}: {said}; slowest {slowest[False]:.1f} s, at the start"
        f" {slowest[True]:.1f} s. Rank 0 was: {doing}. Harmed: {lost}"
    )


if __name__ == "__main__":
    main()
