"""Which of a training panel's buttons can do something now, and how to go on when the run is done."""

from __future__ import annotations

from fulltune_nb.panels.loop import TrainLoop
from fulltune_nb.panels.samples import Samples
from fulltune_nb.training.trainer import Trainer


def how_to_go_on(trainer: Trainer) -> str:
    """The call that trains on from the end of a run."""
    config = trainer.config
    change = f"epochs={2 * config.epochs:g}" if config.epochs is not None else f"iters={2 * trainer.total_steps}"
    if trainer.stopped_early:
        change = "patience=None"
    place = "'runs/another', " if trainer.run_dir else ""
    return f"To train on: more = trainer.fork({place}{change}), then ft.TrainPanel(more). The fork is a copy; this model stays as it is."


def reasons_against(trainer: Trainer, loop: TrainLoop, samples: Samples) -> dict[str, str]:
    """Button -> why it can do nothing now; "" where it can. From any thread."""
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
        "sample_now": "" if samples.prompts else "There are no prompts yet: enter some, one a line",
    }
