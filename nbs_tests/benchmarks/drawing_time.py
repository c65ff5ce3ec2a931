"""How long it takes to show large things: what tests leave out, as their machine may be busy.

    python nbs_tests/benchmarks/drawing_time.py

Processor seconds of this process, the least of three times. Targets: token losses, traces and update meters of 4,096 tokens and of 32
layers in at most 2 s; a refresh of the training panel after 20,000 steps in at most 0.02 s; an import in at most 1.5 s.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import fulltune_nb as ft
from fulltune_nb.insight import UpdateMeter
from fulltune_nb.insight.losses import ExampleLosses, TokenLosses
from fulltune_nb.insight.predictions import TokenStatistics
from fulltune_nb.insight.updates import TensorUpdate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from nbs_tests.panels.kernels import SETUP

LAYERS, TOKENS, STEPS = 32, 4096, 20_000


def long_losses(tokenizer: Any) -> TokenLosses:
    """Of an example of 4,096 tokens, as some model could have given them."""
    random = np.random.default_rng(0)
    ids = random.integers(10, 400, TOKENS).astype(np.int32)
    five = random.integers(10, 400, (TOKENS, 5)).astype(np.int32), random.random((TOKENS, 5), dtype=np.float32)
    found = TokenStatistics(random.exponential(1.0, TOKENS).astype(np.float32), np.ones(TOKENS, np.int32), *five)
    found.losses[0] = math.nan
    return TokenLosses([ExampleLosses(ft.Example(ids, np.arange(TOKENS) > 100, "", "long:1", 0, {}, tokenizer), found)], tokenizer, False)


def deep_trace(lm: ft.LanguageModel) -> Any:
    """Of 4,096 tokens in 32 layers."""
    found, random = ft.trace(lm, "the quick brown fox"), np.random.default_rng(0)
    found.example = ft.Example(random.integers(10, 400, TOKENS), np.ones(TOKENS, bool), "x" * 9999, "long:1", 0, {})
    found.residual_norms, found.next_probabilities = random.random((LAYERS + 1, TOKENS)), random.random((LAYERS + 1, TOKENS - 1))
    found.top_ids, found.top_probabilities = random.integers(10, 400, (LAYERS + 1, TOKENS, 5)), random.random((LAYERS + 1, TOKENS, 5))
    found.attention = lambda layer, head: random.random((TOKENS, TOKENS), dtype=np.float32)
    return found


def long_meter() -> UpdateMeter:
    """200 measured steps of 288 tensors."""
    meter, names = UpdateMeter(), [f"layers.{layer}.{part}" for layer in range(LAYERS) for part in "abcdefghi"]
    meter.records = [TensorUpdate(step, name, "bfloat16", 9, 9, 9, step % 9, 0.1, 0.1, 1.0) for step in range(1, 201) for name in names]
    return meter


def long_history(history: ft.History) -> ft.History:
    """20,000 steps, an evaluation and an event every 50."""
    for step in range(1, STEPS + 1):
        history.append(ft.StepReport(step, step / 3, 2 + math.sin(step), 10, 1e-3, 1.0, 0.05, 200.0, 1000, 1000, 1000))
        if step % 50 == 0:
            history.append(ft.EvalReport("valid", step, 2.0, 7.4, 10, 0.1))
            history.append(ft.Event(step, "note", "x" * 1000, 0.0))
    return history


def what_is_drawn() -> Iterator[tuple[str, float, Callable[[], Any]]]:
    """Name, target in seconds, and what to time."""
    made: dict = {}
    exec(SETUP, made)
    trainer = made["make_trainer"]()
    losses, meter, history, trace = long_losses(trainer.lm.tokenizer), long_meter(), long_history(ft.History()), deep_trace(trainer.lm)
    for name, shown in (("token losses", losses), ("trace", trace), ("update meter", meter)):
        yield f"{name}, HTML", 2.0, shown._repr_html_
        yield f"{name}, plot", 2.0, lambda shown=shown: shown.plot().figure.canvas.draw()
    yield "trace, logit lens", 2.0, lambda: trace.plot_lens().figure.canvas.draw()
    yield "trace, attention", 2.0, lambda: trace.plot_attention(1).figure.canvas.draw()
    yield "history of 20,000 steps, HTML", 1.0, history._repr_html_
    yield "history of 20,000 steps, plots", 10.0, lambda: [p(history).figure.canvas.draw() for p in (ft.plot_loss, ft.plot_memory)]
    long_history(trainer.history)
    panel = ft.TrainPanel(trainer)
    yield "training panel, a refresh after 20,000 steps", 0.02, panel.refresh


def import_seconds() -> float:
    """Of the package, in a Python of its own."""
    code = "import time; start = time.perf_counter(); import fulltune_nb; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name, target, draw in what_is_drawn():
        seconds = []
        for _ in range(3):
            started = time.process_time()
            draw()
            seconds.append(time.process_time() - started)
            plt.close("all")
        print(f"{name:46} {min(seconds):7.3f} s (target: at most {target:g})")
    print(f"{'import':46} {min(import_seconds() for _ in range(3)):7.3f} s (target: at most 1.5)")


if __name__ == "__main__":
    main()
