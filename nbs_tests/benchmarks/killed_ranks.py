"""A run of several ranks, one of which is killed or stopped at a random instant, again and again; each time it is resumed.

    python -m nbs_tests.benchmarks.killed_ranks --kills 50 --stops 20 --ranks 2

Says how many of the runs ended by themselves with an exit code that is not 0 and an error, after how many seconds at most, and whether
what the run came to in the end is what one process that nobody disturbs comes to, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fulltune_nb.training.start_ranks import end_together, environments, kill, start_rank
from nbs_tests.training.test_parallel import results_of, run_ranks, same

SETTINGS = {"grad_accumulation_steps": 4, "iters": 1500, "save_every": 10, "steps_per_eval": 1000, "keep": 2, "shard_optimizer": True}
DEADLINE = 5.0


def harmed(folder: Path, ranks: int, number: int, draw: random.Random) -> tuple[bool, float]:
    """Begins or resumes the run, harms a rank some time after its first step; whether it ended as it should, and in how many seconds."""
    scenario = {"settings": SETTINGS, "run_dir": str(folder / "run"), "resume": "auto"}
    (folder / "scenarios.json").write_text(json.dumps({"run": scenario}))
    command = [sys.executable, "-m", "nbs_tests.training.rank_program", str(folder)]
    said = folder / "said.txt"
    with open(said, "w") as out:
        own = [{**one, "FULLTUNE_NB_DEADLINE": str(DEADLINE)} for one in environments(["localhost"] * ranks)]
        started = [start_rank("localhost", command, one, stdout=subprocess.DEVNULL, stderr=out) for one in own]
        try:
            metrics, begin = folder / "run" / "metrics.jsonl", time.time()
            while not (metrics.exists() and metrics.stat().st_mtime > begin) and started[0].poll() is None:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 4))
            lost = draw.randrange(ranks)
            started[lost].send_signal(number)
            harmed_at = time.monotonic()
            code = end_together(started)
            seconds = time.monotonic() - harmed_at
        finally:
            kill(started)
    return code != 0 and f"rank {lost} has" in said.read_text(), seconds


def main() -> None:
    """Harms, then lets the run come to its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for what, number, count in (("killed", signal.SIGKILL, given.kills), ("stopped", signal.SIGSTOP, given.stops)):
            ends = [harmed(folder, given.ranks, number, draw) for _ in range(count)]
            slowest = max((seconds for _, seconds in ends), default=0.0)
            good = sum(ended for ended, _ in ends)
            print(f"{what}: {good} of {count} ended by themselves with an error, in {slowest:.1f} s at most", flush=True)
        scenario = {"run": {"settings": SETTINGS, "run_dir": str(folder / "run"), "resume": "auto"}}
        assert run_ranks(folder, given.ranks, scenario) == 0
        disturbed = same(results_of(folder)["run"])
        assert run_ranks(folder, 1, {"run": {"settings": SETTINGS}}) == 0
        print(f"the same bits as one process: {same(results_of(folder)['run']) == disturbed}")


if __name__ == "__main__":
    main()
