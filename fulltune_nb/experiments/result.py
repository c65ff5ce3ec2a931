"""What came of an experiment, in the `result.json` of its folder. A module of its own because people's notebooks import it from here."""

from __future__ import annotations

from typing import Any

from fulltune_nb.training.history import EvalReport
from fulltune_nb.training.run import RESULT_FILE as FILE
from fulltune_nb.training.run import read_result, write_result
from fulltune_nb.training.trainer import Trainer

__all__ = ["FILE", "experiment_result", "read_result", "write_result"]


def experiment_result(trainer: Trainer, before: EvalReport | None, after: EvalReport, exported: str = "") -> dict[str, Any]:
    """What came of a run, as plain values.

    Args:
        trainer: after its run.
        before: an evaluation of the base, or None.
        after: the same of the trained model.
        exported: folder of the exported model; "" for none.

    Returns:
        What `trainer.result()` gives, with `<split>_loss` (nats per trained token) and `<split>_perplexity` of `after`, and both
        reports.
    """
    return {
        **trainer.result(),
        f"{after.split}_loss": after.loss,
        f"{after.split}_perplexity": after.perplexity,
        "before": None if before is None else before.to_dict(),
        "after": after.to_dict(),
        "exported": exported or None,
    }
