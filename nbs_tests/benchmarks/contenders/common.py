"""What every contender does alike: its arguments and the one line of JSON it ends with. Standard library only."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
    """`--model --data --steps --warmup --batch-size --learning-rate --max-length --scratch`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True, help="measured steps")
    parser.add_argument("--warmup", type=int, required=True, help="steps before")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder to write to")
    return parser.parse_args()


def shape_arguments() -> argparse.Namespace:
    """`--shape --tokens --steps --scratch`, for models with random weights that are made in memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=json.loads, required=True, help="config.json's content")
    parser.add_argument("--tokens", type=int, required=True, help="trained tokens a step, in one row")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder to write to")
    parser.add_argument("--all", action="store_true", help="mlx-lm: train every weight, not the blocks only")
    return parser.parse_args()


class Clock:
    """Wall and processor seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def start(self) -> None:
        self._begin = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        self.steps.append((time.perf_counter() - self._begin[0], time.process_time() - self._begin[1]))


def finish(
    clock: Clock, tokens: list[int], warmup: int, losses: list[float], mlx_peak: int | None, versions: dict, more: dict | None = None
) -> None:
    """Print the result.

    Args:
        clock: has timed every step, warm-up included.
        tokens: of every step, those that were a trained target; no padding.
        warmup: how many steps are not counted.
        losses: of every step; the first and the last show that the right model learned something.
        mlx_peak: bytes MLX had allocated at most; None for others.
        versions: package -> version.
        more: what else the contender has to tell.
    """
    measured = clock.steps[warmup:]
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "tokens": sum(tokens[warmup:]),
        "seconds": sum(wall for wall, _ in measured),
        "cpu_seconds": sum(cpu for _, cpu in measured),
        "steps": len(measured),
        "first_step_seconds": clock.steps[0][0],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_rss": largest if sys.platform == "darwin" else largest * 1024,
        "mlx_peak": mlx_peak,
        "versions": versions,
        **(more or {}),
    }
    print("\nRESULT " + json.dumps(result), flush=True)
