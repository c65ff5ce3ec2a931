"""A tiny base model that comes with the package, and a text-to-SQL task to fine-tune it on. Both are generated: nothing is downloaded.

    from fulltune_nb import tiny

    lm = ft.load_model(tiny.BASE_MODEL)
    data = ft.load_data(tiny.text_to_sql(), lm.tokenizer, mask_prompt=True)

The base has read about a small world (`world`) in English (`text`), and has never seen SQL (`sql`). How it was made: docs/tiny_model.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from fulltune_nb.tiny.sql import database, exact_match, execution_match, text_to_sql

__all__ = ["BASE_MODEL", "FINE_TUNING", "database", "exact_match", "execution_match", "text_to_sql", "write_text_to_sql"]

BASE_MODEL = Path(__file__).parent / "base"
"""The base model's folder, as `load_model` takes it."""

FINE_TUNING = {
    "batch_size": 16,
    "iters": 500,
    "learning_rate": 2e-3,
    "lr_schedule": "cosine",
    "warmup": 30,
    "optimizer_config": {"betas": [0.9, 0.98]},  # in a run this short, 0.999 remembers the large gradients of the start to its end
    "mask_prompt": True,
}
"""Settings (of `TrainConfig`) with which the base learns the text-to-SQL task: about 96% exact match on the test questions."""


def write_text_to_sql(folder: str | os.PathLike, seed: int = 0, train: int = 4000, valid: int = 200, test: int = 200) -> Path:
    """Write `text_to_sql` as train.jsonl, valid.jsonl and test.jsonl; files of these names are replaced. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in text_to_sql(seed, train, valid, test).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
    return folder
