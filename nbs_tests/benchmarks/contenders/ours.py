"""Contender: `fulltune_nb`."""

from __future__ import annotations

import os
from importlib.metadata import version

from common import Clock, arguments, finish
from mlx.utils import tree_flatten

import fulltune_nb as ft


def main() -> None:
    args = arguments()
    config = ft.TrainConfig(
        batch_size=args.batch_size, learning_rate=args.learning_rate, max_seq_length=args.max_length,
        backward=os.environ.get("BENCHMARK_BACKWARD", "whole"), compile=False if os.environ.get("BENCHMARK_COMPILE") == "0" else None,
    )  # fmt: skip  # a run of the default length, of which these are the first steps
    lm = ft.load_model(args.model)
    data = ft.load_data(args.data, lm.tokenizer, config=config)
    trainer = ft.Trainer(lm, data, config)
    clock, tokens, losses, peak = Clock(), [], [], 0
    for _ in range(args.warmup + args.steps):
        clock.start()
        report = trainer.step()
        clock.stop()
        tokens.append(report.tokens)
        losses.append(report.loss)
        peak = max(peak, report.peak_memory)
    share = share_of_matmul_rate(lm, sum(tokens[args.warmup :]), sum(wall for wall, _ in clock.steps[args.warmup :]))
    versions = {"fulltune_nb": version("fulltune_nb"), "mlx": version("mlx")}
    finish(clock, tokens, args.warmup, losses, peak, versions, {"share_of_matmul_rate": share})


def share_of_matmul_rate(lm: ft.LanguageModel, tokens: int, seconds: float) -> float:
    """The floating point operations of the products with weights, 6 a weight and trained token, against what this machine does in
    the same time in a large product. Padding, attention and an embedding that is only looked up are not counted."""
    embedding = 0 if lm.config.tie_word_embeddings else lm.config.vocab_size * lm.config.hidden_size
    weights = sum(array.size for _, array in tree_flatten(lm.model.parameters()) if array.ndim >= 2) - embedding
    return 6 * weights * tokens / seconds / (ft.system_info(measure=True).matmul_gflops * 1e9)


if __name__ == "__main__":
    main()
