"""The widgets of the chat panel and how they stand. What they do is said in `chat`."""

from __future__ import annotations

import ipywidgets as widgets

from fulltune_nb.panels.style import styled

_LABELS = {"description_width": "initial"}


def _button(description: str, tooltip: str, icon: str, style: str = "") -> widgets.Button:
    return widgets.Button(description=description, tooltip=tooltip, icon=icon, button_style=style, layout=widgets.Layout(width="auto"))


class ChatControls:
    """Every widget of a panel by name; `box` holds them all."""

    def __init__(self, system: str, max_tokens: int, temperature: float, top_p: float, models: int):
        """
        Args:
            system, max_tokens, temperature, top_p: what the fields hold at first.
            models: how many there are.
        """
        self._make_fields(system, max_tokens, temperature, top_p)
        self._make_prompt()
        self.stop = _button("Stop", "End the answer that is being written; what is there stays", "stop")
        self.regenerate = _button("Regenerate", "Answer the last prompt anew; with temperature 0 the answer is the same", "refresh")
        self.clear = _button("Clear", "Forget the conversation", "trash")
        self.show_transcript = widgets.ToggleButton(
            description="Transcript", tooltip="The conversation as plain text, to select and copy", icon="copy",
            layout=widgets.Layout(width="auto"),
        )  # fmt: skip
        self.transcript = widgets.Textarea(
            description="transcript", tooltip="The conversation as plain text: click into it, then select all and copy", rows=8,
            style=_LABELS,
            layout=widgets.Layout(width="100%", display="none"),
        )  # fmt: skip
        self.log = widgets.HTML(tooltip="The conversation so far")
        self.live = widgets.HTML(tooltip="The answer being written")
        self.status = widgets.HTML(tooltip="What is going on")
        self._lay_out(models)

    def _make_fields(self, system: str, max_tokens: int, temperature: float, top_p: float) -> None:
        def narrow(width: str) -> widgets.Layout:
            return widgets.Layout(width=width)

        self.temperature = widgets.BoundedFloatText(
            value=temperature, min=0.0, max=1e9, step=0.1, description="temperature", style=_LABELS, layout=narrow("160px"),
            tooltip="0: always the likeliest token; 1: as the model's own probabilities say; more: wilder",
        )  # fmt: skip
        self.top_p = widgets.BoundedFloatText(
            value=top_p, min=0.0, max=1.0, step=0.05, description="top-p", style=_LABELS, layout=narrow("120px"),
            tooltip="Draw among the fewest likeliest tokens that hold this much probability; 1: among all",
        )  # fmt: skip
        self.max_tokens = widgets.BoundedIntText(
            value=max_tokens, min=1, max=10**9, description="max tokens", style=_LABELS, layout=narrow("160px"),
            tooltip="Tokens after which an answer ends in any case",
        )  # fmt: skip
        self.system = widgets.Textarea(
            value=system, description="system prompt", placeholder="none", rows=2, continuous_update=False, style=_LABELS,
            tooltip="Put before the conversation, from the next answer on; many models have learned to heed it",
            layout=widgets.Layout(flex="1 1 300px", width="auto"),
        )  # fmt: skip

    def _make_prompt(self) -> None:
        # Not sent letter by letter: while the kernel is busy, letters and Enter would come in another order than typed.
        self.line = widgets.Text(
            placeholder="Ask something; Enter sends", continuous_update=False, layout=widgets.Layout(flex="1 1 300px", width="auto"),
            description="prompt", tooltip="The prompt; Enter sends it", style=_LABELS,
        )  # fmt: skip
        self.lines = widgets.Textarea(
            placeholder="Ask something; the Send button sends", continuous_update=False, rows=4, description="prompt",
            tooltip="The prompt, of several lines; the Send button sends it", style=_LABELS,
            layout=widgets.Layout(flex="1 1 300px", width="auto", display="none"),
        )  # fmt: skip
        self.several_lines = widgets.ToggleButton(
            description="Lines", tooltip="A field for prompts of several lines; Enter then begins a new line", icon="align-left",
            layout=widgets.Layout(width="auto"),
        )  # fmt: skip
        self.send = _button("Send", "Ask the model", "paper-plane", "primary")

    def _lay_out(self, models: int) -> None:
        row = widgets.Layout(flex_flow="row wrap", align_items="center", overflow="visible")
        # In reverse, so that the page stays at the bottom while an answer grows: no script does that here.
        talk = widgets.Box(
            [self.live, self.log], layout=widgets.Layout(display="flex", flex_flow="column-reverse", max_height="460px", overflow="auto")
        )
        for child in talk.children:
            child.layout.flex = "0 0 auto"
            child.layout.width = "auto"
        self.box = widgets.VBox(
            [
                talk,
                self.status,
                widgets.HBox([self.line, self.lines, self.several_lines, self.send], layout=row),
                widgets.HBox([self.stop, self.regenerate, self.clear, self.show_transcript], layout=row),
                widgets.HBox([self.temperature, self.top_p, self.max_tokens, self.system], layout=row),
                self.transcript,
            ],
            layout=widgets.Layout(width="100%", max_width="760px" if models == 1 else "1000px", overflow="visible"),
        )
        styled(self.box)

    @property
    def entered(self) -> widgets.Text | widgets.Textarea:
        """The field that is used for prompts now."""
        return self.lines if self.several_lines.value else self.line

    def swap_fields(self) -> None:
        """Shows the field of one line or that of several; what was typed goes along."""
        shown, hidden = (self.lines, self.line) if self.several_lines.value else (self.line, self.lines)
        if hidden.value:
            shown.value, hidden.value = hidden.value, ""
        shown.layout.display, hidden.layout.display = None, "none"

    def set_transcript(self, text: str | None) -> None:
        """Shows the transcript; None hides it."""
        self.transcript.layout.display = "none" if text is None else None
        self.transcript.value = text or ""
