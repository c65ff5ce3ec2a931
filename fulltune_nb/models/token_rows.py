"""Rows of embedding and head for new tokens, V rows of D = hidden_size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.parameters import parameters_of, put_parameters

_NOISE = 0.1  # standard deviations of a dimension: enough to tell new tokens apart, too little for any of them to be likely


def set_token_rows(model: Decoder, vocab_size: int, new: Sequence[int], known: int, seed: int) -> None:
    """Gives a model `vocab_size` rows; each that is added, and each of a new token, is the mean of the known rows plus a little noise.

    The mean keeps what the model says of the tokens it knows nearly as it was; a row of zeros, or of large numbers, may be likelier than
    all of them (Hewitt 2021, "Initializing new word embeddings for pretrained language models").

    Args:
        model: changed in place: embedding (V, D), head (V, D) and its bias (V,), those that it has, and the configuration.
        vocab_size: V from now on, no less than before.
        new: ids of new tokens whose rows are there already.
        known: the rows before this one are of tokens that the model knows.
        seed: of the noise.
    """
    before, grown = model.config.vocab_size, {}
    rows = np.array(sorted({*new, *range(before, vocab_size)}), dtype=np.int64)
    random = np.random.RandomState(seed)
    for name, array in sorted(parameters_of(model).items()):  # sorted, so that a seed gives the same noise each time
        if name.split(".")[0] in ("embed_tokens", "lm_head") and array.shape[0] == before:
            old = array[:known].astype(mx.float32)
            noise = mx.array(random.standard_normal((len(rows), *array.shape[1:])).astype(np.float32))
            values = old.mean(axis=0) + _NOISE * mx.sqrt(old.var(axis=0)) * noise
            grown[name] = mx.concatenate([array, mx.zeros((vocab_size - before, *array.shape[1:]), array.dtype)])
            grown[name][mx.array(rows)] = values.astype(array.dtype)
    mx.eval(grown)
    put_parameters(model, grown)
    model._config = replace(model.config, vocab_size=vocab_size, raw={**model.config.raw, "vocab_size": vocab_size})
