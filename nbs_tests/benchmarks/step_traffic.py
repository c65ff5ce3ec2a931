"""The bytes that a training step reads and writes on a GPU, of this package and of mlx-lm, counted from their graphs; no GPU is needed.

    python -m nbs_tests.benchmarks.step_traffic             # a minute and little memory: nothing is computed
    python -m nbs_tests.benchmarks.step_traffic --kinds     # and which kernels move how much

AdamW in bfloat16, full tuning, as a GPU of a Mac runs it (attention unfused, as in training there). Each model is made with its true
sizes and 2 and 3 blocks; a block more costs the difference. The least possible: products that read their factors and write their results,
and nothing else; an update that reads weight, gradient and moments once and writes weight and moments once.
What is counted, and what is not, stands in `graph_traffic.py`. Needs mlx-lm and g++.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest import mock

import mlx.core as mx
import mlx.optimizers
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import default_loss

import fulltune_nb as ft
from fulltune_nb.data.batches import Batch
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.model_config import read_config
from fulltune_nb.training import engine
from fulltune_nb.training.gradients import norm_of
from fulltune_nb.training.optimizers import Optimizers
from nbs_tests.graph_traffic import traffic
from nbs_tests.kernel_counts import as_on_gpu

BASE = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256, "head_dim": 64, "tie_word_embeddings": True}
MISTRAL_7B = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000, "tie_word_embeddings": False}
MODELS = {
    "Llama-1B 4x512": ({**BASE, **LLAMA_1B, "max_position_embeddings": 4096}, 16, 4, 512),
    "Mistral-7B 4x1024": ({**BASE, **MISTRAL_7B, "max_position_embeddings": 4096}, 32, 4, 1024),
}
MOST = 2**24  # bytes: what is evaluated meanwhile, such as a table of random numbers, is smaller
Counts = dict[str, dict[str, list[int]]]  # part of a step -> kind of kernel -> [kernels, bytes]


def flat(*trees: object) -> list[mx.array]:
    return [array for tree in trees for _, array in tree_flatten(tree) if isinstance(array, mx.array)]


def in_bfloat16(model: nn.Module) -> nn.Module:
    model.set_dtype(mx.bfloat16)
    return model


def batch_of(rows: int, tokens: int, vocab: int) -> Batch:
    ids = np.random.default_rng(0).integers(0, vocab, (rows, tokens + 1)).astype(np.int32)
    count = rows * tokens
    ones = np.ones(count, np.float32)
    return Batch(ids[:, :-1].copy(), np.arange(count, dtype=np.int32), ids[:, 1:].reshape(-1).copy(), ones, count, (), (), count, count)


def ours(config: dict, rows: int, tokens: int) -> Counts:
    model = in_bfloat16(Decoder(read_config(config)))
    batch, parameters = batch_of(rows, tokens, config["vocab_size"]), flat(model.parameters())
    with mock.patch.object(engine, "evaluate") as evaluate, mock.patch.object(engine, "WholeGradients"):
        engine.WholeGraph(model, compiled=True).gradients(1, [batch])
    loss, gradients = evaluate.call_args.args
    found = {"loss and gradients": traffic([loss, gradients], parameters)}
    optimizers = Optimizers(model, ft.TrainConfig(optimizer="adamw"))
    gradients = {name: mx.zeros(array.shape, dtype=array.dtype) for name, array in gradients.items()}
    found["norm"] = traffic(norm_of(gradients), flat(gradients))
    before = flat(gradients, parameters, optimizers.state_arrays())
    optimizers.update(model, gradients, 1e-5)
    found["update"] = traffic(flat(model.parameters(), optimizers.state_arrays()), before)
    return found


def theirs(config: dict, rows: int, tokens: int) -> Counts:
    model = in_bfloat16(llama.Model(llama.ModelArgs.from_dict(config)))
    ids = mx.array(np.random.default_rng(0).integers(0, config["vocab_size"], (rows, tokens + 1)).astype(np.int32))
    batch = ids, mx.array([[0, tokens]] * rows)
    found = {}
    optimizer = mlx.optimizers.AdamW(1e-5)
    optimizer.init(model.trainable_parameters())
    for part in ("loss and gradients", "whole step"):

        def step(parameters: dict, state: dict, part: str = part) -> tuple:
            model.update(parameters)
            optimizer.state = state
            (loss, _), gradients = nn.value_and_grad(model, default_loss)(model, *batch)
            if part == "whole step":
                optimizer.update(model, gradients)
                return loss, model.trainable_parameters(), optimizer.state
            return loss, gradients

        given = model.trainable_parameters(), optimizer.state
        found[part] = traffic(mx.compile(step)(*given), flat(*given))
        model.update(given[0])
        optimizer.state = given[1]
    return found


def gigabytes(count: Callable[[dict, int, int], Counts], name: str, kinds: bool) -> dict[str, float]:
    """Part of a step -> GB, of the whole model; `kinds` are printed."""
    config, layers, rows, tokens = MODELS[name]
    two, three = (count({**config, "num_hidden_layers": depth}, rows, tokens) for depth in (2, 3))
    for part in two if kinds else ():
        print(f"{name}, {count.__name__}, {part}: kernels and MB of a block, and of the rest")
        for kind, (more, moved) in sorted(three[part].items(), key=lambda item: -item[1][1]):
            number, before = two[part].get(kind, (0, 0))
            more, moved = more - number, moved - before
            print(f"    {kind:20s} {more:4d} {moved / 1e6:9.1f}   {number - 2 * more:4d} {(before - 2 * moved) / 1e6:9.1f}")

    def total(part: str, *kinds: str) -> float:
        at = [sum(moved for kind, (_, moved) in found[part].items() if not kinds or kind in kinds) for found in (two, three)]
        return (at[0] + (layers - 2) * (at[1] - at[0])) / 1e9

    return {**{part: total(part) for part in two}, "products": total("loss and gradients", "Matmul", "AddMM")}


def parameters_of(name: str) -> float:
    """Parameters, in 10^9."""
    config, layers, *_ = MODELS[name]
    sizes = [sum(a.size for a in flat(Decoder(read_config({**config, "num_hidden_layers": depth})).parameters())) for depth in (2, 3)]
    return (sizes[0] + (layers - 2) * (sizes[1] - sizes[0])) / 1e9


def main(kinds: bool) -> None:
    evaluate = mx.eval

    def only_small(*trees: object) -> None:
        if sum(array.nbytes for array in flat(list(trees))) <= MOST:
            evaluate(*trees)

    lines = ["| GB | loss and gradients | norm | update | step | beside mlx-lm |", "|---|---|---|---|---|---|"]
    with as_on_gpu(), mock.patch.object(mx, "eval", only_small), mock.patch.object(mx, "async_eval", only_small):
        for name in MODELS:
            package, other, size = gigabytes(ours, name, kinds), gigabytes(theirs, name, kinds), parameters_of(name)
            alone, whole = other["loss and gradients"], other["whole step"]
            rows = {
                "this package": [package["loss and gradients"], package["norm"], package["update"]],
                "mlx-lm": [alone, 0.0, whole - alone],
                "least, moments in float32": [package["products"], 0.0, 22 * size],
                "least, moments in bfloat16": [package["products"], 0.0, 14 * size],
            }
            for who, parts in rows.items():
                cells = [*(f"{part:.1f}" for part in (*parts, sum(parts))), f"{sum(parts) / whole - 1:+.0%}"]
                lines.append(f"| {name}, {who} | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main("--kinds" in sys.argv)
