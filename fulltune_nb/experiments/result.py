"""`result.json` in a run's folder: what came of it, for whoever compares runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulltune_nb.files import write_text
from fulltune_nb.training.card import versions
from fulltune_nb.training.history import EvalReport
from fulltune_nb.training.trainer import Trainer

FILE = "result.json"


def experiment_result(trainer: Trainer, before: EvalReport | None, after: EvalReport, exported: str = "") -> dict[str, Any]:
    """What came of a run, as plain values.

    Args:
        trainer: after its run.
        before: an evaluation of the base, or None.
        after: the same of the trained model.
        exported: folder of the exported model; "" for none.

    Returns:
        `<split>_loss` (nats per trained token) and `<split>_perplexity` after, both reports, the config, where it came from,
        speed and memory (bytes).
    """
    steps = trainer.history.steps
    return {
        f"{after.split}_loss": after.loss,
        f"{after.split}_perplexity": after.perplexity,
        "before": None if before is None else before.to_dict(),
        "after": after.to_dict(),
        "steps": trainer.step_count,
        "stopped_early": trainer.stopped_early,
        "seconds": sum(step.seconds for step in steps),
        "tokens_per_second": sum(step.tokens for step in steps) / max(sum(step.seconds for step in steps), 1e-9),
        "peak_memory": max((step.peak_memory for step in steps), default=0),
        "model": trainer.lm.source,
        "data": {"source": trainer.data.source, "fingerprint": trainer.data.fingerprint},
        "config": trainer.config.to_dict(),
        "run_dir": None if trainer.run_dir is None else str(trainer.run_dir),
        "exported": exported or None,
        "versions": versions(),
    }


def write_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """Writes `result.json` into a run's folder; what already stands there under other names stays."""
    path = folder / FILE
    text = json.dumps({**read_result(path), **_finite(result)}, indent=2, allow_nan=False)
    write_text(path, text + "\n")
    return path


def read_result(path: Path) -> dict[str, Any]:
    """What a result file says; nothing where there is none, or it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON has not: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
