"""From files or lists of rows to batches: formats, tokens, loss masks, order of batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` finds, told to type checkers and editors
    from fulltune_nb.data.batches import Batch, StepBatches, collate, evaluation_batches, evaluation_shapes
    from fulltune_nb.data.dataset import DataSet, Split, load_data
    from fulltune_nb.data.example import Example
    from fulltune_nb.data.settings import DataSettings

__all__ = [
    "Batch", "DataSet", "DataSettings", "Example", "Split", "StepBatches", "collate", "evaluation_batches", "evaluation_shapes",
    "load_data",
]  # fmt: skip

_HOMES = {"Example": "example", "DataSettings": "settings", "DataSet": "dataset", "Split": "dataset", "load_data": "dataset"}


def __getattr__(name: str) -> Any:
    """Imports the module that a name lives in, the first time it is asked for: a command's help needs the settings, and no numpy."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'batches')}"), name)
    globals()[name] = value
    return value
