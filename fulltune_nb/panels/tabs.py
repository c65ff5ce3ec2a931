"""The tabs of the training panel that look inside the model while it learns.

A new tab is a class below, derived from `Tab`, and its name in `TABS` at the end of this file. A tab computes nothing unless it is
open, and then between two steps, no more than once a second and in no more than 2% of the time: see `OpenTab`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fulltune_nb.data.example import Lens
from fulltune_nb.errors import FulltuneError, optional_import
from fulltune_nb.html import NO_MATH, PALETTE, cut, esc, table
from fulltune_nb.insight.losses import TokenLosses, token_losses
from fulltune_nb.insight.updates import UpdateMeter, rounding_warning, survival_html
from fulltune_nb.panels.controls import button, field, row, scrolled
from fulltune_nb.panels.loop import TrainLoop
from fulltune_nb.panels.panel import Panel
from fulltune_nb.training.history import StepReport, moving_mean

with optional_import("A panel", "notebook"):
    import ipywidgets as widgets

MIN_SECONDS = 1.0  # from one picture of a tab to the next
MAX_SHARE = 0.02  # of the time that they may take while a run goes on


class Tab:
    """One tab. A subclass makes `box` and fills it in `renew`; controls are connected with `panel.connect(control, self.method)`.

    Attributes:
        title: what the tab is called.
        box: its widgets.
        panel: the panel that it belongs to.
        loop: of the trainer that is looked at.
        trainer: that trainer.
    """

    title: str
    box: widgets.Widget

    def __init__(self, panel: Panel, loop: TrainLoop):
        self.panel, self.loop, self.trainer = panel, loop, loop.trainer

    def renew(self) -> None:
        """Shows what there is now. Called only while the tab is open."""
        raise NotImplementedError

    def opened(self) -> None:
        """The tab was opened; `renew` comes next."""

    def left(self) -> None:
        """Another tab was opened, or the panel is about to be closed."""

    def closed(self) -> None:
        """The panel is closed."""


class OpenTab:
    """Renews the tab of a panel that is open, if any.

    Args:
        loop: of the trainer that is looked at.
        failed: told of an error that nobody else would hear of.

    Attributes:
        tab: the open one, or None.
        seconds: what the last renewal took.
    """

    def __init__(self, loop: TrainLoop, failed: Callable[[Exception], Any]):
        self.tab: Tab | None = None
        self.seconds = 0.0
        self._loop, self._failed = loop, failed
        self._timer: Any = None
        self._started = -float("inf")

    def choose(self, tab: Tab | None) -> None:
        """Another tab has been opened; None for one that is not of these."""
        if tab is self.tab:
            return
        self._stop_timer()
        if self.tab is not None:
            self.tab.left()
        self.tab = tab
        if tab is not None:
            tab.opened()
            self._renew()

    def tell(self, rests: bool = False) -> None:
        """Something has happened to the run: the open tab is renewed as soon as may be.

        Args:
            rests: no step comes for now, so that without an event loop there will be no better moment.
        """
        if self._timer is not None:
            return
        interval = max(MIN_SECONDS, self.seconds / MAX_SHARE) if self._loop.running else MIN_SECONDS
        self._timer = self._loop.later(max(0.0, self._started + interval - time.monotonic()), self._renew)
        if self._timer is None and rests:
            self._renew()

    def _renew(self) -> None:
        self._stop_timer()
        self._started = time.monotonic()
        try:
            self.tab.renew()
        except Exception as error:  # nobody has asked for this, so nobody else would hear of it
            self._failed(error)
        self.seconds = time.monotonic() - self._started

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None


# -- updates: which of them survive rounding, block by block ------------------------------------------------------------

KEPT = 120
"""Measured steps that are kept at least: twice what the picture shows."""

_PICTURES = (
    ("updates that survive", "survival"),
    ("update / weight", "update_ratio"),
    ("gradient norm", "gradient_norm"),
    ("weight norm", "weight_norm"),
)


class Measuring:
    """The update meter of one trainer's panels, which share it: `loop.shared(Measuring)`. It measures while somebody looks.

    Attributes:
        open_tabs: each panel's tab, and whether it is open.
        always: measure while no tab is open too, as long as there is a panel.
    """

    def __init__(self, loop: TrainLoop):
        self._trainer = loop.trainer
        self._own = UpdateMeter(keep=KEPT)
        self.open_tabs: dict[Tab, bool] = {}
        self.always = False

    @property
    def meter(self) -> UpdateMeter:
        """What measures: one attached in code where there is one, else the panels' own."""
        given = [listener for listener in self._trainer.listeners if isinstance(listener, UpdateMeter) and listener is not self._own]
        return given[0] if given else self._own

    @property
    def is_own(self) -> bool:
        """Whether it is the panels' own."""
        return self.meter is self._own

    @property
    def next_step(self) -> int:
        """The step that is measured next, as in its report."""
        return self._trainer.step_count + 1 + -self._trainer.optimizers.step % self.meter.every

    def set_every(self, every: int) -> None:
        """Steps from one measurement of the panels' own meter to the next."""
        self._own.every = every

    def settle(self) -> None:
        """Attaches the panels' own meter or puts it away, as is wanted now."""
        if self.is_own and (any(self.open_tabs.values()) or (self.always and self.open_tabs)):
            self._own.attach(self._trainer)
        else:
            self._own.detach()


class UpdatesTab(Tab):
    """Which updates survive rounding. Steps are measured only while a tab like this is open, unless it is told to go on."""

    title = "Updates"

    def __init__(self, panel: Panel, loop: TrainLoop):
        super().__init__(panel, loop)
        self._measuring = self.loop.shared(Measuring)
        self._measuring.open_tabs[self] = False
        self.every = field(
            widgets.BoundedIntText, "every", "Steps from one measurement to the next; a measured step takes longer", "120px",
            value=self._measuring.meter.every, min=1, max=10**6, continuous_update=False,
        )  # fmt: skip
        self.always = field(
            widgets.Checkbox, "measure while other tabs are open too", "Else steps are measured only while this tab is open", "auto",
            value=self._measuring.always, indent=False,
        )  # fmt: skip
        tooltip = "What the picture of blocks and steps shows"
        self.picture = field(widgets.Dropdown, "picture", tooltip, "230px", options=_PICTURES, value="survival")
        self.page = widgets.HTML(tooltip="What the measured steps did to the weights")
        self.box = widgets.VBox([row(self.every, self.picture, self.always), scrolled(self.page)])
        panel.connect(self.every, self._every_entered)
        panel.connect(self.always, self._always_entered)
        panel.connect(self.picture, self._picture_chosen)

    def _every_entered(self, every: int) -> None:
        self._measuring.set_every(every)
        self.renew()

    def _always_entered(self, always: bool) -> None:
        self._measuring.always = always
        self._measuring.settle()

    def _picture_chosen(self, _: str) -> None:
        self.renew()

    def opened(self) -> None:
        self._measuring.open_tabs[self] = True
        self._measuring.settle()

    def left(self) -> None:
        self._measuring.open_tabs[self] = False
        self._measuring.settle()

    def closed(self) -> None:
        del self._measuring.open_tabs[self]
        self._measuring.settle()

    def renew(self) -> None:
        measuring = self._measuring
        measuring.settle()  # a meter may have been attached in code meanwhile
        self.panel.put(self.every, measuring.meter.every)
        self.panel.put(self.always, measuring.always)
        self.every.disabled = self.always.disabled = not measuring.is_own
        measured = survival_html(measuring.meter, self.picture.value)
        self.page.value = f'<div style="line-height:1.35">{self._warning()}{self._state()}{measured}</div>'

    def _warning(self) -> str:
        message = rounding_warning(self.trainer, self._measuring.meter.latest())
        style = f"border:1px solid {PALETTE[1]};border-left-width:6px;padding:6px 10px;margin:4px 0"
        return f'<div role="alert" class="{NO_MATH}" style="{style}">⚠ {esc(message[:1].upper() + message[1:])}</div>' if message else ""

    def _state(self) -> str:
        measuring, total = self._measuring, self.trainer.total_steps
        if measuring.next_step > total:
            return ""
        whose = "" if measuring.is_own else ", by a meter that was attached in code"
        every = f"every {measuring.meter.every:,} steps" if measuring.meter.every > 1 else "every step"
        return f"<div>Measured {every}{whose}; the next one is step {measuring.next_step:,} of {total:,}.</div>"


# -- batch: from a step of the loss curve to the rows behind it, token by token -------------------------------------------

_CHOOSE = ("choose one …", 0)
_SPIKES = 10
_WINDOW = 11  # steps whose mean a step's loss is compared with, its own among them
LISTED = 200  # rows of a batch
TOKENS = 3000  # drawn token by token
_TOKENS_OF_A_ROW = 400  # that the lens draws
_CHARACTERS = 120  # of a row's text in the list


class BatchTab(Tab):
    """The rows of a step. Their losses are computed when the button is pressed, by the weights as they are then."""

    title = "Batch"

    def __init__(self, panel: Panel, loop: TrainLoop):
        super().__init__(panel, loop)
        self._just_opened = False
        self.spikes = field(
            widgets.Dropdown, "steps that stand out", "Steps whose loss lies highest above that of the steps around them", "360px",
            options=[_CHOOSE],
        )  # fmt: skip
        self.step = field(
            widgets.BoundedIntText, "step", "The step whose rows are shown, as in its report; steps to come too", "130px",
            value=max(1, self.trainer.step_count), min=1, max=max(1, self.trainer.total_steps),
        )  # fmt: skip
        self.rows = button("Rows", "Show this step's rows, and which of their tokens are trained on")
        self.losses = button("Token losses", "Compute the loss of every token of these rows, by the weights as they are now", "search")
        self.page = widgets.HTML(tooltip="The rows of a step")
        self.box = widgets.VBox([row(self.spikes, self.step, self.rows, self.losses), scrolled(self.page)])
        panel.connect(self.rows, self.show_rows)
        panel.connect(self.losses, self.show_losses)
        panel.connect(self.spikes, self._spike_chosen)

    def _spike_chosen(self, step: int | None) -> None:
        if step:
            self.step.value = step
            self.show_rows()

    def opened(self) -> None:
        self._just_opened = True

    def renew(self) -> None:
        if self._just_opened or not self.loop.running:  # a list that changes while one chooses from it is of no use
            found = [(f"step {step:,}: loss {loss:.3f} ({above:+.3f})", step) for step, loss, above in spikes(self.trainer.history.steps)]
            if tuple(self.spikes.options) != (options := (_CHOOSE, *found)):
                self.spikes.options = options
        if self._just_opened and not self.page.value:
            self.step.value = max(1, self.trainer.step_count)
            self.show_rows()
        self._just_opened = False

    def show_rows(self) -> None:
        """The rows of the step in the field, with their loss masks."""
        rows = self.trainer.batch_at(self.step.value)
        lines = [(one.source, len(one.tokens), int(one.loss_mask.sum()), cut(one.text, _CHARACTERS)) for one in rows[:LISTED]]
        drawn = rows[: _fitting(min(len(one.tokens), _TOKENS_OF_A_ROW) for one in rows)]
        heading = f"{self._about_step()}: {len(rows):,} rows"
        lens = Lens(drawn, self.trainer.lm.tokenizer)
        self._show(heading, ("row", "tokens", "trained on", "text"), lines, len(rows), lens, len(drawn))

    def show_losses(self) -> None:
        """The same rows by loss, the largest first, token by token."""
        trainer = self.trainer
        found = token_losses(trainer.lm, trainer.batch_at(self.step.value))
        rows = sorted(found.rows, key=lambda one: -np.nan_to_num(one.loss, nan=-np.inf))
        lines = [
            (one.example.source, f"{one.loss:.4f}", int(one.trained.sum()), cut(one.example.text, _CHARACTERS)) for one in rows[:LISTED]
        ]
        drawn = rows[: _fitting(len(one.losses) for one in rows)]
        weights = f"losses by the weights after step {trainer.step_count:,}"
        heading = f"{self._about_step()}; {weights}: {found.loss:.4f}, the largest first"
        boxes = TokenLosses(drawn, trainer.lm.tokenizer, compared=False)
        self._show(heading, ("row", "loss (nats)", "trained on", "text"), lines, len(rows), boxes, len(drawn))

    def _about_step(self) -> str:
        step = self.step.value
        report = next((report for report in reversed(self.trainer.history.steps) if report.step == step), None)
        return f"Step {step:,}" + (f" (its loss was {report.loss:.4f})" if report else " (to come)")

    def _show(self, heading: str, headers: Sequence[str], lines: Sequence, count: int, boxes: Lens | TokenLosses, drawn: int) -> None:
        listed = f"<b>{heading}</b>{table(headers, lines)}{_hidden(count - len(lines), 'listed')}"
        page = f"{listed}{boxes._repr_html_()}{_hidden(count - drawn, 'drawn token by token')}"
        self.page.value = f'<div class="{NO_MATH}" style="line-height:1.35">{page}</div>'


def spikes(reports: Sequence[StepReport]) -> list[tuple[int, float, float]]:
    """The steps whose loss lies highest above the mean of the steps around them: step, loss, and how far above; the highest first."""
    loss = np.array([report.loss for report in reports], dtype=np.float64)
    above = loss - moving_mean(loss, _WINDOW)
    order = [i for i in np.argsort(-above, kind="stable")[:_SPIKES] if above[i] > 0]  # NaN comes last, and is not above
    return [(reports[i].step, float(loss[i]), float(above[i])) for i in order]


def _fitting(tokens: Any) -> int:
    """How many rows of so many tokens there is room for, one at least."""
    return max(1, int(np.searchsorted(np.cumsum(list(tokens)), TOKENS, side="right")))


def _hidden(count: int, how: str) -> str:
    return f"<div>… {count:,} more rows, not {how}</div>" if count > 0 else ""


# -- callbacks: what those attached to the trainer have seen so far -------------------------------------------------------

_NOTHING = """<div style="line-height:1.5">Nothing is attached to this trainer. What can be:<ul>
<li><code>insight.Forgetting(prompts, text).attach(trainer)</code>: the same questions at every evaluation and checkpoint, perplexity
on a text that is not trained on, and how far the weights have moved</li>
<li><code>insight.GenerationScore(data.valid[:20]).attach(trainer)</code>: answers written at every evaluation, beside those
expected</li>
</ul></div>"""


class CallbacksTab(Tab):
    """Whatever stands among the trainer's listeners and has a view for a cell."""

    title = "Callbacks"

    def __init__(self, panel: Panel, loop: TrainLoop):
        super().__init__(panel, loop)
        self.page = widgets.HTML(tooltip="What attached callbacks have seen")
        self.box = scrolled(self.page)

    def renew(self) -> None:
        shown = [one for one in self.trainer.listeners if hasattr(one, "_repr_html_") and not isinstance(one, UpdateMeter)]
        self.page.value = "".join(f'<div style="line-height:1.35;margin-bottom:10px">{view_of(one)}</div>' for one in shown) or _NOTHING


def view_of(callback: Any) -> str:
    """A callback's own HTML, or why there is none."""
    try:
        return callback._repr_html_() or esc(repr(callback), 1000)
    except FulltuneError as error:
        text = str(error)
    except Exception as error:  # of somebody's own class
        text = f"{type(error).__name__}: {error}"
    return f'<div class="{NO_MATH}">⚠ {esc(type(callback).__name__)} cannot be shown: {esc(text, 1000)}</div>'


TABS = (UpdatesTab, BatchTab, CallbacksTab)
"""Behind the panel's own tabs, Log and Samples, in this order."""
