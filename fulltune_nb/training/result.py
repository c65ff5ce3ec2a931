"""What came out of a run, as JSON values: `result.json` of its directory, for those who compare many runs."""

from __future__ import annotations

import json
import math
import time
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import CheckpointError
from fulltune_nb.training.history import EvalReport
from fulltune_nb.training.resuming import versions
from fulltune_nb.training.run_directory import RESULT_FILE

if TYPE_CHECKING:
    from fulltune_nb.training.trainer import Trainer


def result_of(trainer: Trainer) -> dict[str, Any]:
    """Losses in nats, times in seconds, memory in bytes. What there was none of is null."""
    steps, evals = trainer.history.steps, trainer.history.evals
    valid = [report for report in evals if report.split == "valid"]
    finite = [report for report in valid if math.isfinite(report.loss)]
    tests = [report for report in evals if report.split == "test"]
    return {
        "steps": trainer.step_count,
        "total_steps": trainer.total_steps,
        "stopped_early": trainer.stopped_early,
        "epochs": steps[-1].epoch if steps else 0.0,
        "tokens": sum(report.tokens for report in steps),
        "seconds_in_steps": sum(report.seconds for report in steps),
        "peak_memory": max((report.peak_memory for report in steps), default=None),
        "train_loss_last": _finite(steps[-1].loss) if steps else None,
        "valid_last": _eval(valid[-1]) if valid else None,
        "valid_best": _eval(min(finite, key=lambda report: report.loss)) if finite else None,
        "test": _eval(tests[-1]) if tests else None,
        "config": trainer.config.to_dict(),
        "model_source": trainer.lm.source,
        "num_parameters": trainer.lm.num_parameters,
        "data": {"source": trainer.data.source, "fingerprint": trainer.data.fingerprint},
        "versions": versions(),
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def write_result(trainer: Trainer) -> None:
    """Writes `result.json`, or anew, where the run is done and has a directory.

    Raises:
        CheckpointError: it cannot be written, and `on_save_error` is "stop".
    """
    if trainer._directory is None or not trainer.done:
        return
    try:
        trainer._directory.write_text(RESULT_FILE, json.dumps(result_of(trainer), indent=1, allow_nan=False) + "\n")
    except CheckpointError as error:
        if trainer.config.on_save_error == "stop":
            raise
        trainer.journal.event(trainer.step_count, "save_failed", str(error))


def _eval(report: EvalReport) -> dict[str, Any]:
    return {"step": report.step, "loss": _finite(report.loss), "perplexity": _finite(report.perplexity), "tokens": report.tokens}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
