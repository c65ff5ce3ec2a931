"""What an optimizer shows in a cell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fulltune_nb import html
from fulltune_nb.training.update_rules import Shape

if TYPE_CHECKING:
    from fulltune_nb.training.optimizers import Optimizers


def optimizers_html(optimizers: Optimizers, shapes: Mapping[str, Shape]) -> str:
    """Its groups, as a table. `shapes`: of the parameters."""
    rows = [
        (group.optimizer, f"{group.factor:g}", f"{group.weight_decay:g}", len(names), f"{sum(math.prod(shapes[name]) for name in names):,}")
        for group, names in optimizers.groups().items()
    ]
    state = f"Optimizer after {optimizers.step:,} steps; its state takes {html.human_bytes(optimizers.state_bytes)}"
    return html.table(("rule", "learning-rate factor", "weight decay", "tensors", "parameters"), rows, caption=state)
