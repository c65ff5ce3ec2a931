"""What storing weights and moments in fewer bits costs in validation loss: bfloat16 and 8 bits beside float32.

    python nbs_tests/benchmarks/rounding_quality.py --data DATA [--iters 300] [--learning-rate 3e-5] [--only NAME ...]

DATA is a folder with `train.jsonl` and `valid.jsonl` of `{"text": ...}` rows (WikiSQL). The 20M-parameter Llama of
`wikisql_model.py`, rounded to bfloat16, is trained once for each row of the table below, on the same batches in the same order, and
evaluated on the whole valid split. Prints the losses and how far each is from float32 AdamW's; exit code 1 when bfloat16 with
stochastic rounding and AdamW in 8 bits is more than 0.5% away. `--json FILE` writes the figures down.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import fulltune_nb as ft  # isort: skip  # before mlx: it gives it its BLAS
from mlx.utils import tree_flatten
from wikisql_model import make_model_folder

ALLOWED = 0.005


@dataclass(frozen=True)
class Storage:
    """One row of the table."""

    name: str
    optimizer: str
    weights: str
    rounding: str = "stochastic"


REFERENCE = Storage("float32-adamw", "adamw", "float32")
CLAIMED = Storage("bfloat16-stochastic-adamw8bit", "adamw8bit", "bfloat16")
ROWS = (
    REFERENCE,
    Storage("bfloat16-nearest-adamw", "adamw", "bfloat16", rounding="nearest"),
    Storage("bfloat16-stochastic-adamw", "adamw", "bfloat16"),
    CLAIMED,
    Storage("float32-adamw8bit", "adamw8bit", "float32"),
    Storage("float32-adafactor", "adafactor", "float32"),
    Storage("bfloat16-stochastic-adafactor", "adafactor", "bfloat16"),
    Storage("float32-lion", "lion", "float32"),
    Storage("bfloat16-stochastic-lion8bit", "lion8bit", "bfloat16"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--only", nargs="*", choices=[row.name for row in ROWS], help="these rows; the first one is always there")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for row in ROWS if row is REFERENCE or not args.only or row.name in args.only]
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model_folder(args.data, Path(scratch) / "model")
        print(f"{'':32}{'valid loss':>12}{'difference':>12}{'seconds':>9}", flush=True)
        for row in rows:
            started = time.perf_counter()
            losses[row.name] = final_loss(model, args, row)
            difference = losses[row.name] / losses[REFERENCE.name] - 1.0
            print(f"{row.name:32}{losses[row.name]:12.4f}{difference:+12.3%}{time.perf_counter() - started:9.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"iters": args.iters, "learning_rate": args.learning_rate, "losses": losses}, indent=2) + "\n")
    return int(CLAIMED.name in losses and abs(losses[CLAIMED.name] / losses[REFERENCE.name] - 1.0) > ALLOWED)


def final_loss(model: Path, args: argparse.Namespace, row: Storage) -> float:
    """Train from the same start; the loss over the whole valid split."""
    config = ft.TrainConfig(
        batch_size=args.batch_size, iters=args.iters, learning_rate=args.learning_rate, optimizer=row.optimizer,
        weights=row.weights, rounding=row.rounding, val_batches=0,
    )  # fmt: skip
    lm = ft.load_model(model, dtype="bfloat16")
    trainer = ft.Trainer(lm, ft.load_data(args.data, lm.tokenizer, config=config), config)
    for _ in trainer.steps():
        pass
    stored = {str(array.dtype).removeprefix("mlx.core.") for _, array in tree_flatten(lm.model.parameters())}
    if stored != {row.weights}:
        sys.exit(f"{row.name}: the weights were trained as {stored}, expected {row.weights}")
    return trainer.evaluate("valid").loss


if __name__ == "__main__":
    sys.exit(main())
