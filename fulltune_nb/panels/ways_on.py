"""Which of a training panel's buttons can do something now, and how to go on when the run is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fulltune_nb.panels.loop import TrainLoop
from fulltune_nb.panels.samples import Samples
from fulltune_nb.training.trainer import Trainer


def _changes(trainer: Trainer) -> dict[str, Any]:
    """The settings of a run that goes on from this one's end: twice as long, without the patience that ended it, or both."""
    changes: dict[str, Any] = {"patience": None} if trainer.stopped_early else {}
    if trainer.step_count >= trainer.total_steps:
        epochs = trainer.config.epochs
        changes |= {"iters": 2 * trainer.total_steps} if epochs is None else {"epochs": 2 * epochs}
    return changes


def how_to_go_on(trainer: Trainer) -> str:
    """The call that trains on from the end of a run."""
    changes = ", ".join(f"{name}={value:g}" if name == "epochs" else f"{name}={value}" for name, value in _changes(trainer).items())
    place = "'runs/another', " if trainer.run_dir else ""
    return (
        f"To train on: the button Train on, or more = trainer.fork({place}{changes}), then ft.TrainPanel(more)."
        " Both train a copy; this model stays as it is."
    )


def fork_to_go_on(trainer: Trainer) -> Trainer:
    """Makes what `how_to_go_on` says, in the next free folder beside the run's own.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    return trainer.fork(None if trainer.run_dir is None else _free_folder(trainer.run_dir), **_changes(trainer))


def _free_folder(run_dir: Path) -> Path:
    number = 2
    while (folder := run_dir.with_name(f"{run_dir.name}-{number}")).exists():
        number += 1
    return folder


def reasons_against(trainer: Trainer, loop: TrainLoop, samples: Samples) -> dict[str, str]:
    """Button or field -> why it can do nothing now; "" where it can. From any thread."""
    pausing, in_cell = trainer.pausing, trainer.state == "running" and not loop.busy
    training = loop.running or trainer.state == "running"
    begin = ""
    if in_cell:
        begin = "A cell trains now: it has to pause or end first"
    elif trainer.done:
        begin = f"The run is {trainer.state}. {how_to_go_on(trainer)}"
    elif loop.running and loop.goal == trainer.total_steps:
        begin = "The run goes on to its end already"
    return {
        "run": begin,
        "step": begin,
        "step_n": begin,
        "pause": "It pauses after this step" if pausing else "" if training or trainer.doing else "Nothing is running",
        "stop": f"The run is {trainer.state}" if trainer.done and not training else "",
        "learning_rate": "To be changed while paused" if loop.running else f"The run is {trainer.state}" if trainer.done else "",
        "sample_now": "" if samples.prompts else "There are no prompts yet: enter some, one a line",
    }
