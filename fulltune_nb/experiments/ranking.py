"""What the runs of a sweep are ranked by, which of them may be compared, and means over seeds."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fulltune_nb.errors import ConfigError
from fulltune_nb.experiments.parameters import digest

SPLITS = ("valid", "test", "train")
_OF_A_SPLIT = re.compile(rf"({'|'.join(SPLITS)})_(loss|perplexity)")
SEED = "seed"
"""The parameter that means are taken over."""


@dataclass(frozen=True)
class Ranking:
    """A number in `result.json`, and whether a high one is good.

    Attributes:
        name: `valid_loss` and its like, for `valid`, `test` and `train`, are those of the last step's weights, wherever the result has
            them; any other is looked up as it is, in `outer.inner` too.
        maximize: the highest is the best.

    Raises:
        ConfigError: no name, or `maximize` is neither True nor False.
    """

    name: str = "valid_loss"
    maximize: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"rank_by: expected the name of a number in result.json, such as valid_loss, got {str(self.name)[:80]!r}.")
        if not isinstance(self.maximize, bool):
            raise ConfigError(f"maximize: expected True or False, got {str(self.maximize)[:80]!r}.")

    def value(self, result: Mapping[str, Any]) -> float | None:
        """The number of a result; None where there is none, or none that is finite."""
        if of_split := _OF_A_SPLIT.fullmatch(self.name):
            found = evaluation(result, of_split[1]).get(of_split[2])
        else:
            found = _looked_up(result, self.name)
        return float(found) if is_number(found) and math.isfinite(found) else None

    def tokens(self, result: Mapping[str, Any]) -> int | None:
        """How many trained tokens it is a mean over; None where it is no loss, or where the result does not tell."""
        of_split = _OF_A_SPLIT.fullmatch(self.name)
        tokens = evaluation(result, of_split[1]).get("tokens") if of_split else None
        return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) else None

    def order(self, value: float | None) -> float:
        """To sort by, the best first; what has no value comes last."""
        return math.inf if value is None else -value if self.maximize else value


def evaluation(result: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Loss, perplexity and trained tokens of a split with the last step's weights; a loss of earlier weights is not the run's."""
    steps, found = result.get("steps"), {}
    for key, usual in (("after", result.get("split")), (f"{split}_last", split), (split, split)):
        report = result.get(key)
        if isinstance(report, Mapping) and report.get("split", usual) == split and steps in (None, report.get("step", steps)):
            found = dict(report)
            break
    own = {name: result.get(f"{split}_{name}") for name in ("loss", "perplexity")}
    return found | {name: value for name, value in own.items() if is_number(value)}


def numbers_of(result: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the numbers in a result, those within others as `outer.inner`; the settings are left out."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from () if name == "config" else numbers_of(value, f"{prefix}{name}.")
        elif is_number(value):
            yield f"{prefix}{name}"


def over_seeds(runs: Sequence[tuple[Mapping[str, Any], int | None, float]], ranking: Ranking) -> list[dict[str, Any]]:
    """Mean and standard deviation of runs that differ in their `seed` alone; of those over the same tokens, the best mean first.

    Args:
        runs: (parameters, tokens that the value is a mean over, value) each.
        ranking: what is best.

    Returns:
        A dict for each setting: `parameters` without the seed, `tokens`, `runs` (how many), `mean`, `sd` (of a sample; None of fewer
        than two runs).
    """
    settings: dict[str, dict[str, Any]] = {}
    for parameters, tokens, value in runs:
        own = {name: given for name, given in parameters.items() if name != SEED}
        setting = settings.setdefault(f"{digest(own)} {tokens}", {"parameters": own, "tokens": tokens, "values": []})
        setting["values"].append(value)
    rows = []
    for setting in settings.values():
        values = setting.pop("values")
        sd = statistics.stdev(values) if len(values) > 1 else None
        rows.append({**setting, "runs": len(values), "mean": statistics.fmean(values), "sd": sd})
    return sorted(rows, key=lambda row: (-(row["tokens"] or 0), ranking.order(row["mean"])))


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number; True is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _looked_up(result: Mapping[str, Any], name: str) -> Any:
    if name in result:
        return result[name]
    outer, _, inner = name.partition(".")
    return _looked_up(result[outer], inner) if inner and isinstance(result.get(outer), Mapping) else None
