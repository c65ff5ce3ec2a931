"""What came of an experiment, in the `result.json` of its folder. A module of its own because people's notebooks import it from here."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from fulltune_nb.training.history import EvalReport
from fulltune_nb.training.run import RESULT_FILE as FILE
from fulltune_nb.training.run import read_result, write_result
from fulltune_nb.training.trainer import Trainer

__all__ = ["FILE", "experiment_result", "git_state", "read_result", "write_result"]

_GIT_SECONDS = 10.0


def experiment_result(trainer: Trainer, before: EvalReport | None, after: EvalReport, exported: str = "") -> dict[str, Any]:
    """What came of a run, as plain values.

    Args:
        trainer: after its run.
        before: an evaluation of the base, or None.
        after: the same of the trained model.
        exported: folder of the exported model; "" for none.

    Returns:
        What `trainer.result()` gives (the device is in its `versions`), with `<split>_loss` (nats per trained token) and
        `<split>_perplexity` of `after`, both reports, and `git`: see `git_state`.
    """
    return {
        **trainer.result(),
        f"{after.split}_loss": after.loss,
        f"{after.split}_perplexity": after.perplexity,
        "before": None if before is None else before.to_dict(),
        "after": after.to_dict(),
        "exported": exported or None,
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """The commit of the working directory, and whether files that git knows were changed since; None where there is no repository.

    `changed` is None where git does not say, as when it takes too long. Of what the repository's own settings name only content filters,
    such as those of git-lfs, are run: git asks them whether a file was changed.
    """
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "changed": None if changes is None else bool(changes)} if commit else None


def _git(*arguments: str) -> str | None:
    """What git says; None where it is not installed, fails or takes too long."""
    safe = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    try:
        done = subprocess.run([*safe, *arguments], capture_output=True, text=True, timeout=_GIT_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
