"""A conversation with one model or two: what was asked and answered, and how it looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fulltune_nb.html import NO_MATH, PALETTE, cut, esc, table

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
_PRE = (
    "white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere;margin:2px 0 0 0;padding:0;line-height:1.45;background:none;"
    "color:inherit;border:none;font-family:var(--jp-content-font-family, sans-serif);font-size:var(--jp-content-font-size1, 14px)"
)
_BUBBLE = "padding:6px 10px;border-radius:6px;line-height:1.45;min-width:0"
_COLOURS = (PALETTE[0], PALETTE[5])  # told apart by their names and places too


@dataclass
class Answer:
    """What one model says to a prompt."""

    text: str = ""
    state: str = "waiting"
    """One of waiting, writing, done, stopped, failed."""
    problem: str = ""
    """Why it failed and what to do."""

    @property
    def open(self) -> bool:
        """Whether more is to come."""
        return self.state in ("waiting", "writing")


@dataclass
class Turn:
    """A prompt and the answers to it, one for each model."""

    prompt: str
    answers: list[Answer]
    note: str = ""
    """Something to know about how it was answered."""

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
        """What model `which` is to read before it answers a turn: the turns before it that it has answered, and the prompt.

        Args:
            which: number of the model.
            turn: the one to be answered.
            system: the system prompt; "" for none.
        """
        found = [{"role": "system", "content": system}] if system.strip() else []
        for earlier in self.turns:
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
            parts.append(f"You:\n{turn.prompt}")
            for name, answer in zip(self.names, turn.answers, strict=True):
                state = _STATES[answer.state]
                parts.append(f"{name}{f' ({state})' if state else ''}:\n{answer.text or answer.problem}")
        return "\n\n".join(parts)

    def bubbles(self, turns: Sequence[Turn]) -> str:
        """HTML of some turns."""
        return f'<div class="{NO_MATH}">{"".join(self._turn_html(turn) for turn in turns)}</div>'

    def _turn_html(self, turn: Turn) -> str:
        answers = zip(self.names, turn.answers, _COLOURS, strict=False)
        columns = "".join(_bubble(name, answer, colour) for name, answer, colour in answers)
        note = f'<div style="opacity:0.8;font-size:12px;line-height:1.4">{esc(turn.note)}</div>' if turn.note else ""
        you = f'{_BUBBLE};margin:8px 0 6px 12%;border:1px solid {PALETTE[7]};background:{PALETTE[7]}22'
        return (
            f'<div style="{you}"><b>You</b><pre dir="auto" style="{_PRE}">{esc(turn.prompt, CHARACTERS_SHOWN)}</pre></div>'
            f'<div style="display:grid;grid-template-columns:repeat(auto-fit, minmax(220px, 1fr));gap:8px">{columns}</div>{note}'
        )

    def to_html(self) -> str:
        """The latest turns as a table: what stays in the notebook."""
        shown = self.turns[-TURNS_SHOWN:]
        rows = [(cut(turn.prompt, _RECORD_CHARACTERS), *(_cell_text(answer) for answer in turn.answers), turn.note) for turn in shown]
        if not rows:
            return f'<div class="{NO_MATH}">Conversation with {esc(" and ".join(self.names))}: nothing said yet</div>'
        more = f", the last {len(shown)} of {len(self.turns):,} turns" if len(shown) < len(self.turns) else ""
        return table(("You", *self.names, ""), rows, f"Conversation{more}")


def _bubble(name: str, answer: Answer, colour: str) -> str:
    state = _STATES[answer.state]
    head = f"<b>{esc(name)}</b>" + (f" <i>({state})</i>" if state else "")
    empty = "" if answer.open or answer.text or answer.problem else " <i>(an empty answer)</i>"
    text = f'<pre dir="auto" style="{_PRE}">{esc(answer.text, CHARACTERS_SHOWN)}</pre>' if answer.text else ""
    problem = ""
    if answer.problem:
        problem = f'<div role="alert" style="overflow-wrap:anywhere;white-space:pre-wrap">⚠ {esc(answer.problem, 2000)}</div>'
    return f'<div style="{_BUBBLE};border-left:4px solid {colour};background:{colour}18">{head}{text}{empty}{problem}</div>'


def _cell_text(answer: Answer) -> str:
    state = _STATES[answer.state]
    problem = f"⚠ {cut(answer.problem, _RECORD_CHARACTERS)}" if answer.problem else ""
    parts = [cut(answer.text, _RECORD_CHARACTERS), problem, f"({state})" if state else ""]
    return "\n".join(part for part in parts if part)
