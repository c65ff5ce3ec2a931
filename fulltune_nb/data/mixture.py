"""Several data sets with weights as one: whose rows are which, and how many of each an epoch takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from fulltune_nb.data.hub import PREFIX
from fulltune_nb.data.read import read_source
from fulltune_nb.data.rows import SPLITS, RawSplit, split_named
from fulltune_nb.data.split import ExampleTable, Part, Split
from fulltune_nb.errors import DataError, listed
from fulltune_nb.settings import show


def is_mixture(source: Any) -> bool:
    """Whether `source` gives data sets weights: a mapping of names, none of which is a split's, to numbers."""
    if not isinstance(source, Mapping) or not source or not all(isinstance(value, Real) for value in source.values()):
        return False
    return not any(split_named(str(name)) for name in source)


def check_weights(source: Mapping[str, float]) -> None:
    """
    Raises:
        DataError: one is no finite number above 0.
    """
    for name, weight in source.items():
        if isinstance(weight, bool) or not math.isfinite(weight) or weight <= 0:
            raise DataError(f"The weight of {str(name)!r} is {show(weight)}: expected a number above 0, such as 0.3.")


def read_mixture(source: Mapping[str, float]) -> tuple[str, list[tuple[str, RawSplit]], list[str], dict[str, float]]:
    """What is stored of the places and weights, the splits of each data set with its name, notes on what was not read, and the weights
    by name, which make 1.

    Raises:
        DataError: a weight is no number above 0, a data set is given twice, or one cannot be read.
    """
    check_weights(source)
    read = [read_source(given) for given in source]
    places = {place: float(weight) for (place, _, _), weight in zip(read, source.values(), strict=True)}
    if len(places) < len(read):
        twice = next(place for i, (place, _, _) in enumerate(read) if place in [other for other, _, _ in read[:i]])
        raise DataError(f"{twice} is given twice. Give it once, with the sum of the two weights.")
    names, total = short_names(list(places)), math.fsum(places.values())
    splits = [(name, under_name(raw, name)) for name, (_, raw_splits, _) in zip(names, read, strict=True) for raw in raw_splits]
    notes = [f"{name}: {note}" for name, (_, _, more) in zip(names, read, strict=True) for note in more]
    weights = {name: weight / total for name, weight in zip(names, places.values(), strict=True)}
    return json.dumps(places, ensure_ascii=False), splits, notes, weights


def short_names(places: Sequence[str]) -> list[str]:
    """A name for each of some different places: of a folder's path the end, as long as it must be for no two to be the same.

    They are made of the places that a run stores, so that a resumed run calls its rows as before.
    """
    parts = [[place] if place.startswith(PREFIX) else Path(place).parts for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(places)


def under_name(raw: RawSplit, name: str) -> RawSplit:
    """The split with its data set's name before each of the sources: `"a/train.jsonl:3"`."""
    rows = [(f"{name}/{source}", row) for source, row in raw.rows]
    problems, notes = [f"{name}/{problem}" for problem in raw.problems], [f"{name}: {note}" for note in raw.notes]
    return replace(raw, label=f"{name}/{raw.label}", rows=rows, problems=problems, notes=notes)


def joined(built: Mapping[tuple[str, str], Split], weights: Mapping[str, float]) -> dict[str, Split]:
    """The splits of several data sets, one behind the other.

    Raises:
        DataError: a data set has no train split, and others have.
    """
    without = [given for given in weights if (given, "train") not in built]
    if without and len(without) < len(weights):
        raise DataError(f"{listed(without)} has no train split, so its weight means nothing. Leave it out, or give it one.")
    together = {}
    for name in SPLITS:
        own = [(given, built[given, name]) for given in weights if (given, name) in built]
        if not own:
            continue
        begins = np.cumsum([0, *(len(split) for _, split in own)]).tolist()
        parts = [Part(given, weights[given], *ends) for (given, _), ends in zip(own, pairwise(begins), strict=True)]
        splits = [split for _, split in own]
        table, format = ExampleTable.joined([split.examples for split in splits]), " and ".join(sorted({split.format for split in splits}))
        skipped, blank_lines = [line for split in splits for line in split.skipped], sum(split.blank_lines for split in splits)
        together[name] = Split(name, format, table, blank_lines, skipped, parts if name == "train" else ())
    return together


def weights_note(train: Split) -> str:
    """What the weights come to, in a sentence."""
    sizes = [len(rows) for rows in train.trainable_parts()]
    taken = rows_of_epoch([part.weight for part in train.parts], sizes)
    counts = zip(train.parts, taken, sizes, strict=True)
    each = [f"{count:,} ({100 * part.weight:.3g} %) from the {size:,} of {part.name}" for part, count, size in counts]
    return f"train: each epoch's {sum(taken):,} rows are drawn by weight: {', '.join(each)}."


def rows_of_epoch(weights: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """How many rows an epoch takes of each data set: together as many as all have, shared out by weight, each at least 1.

    Args:
        weights: of each data set; they make 1.
        sizes: rows of each, at least 1.
    """
    exact = [weight * sum(sizes) for weight in weights]
    taken = [max(1, math.floor(share)) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (taken[i] - exact[i], i))  # the largest remainders first
    for i in by_rest[: max(0, sum(sizes) - sum(taken))]:
        taken[i] += 1
    return taken
