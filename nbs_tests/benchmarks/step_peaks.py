"""Peaks of a step over the whole graph on a GPU, of this package and of mlx-lm, in MB above the weights; no GPU is needed.

    python -m nbs_tests.benchmarks.step_peaks      # some minutes on an idle machine, as MLX multiplies bfloat16 slowly on a CPU

Loss, gradients and norm, compiled; MLX computes on the CPU and counts as on a GPU. Medians of 4 steps, each side in a process of its own.
Exit code 1 where mlx-lm takes less. Needs mlx-lm and g++.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable

STEPS = 4
BASE = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 1024}
WIDE = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6}
NARROW = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
SHAPES = {
    "6 layers, D 384, V 8,192, head of its own": {**BASE, **WIDE, "vocab_size": 8192, "tie_word_embeddings": False},
    "8 layers, D 256, V 32,000, tied": {**BASE, **NARROW, "vocab_size": 32000, "tie_word_embeddings": True},
}
CASES = [
    (shape, dtype, rows, tokens, checkpoint)
    for shape, longer in zip(SHAPES, (384, 512), strict=True)
    for dtype, rows, tokens in (("bfloat16", 2, 256), ("float32", 4 if longer == 384 else 2, longer))
    for checkpoint in (False, True)
]


def peak_of(step: Callable[[], object]) -> float:
    """MB of the median step; each is computed, and its results thrown away."""
    import mlx.core as mx

    found = []
    for _ in range(STEPS):
        gc.collect()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        step()
        found.append((mx.get_peak_memory() - before) / 1e6)
    return statistics.median(found)


def ours(config: dict, dtype: str, rows: int, tokens: int, checkpoint: bool) -> float:
    import fulltune_nb  # noqa: F401  # before mlx: it gives MLX its BLAS

    # isort: split
    import mlx.core as mx

    from fulltune_nb.models.decoder import Decoder
    from fulltune_nb.models.model_config import read_config
    from fulltune_nb.training import engine
    from nbs_tests.benchmarks.step_traffic import batch_of
    from nbs_tests.gpu_like import gpu_like

    with gpu_like():
        model = Decoder(read_config(config))
        model.set_dtype(getattr(mx, dtype))
        mx.eval(model.parameters())
        whole = engine.WholeGraph(model, grad_checkpoint=checkpoint, compiled=True)
        batch = batch_of(rows, tokens, config["vocab_size"])
        return peak_of(lambda: whole.gradients(1, [batch]).norm())


def mlx_lm(config: dict, dtype: str, rows: int, tokens: int, checkpoint: bool) -> float:
    import mlx.core as mx
    import numpy as np
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    if checkpoint:
        grad_checkpoint(model.layers[0])
    ids = mx.array(np.random.default_rng(0).integers(0, config["vocab_size"], (rows, tokens + 1)).astype(np.int32))
    lengths = mx.array([[0, tokens]] * rows)

    def gradients(parameters: dict) -> tuple:
        model.update(parameters)
        return nn.value_and_grad(model, default_loss)(model, ids, lengths)

    compiled, parameters = mx.compile(gradients), model.parameters()

    def step() -> None:
        found = compiled(parameters)
        model.update(parameters)  # no arrays of the trace stay in the model
        mx.eval([array for _, array in tree_flatten(found)])

    return peak_of(step)


SIDES = {"ours": ours, "mlx-lm": mlx_lm}


def peak_in_a_process(side: str, number: int) -> float:
    command = [sys.executable, "-m", "nbs_tests.benchmarks.step_peaks", "--one", side, str(number)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        side, number = options.one
        shape, *case = CASES[int(number)]
        print(SIDES[side](SHAPES[shape], *case))
        return 0
    print("| | this package | mlx-lm |\n|---|---:|---:|")
    missed = 0
    for number, (shape, dtype, rows, tokens, checkpoint) in enumerate(CASES):
        package, other = (peak_in_a_process(side, number) for side in SIDES)
        missed += package > other
        name = f"{shape}, {dtype}, {rows} x {tokens}{', grad_checkpoint' if checkpoint else ''}"
        print(f"| {name} | {package:.0f} | {other:.0f} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
