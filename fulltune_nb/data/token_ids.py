"""Token ids against a model's vocabulary: MLX reads and writes beside the embedding for an id that it has no row for, and says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fulltune_nb.data.example import Example
from fulltune_nb.errors import DataError, listed

_SHOWN = 8  # tokens named in an error message


def check_ids(examples: Sequence[Example], vocab_size: int, tokenizer: Any = None) -> None:
    """That a model has a row for every token. Of a `Split`, which knows its largest id, no row is looked at.

    Args:
        examples: a split, or any examples.
        vocab_size: rows of the model's embedding.
        tokenizer: names the tokens in the message; None: the examples' own.

    Raises:
        DataError: ids that the model has no row for, with the rows and the way to give it some.
    """
    largest = getattr(examples, "largest_id", None)
    if largest is not None and largest < vocab_size:
        return
    outside = {}
    for example in examples:
        if len(example.tokens) and not 0 <= example.tokens.min() <= example.tokens.max() < vocab_size:
            outside[example.source] = example.tokens[(example.tokens < 0) | (example.tokens >= vocab_size)]
            tokenizer = tokenizer or example.tokenizer
    if not outside:
        return
    ids = np.unique(np.concatenate(list(outside.values()))).tolist()
    texts = {token: tokenizer.convert_ids_to_tokens(token) if tokenizer is not None and token >= 0 else None for token in ids}
    names = listed([f"{text!r} (id {token})" if text else f"id {token}" for token, text in texts.items()], _SHOWN)
    known = listed([repr(text) for text in texts.values() if text], _SHOWN)
    remedy = f" Give the model rows for them: lm.add_tokens([{known}])." if known and len(texts) <= _SHOWN else ""
    raise DataError(
        f"{listed(list(outside), 3)}: the model has no row for {names}; its {vocab_size:,} rows are for the ids from 0 to"
        f" {vocab_size - 1:,}.{remedy} Or load the data with the tokenizer that belongs to the model."
    )
