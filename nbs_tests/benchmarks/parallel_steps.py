"""Steps of several ranks: time, the part of it in MLX's engine, and bytes against an all-reduce's minimum.

    python -m nbs_tests.benchmarks.parallel_steps --pin --micro 1                              # one process on one core
    python -m fulltune_nb.ranks -n 2 -- python -m nbs_tests.benchmarks.parallel_steps --pin --micro 2
    python -m nbs_tests.training.rank_network 2 python -m nbs_tests.benchmarks.parallel_steps --pin --micro 2
    python -m fulltune_nb.ranks -n 2 -- python -m nbs_tests.benchmarks.parallel_steps --pin --micro 2 --library mlx-lm

The third has each rank in a network of its own, where the kernel counts what passes its interface. mlx-lm trains the same shape on rows of
the same length by its own loop, every weight, with the BLAS that this package has loaded, over the same ring (`mlx.launch` starts it too,
but keeps a core busy meanwhile). Each rank is pinned to the core of its number with --pin. Rank 0 prints a line of JSON.
"""

import os
import sys

if "--pin" in sys.argv:  # before anything counts the cores
    os.sched_setaffinity(0, {int(os.environ.get("MLX_RANK", 0)) % os.cpu_count()})

import fulltune_nb as ft  # noqa: I001
import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np

from fulltune_nb import tiny
from fulltune_nb.models.parameters import trainable_of
from fulltune_nb.tokenizer import load_tokenizer
from fulltune_nb.training.parallel import ranks_of_environment
from nbs_tests.training.rank_network import bytes_sent

SHAPES = {"22m": (384, 1024, 6, 16_000), "1.2b": (2048, 8192, 16, 128_256)}
"""Hidden size, MLP, layers, vocabulary."""
WARM_UP = 2


def shape_of(name: str) -> dict[str, Any]:
    """A Llama's config.json."""
    hidden, mlp, layers, vocabulary = SHAPES[name]
    return {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": name != "22m",
    }  # fmt: skip


def ours(given: argparse.Namespace) -> dict[str, Any] | None:
    """Steps of a trainer; what rank 0 has to tell of them."""
    tokenizer = load_tokenizer(tiny.BASE_MODEL)
    config = ft.TrainConfig(
        batch_size=given.rows, grad_accumulation_steps=given.micro, iters=given.steps + WARM_UP, max_seq_length=given.tokens + 1,
        backward=given.backward, optimizer=given.optimizer, learning_rate=1e-5, val_batches=0, packing=True, compile=given.compile,
        shard_optimizer=given.shard_optimizer,
    )  # fmt: skip
    words = np.random.RandomState(0).randint(0, 900, (given.rows * given.micro * 4, 2 * given.tokens))
    rows = [{"text": tokenizer.decode(ids.tolist())} for ids in words]
    lm = ft.LanguageModel.from_config(shape_of(given.shape), tokenizer)
    trainer = ft.Trainer(lm, ft.load_data({"train": rows}, tokenizer, config=config), config, force=True)
    ranks, seconds, sent = trainer.ranks, [], []
    for report in trainer.steps():
        seconds.append(report.seconds)
        sent.append((bytes_sent() or 0, *((ranks.bytes_sent, ranks.seconds) if ranks else (0, 0.0))))
    each = [(last - first) / given.steps for first, last in zip(sent[WARM_UP - 1], sent[-1], strict=True)]
    of_ranks = ranks.exchange(each) if ranks else [each]
    arrays = trainable_of(lm.model)
    gradients = sum(array.nbytes for array in arrays.values())
    found = {"seconds": seconds, "MB of gradients": round(gradients / 1e6, 1)}
    if ranks is None:
        return found
    found |= {
        "least MB a rank": round(2 * (ranks.size - 1) / ranks.size * gradients / 1e6, 1),
        "MB sent by each rank's engine": [round(one[1] / 1e6, 1) for one in of_ranks],
        "MB through each rank's interface": [round(one[0] / 1e6, 1) for one in of_ranks],
        "s in each rank's engine": [round(one[2], 2) for one in of_ranks],
        "s of such bytes alone": round(seconds_alone(ranks, arrays), 3),
    }
    return found if ranks.rank == 0 else None


def seconds_alone(ranks: Any, arrays: dict[str, mx.array]) -> float:
    """So long it takes to send arrays of the gradients' sizes to the last rank and back, where nobody waits for a computation."""
    times = []
    for _ in range(3):
        ranks.exchange(None)
        began = time.perf_counter()
        for owner in (0, ranks.size - 1):
            ranks.shared(arrays if ranks.rank == owner else {}, owner, lambda name: False)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def mlx_lms(given: argparse.Namespace) -> dict[str, Any] | None:
    """The same of mlx-lm: what its data parallel training does with as many rows a step."""
    from mlx_lm.models import llama
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.trainer import TrainingArgs, train

    seconds: list[float] = []
    ranks_of_environment()  # MLX's group, which its loop asks for

    class Notes(TrainingCallback):
        def on_train_loss_report(self, info: dict) -> None:
            seconds.append(1 / info["iterations_per_second"])

    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(shape_of(given.shape)))
    mx.eval(model.parameters())
    batch = given.rows * given.micro
    words = np.random.RandomState(0).randint(0, 900, (batch * 4, given.tokens + 1))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArgs(
            batch_size=batch, iters=given.steps + WARM_UP, steps_per_report=1, val_batches=0, max_seq_length=given.tokens + 1,
            adapter_file=f"{folder}/weights.safetensors",
        )  # fmt: skip
        train(model, mlx.optimizers.AdamW(1e-5), [(ids.tolist(), 0) for ids in words], args=args, training_callback=Notes())
    return {"seconds": seconds} if mx.distributed.init().rank() == 0 else None


def main() -> None:
    """Measures `--steps` steps after two to warm up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=("fulltune_nb", "mlx-lm"), default="fulltune_nb")
    parser.add_argument("--shape", choices=SHAPES, default="22m")
    parser.add_argument("--micro", type=int, default=2, help="micro-batches a step, of all ranks together")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--backward", default="whole")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--shard-optimizer", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--pin", action="store_true")
    given = parser.parse_args()
    found = (ours if given.library == "fulltune_nb" else mlx_lms)(given)
    if found is None:
        return
    seconds = statistics.median(found.pop("seconds")[WARM_UP:])
    tokens = given.micro * given.rows * given.tokens
    print(
        json.dumps({
            "library": given.library, "ranks": int(os.environ.get("MLX_WORLD_SIZE", 0)) or None, "shape": given.shape,
            "tokens a step": tokens, "seconds a step": round(seconds, 3), "tokens/s": round(tokens / seconds, 1), **found,
            "peak GB": round(mx.get_peak_memory() / 1e9, 2), "load": os.getloadavg()[0], "time": time.strftime("%H:%M"),
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
