"""What a step must be before it may change anything: finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fulltune_nb.data.batching import Batch
from fulltune_nb.errors import NonFiniteError


def check_finite(step: int, loss: float, norm: float, batches: Sequence[Batch]) -> None:
    """Nothing where loss and gradient norm of step `step` (from 1) are finite.

    Raises:
        NonFiniteError: names the rows of the step.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return
    rows = ", ".join(source for batch in batches for source in batch.sources)
    raise NonFiniteError(
        f"step {step}: the loss is {loss} and the gradient's norm {norm}; nothing was updated. The batch's rows: {rows}."
        " Look at these rows, lower the learning rate, or set max_grad_norm."
    )
