"""How long a step takes beside another commit's, in pairs of steps that follow one another, so that what else a machine does meets both.

    python nbs_tests/benchmarks/step_pairs.py --data DATA --other FOLDER [--pairs 40] [--engine whole layerwise compiled]

FOLDER is a checkout of another commit of this package, DATA as for `throughput.py`, whose 20M Llama is trained (batch 4, AdamW, float32).
Prints the median of the pairs' ratios, other / this one, the ratio of all time together, and whether every loss has the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WARM_UP = 5
ENGINES = {
    "whole": {"backward": "whole", "compile": False},
    "layerwise": {"backward": "layerwise", "compile": False},
    "compiled": {"backward": "whole", "compile": True},
    "compiled-layerwise": {"backward": "layerwise", "compile": True},
}
TRAINER = """
import json, sys, time
import fulltune_nb as ft
model, data, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
config = ft.TrainConfig(batch_size=4, learning_rate=3e-4, max_seq_length=512, **options)
lm = ft.load_model(model)
trainer = ft.Trainer(lm, ft.load_data(data, lm.tokenizer, config=config), config)
answers, sys.stdout = sys.stdout, sys.stderr
for _ in sys.stdin:
    started = time.perf_counter()
    loss = trainer.step().loss
    print(json.dumps([time.perf_counter() - started, loss]), file=answers, flush=True)
"""


class Stepper:
    """A trainer in a process of its own, with the package of a checkout."""

    def __init__(self, checkout: Path, model: Path, data: Path, options: dict):
        command = [sys.executable, "-c", TRAINER, str(model), str(data), json.dumps(options)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, env=environment, cwd=model, **pipes)

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def step(self) -> tuple[float, float]:
        """Seconds and loss."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds, loss = json.loads(self._process.stdout.readline())
        return seconds, loss


def compare(engine: str, pairs: int, other: Path, model: Path, data: Path) -> str:
    options = ENGINES[engine] | {"iters": pairs + WARM_UP}
    with ExitStack() as stack:
        steppers = [stack.enter_context(Stepper(checkout.resolve(), model, data, options)) for checkout in (other, REPOSITORY)]
        found = []
        for number in range(pairs + WARM_UP):
            turn = [0, 1] if number % 2 else [1, 0]
            done = {which: steppers[which].step() for which in turn}
            found.append((done[0], done[1]))
    equal = all(old[1] == new[1] for old, new in found)
    times = [(old[0], new[0]) for old, new in found[WARM_UP:]]
    ratio, total = statistics.median(old / new for old, new in times), sum(old for old, _ in times) / sum(new for _, new in times)
    return f"{engine}: {ratio:.3f} by the median pair, {total:.3f} by all time; losses {'equal' if equal else 'DIFFER'}; {pairs} pairs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=["whole", "layerwise", "compiled"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"  # made in a process of its own, as it takes PyTorch
        subprocess.run([sys.executable, Path(__file__).with_name("wikisql_model.py"), options.data, model], check=True)
        for engine in options.engine:
            print(compare(engine, options.pairs, options.other, model, options.data.resolve()), flush=True)


if __name__ == "__main__":
    main()
