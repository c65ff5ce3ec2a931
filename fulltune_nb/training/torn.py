"""A step that fails: whole again where nothing was updated yet, torn where some weights are new and some old.

A torn trainer and its model refuse to be used until they have gone back to a snapshot or a checkpoint. It is the same for both
engines: the optimizer knows whether it has changed anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulltune_nb.errors import TornStepError

if TYPE_CHECKING:
    from fulltune_nb.training.trainer import Trainer


def step_failed(trainer: Trainer, error: BaseException) -> None:
    """To be called where a step was left by `error`, which the caller raises again when this returns.

    Raises:
        TornStepError: `error`, its cause, came when a part of the weights had been updated. Not in the place of what is no
            `Exception`: an interrupt stays one, and the next use of the trainer raises this.
    """
    trainer.optimizers.abandon_step()
    trainer.lm.torn = torn_reason(trainer, error)
    if trainer.lm.torn and isinstance(error, Exception):
        raise TornStepError(trainer.lm.torn) from error


def check_whole(trainer: Trainer) -> None:
    """
    Raises:
        TornStepError: some weights are new and some old.
    """
    if reason := torn_reason(trainer):
        raise TornStepError(trainer.lm.torn or reason)


def torn_reason(trainer: Trainer, error: BaseException | None = None) -> str | None:
    """Why the weights are of no use, if a step was broken off between its first and its last update; else None.

    Args:
        error: what broke it off.
    """
    if trainer.optimizers.step == trainer.step_count - trainer.optimizer_steps_before:
        return None
    why = f", by {type(error).__name__}{f': {error}' if str(error) else ''}" if error else ""
    back = f"Trainer.resume({str(trainer.run_dir)!r})" if trainer.run_dir else "trainer.restore(a snapshot), or a new trainer"
    return (
        f"Step {trainer.step_count + 1} was broken off in the middle of its update{why}. Some weights are new and some old, so they are"
        f" neither trained on, nor used, nor saved. What is on the disk is whole: go on with {back}."
    )
