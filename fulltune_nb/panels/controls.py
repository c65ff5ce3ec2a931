"""The widgets of the training panel and how they stand. What they do is said in `train`."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets as widgets

from fulltune_nb.panels.live_plot import HEIGHT, WIDTH
from fulltune_nb.panels.looks import scrolled
from fulltune_nb.panels.record import PANEL_CLASS
from fulltune_nb.panels.style import styled

OWN_TABS = 2
_LABELS = {"description_width": "initial"}


def _button(description: str, tooltip: str, icon: str, style: str = "") -> widgets.Button:
    return widgets.Button(description=description, tooltip=tooltip, icon=icon, button_style=style, layout=widgets.Layout(width="auto"))


class TrainControls:
    """Every widget of a panel by name; `box` holds them all."""

    def __init__(self, splits: Sequence[str], can_save: bool, tabs: Sequence[tuple[str, widgets.Widget]] = ()):
        """
        Args:
            splits: names of what can be evaluated.
            can_save: whether the trainer has a place for checkpoints.
            tabs: titles and contents of further tabs, from number `OWN_TABS` on.
        """
        self._make_buttons(splits, can_save)
        self._make_fields()
        self._make_displays()
        row = widgets.Layout(flex_flow="row wrap", align_items="center", overflow="visible")
        self.tabs = self._make_tabs(row, tabs)
        self.box = widgets.VBox(
            [
                widgets.HBox([self.run, self.pause, self.step, self.step_count, self.step_n, self.stop], layout=row),
                widgets.HBox([self.split, self.evaluate, self.save, self.learning_rate], layout=row),
                self.progress,
                self.status,
                self.error,
                self.plot,
                self.tabs,
            ],
            layout=widgets.Layout(width="100%", max_width=f"{WIDTH + 20}px", overflow="visible"),
        )
        styled(self.box).add_class(PANEL_CLASS)

    def _make_buttons(self, splits: Sequence[str], can_save: bool) -> None:
        self.run = _button("Run", "Train to the end of the run", "play", "primary")
        self.pause = _button("Pause", "Pause after the step under way; Run goes on from there", "pause")
        self.step = _button("Step", "Take one optimizer step", "step-forward")
        self.step_n = _button("Step N", "Take the number of steps given beside", "fast-forward")
        self.evaluate = _button("Evaluate", "Loss and perplexity of the chosen split, all of it, now", "check")
        where = "Write a checkpoint into the run directory" if can_save else "Nowhere to save: make the trainer with run_dir='runs/a'"
        self.save = _button("Save", where, "save")
        self.save.disabled = not can_save
        more = ", and write a checkpoint" if can_save else ""
        self.stop = _button("Stop", f"End this run after the step under way{more}; Run would still go on from there", "stop")
        chosen = "valid" if "valid" in splits else splits[0]
        self.split = widgets.Dropdown(
            options=list(splits), value=chosen, description="split", tooltip="What Evaluate looks at", style=_LABELS,
            layout=widgets.Layout(width="130px"),
        )  # fmt: skip

    def _make_fields(self) -> None:
        self.step_count = widgets.BoundedIntText(
            value=10, min=1, max=10**9, description="N", tooltip="Steps that Step N takes", style=_LABELS,
            layout=widgets.Layout(width="110px"),
        )  # fmt: skip
        self.learning_rate = widgets.FloatText(
            description="learning rate", tooltip="Rate of the next step; can be changed while paused, and the schedule goes on from it",
            style=_LABELS, layout=widgets.Layout(width="220px"), step=None, continuous_update=False,
        )  # fmt: skip
        self.prompts = widgets.Textarea(
            description="prompts", placeholder="one prompt a line", continuous_update=False, rows=3, style=_LABELS,
            tooltip="Prompts the model answers while it learns, one a line", layout=widgets.Layout(width="60%", min_width="280px"),
        )  # fmt: skip
        self.sample_every = widgets.BoundedIntText(
            value=0, min=0, max=10**9, description="every", tooltip="Steps from one answer to the next; 0 for never", style=_LABELS,
            layout=widgets.Layout(width="130px"), continuous_update=False,
        )  # fmt: skip
        self.max_tokens = widgets.BoundedIntText(
            value=64, min=1, max=10**6, description="tokens", tooltip="Tokens of an answer at most", style=_LABELS,
            layout=widgets.Layout(width="130px"), continuous_update=False,
        )  # fmt: skip
        self.sample_now = _button("Sample now", "Have the prompts answered now", "comment")

    def _make_displays(self) -> None:
        self.progress = widgets.IntProgress(
            min=0, max=1, description="progress", tooltip="Steps taken of all", style=_LABELS, layout=widgets.Layout(width="100%")
        )
        self.status = widgets.HTML(tooltip="Where the run stands")
        self.error = widgets.HTML(tooltip="The last error", layout=widgets.Layout(display="none"))
        size = {"width": f"{WIDTH}px", "height": f"{HEIGHT}px", "min_height": f"{HEIGHT}px"}  # before there is a picture too
        # No tooltip here: with one, ipywidgets 8.1.9 fails to show an image at all. The line above says in words what it shows.
        self.plot = widgets.Image(format="png", layout=widgets.Layout(**size, max_width="100%", object_fit="contain"))
        self.log = widgets.HTML(tooltip="What happened, newest first")
        self.samples = widgets.HTML(tooltip="Answers while learning, newest first")

    def _make_tabs(self, row: widgets.Layout, more: Sequence[tuple[str, widgets.Widget]]) -> widgets.Tab:
        fields = widgets.HBox([self.prompts, self.sample_every, self.max_tokens, self.sample_now], layout=row)
        own = [("Log", scrolled(self.log, "220px"))]
        own.append(("Samples", widgets.VBox([fields, scrolled(self.samples, "220px")])))
        tabs = widgets.Tab([content for _, content in (*own, *more)])
        tabs.titles = [title for title, _ in (*own, *more)]
        return tabs

    def close(self) -> None:
        """Takes every widget away from the front end."""
        for widget in _all_below(self.box):
            widget.close()


def _all_below(widget: widgets.Widget) -> list[widgets.Widget]:
    found = [widget]
    for child in getattr(widget, "children", ()):
        found += _all_below(child)
    return found + [getattr(widget, name) for name in ("layout", "style") if hasattr(widget, name)]
