"""Would a step gain if gradients travelled while the next block's are computed? Eight products as of a backward pass, each followed by the
exchange of 8 MB: in turn, and with the exchange on a thread of its own.

    python -m fulltune_nb.ranks -n 2 -- python -m nbs_tests.benchmarks.overlapped_exchange --rows 256

Each rank is pinned to the core of its number. Rank 0 prints a line of JSON: milliseconds, medians of runs in turn.
"""

import os

if hasattr(os, "sched_setaffinity"):  # before anything counts the cores
    os.sched_setaffinity(0, {int(os.environ.get("MLX_RANK", 0)) % os.cpu_count()})

import fulltune_nb as ft  # noqa: F401, I001  first of all: it gives MLX its BLAS
import argparse
import json
import queue
import statistics
import threading
import time

import mlx.core as mx

from fulltune_nb.models.parameters import Arrays
from fulltune_nb.training.parallel import ranks_of_environment

HIDDEN, BLOCKS = 512, 8


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--times", type=int, default=9)
    given = parser.parse_args()
    ranks = ranks_of_environment()
    weights = [mx.random.normal((HIDDEN, 4 * HIDDEN)) * 0.01 for _ in range(BLOCKS)]
    x, cotangent = mx.random.normal((given.rows, HIDDEN)), mx.random.normal((given.rows, 4 * HIDDEN))
    mx.eval(weights, x, cotangent)

    def block(number: int) -> Arrays:
        gradient = x.T @ (cotangent * (x @ weights[number]))
        own = {"a": gradient, "b": gradient * 0.5}
        mx.eval(own, cotangent @ weights[number].T)
        return own

    def exchanged(own: Arrays) -> Arrays:
        return ranks.total(2, ranks.added(ranks.rank, 2, {}, own))

    def in_turn() -> None:
        for number in range(BLOCKS):
            exchanged(block(number))

    def overlapped() -> None:
        todo: queue.SimpleQueue = queue.SimpleQueue()

        def work() -> None:
            with mx.stream(mx.new_stream(mx.cpu)):
                while (own := todo.get()) is not None:
                    exchanged(own)

        thread = threading.Thread(target=work)
        thread.start()
        for number in range(BLOCKS):
            todo.put(block(number))
        todo.put(None)
        thread.join()

    def computed() -> None:
        for number in range(BLOCKS):
            block(number)

    found: dict[str, list[float]] = {}
    for _ in range(given.times + 1):
        for way in (computed, in_turn, overlapped):
            ranks.exchange("begin")
            began = time.perf_counter()
            way()
            found.setdefault(way.__name__, []).append(1e3 * (time.perf_counter() - began))
    if not ranks.rank:
        medians = {name: round(statistics.median(times[1:]), 1) for name, times in found.items()}  # the first warms up
        print(json.dumps({"rows": given.rows, **medians, "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
