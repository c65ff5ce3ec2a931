"""What is due between two steps of a run: validation, the best weights, checkpoints, the result; and what to do when one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import CheckpointError
from fulltune_nb.training.interrupts import interrupts_deferred
from fulltune_nb.training.result import write_result

if TYPE_CHECKING:
    from fulltune_nb.training.trainer import Trainer


class Upkeep:
    """Does what is due after the steps of one trainer, each thing once.

    Attributes:
        saved_step: the step whose checkpoint was written last by this trainer, or that it was resumed from; -1 for none.
        result_step: the step at which `result.json` was written; -1 for none.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.forget()

    def forget(self) -> None:
        """After going back to an earlier state: what was written is not of this line."""
        self.saved_step = self.result_step = -1

    def do(self) -> None:
        """Validation, checkpoint and result, if they are due at this step and not done yet."""
        trainer = self._trainer
        at_end = trainer.step_count == trainer.total_steps
        if at_end or trainer.step_count % trainer.config.steps_per_eval == 0:
            self._evaluate_valid()
        if trainer.step_count and (trainer.done or trainer.step_count % trainer.config.save_every == 0):
            with interrupts_deferred():
                self.save_unless_saved()
        if trainer.done and self.result_step != trainer.step_count:
            write_result(trainer)
            self.result_step = trainer.step_count

    def evaluated(self) -> None:
        """An evaluation after the end, such as a test, belongs into the result."""
        if self.result_step == self._trainer.step_count:
            write_result(self._trainer)

    def save_unless_saved(self) -> None:
        """A checkpoint of this step, where there is a directory and none was written."""
        if self._trainer.run_dir and self.saved_step != self._trainer.step_count:
            self._trying(self._trainer.save)

    def _evaluate_valid(self) -> None:
        """The validation that is due, once a step; keeps the best weights and counts towards `patience`."""
        trainer, patience = self._trainer, self._trainer.patience
        if trainer.data.valid is None or trainer.config.val_batches == 0 or patience.last_step == trainer.step_count:
            return
        loss = trainer.evaluate("valid", None if trainer.config.val_batches < 0 else trainer.config.val_batches).loss
        with interrupts_deferred():
            if patience.improved(trainer.step_count, loss):
                if trainer.run_dir and trainer.step_count:
                    self._trying(lambda: trainer.journal.directory.save_best(trainer.lm))
            elif trainer.stopped_early:
                message = f"no better validation loss than {patience.best_loss:.4f} in {patience.waited} evaluations"
                trainer.journal.event(trainer.step_count, "early_stop", message)

    def _trying(self, save: Callable[[], Any]) -> None:
        trainer = self._trainer
        try:
            save()
        except CheckpointError as error:
            if trainer.config.on_save_error == "stop" or not trainer.journal.directory.is_ours:
                raise
            trainer.journal.event(trainer.step_count, "save_failed", str(error))
