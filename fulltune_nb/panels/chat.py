"""The chat panel: talk to a model, or to two side by side, also while one of them is being trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fulltune_nb.chat_template import ensure_chat_template
from fulltune_nb.errors import ConfigError, GenerationError
from fulltune_nb.html import NO_MATH, esc, printable
from fulltune_nb.models.generation import Sampling
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.panels.controls import OWN_NUMBERS, ChatControls
from fulltune_nb.panels.conversation import TURNS_SHOWN, Answering, Conversation
from fulltune_nb.panels.loop import running_loop
from fulltune_nb.panels.panel import Panel
from fulltune_nb.training.card import training_of

REDRAW_SECONDS = 0.1  # the answer on the page changes no more often
PRESETS = {"exact": (0.0, 1.0, 0), "balanced": (0.7, 0.9, 0), "creative": (1.0, 0.95, 0)}
"""Temperature, top-p and top-k. Exact takes the likeliest token each time."""
_ELSEWHERE = ("repetition_penalty", "no_repeat_ngram_size", "min_p", "typical_p", "penalty_alpha", "epsilon_cutoff", "eta_cutoff")
"""What a `generation_config.json` may name for drawing, and the panel has no field for."""


class ChatPanel(Panel):
    """A chat with a model, or with two that answer the same prompts side by side. `send` and `await wait()` do it from code.

    Answers are written piece by piece behind the cells, on the main thread. While the model is being trained, training waits between
    two steps until an answer is whole: every word of it comes from the same weights. A step that a cell takes in the midst of an
    answer (`trainer.step()`) changes the rest of it. While a cell blocks, as with `trainer.run()`, nothing is answered.

    To copy the conversation: the Transcript button shows it as plain text to select; `panel.transcript` is the same text. (Only
    JavaScript could put it onto the clipboard.)

    Attributes:
        conversation: `.turns`, each with a `.prompt` and `.answers`.
        notes: what to know about the models, such as a chat template that was put in.
        controls: the widgets by name.
        widget: all of them in a box.
        closed: whether the panel was taken away.
    """

    MADE_BY, ERROR = "ChatPanel(lm)", GenerationError
    MISSING = "What was said after that does not stand here."

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
        alone: bool | None = None,
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
            alone: whether each prompt is asked alone, and not with the conversation so far; the panel has a field for it. None: where the
                rows that a model was trained on have one turn each, which it or the card of its folder knows. Such a model has never
                seen a second turn.

        Raises:
            ConfigError: not language models, twice the same one, a wrong number of names, or `alone` is neither of the three.
            GenerationError: a setting out of range.
        """
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p)  # says what is wrong
        models = _checked_models(lm, other)
        if alone not in (None, True, False):
            raise ConfigError(f"ChatPanel: alone: expected True, False or None, got {alone!r:.80}.")
        self.conversation = Conversation(_checked_names(names, len(models)))
        self.notes = list(dict.fromkeys(note for model in models if (note := ensure_chat_template(model.tokenizer))))
        self._presets = {**PRESETS, **self._own_presets(models)}
        alone = any(training_of(model)[0] for model in models) if alone is None else bool(alone)
        self.controls = ChatControls(len(models), system, sampling, alone, self._presets)
        super().__init__(self.controls.box)
        self.widget.panel = self  # shown without a name of its own, the panel lives as long as its widgets
        self._drawn = 0.0
        self._answering = Answering(models, self.conversation, self._settings, self._changed)
        self._connect()
        self.refresh()

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
        return self._control_error or self._answering.error

    @property
    def transcript(self) -> str:
        """The conversation as plain text."""
        return self.conversation.transcript

    def _end(self) -> None:
        self._answering.post(self._answering.stop)
        # The notebook's list of outputs holds panels for ever. They must not hold models, nor errors, whose tracebacks do.
        self._answering.models, self._answering.error, self._control_error = (), None, None

    def _clear(self) -> None:
        self._answering.clear()
        self.refresh()

    def _settings(self) -> tuple[str, bool, dict[str, Any]]:
        controls = self.controls
        names = ("max_tokens", "temperature", "top_p", "top_k")
        return controls.system.value, controls.alone.value, {name: getattr(controls, name).value for name in names}

    def _own_presets(self, models: Sequence[LanguageModel]) -> dict[str, tuple[float, float, int]]:
        """The sampling that each model's `generation_config.json` asks for, where it does; what of it cannot be had is noted."""
        presets = {}
        for name, model in zip(self.conversation.names, models, strict=True):
            given = getattr(model, "generation_config", None) or {}
            if given.get("do_sample") is not True:
                continue
            values = {key: given[key] for key in ("temperature", "top_p", "top_k") if given.get(key) is not None}
            try:
                own = Sampling(**{"temperature": 1.0, **values})
            except GenerationError as error:
                self.notes.append(f"generation_config.json of {name}: {error} It is no preset here.")
                continue
            presets[f"{name}'s own"] = (own.temperature, own.top_p, own.top_k)
            if left := [key for key in _ELSEWHERE if given.get(key) not in (None, 0, 1)]:
                self.notes.append(f"generation_config.json of {name} has {', '.join(left)} too, which the panel does not apply.")
        return presets

    # -- controls ---------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        controls = self.controls
        self.connect(controls.send, self._send_entered)
        self.connect(controls.stop, self.stop)
        self.connect(controls.regenerate, self.regenerate)
        self.connect(controls.clear, self.clear)
        self.connect(controls.preset, self._preset_chosen)
        for field in (controls.temperature, controls.top_p, controls.top_k, controls.show_transcript):
            self.connect(field, self._entered)
        controls.prompt.on_submit(lambda text: self._post(partial(self._send_text, text)))

    def _post(self, action: Callable[[], Any]) -> None:
        """MLX is for the thread that made the panel."""
        self._answering.post(partial(self._act, action))

    def _send_entered(self) -> None:
        self._send_text(self.controls.prompt.value)

    def _send_text(self, text: str) -> None:
        if not text.strip():
            return
        if self.busy:
            raise GenerationError("An answer is being written. Stop it, or wait for its end; then send again.")
        self.controls.prompt.take(text)
        self.send(text)

    def _preset_chosen(self, name: str) -> None:
        for field, value in zip(self._sampling_fields(), self._presets.get(name, ()), strict=False):
            self.put(field, value)
        self.refresh()

    def _sampling_fields(self) -> tuple[Any, ...]:
        return self.controls.temperature, self.controls.top_p, self.controls.top_k

    def _entered(self, _: Any) -> None:
        self.refresh()

    # -- what is shown --------------------------------------------------------------------------------------------

    def _changed(self, whole_turn: bool) -> None:
        """After a piece of an answer, or when a turn begins or ends."""
        if self.closed:
            return
        if whole_turn:
            self.refresh()
            if not self.busy:
                self._record.renew(self._repr_html_(), repr(self), missing=self.MISSING)
        elif time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._draw_live()

    def refresh(self) -> None:
        """Shows everything as it is now."""
        if self.closed:
            return
        controls, conversation = self.controls, self.conversation
        busy = self.busy
        finished = [turn for turn in conversation.turns if not turn.open]
        hidden = len(finished) - TURNS_SHOWN
        earlier = f'<div class="{NO_MATH}">… {hidden:,} earlier turns not shown</div>' if hidden > 0 else ""
        controls.log.value = earlier + conversation.bubbles(finished[-TURNS_SHOWN:]) if finished else ""
        self._draw_live()
        numbers = tuple(field.value for field in self._sampling_fields())
        self.put(controls.preset, next((name for name, values in self._presets.items() if values == numbers), OWN_NUMBERS))
        controls.stop.disabled = not busy
        controls.regenerate.disabled = busy or not conversation.turns
        controls.send.disabled = busy
        controls.clear.disabled = not conversation.turns
        controls.status.value = self._status_html()
        controls.transcript.layout.display = None if controls.show_transcript.value else "none"
        controls.transcript.value = self.transcript if controls.show_transcript.value else ""

    def _draw_live(self) -> None:
        """The turns that are still open: the one being answered, and those that wait."""
        self._drawn = time.monotonic()
        live = [turn for turn in self.conversation.turns if turn.open]
        self.controls.live.value = self.conversation.bubbles(live) if live else ""

    def _status_html(self) -> str:
        lines = [f"⚠ {esc(self._control_error, 1000)}"] if self._control_error else []
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
        return printable(f"ChatPanel({', '.join(self.conversation.names)}, {len(self.conversation.turns):,} turns)")

    def _repr_html_(self) -> str:
        return self.conversation.to_html()


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
