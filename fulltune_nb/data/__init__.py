"""From files or lists of rows to batches: formats, tokens, loss masks, order of batches."""

from fulltune_nb.data.batches import Batch, StepBatches, collate, evaluation_batches, evaluation_shapes
from fulltune_nb.data.dataset import DataSet, Split, load_data
from fulltune_nb.data.example import Example
from fulltune_nb.data.settings import DataSettings

__all__ = [
    "Batch", "DataSet", "DataSettings", "Example", "Split", "StepBatches", "collate", "evaluation_batches", "evaluation_shapes",
    "load_data",
]  # fmt: skip
