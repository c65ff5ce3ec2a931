"""Steps of several ranks: time, the part of it in MLX's engine, and bytes against an all-reduce's minimum.

    taskset -c 0 python -m nbs_tests.benchmarks.parallel_steps --micro 1            # one process on one core
    python -m fulltune_nb.ranks -n 2 -- python -m nbs_tests.benchmarks.parallel_steps --micro 2 --pin

Each rank is pinned to the core of its number with --pin. Prints a line of JSON on rank 0.
"""

import os
import sys

if "--pin" in sys.argv:  # before anything counts the cores
    os.sched_setaffinity(0, {int(os.environ.get("MLX_RANK", 0)) % os.cpu_count()})

import fulltune_nb as ft  # noqa: I001
import argparse
import json
import statistics
import time

import numpy as np

from fulltune_nb import tiny
from fulltune_nb.models.parameters import trainable_of
from fulltune_nb.tokenizer import load_tokenizer

SHAPES = {"22m": (384, 1024, 6, 16_000), "1.2b": (2048, 8192, 16, 128_256)}
"""Hidden size, MLP, layers, vocabulary."""


def main() -> None:
    """Measures `--steps` steps after two to warm up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="22m")
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--backward", default="whole")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--pin", action="store_true")
    given = parser.parse_args()
    hidden, mlp, layers, vocabulary = SHAPES[given.shape]
    shape = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "max_position_embeddings": 4096,
        "tie_word_embeddings": given.shape != "22m",
    }  # fmt: skip
    tokenizer = load_tokenizer(tiny.BASE_MODEL)
    config = ft.TrainConfig(
        batch_size=given.rows, grad_accumulation_steps=given.micro, iters=given.steps + 2, max_seq_length=given.tokens + 1,
        backward=given.backward, optimizer=given.optimizer, learning_rate=1e-5, val_batches=0, packing=True, compile=False,
    )  # fmt: skip
    words = np.random.RandomState(0).randint(0, 900, (given.rows * given.micro * 4, 2 * given.tokens))
    rows = [{"text": tokenizer.decode(ids.tolist())} for ids in words]
    lm = ft.LanguageModel.from_config(shape, tokenizer)
    trainer = ft.Trainer(lm, ft.load_data({"train": rows}, tokenizer, config=config), config, force=True)
    ranks, reports, spent = trainer.ranks, [], []
    for report in trainer.steps():
        reports.append(report)
        spent.append((ranks.bytes_sent, ranks.seconds) if ranks else (0, 0.0))
    if ranks is not None and ranks.rank:
        return
    seconds = statistics.median(report.seconds for report in reports[2:])
    gradients = 4 * sum(array.size for array in trainable_of(lm.model).values())
    size = ranks.size if ranks else 1
    each = (spent[-1][0] - spent[1][0]) / given.steps, (spent[-1][1] - spent[1][1]) / given.steps
    print(
        json.dumps({
            "ranks": size, "shape": given.shape, "backward": given.backward, "micro": given.micro, "seconds a step": round(seconds, 3),
            "tokens/s": round(statistics.median(r.tokens_per_second for r in reports[2:])), "engine s": round(each[1], 3),
            "share in engine": round(each[1] / seconds, 3), "MB sent by rank 0": round(each[0] / 1e6, 1),
            "MB of gradients": round(gradients / 1e6, 1), "least MB a rank": round(2 * (size - 1) / size * gradients / 1e6, 1),
            "load": os.getloadavg()[0], "time": time.strftime("%H:%M"),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
