"""A part of the train split that becomes the valid split where there is none: a function of the rows' texts alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from fulltune_nb.data.split import Split
from fulltune_nb.errors import ConfigError, DataError

SEED = b"fulltune_nb valid 0"
"""Of every division, whatever the seed of a run is: runs with other seeds are compared on the same held-out rows."""


def with_valid(splits: Mapping[str, Split], fraction: float, notes: list[str]) -> dict[str, Split]:
    """The splits with a part of train as valid; `notes` grows by what became of that.

    Raises:
        ConfigError: there is a valid split, or no train split.
        DataError: a side would have no row.
    """
    if "valid" in splits or "train" not in splits:
        why = "there is a valid split" if "valid" in splits else "there is no train split to take it from"
        raise ConfigError(f"valid_fraction={fraction:g}: {why}. Leave valid_fraction out.")
    train = splits["train"]
    rows = held_out(train.examples.texts, train.trainable.tolist(), fraction)
    if not len(rows):
        raise DataError(f"valid_fraction={fraction:g}: all rows of train have the same text, so none can be held out. Leave it out.")
    kept = np.setdiff1d(np.arange(len(train)), rows)
    places = [np.searchsorted(kept, (part.begin, part.end)).tolist() for part in train.parts]
    parts = [replace(part, begin=begin, end=end) for part, (begin, end) in zip(train.parts, places, strict=True)]
    share = f"{len(rows):,} of {len(train):,} examples of train ({100 * len(rows) / len(train):.1f} %)"
    notes.append(f"valid: {share} are held out, chosen by their texts; rows of the same text stay together.")
    valid, rest = Split("valid", train.format, train.examples.take(rows)), train.examples.take(kept)
    rest.dropped, rest.tokens_dropped = train.dropped, train.tokens_dropped
    divided = Split("train", train.format, rest, train.blank_lines, train.skipped, parts)
    if not all(map(len, divided.trainable_parts())):
        raise DataError(f"valid_fraction={fraction:g}: a data set has no row left for training. Make it smaller.")
    return {**splits, "train": divided, "valid": valid}


def held_out(texts: list[str], candidates: Iterable[int], fraction: float) -> np.ndarray:
    """Which examples are held out: (k,) int64, ascending.

    Rows are ordered by a hash of their text, and the first of them are taken up to `fraction` of all, at least one. What has the very same
    text goes together: the windows of a row, and rows that occur twice. Such a group that would be too many is passed over.

    Args:
        texts: of all examples' rows.
        candidates: the examples that have a token to train on; only their texts are held out.
        fraction: above 0 and below 1.

    Returns:
        No index where there is only one text.
    """
    of_text: dict[bytes, list[int]] = {}
    digests = [hashlib.blake2b(text.encode(), digest_size=16, key=SEED).digest() for text in texts]
    for i, digest in enumerate(digests):
        of_text.setdefault(digest, []).append(i)
    order = sorted({digests[i] for i in candidates})
    if len(order) < 2:
        return np.empty(0, dtype=np.int64)
    left, taken = max(1, round(fraction * len(texts))), []
    for digest in order[:-1]:  # one stays for training, however large the fraction
        if len(of_text[digest]) <= left:
            taken += of_text[digest]
            left -= len(of_text[digest])
    return np.array(sorted(taken or min((of_text[digest] for digest in order), key=len)), dtype=np.int64)
