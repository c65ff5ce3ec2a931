"""Writes the fixtures of the parity tests: `python -m nbs_tests.models.make_fixtures [case ...]` (needs torch==2.13.0).

For each case of `model_cases.CASES`: `fixtures/<case>.json`, the config.json, and `fixtures/<case>.safetensors` with
`weights/<name>` and `gradients/<name>` (of the mean next-token cross-entropy on `ids`), `ids` (B, T), `logits` (B, T, V),
`prompt` (1, T) and `answer`, the tokens that `generate` puts after it without sampling. All from transformers.
"""

from __future__ import annotations

import json
import sys

import numpy as np
from safetensors.numpy import save_file

from nbs_tests.models import torch_reference as reference
from nbs_tests.models.model_cases import CASES, FIXTURES, IDS_SHAPE, NEW_TOKENS, PROMPT_LENGTH, random_ids

CLEAR_GAP = 5e-3
"""No token of an answer may be chosen by less: on another machine rounding could choose the other."""
SEEDS = range(10)


def make(name: str) -> None:
    """The two files of one case, from the seed whose answer is the most varied."""
    raw = CASES[name]
    answers = {}
    for seed in SEEDS:
        model = reference.build(raw, seed)
        prompt = random_ids(raw, (1, PROMPT_LENGTH), seed)
        answer = reference.greedy(model, prompt, NEW_TOKENS)
        if reference.smallest_gap(model, prompt, answer) > CLEAR_GAP:
            answers[seed] = (prompt, answer)
    seed = max(answers, key=lambda seed: len(np.unique(answers[seed][1])))
    prompt, answer = answers[seed]
    model = reference.build(raw, seed)
    ids = random_ids(raw, IDS_SHAPE, seed + 1000)
    tensors = {"ids": ids, "prompt": prompt, "answer": answer, "logits": reference.logits(model, ids)}
    tensors |= {f"weights/{key}": array for key, array in reference.checkpoint(model).items()}
    tensors |= {f"gradients/{key}": array for key, array in reference.gradients(model, ids).items()}
    FIXTURES.mkdir(exist_ok=True)
    save_file(tensors, FIXTURES / f"{name}.safetensors")
    (FIXTURES / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: seed {seed}, {len(np.unique(answer))} different tokens in the answer")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
