"""The training panel's tab of updates: which of them survive rounding, block by block, while the run goes on."""

from __future__ import annotations

import weakref

import ipywidgets as widgets

from fulltune_nb.html import NO_MATH, PALETTE, esc
from fulltune_nb.insight.survival import rounding_warning
from fulltune_nb.insight.survival_view import survival_html
from fulltune_nb.panels.looks import Post, on_entry, scrolled
from fulltune_nb.panels.loop import TrainLoop
from fulltune_nb.panels.measuring import measuring_of

_LABELS = {"description_width": "initial"}
_PICTURES = (
    ("updates that survive", "survival"),
    ("update / weight", "update_ratio"),
    ("gradient norm", "gradient_norm"),
    ("weight norm", "weight_norm"),
)


class UpdatesTab:
    """See `Look`. The meter measures only while a tab like this is open, unless it is told to go on."""

    title = "Updates"

    def __init__(self, loop: TrainLoop):
        self._loop, self._trainer = loop, loop.trainer
        self._measuring = measuring_of(loop)
        self._measuring.look(self, False)
        self.every = widgets.BoundedIntText(
            value=self._measuring.meter.every, min=1, max=10**6, description="every", style=_LABELS, continuous_update=False,
            tooltip="Steps from one measurement to the next; a measured step takes longer", layout=widgets.Layout(width="120px"),
        )  # fmt: skip
        self.always = widgets.Checkbox(
            value=self._measuring.always, description="measure while other tabs are open too", indent=False,
            tooltip="Else steps are measured only while this tab is open", layout=widgets.Layout(width="auto"),
        )  # fmt: skip
        self.picture = widgets.Dropdown(
            options=_PICTURES, value="survival", description="picture", tooltip="What the picture of blocks and steps shows", style=_LABELS,
            layout=widgets.Layout(width="230px"),
        )  # fmt: skip
        self.page = widgets.HTML(tooltip="What the measured steps did to the weights")
        row = widgets.Layout(flex_flow="row wrap", align_items="center", overflow="visible")
        fields = widgets.HBox([self.every, self.picture, self.always], layout=row)
        self.box = widgets.VBox([fields, scrolled(self.page)])

    def connect(self, post: Post) -> None:
        """See `Look`."""
        here = weakref.ref(self)
        on_entry(self.every, post, here, UpdatesTab._every_entered)
        on_entry(self.always, post, here, lambda tab, value: tab._measuring.set(always=value))
        on_entry(self.picture, post, here, lambda tab, value: tab.renew())

    def _every_entered(self, every: int) -> None:
        if every != self._measuring.meter.every:
            self._measuring.set(every=every)
            self.renew()

    def open(self) -> None:
        """See `Look`."""
        self._measuring.look(self, True)

    def close(self) -> None:
        """See `Look`."""
        self._measuring.look(self, False)

    def leave(self) -> None:
        """See `Look`."""
        self._measuring.leave(self)

    def renew(self) -> None:
        """See `Look`."""
        measuring = self._measuring
        measuring.settle()  # a meter may have been attached in code meanwhile
        self.every.value, self.always.value = measuring.meter.every, measuring.always
        self.every.disabled = self.always.disabled = not measuring.is_own
        self.page.value = f'<div style="line-height:1.35">{self._warning()}{self._state()}{self._measured()}</div>'

    def _warning(self) -> str:
        message = rounding_warning(self._trainer, self._measuring.meter.latest())
        style = f"border:1px solid {PALETTE[1]};border-left-width:6px;padding:6px 10px;margin:4px 0"
        return f'<div role="alert" class="{NO_MATH}" style="{style}">⚠ {esc(message[:1].upper() + message[1:])}</div>' if message else ""

    def _state(self) -> str:
        measuring = self._measuring
        whose = "" if measuring.is_own else ", by a meter that was attached in code"
        every = f"every {measuring.meter.every:,} steps" if measuring.meter.every > 1 else "every step"
        text = f"Measured {every}{whose}; the next one is step {measuring.next_step:,}"
        return f"<div>{text} of {self._trainer.total_steps:,}.</div>" if measuring.next_step <= self._trainer.total_steps else ""

    def _measured(self) -> str:
        return survival_html(self._measuring.meter, self.picture.value)
