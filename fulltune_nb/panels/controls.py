"""The widgets of the panels by name and how they stand. What they do is said where the panels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fulltune_nb.errors import optional_import
from fulltune_nb.models.generation import Sampling
from fulltune_nb.panels.prompt import PromptField

with optional_import("A panel", "notebook"):
    import ipywidgets as widgets

OWN_NUMBERS = "the numbers beside"  # no preset


def button(description: str, tooltip: str, icon: str = "", style: str = "", toggles: bool = False) -> Any:
    """A button as wide as its text; one that `toggles` stays pressed until it is pressed again."""
    kind = widgets.ToggleButton if toggles else widgets.Button
    made = kind(description=description, tooltip=tooltip, icon=icon, button_style=style, layout=widgets.Layout(width="auto"))
    made.usual_tooltip = tooltip  # while it is not disabled for a reason, which the tooltip says then
    return made


def field(kind: type[widgets.DOMWidget], description: str, tooltip: str, layout: str | dict[str, str], **settings: Any) -> Any:
    """A control with a label: of some kind, `layout` wide but no wider than its place, with the kind's own settings."""
    placed = widgets.Layout(max_width="calc(100% - 4px)", **({"width": layout} if isinstance(layout, str) else layout))  # 4px: its margins
    made = kind(description=description, tooltip=tooltip, style={"description_width": "initial"}, layout=placed, **settings)
    made.usual_tooltip = tooltip  # as of a button
    return made


def row(*children: widgets.Widget) -> widgets.HBox:
    """Controls beside one another; a narrow page breaks the row."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center", overflow="visible"))


def column(*children: widgets.Widget, max_width: int) -> widgets.VBox:
    """All widgets of a panel, above one another; `max_width` in pixels."""
    return widgets.VBox(children, layout=widgets.Layout(width="100%", max_width=f"{max_width}px", overflow="visible"))


def scrolled(child: widgets.HTML, height: str = "420px") -> widgets.Box:
    """A box with a scroll bar where it is needed; what is in it has the keyboard's focus, which ipywidgets 8.1 gives no box."""
    child.tabbable = True
    # No tooltip here: with one, ipywidgets 8.1.9 fails to show a box at all. What is in it has one.
    return widgets.Box([child], layout=widgets.Layout(max_height=height, overflow="auto", display="block"))


class TrainControls:
    """Every widget of a panel by name; `box` holds them all.

    Args:
        splits: names of what can be evaluated.
        can_save: whether the trainer has a place for checkpoints.
        chart: the live chart.
    """

    def __init__(self, splits: Sequence[str], can_save: bool, chart: widgets.DOMWidget):
        self.chart = chart
        self._make_buttons(can_save)
        self._make_fields(splits)
        self._make_displays()
        samples = row(self.prompts, self.sample_every, self.max_tokens, self.sample_now)
        self.tabs = widgets.Tab([scrolled(self.log, "220px"), widgets.VBox([samples, scrolled(self.samples, "320px")])])
        self.tabs.titles = ("Log", "Samples")
        self.box = column(
            row(self.run, self.pause, self.step, self.step_count, self.step_n, self.stop, self.train_on),
            row(self.split, self.evaluate, self.save, self.learning_rate),
            self.progress,
            self.status,
            self.error,
            self.chart,
            self.tabs,
            max_width=900,
        )
        self.box.add_class("fulltune-panel")

    def _make_buttons(self, can_save: bool) -> None:
        self.run = button("Run", "Train to the end of the run", "play", "primary")
        self.pause = button("Pause", "Pause after the step under way; Run goes on from there", "pause")
        self.step = button("Step", "Take one optimizer step", "step-forward")
        self.step_n = button("Step N", "Take the number of steps given beside", "fast-forward")
        self.evaluate = button("Evaluate", "Loss and perplexity of the chosen split, all of it, now", "check")
        where = "Write a checkpoint into the run directory" if can_save else "Nowhere to save: make the trainer with run_dir='runs/a'"
        self.save = button("Save", where, "save")
        self.save.disabled = not can_save
        more = ", and write a checkpoint" if can_save else ""
        self.stop = button("Stop", f"End this run after the step under way{more}; Run would still go on from there", "stop")
        where = ", and a run folder beside this one" if can_save else ""
        self.train_on = button("Train on", f"Go on from the end of this run, with a copy of the model{where}", "forward", "primary")
        self.train_on.layout.display = "none"  # until the run is done
        self.sample_now = button("Sample now", "Have the prompts answered now", "comment")

    def allow(self, reasons: Mapping[str, str]) -> None:
        """Disables the buttons that have a reason, which their tooltip says then; enables the others that are named."""
        for name, reason in reasons.items():
            widget = getattr(self, name)
            widget.disabled, widget.tooltip = bool(reason), reason or widget.usual_tooltip

    def _make_fields(self, splits: Sequence[str]) -> None:
        chosen = "valid" if "valid" in splits else splits[0]
        self.split = field(widgets.Dropdown, "split", "What Evaluate looks at", "130px", options=list(splits), value=chosen)
        number, whenever = widgets.BoundedIntText, {"continuous_update": False}
        self.step_count = field(number, "N", "Steps that Step N takes", "110px", value=10, min=1, max=10**9)
        self.learning_rate = field(
            widgets.FloatText, "peak learning rate", "Highest rate of the schedule, the config's learning_rate; to be changed while paused",
            "250px", step=None, **whenever,
        )  # fmt: skip
        tooltip = "Prompts the model answers while it learns, one a line; ⏎ stands for a line break within one"
        self.prompts = field(
            widgets.Textarea, "prompts", tooltip, {"width": "60%", "min_width": "min(280px, 100% - 4px)"},
            placeholder="one prompt a line; add one by a new line", rows=3, **whenever,
        )  # fmt: skip
        self.sample_every = field(number, "every", tooltip, "130px", value=0, min=0, max=10**9, **whenever)
        self.max_tokens = field(number, "tokens", "Tokens of an answer at most", "130px", value=64, min=1, max=10**6, **whenever)

    def _make_displays(self) -> None:
        self.progress = field(widgets.IntProgress, "progress", "Steps taken of all", "100%", min=0, max=1)
        self.status = widgets.HTML(tooltip="Where the run stands")
        self.error = widgets.HTML(tooltip="The last error", layout=widgets.Layout(display="none"))
        self.log = widgets.HTML(tooltip="What happened, newest first")
        self.samples = widgets.HTML(tooltip="Answers while learning: a row for each prompt, a column for each step, newest first")

    def add_tab(self, title: str, content: widgets.Widget) -> None:
        """Puts a further tab behind those there are."""
        titles = self.tabs.titles
        self.tabs.children = (*self.tabs.children, content)
        self.tabs.titles = (*titles, title)


class DataControls:
    """Every widget of a data panel by name; `box` holds them all.

    Args:
        splits: names of the splits.
        filters: which rows there are to choose from.
    """

    def __init__(self, splits: Sequence[str], filters: Sequence[str]):
        self.split = field(widgets.Dropdown, "split", "Which split to look at", "130px", options=splits)
        self.filter = field(widgets.Dropdown, "rows", "Which of its rows to go through", "210px", options=filters)
        tooltip = "Rows whose text has this in it, upper and lower case being the same; Enter searches, empty ends the search"
        self.search = field(widgets.Text, "search", tooltip, "280px", placeholder="text, then Enter", continuous_update=False)
        self.all_rows = button("All rows", "End filter and search", "times")
        self.previous = button("Previous", "The row before, of those chosen", "chevron-left")
        self.next = button("Next", "The next row, of those chosen", "chevron-right")
        self.index = field(widgets.BoundedIntText, "index", "Go to this row, as in data.train[index]", "130px", min=0, max=0)
        self.status = widgets.HTML(tooltip="Where this row stands")
        self.lens = widgets.HTML(tooltip="The row, token by token")
        self.lengths = widgets.HTML(tooltip="Lengths in a picture and in words")
        self.checks = widgets.HTML(tooltip="What was found in the data set")
        browse = widgets.VBox([row(self.previous, self.next, self.index, self.status), scrolled(self.lens)])
        self.tabs = widgets.Tab([browse, self.lengths, scrolled(self.checks)])
        self.tabs.titles = ("Rows", "Lengths", "Checks")
        self.box = column(row(self.split, self.filter, self.search, self.all_rows), self.tabs, max_width=900)


class ChatControls:
    """Every widget of a chat panel by name; `box` holds them all.

    Args:
        models: how many there are.
        system, sampling, alone: what the fields hold at first.
        presets: name -> temperature, top-p, top-k.
    """

    def __init__(self, models: int, system: str, sampling: Sampling, alone: bool, presets: Mapping[str, tuple[float, float, int]]):
        self._make_settings(system, sampling, presets)
        # Not a field of ipywidgets: none of several lines tells of Enter.
        self.prompt = PromptField(
            description="prompt", placeholder="Ask something; Enter sends, Shift+Enter begins a new line",
            tooltip="The prompt; Enter sends it, Shift+Enter begins a new line", layout=widgets.Layout(flex="1 1 300px", width="auto"),
        )  # fmt: skip
        self.send = button("Send", "Ask the model", "paper-plane", "primary")
        tooltip = "What the model reads before an answer: this prompt, or every turn above it too; the system prompt in either case"
        ways = [("each prompt alone", True), ("as a conversation", False)]
        self.alone = field(widgets.Dropdown, "ask", tooltip, "220px", options=ways, value=alone)
        self.stop = button("Stop", "End the answer that is being written; what is there stays", "stop")
        self.regenerate = button("Regenerate", "Answer the last prompt anew; with temperature 0 the answer is the same", "refresh")
        self.clear = button("Clear", "Forget the conversation", "trash")
        self.show_transcript = button("Transcript", "The conversation as plain text, to select and copy", "copy", toggles=True)
        tooltip = "The conversation as plain text: click into it, then select all and copy"
        self.transcript = field(widgets.Textarea, "transcript", tooltip, {"width": "100%", "display": "none"}, rows=8)
        self.log = widgets.HTML(tooltip="The conversation so far", tabbable=True, layout=widgets.Layout(flex="0 0 auto", width="auto"))
        self.live = widgets.HTML(tooltip="The answer being written", layout=widgets.Layout(flex="0 0 auto", width="auto"))
        self.status = widgets.HTML(tooltip="What is going on")
        # In reverse, so that the page stays at the bottom while an answer grows: no script does that here.
        talk = {"display": "flex", "flex_flow": "column-reverse", "max_height": "460px", "overflow": "auto"}
        self.box = column(
            widgets.Box([self.live, self.log], layout=widgets.Layout(**talk)),
            self.status,
            row(self.prompt, self.send),
            row(self.alone, self.stop, self.regenerate, self.clear, self.show_transcript),
            row(self.preset, self.temperature, self.top_p, self.top_k, self.max_tokens, self.system),
            self.transcript,
            max_width=760 if models == 1 else 1000,
        )

    def _make_settings(self, system: str, sampling: Sampling, presets: Mapping[str, tuple[float, float, int]]) -> None:
        tooltip = "Fills in temperature, top-p and top-k"
        self.preset = field(widgets.Dropdown, "sampling", tooltip, "250px", options=[*presets, OWN_NUMBERS], value=OWN_NUMBERS)
        number, whole = widgets.BoundedFloatText, widgets.BoundedIntText
        tooltip = "0: always the likeliest token; 1: as the model's own probabilities say; more: wilder"
        self.temperature = field(number, "temperature", tooltip, "160px", value=sampling.temperature, min=0.0, max=1e9, step=0.1)
        tooltip = "Draw among the fewest likeliest tokens that hold this much probability; 1: among all"
        self.top_p = field(number, "top-p", tooltip, "120px", value=sampling.top_p, min=0.0, max=1.0, step=0.05)
        self.top_k = field(whole, "top-k", "Draw among this many likeliest tokens; 0: among all", "120px", value=0, min=0, max=10**9)
        tooltip = "Tokens after which an answer ends in any case"
        self.max_tokens = field(whole, "max tokens", tooltip, "160px", value=sampling.max_tokens, min=1, max=10**9)
        self.system = field(
            widgets.Textarea, "system prompt", "Put before the conversation, from the next answer on; many models have learned to heed it",
            {"flex": "1 1 300px", "width": "auto"}, value=system, placeholder="none", rows=2, continuous_update=False,
        )  # fmt: skip
