"""`python -m nbs_tests.training.rank_memory FOLDER`: a rank that measures what its steps need, for each of the settings."""

import fulltune_nb as ft  # noqa: I001  first of all: it gives MLX its BLAS
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

from fulltune_nb import tiny
from fulltune_nb.tokenizer import load_tokenizer
from nbs_tests.training.conftest import TINY_LLAMA, make_rows

WHOLE = {"backward": "whole"}
LEAN = {"backward": "layerwise"}
SETTINGS = {
    "whole": WHOLE,
    "shared out": {**WHOLE, "shard_optimizer": True},
    "two micro-batches each": {**WHOLE, "shard_optimizer": True, "grad_accumulation_steps": 4},
    "lean": LEAN,
    "lean, shared out": {**LEAN, "shard_optimizer": True, "max_grad_norm": 1.0},
}
SHAPE = {**TINY_LLAMA, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}


def config_of(name: str) -> ft.TrainConfig:
    """Of one of the settings."""
    return ft.TrainConfig(**{"batch_size": 2, "grad_accumulation_steps": 2, "iters": 3, "mask_prompt": True, **SETTINGS[name]})


def lm_and_data(name: str) -> tuple[ft.LanguageModel, Any]:
    """A model whose weights, not its activations, make the memory."""
    tokenizer = load_tokenizer(tiny.BASE_MODEL)
    lm = ft.LanguageModel.from_config({**SHAPE, "vocab_size": len(tokenizer)}, tokenizer)
    return lm, ft.load_data({"train": make_rows(24)}, tokenizer, config=config_of(name))


def measured(name: str) -> dict[str, int]:
    """Bytes: the largest peak of this rank's steps, what it sends in one, and its optimizer's state."""
    gc.collect()  # the one before
    before = mx.get_active_memory()
    trainer = ft.Trainer(*lm_and_data(name), config_of(name))
    begin = trainer.ranks.bytes_sent
    trainer.run()
    peak = max(report.peak_memory for report in trainer.history.steps)
    sent = (trainer.ranks.bytes_sent - begin) // trainer.step_count
    return {"peak": peak - before, "sent": sent, "state": trainer.optimizers.state_bytes}


def main(folder: str) -> None:
    """All settings, one after the other."""
    found = {name: measured(name) for name in SETTINGS}
    (Path(folder) / f"rank-{os.environ['MLX_RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
