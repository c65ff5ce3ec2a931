"""Contender: mlx-lm's trainer on its own model class in bfloat16, with the AdamW that its command uses.

As its `--fine-tune-type full` does, the blocks are trained and embeddings, last norm and head are frozen; with `--all` every
weight is trained, which its command cannot do. Random weights made in memory; one row of `--tokens` trained tokens a step; no
gradient checkpointing.
"""

from __future__ import annotations

from importlib.metadata import version

import mlx.core as mx
import mlx.optimizers
import numpy as np
from common import Clock, finish, shape_arguments
from mlx.utils import tree_map
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.utils import _get_classes


class Rows(list):
    """Token ids in the place of a data set."""

    def process(self, row: list[int]) -> tuple[list[int], int]:
        return row, 0


class Notes(TrainingCallback):
    """Times the steps from report to report, one a step."""

    def __init__(self) -> None:
        self.clock, self.losses, self.tokens = Clock(), [], []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.clock.stop()
        self.losses.append(train_info["train_loss"])
        self.tokens.append(int(train_info["trained_tokens"]) - sum(self.tokens))
        self.peak = mx.get_peak_memory()
        self.clock.start()


def main() -> None:
    args = shape_arguments()
    model_class, config_class = _get_classes(args.shape)
    model = model_class(config_class.from_dict(args.shape))  # lazy: nothing is allocated yet
    model.update(tree_map(fill, model.parameters()))
    model.freeze()
    for part in [model] if args.all else model.layers:
        part.unfreeze()
    rows = Rows([np.random.default_rng(0).integers(0, args.shape["vocab_size"], args.tokens + 1).tolist()])
    args.scratch.mkdir(parents=True, exist_ok=True)
    settings = TrainingArgs(
        batch_size=1, iters=args.steps, steps_per_report=1, steps_per_save=10**9, max_seq_length=args.tokens + 1,
        adapter_file=str(args.scratch / "weights.safetensors"),
    )  # fmt: skip
    notes = Notes()
    notes.clock.start()
    train(model, mlx.optimizers.AdamW(learning_rate=1e-5), CacheDataset(rows), None, settings, training_callback=notes)
    finish(notes.clock, notes.tokens, 0, notes.losses, notes.peak, {p: version(p) for p in ("mlx-lm", "mlx")})


def fill(array: mx.array) -> mx.array:
    """bfloat16 weights, one tensor at a time."""
    made = mx.ones(array.shape, dtype=mx.bfloat16) if array.ndim < 2 else draw(array.shape)
    mx.eval(made)
    return made


def draw(shape: tuple[int, int]) -> mx.array:
    """Random rows, the same ones again and again: drawing billions of numbers would take minutes and show nothing more."""
    block = (0.02 * mx.random.normal((min(256, shape[0]), shape[1]))).astype(mx.bfloat16)
    return mx.concatenate([block[: min(256, shape[0] - i)] for i in range(0, shape[0], 256)])


if __name__ == "__main__":
    main()
