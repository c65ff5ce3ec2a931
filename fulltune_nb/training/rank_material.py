"""Model and data on their way to ranks that were started from a notebook: shapes and tokens, in arrays and JSON.

What the other ranks only need to train is sent: neither texts nor a tokenizer, and nothing that is executed. Weights follow by themselves.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from fulltune_nb.data.dataset import DataSet
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.data.split import ExampleTable, Part, Split
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.models.model_config import read_config
from fulltune_nb.models.parameters import Arrays
from fulltune_nb.settings import names_of

ARRAYS = {"tokens": np.int32, "loss_mask": np.bool_, "begins": np.int64, "columns": np.int64}
"""Of an `ExampleTable`. MLX's ring takes no bool, so all travel as numbers."""


def material_of(lm: LanguageModel, data: DataSet) -> tuple[dict[str, Any], Arrays]:
    """What `lm_and_data` makes them of again: JSON values, and arrays by name."""
    tables = {name: split.examples for name, split in data.splits.items()}
    arrays = {f"{name}.{part}": mx.array(getattr(table, part) * 1) for name, table in tables.items() for part in ARRAYS}
    splits = {name: {"format": split.format, "parts": [vars(part) for part in split.parts]} for name, split in data.splits.items()}
    settings = {name: getattr(data.settings, name) for name in names_of(DataSettings)}
    return {"config": lm.config.raw, "dtype": lm.dtype, "splits": splits, "settings": settings}, arrays


def lm_and_data(material: dict[str, Any], arrays: Arrays) -> tuple[LanguageModel, DataSet]:
    """A model of the same shape, with other weights, and the same data; neither has a tokenizer or texts."""
    model = Decoder(read_config(material["config"]))
    model.set_dtype(getattr(mx, material["dtype"]))
    splits = {}
    for name, about in material["splits"].items():
        own = [np.array(arrays[f"{name}.{part}"]).astype(dtype) for part, dtype in ARRAYS.items()]
        count = len(own[2]) - 1
        table = ExampleTable(*own, [""] * count, [f"{name}, row {i + 1}" for i in range(count)], [{}] * count)
        splits[name] = Split(name, about["format"], table, parts=[Part(**part) for part in about["parts"]])
    return LanguageModel(model, None), DataSet(splits, DataSettings(**material["settings"]), None, [], None)
