"""The training panel's tab of batches: from a step of the loss curve to the rows behind it, token by token."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import ipywidgets as widgets
import numpy as np

from fulltune_nb.data.encoding import Example
from fulltune_nb.data.lens import Lens
from fulltune_nb.html import NO_MATH, cut, table
from fulltune_nb.insight.losses import TokenLosses, token_losses
from fulltune_nb.panels.looks import Post, on_entry, on_press, scrolled
from fulltune_nb.panels.loop import TrainLoop
from fulltune_nb.plots import moving_mean
from fulltune_nb.training.history import StepReport

_LABELS = {"description_width": "initial"}
_CHOOSE = ("choose one …", 0)
_SPIKES = 10
_WINDOW = 11  # steps whose mean a step's loss is compared with, its own among them
_LISTED = 200  # rows of a batch
_TOKENS = 3000  # drawn token by token
_CHARACTERS = 120  # of a row's text in the list


class BatchTab:
    """See `Look`. Losses are computed when the button is pressed, by the weights as they are then."""

    title = "Batch"

    def __init__(self, loop: TrainLoop):
        self._loop, self._trainer = loop, loop.trainer
        self._just_opened = False
        self.spikes = widgets.Dropdown(
            options=[_CHOOSE], description="steps that stand out", style=_LABELS, layout=widgets.Layout(width="360px"),
            tooltip="Steps whose loss lies highest above that of the steps around them",
        )  # fmt: skip
        self.step = widgets.BoundedIntText(
            value=max(1, self._trainer.step_count), min=1, max=max(1, self._trainer.total_steps), description="step", style=_LABELS,
            tooltip="The step whose rows are shown, as in its report; steps to come too", layout=widgets.Layout(width="130px"),
        )  # fmt: skip
        look = {"layout": widgets.Layout(width="auto")}
        self.rows = widgets.Button(description="Rows", tooltip="Show this step's rows, and which of their tokens are trained on", **look)
        self.losses = widgets.Button(
            description="Token losses", icon="search", **look,
            tooltip="Compute the loss of every token of these rows, by the weights as they are now",
        )  # fmt: skip
        self.page = widgets.HTML(tooltip="The rows of a step")
        row = widgets.Layout(flex_flow="row wrap", align_items="center", overflow="visible")
        fields = widgets.HBox([self.spikes, self.step, self.rows, self.losses], layout=row)
        self.box = widgets.VBox([fields, scrolled(self.page)])

    def connect(self, post: Post) -> None:
        """See `Look`."""
        here = weakref.ref(self)
        on_press(self.rows, post, here, lambda tab: tab.show_rows(tab.step.value))
        on_press(self.losses, post, here, lambda tab: tab.show_losses(tab.step.value))
        on_entry(self.spikes, post, here, BatchTab._chosen)

    def _chosen(self, step: int | None) -> None:
        if step:
            self.step.value = step
            self.show_rows(step)

    def open(self) -> None:
        """See `Look`."""
        self._just_opened = True

    def close(self) -> None:
        """See `Look`."""

    def leave(self) -> None:
        """See `Look`."""

    def renew(self) -> None:
        """See `Look`."""
        if self._just_opened or not self._loop.running:  # a list that changes while one chooses from it is of no use
            self._offer()
        if self._just_opened and not self.page.value:
            self.step.value = max(1, self._trainer.step_count)
            self.show_rows(self.step.value)
        self._just_opened = False

    def _offer(self) -> None:
        """The steps that can be chosen from."""
        found = [(f"step {step:,}: loss {loss:.3f} ({above:+.3f})", step) for step, loss, above in spikes(self._trainer.history.steps)]
        if tuple(self.spikes.options) != (options := (_CHOOSE, *found)):
            self.spikes.options = options

    # -- showing ----------------------------------------------------------------------------------------------------

    def show_rows(self, step: int) -> None:
        """The rows of a step, with their loss masks."""
        rows = self._trainer.batch_at(step)
        lines = [(row.source, len(row.tokens), int(row.loss_mask.sum()), cut(row.text, _CHARACTERS)) for row in rows[:_LISTED]]
        drawn = _first(rows, [min(len(row.tokens), 400) for row in rows])
        lens = Lens(drawn, self._trainer.lm.tokenizer)._repr_html_()
        listed = f"<b>{self._about(step)}: {len(rows):,} rows</b>" + table(("row", "tokens", "trained on", "text"), lines)
        self._put(listed, _hidden(len(rows), len(lines), "listed"), lens, _hidden(len(rows), len(drawn), "drawn token by token"))

    def show_losses(self, step: int) -> None:
        """The same rows by loss, the largest first, token by token."""
        trainer = self._trainer
        found = token_losses(trainer.lm, trainer.batch_at(step))
        worst = sorted(found.rows, key=lambda row: -np.nan_to_num(row.loss, nan=-np.inf))
        lines = [
            (row.example.source, f"{row.loss:.4f}", int(row.trained.sum()), cut(row.example.text, _CHARACTERS)) for row in worst[:_LISTED]
        ]
        about = f"{self._about(step)}; losses by the weights after step {trainer.step_count:,}: {found.loss:.4f}, the largest first"
        listed = f"<b>{about}</b>" + table(("row", "loss (nats)", "trained on", "text"), lines)
        drawn = _first(worst, [len(row.losses) for row in worst])
        boxes = TokenLosses(drawn, trainer.lm.tokenizer, compared=False)._repr_html_()
        self._put(listed, _hidden(len(worst), len(lines), "listed"), boxes, _hidden(len(worst), len(drawn), "drawn token by token"))

    def _about(self, step: int) -> str:
        report = next((report for report in reversed(self._trainer.history.steps) if report.step == step), None)
        return f"Step {step:,}" + (f" (its loss was {report.loss:.4f})" if report else " (to come)")

    def _put(self, *parts: str) -> None:
        self.page.value = f'<div class="{NO_MATH}" style="line-height:1.35">{"".join(parts)}</div>'


def spikes(reports: Sequence[StepReport]) -> list[tuple[int, float, float]]:
    """The steps whose loss lies highest above the mean of the steps around them: step, loss, and how far above; the highest first."""
    loss = np.array([report.loss for report in reports], dtype=np.float64)
    above = loss - moving_mean(loss, _WINDOW)
    order = [i for i in np.argsort(-above, kind="stable")[:_SPIKES] if above[i] > 0]  # NaN comes last, and is not above
    return [(reports[i].step, float(loss[i]), float(above[i])) for i in order]


def _first(rows: Sequence, tokens: Sequence[int]) -> list[Example]:
    """So many of the rows as there is room for, one at least."""
    room = int(np.searchsorted(np.cumsum(tokens), _TOKENS, side="right"))
    return list(rows[: max(1, room)])


def _hidden(there: int, shown: int, how: str) -> str:
    return f"<div>… {there - shown:,} more rows, not {how}</div>" if there > shown else ""
