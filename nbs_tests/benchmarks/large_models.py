"""Peak memory of a full fine-tuning step of large models with random weights, one process each.

    python nbs_tests/benchmarks/large_models.py llama-1b --optimizer adafactor
    python nbs_tests/benchmarks/large_models.py llama-1b --optimizer adamw8bit
    python nbs_tests/benchmarks/large_models.py mistral-7b --optimizer adafactor --tokens 64      # needs 17 GB of free memory

Weights are bfloat16, the step is layerwise and updates every weight. Printed as JSON: MLX's peak, the process's peak resident
set, what `preflight` had predicted, seconds a step, and the bytes the usual way needs for the same shape (bfloat16 weights,
gradients and two moments, logits and their gradient in float32).
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from transformers import AutoTokenizer

import fulltune_nb as ft
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import read_config

SHAPES = {
    "llama-1b": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, rope_theta=500000.0, tie_word_embeddings=True, max_position_embeddings=131072,
        rope_scaling=dict(
            rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
        ),
    ),
    "mistral-7b": dict(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False, max_position_embeddings=32768,
    ),
}  # fmt: skip
TOKENIZER = Path(ft.__file__).parent / "tiny" / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--optimizer", default="adafactor")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    lm = ft.LanguageModel(random_model(SHAPES[args.shape]), AutoTokenizer.from_pretrained(TOKENIZER))
    config = ft.TrainConfig(
        batch_size=1, iters=args.steps, optimizer=args.optimizer, memory="lean", learning_rate=1e-5, val_batches=0,
        max_seq_length=args.tokens + 1,
    )  # fmt: skip
    rows = [{"text": f"a row of many words, number {i}: " + "word " * args.tokens} for i in range(4)]
    data = ft.load_data({"train": rows}, lm.tokenizer, config=config)
    before = fingerprints(lm)
    plan = ft.preflight(lm, data, config)
    trainer = ft.Trainer(lm, data, config)
    started = time.perf_counter()
    reports = list(trainer.steps())
    seconds = (time.perf_counter() - started) / args.steps
    unchanged = [name for name, value in fingerprints(lm).items() if value == before[name]]
    usual = 8 * lm.num_parameters + 2 * 4 * args.tokens * lm.config.vocab_size
    peak = max(report.peak_memory for report in reports)
    print(
        json.dumps(
            {
                "shape": args.shape, "parameters": lm.num_parameters, "optimizer": args.optimizer, "tokens": reports[0].tokens,
                "losses": [round(report.loss, 4) for report in reports], "tensors not changed": unchanged,
                "mlx_peak": peak, "peak_rss": peak_rss(), "predicted": plan.peak, "usual": usual, "ratio": round(peak / usual, 3),
                "seconds_a_step": round(seconds, 1),
            }
        )
    )  # fmt: skip


def random_model(values: dict) -> Decoder:
    """bfloat16 weights, made one tensor at a time so that no float32 copy of the model ever exists."""
    config = read_config(values)
    model = Decoder(config)  # lazy: nothing is allocated yet
    mx.random.seed(0)

    def fill(array: mx.array) -> mx.array:
        made = mx.ones(array.shape, dtype=mx.bfloat16) if array.ndim < 2 else draw(array.shape)
        mx.eval(made)
        return made

    model.update(tree_map(fill, model.parameters()))
    return model


def draw(shape: tuple[int, int]) -> mx.array:
    """Random rows, the same ones again and again: drawing billions of numbers would take minutes and show nothing more."""
    block = (0.02 * mx.random.normal((min(256, shape[0]), shape[1]))).astype(mx.bfloat16)
    return mx.concatenate([block[: min(256, shape[0] - i)] for i in range(0, shape[0], 256)])


def fingerprints(lm: ft.LanguageModel) -> dict[str, int]:
    """A number for each matrix, from its first 2,048 rows (the ids of all tokens seen), that nearly any change changes."""
    matrices = [(name, array) for name, array in tree_flatten(lm.model.parameters()) if array.ndim > 1]
    return {name: mx.view(array[:2048], mx.uint16).astype(mx.uint32).sum().item() for name, array in matrices}


def peak_rss() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
