"""`python -m fulltune_nb.training.worker`: a rank that a notebook has started. It does what the kernel, rank 0, says, and ends with it."""

from __future__ import annotations

import sys

from fulltune_nb.errors import FulltuneError
from fulltune_nb.training.parallel import Ranks, ranks_of_environment
from fulltune_nb.training.rank_material import lm_and_data
from fulltune_nb.training.trainer import Trainer


def serve(ranks: Ranks) -> None:
    """Follows rank 0 until it ends this.

    Raises:
        TrainingError: a rank was lost, rank 0 too.
    """
    trainer: Trainer | None = None
    while (command := ranks.next_command())["do"] != "end":
        if command["do"] == "material":
            trainer = None  # its memory first
            try:
                trainer = Trainer(*lm_and_data(command["material"], ranks.shared({}, 0)), parallel=ranks)
            except BaseException as error:
                if error is not ranks.settled:
                    ranks.fail(error)
                    raise
        elif trainer is not None:
            trainer.obey(command)


if __name__ == "__main__":
    try:
        serve(ranks_of_environment())
    except FulltuneError as error:
        sys.exit(f"error: {error}")
