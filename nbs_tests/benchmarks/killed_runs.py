"""SIGKILL at random instants of a run that evaluates, saves and exports after every step. After each, a copy of what is left is resumed
to the end.

    python -m nbs_tests.benchmarks.killed_runs --kills 200

Counts the kills after which a whole checkpoint was found, and after which all losses and the final weights and optimizer state are
those of the run that nobody killed, bit for bit; `best/` and the export are whole. The killed run itself goes on from where it was, to be
killed again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from fulltune_nb.models.language_model import load_model
from fulltune_nb.models.model_file import export_folder
from fulltune_nb.training.state import check_files, list_checkpoints
from nbs_tests.benchmarks import small_run
from nbs_tests.benchmarks.small_run import SIGKILL, begin, digest, fork, losses, run_to_end, send


class Export:
    """Exports the model with every checkpoint, over the export before."""

    def __init__(self, place: Path):
        self.place = place

    def on_save(self, trainer, path) -> None:
        assert export_folder(trainer.lm, self.place, {"steps": trainer.step_count}) == self.place, "the export before was not whole"


def train(folder: Path, run_dir: Path, ready: int) -> None:
    """The child that is killed: it says when its first checkpoint is there, and trains."""
    trainer = begin(folder, run_dir)
    trainer.listeners.append(Export(run_dir / "out" / "model"))
    if trainer.step_count == 0 and not list_checkpoints(run_dir / "checkpoints"):
        trainer.save()
    os.write(ready, b"+")
    trainer.run()


def check(folder: Path, run_dir: Path) -> None:
    """The child that resumes: exits with an error where anything differs."""
    trainer = begin(folder, run_dir)
    assert trainer.history.events[-1].kind == "resume", "no whole checkpoint"
    for place in (run_dir / "out" / "model", run_dir / "best"):
        if place.exists():
            load_model(place)
    if (run_dir / "best").exists():
        check_files(run_dir / "best")
    trainer.run()
    Export(run_dir / "out" / "model").on_save(trainer, None)  # what a killed export left is removed by the next
    expected = json.loads((folder / "reference.json").read_text())
    assert losses(trainer) == expected["losses"], "losses differ"
    assert digest(trainer) == expected["digests"][-1], "weights or optimizer state differ"
    assert json.loads((run_dir / "result.json").read_text())["steps"] == trainer.total_steps
    litter = [path.name for path in run_dir.rglob(".*")]
    assert not litter, f"left over: {litter}"


def main(kills: int, seed: int) -> int:
    """Returns the exit code: 0 where every kill was survived."""
    folder, rng = small_run.workplace(), small_run.rng(seed)
    run_dir, copy = folder / "run", folder / "copy"
    killed = survived = ended = 0
    longest = None  # seconds that the steps of a whole run take
    began = time.perf_counter()
    while killed < kills:
        read, write = os.pipe()
        child = fork(lambda write=write: train(folder, run_dir, write), folder / "output.txt")
        os.close(write)
        assert os.read(read, 1) == b"+", (folder / "output.txt").read_text()
        os.close(read)
        started = time.perf_counter()
        if longest is not None:
            time.sleep(rng.uniform(0, longest))
            send(child, SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        longest = longest or time.perf_counter() - started
        if code == 0:  # done before it was hit
            ended += 1
            shutil.rmtree(run_dir)
            continue
        assert code == -SIGKILL, (folder / "output.txt").read_text()
        killed += 1
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run_dir, copy)
        if run_to_end(lambda: check(folder, copy), folder / "output.txt") == 0:
            survived += 1
        else:
            print((folder / "output.txt").read_text()[-3000:])
    seconds = time.perf_counter() - began
    print(f"{survived} of {killed} kills survived; {ended} runs ended before they were hit; {seconds:.0f} s")
    if survived == killed:
        small_run.remove(folder)
    return 0 if survived == killed else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    raise SystemExit(main(arguments.kills, arguments.seed))
