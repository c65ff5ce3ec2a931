"""What happened during training: reports of steps and evaluations, events, and the list that holds them.

Reports are plain frozen records. `History` is a list of them in the order they came, `RunSummary` its few figures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from fulltune_nb import html, svg
from fulltune_nb.errors import CheckpointError
from fulltune_nb.frames import frame

_ROWS = 10  # reports shown in a cell


class _Record:
    """To and from plain JSON values. NaN and infinity, which JSON has not, become null and come back as NaN."""

    kind_of_report: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `kind` ("step", "eval" or "event") to tell the reports apart."""
        values = {own.name: _to_json(getattr(self, own.name)) for own in dataclasses.fields(self)}
        if "kind" in values:  # an event's own kind stands under "event"
            values["event"] = values.pop("kind")
        return {"kind": self.kind_of_report, **values}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> StepReport | EvalReport | Event:
        """A report from what `to_dict` gave. Names it does not know are left out, so that later versions can add some.

        Raises:
            CheckpointError: not a report, a field is missing, or a value is not of the field's type.
        """
        report = _KINDS.get(str(values.get("kind"))) if isinstance(values, dict) else None
        if report is None:
            raise CheckpointError(f"expected a report with kind {', '.join(map(repr, _KINDS))}, got {str(values)[:80]!r}.")
        given = {k: v for k, v in values.items() if k != "kind"}
        if "event" in given:
            given["kind"] = given.pop("event")
        fields = {own.name: own for own in dataclasses.fields(report)}
        missing = [name for name, own in fields.items() if name not in given and own.default is dataclasses.MISSING]
        if missing:
            raise CheckpointError(f"a report of kind {values['kind']!r} lacks {', '.join(missing)}: {str(values)[:80]!r}.")
        return report(**{k: _from_json(v, fields[k]) for k, v in given.items() if k in fields})


def _to_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _from_json(value: Any, own: dataclasses.Field) -> Any:
    """A field's value; whole numbers do for `float`."""
    if own.type == "float":
        with suppress(OverflowError):  # a whole number of hundreds of digits
            if value is None or isinstance(value, (int, float)) and not isinstance(value, bool):
                return math.nan if value is None else float(value)
    elif isinstance(value, str) if own.type == "str" else type(value) is int and abs(value) < 2**63:
        return value
    raise CheckpointError(f"a report's {own.name}: expected {own.type}, got {value!r:.80}.")


@dataclass(frozen=True)
class StepReport(_Record):
    """One optimizer step."""

    kind_of_report: ClassVar[str] = "step"

    step: int
    """Steps taken, this one included: the first report has 1."""
    epoch: float
    """Passes over the training split, this step included."""
    loss: float
    """Mean cross-entropy over the step's trained tokens, in nats."""
    tokens: int
    """Trained tokens in the step."""
    learning_rate: float
    """Rate this step was taken with, before `lr_factors`."""
    grad_norm: float
    """Global L2 norm of the gradient, before clipping."""
    seconds: float
    """Wall-clock time of the step."""
    tokens_per_second: float
    """`tokens / seconds`."""
    peak_memory: int = 0
    """Largest number of bytes MLX had in use during the step; without its cache."""
    active_memory: int = 0
    """Bytes in use after the step."""
    cache_memory: int = 0
    """Bytes MLX keeps for reuse after the step."""

    def __str__(self) -> str:
        return (
            f"step {self.step}: loss {self.loss:.3f}, lr {self.learning_rate:.3g}, {self.tokens_per_second:.0f} tokens/s, "
            f"peak {html.human_bytes(self.peak_memory)}"
        )

    def _repr_html_(self) -> str:
        return html.facts(f"Step {self.step}", _readable(self))


@dataclass(frozen=True)
class EvalReport(_Record):
    """Loss over a split, or a part of it."""

    kind_of_report: ClassVar[str] = "eval"

    split: str
    """"valid", "test" or "train"."""
    step: int
    """Optimizer steps taken before it."""
    loss: float
    """Summed cross-entropy over all trained tokens, divided by their number, in nats."""
    perplexity: float
    """`exp(loss)`."""
    tokens: int
    """Trained tokens counted."""
    seconds: float
    """Wall-clock time."""
    accuracy: float = math.nan
    """Share of these tokens than which none was held likelier, each with the true text before it; NaN in reports of earlier versions."""
    entropy: float = math.nan
    """Mean entropy of what was predicted for them, in nats: near 0 where the model is sure, right or wrong; NaN as above."""

    def __str__(self) -> str:
        figures = f"loss {self.loss:.3f}, ppl {self.perplexity:.3f}{self.accuracy_text}"
        return f"step {self.step}: {html.printable(self.split)} {figures} ({self.tokens} tokens)"

    @property
    def accuracy_text(self) -> str:
        """`, accuracy 61.2%` to go on with behind a loss; "" where it is not known."""
        return "" if math.isnan(self.accuracy) else f", accuracy {self.accuracy:.1%}"

    def _repr_html_(self) -> str:
        return html.facts(f"{self.split} at step {self.step}", _readable(self))


@dataclass(frozen=True)
class Event(_Record):
    """Something that happened between steps."""

    kind_of_report: ClassVar[str] = "event"

    step: int
    """Optimizer steps taken before it."""
    kind: str
    """A short word, such as "learning_rate", "resume", "pause", "early_stop"."""
    message: str
    """What happened, in a sentence."""
    time: float
    """Seconds since 1970."""

    def __post_init__(self) -> None:
        for name in ("kind", "message"):  # they are for terminals, and quote rows and names of files
            object.__setattr__(self, name, html.printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"step {self.step}: {self.kind}: {self.message}"

    def _repr_html_(self) -> str:
        return html.facts(f"{self.kind} at step {self.step}", _readable(self))


_KINDS: dict[str, type] = {report.kind_of_report: report for report in (StepReport, EvalReport, Event)}


def _readable(report: _Record) -> Iterator[tuple[str, object]]:
    memory = [own.name for own in dataclasses.fields(report) if own.name.endswith("_memory")]
    sizes = dict(zip(memory, html.in_one_unit([getattr(report, name) for name in memory]), strict=True))
    for own in dataclasses.fields(report):
        value = getattr(report, own.name)
        if own.name in sizes:
            value = sizes[own.name]
        elif isinstance(value, float):
            value = f"{value:.6g}"
        elif isinstance(value, int):
            value = f"{value:,}"
        yield own.name.replace("_", " "), value


@dataclass(frozen=True)
class RunSummary:
    """A history in a few figures: what tables, cards and `result.json` say of a run."""

    steps: int = 0
    """Number of the last step taken."""
    epochs: float = 0.0
    tokens: int = 0
    """Trained tokens of all steps."""
    seconds: float = 0.0
    """Time in steps."""
    peak_memory: int | None = None
    """Bytes, the most of any step; None before the first."""
    first_loss: float | None = None
    """Training loss of the first step, in nats."""
    last_loss: float | None = None
    last_evals: dict[str, EvalReport] = field(default_factory=dict)
    """Split -> its last evaluation."""
    best_evals: dict[str, EvalReport] = field(default_factory=dict)
    """Split -> the evaluation with the lowest finite loss."""

    @classmethod
    def of(cls, history: Iterable[StepReport | EvalReport | Event]) -> RunSummary:
        """The figures of a history."""
        history = History(history)
        last, best = {}, {}
        for report in history.evals:
            last[report.split] = report
            if math.isfinite(report.loss) and (report.split not in best or report.loss < best[report.split].loss):
                best[report.split] = report
        steps = history.steps
        if not steps:
            return cls(last_evals=last, best_evals=best)
        return cls(
            steps=steps[-1].step,
            epochs=steps[-1].epoch,
            tokens=sum(report.tokens for report in steps),
            seconds=sum(report.seconds for report in steps),
            peak_memory=max(report.peak_memory for report in steps),
            first_loss=steps[0].loss,
            last_loss=steps[-1].loss,
            last_evals=last,
            best_evals=best,
        )

    @property
    def tokens_per_second(self) -> float | None:
        """Trained tokens a second in steps; None before the first."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def evals_at_end(self) -> dict[str, EvalReport]:
        """Split -> its last evaluation, where that is of the last step's weights."""
        return {split: report for split, report in self.last_evals.items() if report.step == self.steps}

    def to_dict(self) -> dict[str, Any]:
        """JSON values for `result.json`; what is not known, or not finite, is None. `<split>_loss` is that of the last step's weights."""
        last, end = self.last_evals, self.evals_at_end
        losses = {f"{split}_{name}": _to_json(getattr(report, name)) for split, report in end.items() for name in ("loss", "perplexity")}
        return {
            "epochs": self.epochs,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "seconds_in_steps": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "peak_memory": self.peak_memory,
            "train_loss_first": _to_json(self.first_loss),
            "train_loss_last": _to_json(self.last_loss),
            "valid_last": _of_eval(last.get("valid")),
            "valid_best": _of_eval(self.best_evals.get("valid")),
            "test": _of_eval(last.get("test")),
            **losses,
        }

    def facts(self) -> list[tuple[str, str]]:
        """Names and texts for a table."""
        rows = []
        if self.steps:
            speed = self.tokens_per_second or math.nan
            rows.append(("loss, first and last", f"{self.first_loss:.4f} → {self.last_loss:.4f}"))
            rows.append(("trained tokens", f"{self.tokens:,}"))
            rows.append(("time in steps", f"{self.seconds:.1f} s ({speed:,.0f} tokens/s)"))
            rows.append(("peak memory", html.human_bytes(self.peak_memory)))
        for split, last in self.last_evals.items():
            for when, report in (("last", last), ("best", self.best_evals.get(split, last))):
                rows.append((f"{split} loss, {when}", f"{report.loss:.4f} (perplexity {report.perplexity:.3f}) at step {report.step:,}"))
        return rows


def _of_eval(report: EvalReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    return {name: _to_json(getattr(report, name)) for name in ("step", "loss", "perplexity", "accuracy", "entropy", "tokens")}


class History(list):
    """Reports and events of a run, oldest first. A list in every respect; a slice of it is a `History` too."""

    @property
    def steps(self) -> list[StepReport]:
        """The step reports."""
        return [r for r in self if isinstance(r, StepReport)]

    @property
    def evals(self) -> list[EvalReport]:
        """The evaluation reports."""
        return [r for r in self if isinstance(r, EvalReport)]

    @property
    def events(self) -> list[Event]:
        """The events."""
        return [r for r in self if isinstance(r, Event)]

    @property
    def summary(self) -> RunSummary:
        """The run in a few figures."""
        return RunSummary.of(self)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return History(found) if isinstance(index, slice) else found

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each report; `kind` tells them apart.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        columns = dict.fromkeys(["kind", *(f.name for r in _KINDS.values() for f in dataclasses.fields(r) if f.name != "kind"), "event"])
        rows = []
        for report in self:
            row = report.to_dict()
            # to_dict writes null for NaN, for JSON's sake; a frame can hold the values themselves.
            row.update({k: getattr(report, k) for k in row if k not in ("kind", "event")})
            rows.append(row)
        return frame(rows, list(columns))

    def to_jsonable(self) -> list[dict[str, Any]]:
        """Plain values that `json.dumps(..., allow_nan=False)` takes."""
        return [report.to_dict() for report in self]

    @classmethod
    def from_jsonable(cls, values: Iterable[dict[str, Any]]) -> History:
        """The history that `to_jsonable` gave.

        Raises:
            CheckpointError: an entry is not a report.
        """
        return cls(_Record.from_dict(v) for v in values)

    def __repr__(self) -> str:
        return f"History({len(self.steps)} steps, {len(self.evals)} evaluations, {len(self.events)} events)"

    def _repr_html_(self) -> str:
        steps, shown = self.steps, self[-_ROWS:]
        caption = "Last reports" if len(self) > _ROWS else "Reports"
        parts = [html.facts(f"Training history: {len(steps):,} steps", self.summary.facts())]
        if len(steps) > 1:
            parts.append(svg.curve([(r.step, r.loss) for r in steps], f"loss over {len(steps):,} steps"))
        parts.append(html.table(("report", "what"), [(type(r).__name__, html.cut(str(r))) for r in shown], caption))
        hidden = len(self) - len(shown)
        if hidden:
            parts.append(f"<div>… and {hidden:,} before them</div>")
        return "".join(parts)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The centred mean over `window` values, fewer at the ends; never across a NaN: each finite stretch is taken by itself."""
    smooth = np.full_like(values, np.nan)
    finite = np.isfinite(values)
    borders = np.flatnonzero(np.diff(finite, prepend=False, append=False))  # start, end, start, end, ...
    for start, end in zip(borders[::2], borders[1::2], strict=True):
        sums = np.concatenate([[0.0], np.cumsum(values[start:end])])
        at = np.arange(end - start)
        low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, end - start)
        smooth[start:end] = (sums[high] - sums[low]) / (high - low)
    return smooth
