"""`python -m nbs_tests.training.rank_program FOLDER`: what one of several ranks does, or one process alone, in tests.

Trains as each of the scenarios in FOLDER/scenarios.json says, and writes what came out into FOLDER/rank-R.json.
"""

import fulltune_nb as ft  # noqa: I001  first of all: it gives MLX its BLAS
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulltune_nb import tiny
from fulltune_nb.models.parameters import parameters_of
from fulltune_nb.tokenizer import load_tokenizer
from nbs_tests.training.conftest import TINY_LLAMA, make_rows
from nbs_tests.training.rank_network import bytes_sent

SETTINGS = {"batch_size": 2, "iters": 4, "learning_rate": 1e-3, "mask_prompt": True, "backward": "whole"}


def trained(scenario: dict[str, Any], listeners: Sequence[Any] = ()) -> dict[str, Any]:
    """Losses, norms, evaluations, and a sum over all weights and optimizer arrays, of a run in one scenario."""
    for place, value in scenario.get("constants", {}).items():
        module, name = place.rsplit(".", 1)
        setattr(importlib.import_module(f"fulltune_nb.{module}"), name, value)
    config = ft.TrainConfig(**{**SETTINGS, **scenario.get("settings", {})})
    tokenizer = load_tokenizer(tiny.BASE_MODEL)
    shape = {**TINY_LLAMA, "vocab_size": len(tokenizer), **scenario.get("model", {})}
    lm = ft.LanguageModel.from_config(shape, tokenizer, seed=int(os.environ.get("MLX_RANK", 0)))  # rank 0's count
    splits = {"train": make_rows(27), "valid": make_rows(9, start=100), "test": make_rows(3, start=200)}
    data = ft.load_data(splits, tokenizer, config=config)
    trainer = ft.Trainer(lm, data, config, scenario.get("run_dir"), resume=scenario.get("resume"))
    if scenario.get("again"):
        trainer.run(2)
        trainer = ft.Trainer(lm, data, config, scenario["run_dir"], resume="auto")  # for which the first one saves
    trainer.listeners.extend(listeners)
    if scenario.get("back"):
        begin = trainer.snapshot()
        trainer.run(2)
        trainer.restore(begin)
    if scenario.get("loop"):
        for report in trainer.steps():
            trainer.evaluate("test", report.step)
    else:
        trainer.run(scenario.get("steps"))
    test = trainer.evaluate("test")
    if scenario.get("save"):
        trainer.save()
    return result_of(trainer, test)


def result_of(trainer: ft.Trainer, test: ft.EvalReport) -> dict[str, Any]:
    """What must not depend on the number of ranks ("optimizer" is rank 0's), and bytes of this rank."""
    snapshot = trainer.snapshot()
    arrays = {"weights": parameters_of(trainer.lm.model), "optimizer": snapshot.state.optimizer_arrays if snapshot else {}}
    digests = {name: digest_of(own) for name, own in arrays.items()}
    sizes = {"state_bytes": trainer.optimizers.state_bytes, "interface_bytes": bytes_sent()}
    sizes["engine_bytes"] = trainer.ranks.bytes_sent if trainer.ranks else 0
    steps = [[report.step, report.loss, report.grad_norm, report.learning_rate, report.tokens] for report in trainer.history.steps]
    order = [[example.source for example in trainer.batch_at(report.step)] for report in trainer.history.steps]
    evals = [[report.split, report.loss, report.tokens] for report in trainer.history.evals]
    stands = {"done": trainer.done, "step": trainer.step_count, "interrupted": trainer.interrupted}
    return {"steps": steps, "order": order, "evals": evals, "test": test.loss, **digests, **stands, **sizes}


def digest_of(arrays: dict[str, Any]) -> str:
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(name.encode() + np.asarray(array).tobytes())
    return digest.hexdigest()


def main(folder: str) -> None:
    """All scenarios, one after the other."""
    scenarios = json.loads((Path(folder) / "scenarios.json").read_text())
    for scenario in scenarios.values():
        if "run_dir" in scenario:
            scenario["run_dir"] = str(Path(folder) / scenario["run_dir"])
    results = {name: trained(scenario) for name, scenario in scenarios.items()}
    (Path(folder) / f"rank-{os.environ.get('MLX_RANK', 0)}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
