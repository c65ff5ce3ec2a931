"""Contender: mlx-lm's own `lora --fine-tune-type full`, through the function its command calls.

It trains the blocks only (embeddings, last norm and head stay frozen), so it has less to do for a token. It also counts one
padding token a row as trained; that one is taken off here.

With the environment variable `BENCHMARK_BLAS` set, `fulltune_nb.cpu` runs first (its folder must be on `PYTHONPATH`).
"""

from __future__ import annotations

import os
import types
from importlib.metadata import version

from common import Clock, arguments, finish

if os.environ.get("BENCHMARK_BLAS"):
    from fulltune_nb.cpu import ensure_fast_blas

    assert ensure_fast_blas().path, "no fast BLAS was found"

from mlx_lm import lora
from mlx_lm.tuner.callbacks import TrainingCallback


class Notes(TrainingCallback):
    """Times the steps from report to report, one a step, and keeps what is reported.

    The first step's time begins with the training; fetching a batch is in every step's time.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.clock = Clock()
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self.reported = 0
        self.peak = 0.0

    def on_val_loss_report(self, val_info: dict) -> None:
        self.clock.start()  # the one before the first step, over no batches

    def on_train_loss_report(self, train_info: dict) -> None:
        self.clock.stop()
        self.tokens.append(int(train_info["trained_tokens"]) - self.reported - self.batch_size)
        self.reported = int(train_info["trained_tokens"])
        self.losses.append(train_info["train_loss"])
        self.peak = train_info["peak_memory"] * 1e9
        self.clock.start()


def main() -> None:
    args = arguments()
    settings = {
        **lora.CONFIG_DEFAULTS,
        "model": str(args.model),
        "data": str(args.data),
        "train": True,
        "fine_tune_type": "full",
        "num_layers": -1,
        "optimizer": "adamw",
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "iters": args.warmup + args.steps,
        "max_seq_length": args.max_length,
        "steps_per_report": 1,
        "val_batches": 0,
        "save_every": 10**9,
        "adapter_path": str(args.scratch / "adapters"),
    }
    defaults = vars(lora.build_parser().parse_args([]))
    notes = Notes(args.batch_size)
    # `run` replaces the callback it is given by those for wandb and the like; ours is to stay.
    lora.get_reporting_callbacks = lambda *a, **k: notes
    lora.run(types.SimpleNamespace(**{**defaults, **settings}))
    finish(notes.clock, notes.tokens, args.warmup, notes.losses, int(notes.peak), {p: version(p) for p in ("mlx-lm", "mlx")})


if __name__ == "__main__":
    main()
