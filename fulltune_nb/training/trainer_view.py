"""What a trainer shows in a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulltune_nb.html import facts

if TYPE_CHECKING:
    from fulltune_nb.training.trainer import Trainer


def trainer_html(trainer: Trainer) -> str:
    """Where it stands, as a table."""
    last = trainer.history.steps[-1].loss if trainer.history.steps else None
    per_epoch = trainer.steps_per_epoch
    return facts(
        "Trainer",
        [
            ("step", f"{trainer.step_count:,} of {trainer.total_steps:,}"),
            ("epoch", f"{trainer.step_count / per_epoch:.2f} ({per_epoch:,} steps each)"),
            ("last loss", "none yet" if last is None else f"{last:.4f}"),
            ("next learning rate", f"{trainer.learning_rate:.3g}"),
            ("optimizer", trainer.config.optimizer),
            ("run_dir", trainer.run_dir or "none: nothing is written"),
        ],
    )
