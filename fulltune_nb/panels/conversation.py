"""A conversation with one model or two: what was asked and answered, and how it looks."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fulltune_nb.errors import FulltuneError, GenerationError
from fulltune_nb.html import NO_MATH, PALETTE, cut, esc, scrolling, table
from fulltune_nb.models.generation import Reading
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.panels.loop import Background, Hold, let_go
from fulltune_nb.training.card import training_of

TURNS_SHOWN = 50
"""Turns on the page; earlier ones are counted."""
CHARACTERS_SHOWN = 20_000
"""Of a text in a bubble."""
_RECORD_CHARACTERS = 4000  # of a text in the table that stays in the notebook

_STATES = {
    "waiting": "waiting",
    "writing": "writing …",
    "done": "",
    "stopped": "stopped before its end",
    "failed": "failed",
}
_OUTGROWN = "Prompt and answer have more tokens together than the model was made for: what follows is often nonsense."
_PRE = (
    "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;margin:2px 0 0 0;padding:0;line-height:1.45;background:none;"
    "color:inherit;border:none;font-family:var(--jp-content-font-family, sans-serif);font-size:var(--jp-content-font-size1, 14px)"
)
_BUBBLE = "padding:6px 10px;border-radius:6px;line-height:1.45;min-width:0"
_WRAPPED = "overflow-wrap:anywhere;white-space:pre-wrap"
_COLOURS = (PALETTE[0], PALETTE[5])  # told apart by their names and places too


@dataclass
class Answer:
    """What one model says to a prompt."""

    text: str = ""
    state: str = "waiting"
    """One of waiting, writing, done, stopped, failed."""
    problem: str = ""
    """Why it failed and what to do."""
    reading: str = ""
    """How far a long prompt is read; empty when it is."""
    step: int = 0
    """Optimizer steps that the model had been trained for; 0: none, or it is not known."""
    notes: list[str] = field(default_factory=list)
    """What the model warned of."""
    ending: str = ""
    """What ended it, where that was not the model."""

    @property
    def open(self) -> bool:
        """Whether more is to come."""
        return self.state in ("waiting", "writing")

    def add(self, piece: str) -> None:
        """More text; or, empty, how far the prompt is read."""
        self.text += piece
        self.reading = f"reading the prompt, {piece.read:,} of {piece.total:,} tokens" if isinstance(piece, Reading) else ""

    @property
    def told(self) -> str:
        """Where it comes from and where it stands; empty where there is nothing to say."""
        state = self.reading if self.state == "writing" and self.reading else _STATES[self.state]
        return ", ".join(part for part in (f"step {self.step:,}" if self.step else "", state, self.ending) if part)

    def look(self, stream: Any) -> None:
        """Takes in what its stream knows besides the text: that it outgrew the model's context, and that it was cut off."""
        if getattr(stream, "outgrown", False) and _OUTGROWN not in self.notes:
            self.notes.append(_OUTGROWN)
        if self.state == "done" and (whole := getattr(stream, "answer", None)) is not None and whole.cut:
            self.ending = f"cut off at max tokens: {len(whole.tokens):,}"


@dataclass
class Turn:
    """A prompt and the answers to it, one for each model."""

    prompt: str
    answers: list[Answer]
    note: str = ""
    """Something to know about how it was answered."""
    alone: bool = False
    """Whether the models read nothing of the turns before it."""

    @property
    def way(self) -> str:
        """How it was asked, in words."""
        return "asked alone" if self.alone else "asked as a conversation"

    @property
    def open(self) -> bool:
        """Whether more is to come."""
        return any(answer.open for answer in self.answers)


@dataclass
class Conversation:
    """Turns, oldest first."""

    names: tuple[str, ...]
    """Of the models."""
    turns: list[Turn] = field(default_factory=list)

    def messages(self, which: int, turn: Turn, system: str = "") -> list[dict[str, str]]:
        """What model `which` is to read before it answers a turn: the turns before it that it has answered, if it is
        not asked alone, and the prompt.

        Args:
            which: number of the model.
            turn: the one to be answered.
            system: the system prompt; "" for none.
        """
        found = [{"role": "system", "content": system}] if system.strip() else []
        for earlier in () if turn.alone else self.turns:
            if earlier is turn:
                break
            if earlier.answers[which].text:
                found.append({"role": "user", "content": earlier.prompt})
                found.append({"role": "assistant", "content": earlier.answers[which].text})
        return [*found, {"role": "user", "content": turn.prompt}]

    @property
    def transcript(self) -> str:
        """The whole as plain text."""
        parts = []
        for turn in self.turns:
            parts.append(f"You{' (asked alone)' if turn.alone else ''}:\n{turn.prompt}")
            for name, answer in zip(self.names, turn.answers, strict=True):
                parts.append(f"{name}{f' ({answer.told})' if answer.told else ''}:\n{answer.text or answer.problem}")
        return "\n\n".join(parts)

    def bubbles(self, turns: Sequence[Turn]) -> str:
        """HTML of some turns."""
        return f'<div class="{NO_MATH}">{"".join(self._turn_html(turn) for turn in turns)}</div>'

    def _turn_html(self, turn: Turn) -> str:
        answers = zip(self.names, turn.answers, _COLOURS, strict=False)
        columns = "".join(_bubble(name, answer, colour) for name, answer, colour in answers)
        note = f'<div style="opacity:0.8;font-size:12px;line-height:1.4">{esc(turn.note)}</div>' if turn.note else ""
        head = f"<b>You</b> <i>({turn.way})</i>"
        you = f'{_BUBBLE};margin:8px 0 6px 12%;border:1px solid {PALETTE[7]};background:{PALETTE[7]}22'
        return (
            f'<div style="{you}">{head}<pre dir="auto" style="{_PRE}">{esc(turn.prompt, CHARACTERS_SHOWN)}</pre></div>'
            f'<div style="display:grid;grid-template-columns:repeat(auto-fit, minmax(220px, 1fr));gap:8px">{columns}</div>{note}'
        )

    def to_html(self) -> str:
        """The latest turns as a table: what stays in the notebook."""
        shown = self.turns[-TURNS_SHOWN:]
        rows = [
            (cut(turn.prompt, _RECORD_CHARACTERS), *map(_cell_text, turn.answers), f"{turn.way}\n{turn.note}".strip()) for turn in shown
        ]
        if not rows:
            return f'<div class="{NO_MATH}">Conversation with {esc(" and ".join(self.names))}: nothing said yet</div>'
        more = f", the last {len(shown)} of {len(self.turns):,} turns" if len(shown) < len(self.turns) else ""
        turns = table(("You", *self.names, ""), rows, f"Conversation{more}", least_width="7em")
        return scrolling(turns, "Conversation")


def _bubble(name: str, answer: Answer, colour: str) -> str:
    head = f"<b>{esc(name)}</b>" + (f" <i>({answer.told})</i>" if answer.told else "")
    empty = "" if answer.open or answer.text or answer.problem else " <i>(an empty answer)</i>"
    text = f'<pre dir="auto" style="{_PRE}">{esc(answer.text, CHARACTERS_SHOWN)}</pre>' if answer.text else ""
    problem = "".join(f'<div style="{_WRAPPED}">⚠ {esc(note, 2000)}</div>' for note in answer.notes)
    if answer.problem:
        problem += f'<div role="alert" style="{_WRAPPED}">⚠ {esc(answer.problem, 2000)}</div>'
    return f'<div style="{_BUBBLE};border-left:4px solid {colour};background:{colour}18">{head}{text}{empty}{problem}</div>'


def _cell_text(answer: Answer) -> str:
    problems = [f"⚠ {cut(text, _RECORD_CHARACTERS)}" for text in (*answer.notes, answer.problem) if text]
    parts = [cut(answer.text, _RECORD_CHARACTERS), *problems, f"({answer.told})" if answer.told else ""]
    return "\n".join(part for part in parts if part)


# -- answering: piece by piece behind the cells of a notebook, or in plain Python while one waits --------------------------

UNEXPECTED = "Something unexpected. `await panel.wait()` raises it with its traceback; Regenerate tries again."


class Answering(Background):
    """Has models answer the turns of a conversation, one turn after the other, all models side by side.

    Attributes:
        models: language models, one for each name of the conversation.
        conversation: what was said.
        error: the last error of an answer, or None.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        conversation: Conversation,
        settings: Callable[[], tuple[str, bool, dict[str, Any]]],
        changed: Callable[[bool], None],
    ):
        """
        Args:
            models: whom to ask.
            conversation: where turns are added.
            settings: gives the system prompt and the settings of `stream_chat`, when an answer begins; between them, whether a prompt
                is asked alone, which is looked at when it comes.
            changed: called after every piece with False, and with True when a turn begins or ends.
        """
        super().__init__()
        self.models = tuple(models)
        self.conversation = conversation
        self.error: BaseException | None = None
        self._settings, self._changed = settings, changed
        self._thread = threading.get_ident()
        self._stopping = False

    def post(self, action: Callable[[], Any]) -> None:
        """Has `action` called on the thread that made this object: at once there, soon from any other."""
        if threading.get_ident() == self._thread:
            action()
        else:
            super().post(action)

    # -- what can be done, on the own thread -----------------------------------------------------------------------

    def ask(self, prompt: str) -> Turn:
        """Adds a turn and sees that it is answered: in the background, or at once where no event loop runs."""
        turn = Turn(prompt, [Answer() for _ in self.models], alone=self._settings()[1])
        self.conversation.turns.append(turn)
        self._begin()
        return turn

    def again(self) -> Turn:
        """Has the last turn answered anew.

        Raises:
            GenerationError: there is none, or it is being answered.
        """
        turns = self.conversation.turns
        if not turns:
            raise GenerationError("Nothing was asked yet, so there is nothing to answer again. Send a prompt first.")
        if self.busy:
            raise GenerationError("An answer is being written. Stop it, or wait for its end.")
        turns[-1].answers, turns[-1].note, turns[-1].alone = [Answer() for _ in self.models], "", self._settings()[1]
        self._begin()
        return turns[-1]

    def stop(self) -> None:
        """Ends the answer that is being written, which keeps its text, and leaves unanswered what waits."""
        self._stopping = True
        for turn in self.conversation.turns:
            for answer in turn.answers:
                if answer.state == "waiting":
                    answer.state = "stopped"

    def interrupt(self) -> None:
        """The notebook's stop button ends an answer too."""
        self.stop()

    def clear(self) -> None:
        """Stops, and forgets the conversation."""
        self.stop()
        self.conversation.turns.clear()
        self.error = None

    async def wait(self) -> None:
        """Returns when everything is answered or stopped. An interrupt meanwhile stops the answer; so does cancelling the wait.

        Raises:
            Exception: the last answer's own error.
        """
        await self._wait_for_task(self.stop)
        if self.error is not None:
            raise self.error

    # -- answering -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.error = None
        self.capture_event_loop()
        if not self.in_event_loop:
            asyncio.run(self._work())
        elif not self.busy:
            self._begin_task(self._work(), "fulltune_nb chat")
        self._changed(True)

    async def _work(self) -> None:
        try:
            while turn := next((turn for turn in self.conversation.turns if turn.open), None):
                self._stopping = False
                await self._answer(turn)
                self._changed(True)
        except asyncio.CancelledError:  # the event loop is closing
            raise
        except BaseException as error:  # a task's exceptions are shown nowhere: kept for `wait` and for the panel
            self.error = error
        finally:
            self._stop_listening()
            self.later(0, lambda: self._changed(True))  # when the task is done

    async def _answer(self, turn: Turn) -> None:
        hold = Hold(model.model for model in self.models)
        try:
            self._listen()
            if hold.running:
                turn.note = "The model is being trained: this is answered at the end of the step under way."
                self._changed(True)
            await hold.ready(lambda: self._stopping)
            turn.note = _training_note(hold)
            if not self._stopping:
                await self._write(turn)
        except KeyboardInterrupt:  # where the watch could not be set, as in a plain script
            if not self.in_event_loop:
                raise
        finally:
            hold.release()
            for answer in turn.answers:
                if answer.open:
                    answer.state = "stopped"

    async def _write(self, turn: Turn) -> None:
        system, _, settings = self._settings()
        streams: dict[int, tuple[Iterator[str], Iterator[str]]] = {}  # and the steps of each, which let go while a prompt is read
        for which, answer in enumerate(turn.answers):
            model, messages = self.models[which], self.conversation.messages(which, turn, system)
            answer.state, answer.step = "writing", training_of(model)[1]
            with self._telling(answer, system), warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                stream = model.stream_chat(messages, **settings)
                streams[which] = stream, getattr(stream, "steps", stream)
                answer.notes = [str(warning.message) for warning in told]
        self._changed(True)
        await let_go()
        try:
            while streams and not self._stopping:
                for which in list(streams):
                    answer, (stream, steps) = turn.answers[which], streams[which]
                    with self._telling(answer, system):
                        piece = next(steps, None)
                        if piece is None:
                            answer.state = "done"
                        else:
                            answer.add(piece)
                        answer.look(stream)
                    if not answer.open:
                        del streams[which]
                self._changed(False)
                self._listen()  # a kernel exchanges the handler whenever a cell begins or ends
                await let_go()
        finally:
            for _, steps in streams.values():
                steps.close()

    @contextmanager
    def _telling(self, answer: Answer, system: str) -> Iterator[None]:
        """Within the block, an error is written into the answer and kept; another model's answer goes on."""
        try:
            yield
        except Exception as error:
            self.error, answer.state = error, "failed"
            if isinstance(error, FulltuneError):
                refused = system.strip() and "chat template" in str(error)
                answer.problem = f"{error}" + (" If it takes no system prompt, leave that empty." if refused else "")
            else:
                answer.problem = f"{type(error).__name__}: {error}. {UNEXPECTED}"


def _training_note(hold: Hold) -> str:
    steps = " and ".join(f"{loop.trainer.step_count:,}" for loop in hold.running)
    return f"Answered with the weights of step {steps}; training waited for the answer." if steps else ""
