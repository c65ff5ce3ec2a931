"""Whether memory stays flat over thousands of steps on rows that all differ in length, and how many shapes the batches take.

    python nbs_tests/benchmarks/many_lengths.py                     # 2,000 steps, 2,000 lengths; some minutes
    python nbs_tests/benchmarks/many_lengths.py --set '{"packing": true, "batch_size": 2}'

A tiny Llama with random weights is trained on random tokens: one row of each length from 2 to 2,001. Of the first and of the last
quarter of the steps it prints the largest active memory after a step, the largest peak in one, and the largest resident memory of
the process after one, of steps with shapes that occur in both; then the number of different (B, T, N): rows, positions and targets
of a micro-batch. Exit code 1 where a figure of the last quarter is more than 2% above the first's, or there are more than 16 shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

import fulltune_nb as ft  # first: it gives MLX its BLAS
from fulltune_nb import tiny
from fulltune_nb.data import DataSet, DataSettings, Example, Split

MODEL = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip
ALLOWED_GROWTH, ALLOWED_SHAPES = 0.02, 16
FIGURES = ("active", "peak", "resident")


@dataclass(frozen=True)
class Result:
    """What was measured; bytes."""

    first: dict[str, int]
    """Figure -> the largest of the first quarter of the steps; of steps whose shapes occur in the last quarter too."""
    last: dict[str, int]
    """The other way round."""
    shapes: set[tuple[int, int, int]]
    """(B, T, N) of all micro-batches."""
    lengths: int
    """Different lengths of the rows trained on."""

    def growth(self, figure: str) -> float:
        """Share by which the last quarter's is larger."""
        return self.last[figure] / self.first[figure] - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lengths", type=int, default=2000)
    parser.add_argument("--share", type=float, default=1.0, help="of the tokens that are trained on; another in each row if below 1")
    parser.add_argument("--set", type=json.loads, default={}, help="further training settings, as JSON")
    args = parser.parse_args()
    result = measure(args.steps, range(2, args.lengths + 2), args.share, **args.set)
    print(f"{args.steps:,} steps, {result.lengths:,} lengths, {len(result.shapes)} shapes (B, T, N)")
    for figure in FIGURES:
        first, last = result.first[figure], result.last[figure]
        print(f"{figure:>8}: first quarter {first / 1e6:,.2f} MB, last quarter {last / 1e6:,.2f} MB, {result.growth(figure):+.2%}")
    flat = all(result.growth(figure) <= ALLOWED_GROWTH for figure in FIGURES)
    return 0 if flat and len(result.shapes) <= ALLOWED_SHAPES else 1


def measure(
    steps: int, lengths: Sequence[int], share: float = 1.0, of_a_shape: Callable[..., np.ndarray] = np.max, **settings: Any
) -> Result:
    """Trains for so many steps on one row of each length.

    `of_a_shape` makes one figure of those of all steps of the same shapes; of these the largest counts. The median leaves out that
    two streams, working side by side, now and then hold a little more at once, which shows where everything is tiny.
    """
    config = ft.TrainConfig(**{"batch_size": 1, "iters": steps, "max_seq_length": max(lengths), **settings})
    data = DataSet({"train": random_split(lengths, share)}, DataSettings(max_seq_length=config.max_seq_length), None, [], None)
    lm = ft.LanguageModel.from_config(MODEL, ft.load_model(tiny.BASE_MODEL).tokenizer, seed=0)
    trainer, process = ft.Trainer(lm, data, config), psutil.Process()
    gc.collect()  # what was there before must not be freed in the middle
    figures, kinds, seen = [], [], set()  # a step's kind: the shapes of its micro-batches
    for report in trainer.steps():
        figures.append((report.active_memory, report.peak_memory, process.memory_info().rss))
        of_step = trainer.batches.of_step(report.step - 1)
        kinds.append(tuple((*batch.inputs.shape, len(batch.targets)) for batch in of_step))
        seen.update(data.train.lengths[[row for batch in of_step for row in batch.rows]].tolist())
    quarters = slice(0, max(1, steps // 4)), slice(-max(1, steps // 4), None)
    common = set(kinds[quarters[0]]) & set(kinds[quarters[1]])  # a step with more targets takes more memory, whenever it comes
    first, last = {}, {}
    for result, part in zip((first, last), quarters, strict=True):
        of_kind = {kind: [f for f, k in zip(figures[part], kinds[part], strict=True) if k == kind] for kind in common}
        largest = np.max([of_a_shape(some, axis=0) for some in of_kind.values()], axis=0)
        result |= dict(zip(FIGURES, largest.astype(int).tolist(), strict=True))
    return Result(first, last, {shape for kind in kinds for shape in kind}, len(seen))


def random_split(lengths: Sequence[int], share: float) -> Split:
    """Random tokens; in each row another part of them is trained on, `share` of all."""
    random = np.random.RandomState(0)
    examples = []
    for i, length in enumerate(lengths, 1):
        mask = np.zeros(length, dtype=bool)
        own = 1.0 if share == 1 else random.beta(4 * share, 4 * (1 - share))
        mask[-max(1, round(own * (length - 1))) :] = True
        examples.append(Example(random.randint(0, MODEL["vocab_size"], length).astype(np.int32), mask, "", f"train.jsonl:{i}", 0, {}))
    return Split("train", "text", examples)


if __name__ == "__main__":
    sys.exit(main())
