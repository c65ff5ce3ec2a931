"""The update meter: which share of the weights a step really changes after rounding, and how large updates, gradients and weights are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from fulltune_nb import svg
from fulltune_nb.errors import ConfigError
from fulltune_nb.frames import frame
from fulltune_nb.html import NO_MATH, counted, more, table
from fulltune_nb.settings import whole_number
from fulltune_nb.training.callbacks import Attachable
from fulltune_nb.training.rules import Piece
from fulltune_nb.training.trainer import Trainer

if TYPE_CHECKING:
    from fulltune_nb.plots import Axes

_NORM_CHUNK = 2**22  # elements turned into float32 at a time
_EATEN_BELOW = 0.5
"""A share of surviving updates below this is worth a warning."""


@dataclass(frozen=True)
class TensorUpdate:
    """What one step did to one tensor."""

    step: int
    """As in the step's report, from 1."""
    name: str
    """Module path."""
    dtype: str
    size: int
    """Elements."""
    looked_at: int
    """Elements that changes were counted among."""
    moving: int
    """Of these, elements whose update before rounding is not zero."""
    changed: int
    """Of those, elements that really changed."""
    update_ratio: float
    """L2 norm of the update before rounding over that of the weights, over the elements looked at."""
    gradient_norm: float
    """L2 norm of the whole tensor's gradient, before clipping."""
    weight_norm: float
    """L2 norm of the whole tensor before the step."""

    @property
    def survival(self) -> float:
        """`changed / moving`; NaN where nothing was to move."""
        return self.changed / self.moving if self.moving else math.nan


class UpdateMeter(Attachable):
    """Measures what updates do. Pass it to `trainer.run(callbacks=[meter])`, or `attach` it for steps, panels and notebooks.

    By default every tenth step is measured, and changes are counted in rows spread evenly over each tensor, 16,384 elements or so;
    gradient and weight norms are of the whole tensors. So nothing large is kept, and updates are still made in place. Where rounding
    eats the updates, the run's history gets an event that says so, once.

    Attributes:
        records: a `TensorUpdate` for each measured step and tensor.
        every: steps from one measurement to the next, beginning with the first.
        sample: elements of a tensor that changes are counted in, at least a row; None: all.
        keep: the latest measured steps that are kept at least, and at most twice as many; None: all.
    """

    def __init__(self, every: int = 10, sample: int | None = 2**14, keep: int | None = None):
        """
        Raises:
            ConfigError: a number out of range.
        """
        self.every = whole_number("every", every, low=1)
        self.sample = None if sample is None else whole_number("sample", sample, low=1)
        self.keep = None if keep is None else whole_number("keep", keep, low=1)
        self.records: list[TensorUpdate] = []
        self._attached_by_run = self._warned = False
        self._pending: dict[tuple[str, int], tuple] = {}  # what was seen before an update, by name and first row
        self._measured: dict[tuple[str, str, int], list[tuple]] = {}  # of the step under way: name, dtype, size -> sums over some rows

    def attach(self, trainer: Trainer) -> UpdateMeter:
        """Measures every step of this trainer from now on, whoever takes it; until `detach`."""
        if self._trainer is not trainer:
            super().attach(trainer)
            trainer.optimizers.observers.append(self)
        return self

    def detach(self) -> None:
        """Ends the measuring; what was measured stays."""
        if self._trainer is not None:
            self._trainer.optimizers.observers.remove(self)
        super().detach()
        self._attached_by_run, self._pending, self._measured = False, {}, {}

    def on_start(self, trainer: Trainer, target: int) -> None:
        """As a callback of `run`: attaches itself for as long as that lasts."""
        if self._trainer is not trainer:
            self.attach(trainer)
            self._attached_by_run = True

    def on_end(self, trainer: Trainer) -> None:
        """The end of the run: detaches itself if the run had attached it."""
        if self._attached_by_run:
            self.detach()

    def before(self, update: Piece) -> None:
        """See `UpdateObserver`."""
        if (update.step - 1) % self.every:
            return
        size = math.prod(update.shape)
        every = rows_between(self.sample, size, update.weight.shape[0])
        weight, change = update.change(every)
        old, moving = update.weight[::every] + 0, change != 0  # a copy: a view of the rows would hold the whole array
        squares = [mx.square(change).sum(), mx.square(weight).sum()]
        mx.eval(old, moving, squares)
        sums = (*(square.item() for square in squares), sum_of_squares(update.gradient), sum_of_squares(update.weight))
        tensor = update.name, str(update.weight.dtype).removeprefix("mlx.core."), size
        self._pending[update.name, update.first_row] = tensor, every, old, moving, sums

    def after(self, name: str, first_row: int, new: mx.array) -> None:
        """See `UpdateObserver`."""
        if (name, first_row) in self._pending:
            tensor, every, old, moving, sums = self._pending.pop((name, first_row))
            changed = (new[::every] != old) & moving
            self._measured.setdefault(tensor, []).append((old.size, moving.sum().item(), changed.sum().item(), *sums))

    def on_step(self, trainer: Trainer, report: Any) -> None:
        """The step is whole: what was seen of it is taken down."""
        new = self.collect(report.step)
        if new and not self._warned and (message := rounding_warning(trainer, new)):
            self._warned = True
            trainer.event("rounding", message)

    def collect(self, step: int) -> list[TensorUpdate]:
        """What was seen since the last call, as of this step; for a loop of one's own, where no trainer tells that a step is whole."""
        measured, self._measured = self._measured, {}
        new = [_tensor_update(step, *tensor, [sum(values) for values in zip(*rows, strict=True)]) for tensor, rows in measured.items()]
        self.records += new
        if self.keep is not None and len(self.records) > 2 * self.keep * len(new) > 0:
            del self.records[: -self.keep * len(new)]
        return new

    @property
    def steps(self) -> list[int]:
        """The measured steps."""
        return list(dict.fromkeys(record.step for record in self.records))

    def latest(self, steps: int = 1) -> list[TensorUpdate]:
        """The records of the latest measured steps; found from the end, so that a long run costs no more."""
        first, last = len(self.records), None
        while first and (steps or self.records[first - 1].step == last):
            first -= 1
            steps, last = steps - (self.records[first].step != last), self.records[first].step
        return self.records[first:]

    def by_block(self, records: Iterable[TensorUpdate] | None = None) -> dict[str, dict[int, list[TensorUpdate]]]:
        """Block (`"embed_tokens"`, `"layers.0"`, ...) -> step -> its tensors' records: of all records, or of those given."""
        found: dict[str, dict[int, list[TensorUpdate]]] = {}
        for record in self.records if records is None else records:
            found.setdefault(block_of(record.name), {}).setdefault(record.step, []).append(record)
        return {name: found[name] for name in sorted(found, key=_block_order)}

    def survival(self, step: int | None = None) -> float:
        """Share of the moving weights that changed, over all tensors: of a measured step, or of all of them. NaN where none moved."""
        return survival(record for record in self.records if step in (None, record.step))

    def to_frame(self) -> Any:
        """A pandas DataFrame with a line for each measured step and tensor. Raises `MissingDependencyError` without pandas."""
        columns = [*TensorUpdate.__dataclass_fields__, "survival"]
        return frame(({**vars(record), "survival": record.survival} for record in self.records), columns)

    def heat(self, what: str = "survival") -> tuple[list[str], list[int], np.ndarray]:
        """Blocks, steps, and a number for each of both: (blocks, steps) float64.

        Args:
            what: `"survival"`, `"update_ratio"`, `"gradient_norm"` or `"weight_norm"`.

        Raises:
            ConfigError: another name.
        """
        if what not in SUMMARIES:
            raise ConfigError(f"what: expected {', '.join(map(repr, SUMMARIES))}, got {what!r}.")
        blocks, steps = self.by_block(), self.steps
        return list(blocks), steps, _values(blocks, steps, what)

    def plot(self, ax: Axes | None = None, what: str = "survival") -> Axes:
        """Blocks x steps as a heat map.

        Args:
            ax: where to draw; a new figure where left out.
            what: see `heat`.
        """
        from fulltune_nb.plots import heat_map

        blocks, steps, values = self.heat(what)
        limits = (0.0, 1.0) if what == "survival" else (None, None)
        if what != "survival":
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.where(values > 0, np.log10(values), np.nan)
        label = "share of updates that survive" if what == "survival" else f"log10 of {what.replace('_', ' ')}"
        return heat_map(values, blocks, steps, ("block", "optimizer step", label), "", limits, ax)

    def __repr__(self) -> str:
        steps = self.steps
        share = f", {self.survival(steps[-1]):.1%} of the updates survived step {steps[-1]}" if steps else ""
        return f"UpdateMeter({len(steps)} steps measured, every {self.every}{share})"

    def _repr_html_(self) -> str:
        return survival_html(self)


def _tensor_update(step: int, name: str, dtype: str, size: int, sums: Sequence[float]) -> TensorUpdate:
    looked_at, moving, changed, update, sample, gradient, weight = sums  # the last four of squares
    ratio = math.sqrt(update / max(sample, 1e-30))
    return TensorUpdate(step, name, dtype, size, looked_at, moving, changed, ratio, math.sqrt(gradient), math.sqrt(weight))


def rows_between(sample: int | None, size: int, rows: int) -> int:
    """Every how many-th row to look at, so that `sample` of a tensor's `size` elements are seen; None: every row."""
    skip = 1 if sample is None else min(size // sample, rows)
    return max(1, skip - 1 + skip % 2)  # odd: an even one could pick the same place in every head


def sum_of_squares(array: mx.array) -> float:
    """In float32, of any dtype, some millions of elements at a time."""
    flat, total = array.reshape(-1), 0.0
    for begin in range(0, flat.size, _NORM_CHUNK):
        part = flat[begin : begin + _NORM_CHUNK].astype(mx.float32)
        total += mx.inner(part, part).item()
    return total


def norm(array: mx.array) -> float:
    """L2 norm; see `sum_of_squares`."""
    return math.sqrt(sum_of_squares(array))


def survival(records: Iterable[TensorUpdate]) -> float:
    """Share of the moving weights that changed, each tensor counting by its size; NaN where none moved."""
    changed = moving = 0.0
    for record in records:
        scale = record.size / record.looked_at if record.looked_at else 0.0
        changed, moving = changed + scale * record.changed, moving + scale * record.moving
    return changed / moving if moving else math.nan


def rounding_warning(trainer: Trainer, records: Iterable[TensorUpdate]) -> str:
    """What to say of a step whose updates rounding eats, and what to switch on; "" where all is well."""
    rounded = [record for record in records if record.dtype != "float32"]
    share = survival(rounded)
    if not rounded or not share < _EATEN_BELOW or getattr(trainer.config, "rounding", None) == "stochastic":
        return ""
    percent = f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
    return (
        f"only {percent} of the updates of {rounded[0].dtype} weights survive rounding at learning rate {trainer.learning_rate:.3g}: "
        'the rest is lost. Train with TrainConfig(rounding="stochastic"), which keeps them on average, or in float32.'
    )


def _root_of_squares(values: Iterable[float]) -> float:
    return math.sqrt(sum(value**2 for value in values))


def _update_ratio(records: list[TensorUpdate]) -> float:
    weights = _root_of_squares(r.weight_norm for r in records)
    return _root_of_squares(r.update_ratio * r.weight_norm for r in records) / weights if weights else math.nan


SUMMARIES = {
    "survival": survival,
    "update_ratio": _update_ratio,
    "gradient_norm": lambda records: _root_of_squares(r.gradient_norm for r in records),
    "weight_norm": lambda records: _root_of_squares(r.weight_norm for r in records),
}


def _values(blocks: dict[str, dict[int, list[TensorUpdate]]], steps: Sequence[int], what: str) -> np.ndarray:
    """(blocks, steps) float64; NaN where a block was not measured."""
    values = [[SUMMARIES[what](by_step[step]) if step in by_step else math.nan for step in steps] for by_step in blocks.values()]
    return np.array(values, dtype=np.float64).reshape(len(blocks), len(steps))


def block_of(name: str) -> str:
    """`layers.3.mlp.up_proj.weight` -> `layers.3`; what stands outside the blocks by its first part."""
    return ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])


def _block_order(block: str) -> tuple[int, int]:
    if block.startswith("layers."):
        return 1, int(block.split(".")[1])
    return (0, 0) if block.startswith("embed") else (2, 0)


# -- in a cell --------------------------------------------------------------------------------------------------------

_COLUMNS = 60  # measured steps
_BLOCKS = 40  # lines


def survival_html(meter: UpdateMeter, what: str = "survival") -> str:
    """Nothing yet, or a table of the last measured step and a picture of the latest ones; what there is no room for is counted.

    Args:
        meter: what has measured.
        what: the picture is of; one of `SUMMARIES`.
    """
    if not meter.records:
        return f'<div class="{NO_MATH}">Update survival: nothing measured yet.</div>'
    recent = meter.latest(_COLUMNS)
    last, blocks = recent[-1].step, meter.by_block(recent)
    shown = dict(list(blocks.items())[:_BLOCKS])
    rows = []
    for name, by_step in shown.items():
        if last in by_step:
            share, *numbers = (summary(by_step[last]) for summary in SUMMARIES.values())
            rows.append((name, _percent(share), *(f"{number:{form}}" for number, form in zip(numbers, (".2e", ".3g", ".4g"), strict=True))))
    headers = ("block", "updates that survive", "update / weight", "gradient norm", "weight norm")
    share, measured = survival(record for record in recent if record.step == last), len(meter.steps)
    caption = f"Step {last:,}: {_percent(share)} of the updates survive rounding; {counted(measured, 'step')} measured"
    lines = f"{table(headers, rows, caption)}{more(len(blocks) - _BLOCKS, 'blocks')}"
    return f'<div class="{NO_MATH}">{lines}{_heat_map_html(shown, what, measured)}</div>'


def _percent(share: float) -> str:
    return "nothing moves" if math.isnan(share) else f"{share:.1%}"


def _heat_map_html(blocks: dict[str, dict[int, list[TensorUpdate]]], what: str, measured: int) -> str:
    names, steps = list(blocks), sorted({step for by_step in blocks.values() for step in by_step})
    values, shares = _values(blocks, steps, what), what == "survival"

    def title(row: int, column: int) -> str:
        return f"{names[row]}, step {steps[column]}: {values[row, column]:{'.1%' if shares else '.3g'}}"

    name = {"survival": "Updates that survive", "update_ratio": "Update / weight"}.get(what, what.replace("_", " ").capitalize())
    hidden = f"; {measured - len(steps):,} earlier measurements not shown" if measured > len(steps) else ""
    return svg.heat_map(values, f"{name}, by block and step {steps[0]:,} to {steps[-1]:,}", names, title, shares, hidden)
