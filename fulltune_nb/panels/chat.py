"""The chat panel: talk to a model, or to two side by side, also while one of them is being trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from fulltune_nb.chat_template import ensure_chat_template
from fulltune_nb.errors import ConfigError, GenerationError
from fulltune_nb.html import NO_MATH, esc
from fulltune_nb.models.generation import GenerationSettings
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.panels.conversation import TURNS_SHOWN, Answering, Conversation
from fulltune_nb.panels.loop import running_loop
from fulltune_nb.panels.panel import Showing, close_all, styled

# -- chat_controls: The widgets of the chat panel and how they stand. What they do is said in `chat`

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


# -- chat: The chat panel: talk to a model, or to two side by side, also while one of them is being trained

REDRAW_SECONDS = 0.1  # the answer on the page changes no more often
_ENTER_SECONDS = 0.3  # in which the text that Enter was pressed behind arrives, if it is not there already


class ChatPanel:
    """A chat with a model, or with two that answer the same prompts side by side. `send` and `await wait()` do it from code.

    Answers are written piece by piece behind the cells, on the main thread. While the model is being trained, training waits between
    two steps until an answer is whole: every word of it comes from the same weights. A step that a cell takes in the midst of an
    answer (`trainer.step()`) changes the rest of it. While a cell blocks, as with `trainer.run()`, nothing is answered.

    To copy the conversation: the Transcript button shows it as plain text to select; `panel.transcript` is the same text. (Only
    JavaScript could put it onto the clipboard.)

    Attributes:
        conversation: `.turns`, each with a `.prompt` and `.answers`.
        controls: the widgets by name.
        widget: all of them in a box.
    """

    def __init__(
        self,
        lm: LanguageModel,
        other: LanguageModel | None = None,
        *,
        names: Sequence[str] | None = None,
        system: str = "",
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ):
        """
        Args:
            lm: the model to talk to.
            other: a second one, for comparison: `ChatPanel(base, tuned)`.
            names: what the models are called on the page.
            system: the system prompt; "" for none.
            max_tokens: of an answer at most.
            temperature: 0 takes the likeliest token each time.
            top_p: draw among the fewest likeliest tokens that hold this much probability.

        Raises:
            ConfigError: not language models, twice the same one, or a wrong number of names.
            GenerationError: a setting out of range.
        """
        GenerationSettings(max_tokens=max_tokens, temperature=temperature, top_p=top_p)  # says what is wrong
        models = _checked_models(lm, other)
        self.conversation = Conversation(_checked_names(names, len(models)))
        self.notes = list(dict.fromkeys(note for model in models if (note := ensure_chat_template(model.tokenizer))))
        self.controls = ChatControls(system, max_tokens, temperature, top_p, len(models))
        self.widget = self.controls.box
        self.closed = False
        self._error: Exception | None = None  # of a button
        self._entered = False  # Enter was pressed, and its text may still be on its way
        self._drawn = 0.0
        self._answering = Answering(models, self.conversation, self._settings, self._changed)
        self._showing = Showing(self.widget)
        self._connect()
        self._refresh()

    # -- what can be done -----------------------------------------------------------------------------------------

    def send(self, prompt: str) -> None:
        """Asks; the answer is written in the background, and `await panel.wait()` waits for it. In plain Python it is there when
        this returns.

        Prompts sent meanwhile are answered one after the other.

        Raises:
            GenerationError: an empty prompt, or the panel is closed.
        """
        self._check_open()
        if not isinstance(prompt, str) or not prompt.strip():
            raise GenerationError(f"A prompt is a text with at least one word, found {prompt!r:.80}.")
        self._answering.post(lambda: self._answering.ask(prompt))

    async def wait(self) -> None:
        """Returns when everything is answered or stopped.

        Raises:
            Exception: the last answer's own error.
        """
        await self._answering.wait()

    def stop(self) -> None:
        """Ends the answer that is being written; what is there stays, and prompts that wait are not answered."""
        self._answering.post(self._answering.stop)

    def regenerate(self) -> None:
        """Has the last prompt answered anew.

        Raises:
            GenerationError: nothing was asked, or an answer is being written.
        """
        self._check_open()
        self._answering.post(self._answering.again)

    def clear(self) -> None:
        """Forgets the conversation; an answer that is being written ends."""
        self._answering.post(self._clear)

    @property
    def busy(self) -> bool:
        """Whether an answer is being written or waits for its turn."""
        return self._answering.busy

    @property
    def error(self) -> BaseException | None:
        """What went wrong last, if anything."""
        return self._error or self._answering.error

    @property
    def transcript(self) -> str:
        """The conversation as plain text."""
        return self.conversation.transcript

    def close(self) -> None:
        """Ends the answer that is being written and takes the panel away. The conversation stays in `conversation`."""
        if not self.closed:
            self.closed = True
            self._answering.post(self._answering.stop)
            # The notebook's list of outputs holds panels for ever. They must not hold models, nor errors, whose tracebacks do.
            self._answering.models, self._answering.error, self._error = (), None, None
            close_all(self.widget)

    def _check_open(self) -> None:
        if self.closed:
            raise GenerationError("This panel is closed. Make a new one: ChatPanel(lm).")

    def _clear(self) -> None:
        self._answering.clear()
        self._refresh()

    def _settings(self) -> tuple[str, dict[str, Any]]:
        controls = self.controls
        numbers = {"max_tokens": controls.max_tokens, "temperature": controls.temperature, "top_p": controls.top_p}
        return controls.system.value, {name: field.value for name, field in numbers.items()}

    # -- controls: their callbacks may come on another thread, and only post -----------------------------------------

    def _connect(self) -> None:
        controls = self.controls
        controls.send.on_click(lambda _: self._post(self._send_entered))
        controls.stop.on_click(lambda _: self._post(self.stop))
        controls.regenerate.on_click(lambda _: self._post(self.regenerate))
        controls.clear.on_click(lambda _: self._post(self.clear))
        controls.line.on_msg(lambda _, content, __: content.get("event") == "submit" and self._post(self._enter_pressed))
        controls.line.observe(lambda _: self._post(self._line_changed), "value")
        controls.several_lines.observe(lambda _: self._post(controls.swap_fields), "value")
        controls.show_transcript.observe(lambda _: self._post(self._refresh), "value")

    def _post(self, action: Callable[[], Any]) -> None:
        self._answering.post(lambda: self._act(action))

    def _act(self, action: Callable[[], Any]) -> None:
        """Does what a control asks for, on the main thread; an error is shown in the panel, where it would else be lost."""
        if self.closed:
            return
        self._error = None
        try:
            action()
        except Exception as error:
            self._error = error
        self._refresh()

    def _enter_pressed(self) -> None:
        # A browser tells of Enter before it sends the text, which it does not send again if it has done so before, when the field
        # lost the cursor. While steps are taken, the two can come far apart: look again after some time, twice.
        self._entered = True
        self._answering.later(_ENTER_SECONDS, lambda: self._answering.later(0.05, lambda: self._act(self._line_settled)))

    def _line_changed(self) -> None:
        if self._entered:
            self._line_settled()

    def _line_settled(self) -> None:
        if self._entered:
            self._entered = False
            self._send_entered()

    def _send_entered(self) -> None:
        text = self.controls.entered.value
        if not text.strip():
            return
        if self.busy:
            raise GenerationError("An answer is being written. Stop it, or wait for its end; then send again.")
        self.controls.entered.value = ""
        self.send(text)

    # -- what is shown --------------------------------------------------------------------------------------------

    def _changed(self, whole_turn: bool) -> None:
        """After a piece of an answer, or when a turn begins or ends."""
        if self.closed:
            return
        if whole_turn:
            self._refresh()
            if not self.busy:
                self._showing.renew(self._repr_html_(), repr(self))
        elif time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw_live()

    def _refresh(self) -> None:
        if self.closed:
            return
        controls, conversation = self.controls, self.conversation
        busy = self.busy
        finished = [turn for turn in conversation.turns if not turn.open]
        hidden = len(finished) - TURNS_SHOWN
        earlier = f'<div class="{NO_MATH}">… {hidden:,} earlier turns not shown</div>' if hidden > 0 else ""
        controls.log.value = earlier + conversation.bubbles(finished[-TURNS_SHOWN:]) if finished else ""
        self._draw_live()
        controls.stop.disabled = not busy
        controls.regenerate.disabled = busy or not conversation.turns
        controls.send.disabled = busy
        controls.clear.disabled = not conversation.turns
        controls.status.value = self._status_html()
        controls.set_transcript(self.transcript if controls.show_transcript.value else None)

    def _draw_live(self) -> None:
        """The turns that are still open: the one being answered, and those that wait."""
        self._drawn = time.monotonic()
        live = [turn for turn in self.conversation.turns if turn.open]
        self.controls.live.value = self.conversation.bubbles(live) if live else ""

    def _status_html(self) -> str:
        lines = [f"⚠ {esc(self._error, 1000)}"] if self._error else []
        waiting = sum(turn.open for turn in self.conversation.turns)
        if self.busy:
            lines.append("Answering …" + (f" {waiting - 1:,} more to come" if waiting > 1 else ""))
        for name, model in zip(self.conversation.names, self._answering.models, strict=False):
            if (loop := running_loop(model.model)) is not None:
                at = f"{esc(name)} is being trained (step {loop.trainer.step_count:,} of {loop.trainer.total_steps:,})"
                lines.append(f"{at}: answers are written between two steps, and training waits meanwhile.")
        lines += [esc(note) for note in self.notes]
        return f'<div class="{NO_MATH}" role="status" aria-live="polite" style="line-height:1.4">{"<br>".join(lines)}</div>'

    def __repr__(self) -> str:
        return f"ChatPanel({', '.join(self.conversation.names)}, {len(self.conversation.turns):,} turns)"

    def _repr_html_(self) -> str:
        return self.conversation.to_html()

    def _ipython_display_(self) -> None:
        self._check_open()
        self._showing.show(self, self._repr_html_(), repr(self))


def _checked_models(lm: LanguageModel, other: LanguageModel | None) -> list[LanguageModel]:
    models = [lm] if other is None else [lm, other]
    for model in models:
        if not hasattr(model, "stream_chat"):
            hint = " Pass its .lm." if hasattr(model, "lm") else ""
            raise ConfigError(f"ChatPanel: expected a LanguageModel (ft.load_model), got {type(model).__name__}.{hint}")
    if other is not None and lm.model is other.model:
        raise ConfigError(
            "ChatPanel: both are the same model, so there is nothing to compare. Training changes a model in place: load the base anew"
            " with ft.load_model."
        )
    return models


def _checked_names(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    names = (("Model",) if count == 1 else ("Base", "Tuned")) if names is None else names
    if isinstance(names, str) or len(names) != count or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"ChatPanel: expected {count} name{'s' * (count > 1)}, one for each model, got {names!r}.")
    return tuple(names)
