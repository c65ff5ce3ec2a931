"""A Modelfile for Ollama: the chat template in Go's language, and the texts that end an answer.

Ollama does not run a model's own template. What a template writes around messages is found by rendering marked conversations, written in
Go's language, and compared with the template's own text of other conversations.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fulltune_nb.chat_template import ChatRenderer, LimitReached, TemplateRefused, writes_date
from fulltune_nb.html import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM, _USER, _ANSWER, _AGAIN = "SYSTEM-7c31", "USER-7c31", "ANSWER-7c31", "AGAIN-7c31"
_TALKS = ("u", "su", "uau", "suau", "uauau")  # the roles of conversations that are compared, by their first letters
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
_UNSAYABLE = ('"""', "{{", "}}")  # what would end a text of a Modelfile, or begin an action of Go's


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the contents of messages, as texts.

    Attributes:
        begin: before everything, where there is no system message.
        begin_with_system: before everything, where there is one.
        around: role -> what stands before and behind a message's content.
        end: behind the last user's content, up to where the answer begins.
    """

    begin: str
    begin_with_system: str
    around: Mapping[str, tuple[str, str]]
    end: str

    def text(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as Ollama makes it of `go`."""
        has_system = any(message["role"] == "system" for message in messages)
        parts = [self.begin_with_system if has_system else self.begin]
        for message in messages:
            before, behind = self.around[message["role"]]
            parts += [before, message["content"], behind]
        return "".join([*parts, self.end])

    def go(self) -> str:
        """The same in the language of Go's text/template, over Ollama's `.System` and `.Messages`."""
        if self.begin == self.begin_with_system:
            parts = [self.begin]
        else:
            parts = ["{{ if .System }}", self.begin_with_system, "{{ else }}", self.begin, "{{ end }}"]
        parts.append("{{ range .Messages }}")
        for role, (before, behind) in self.around.items():
            parts += ['{{ if eq .Role "', role, '" }}', before, "{{ .Content }}", behind, "{{ end }}"]
        return "".join([*parts, "{{ end }}", self.end])


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """What a tokenizer's chat template writes, without the BOS that its readers put in front; None where Go's language cannot say it so."""
    renderer = ChatRenderer(tokenizer)
    bos = tokenizer.bos_token or ""
    adds_bos = bool(bos) and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]

    def rendered(letters: str, contents: Sequence[str]) -> str:
        messages = [{"role": _ROLES[letter], "content": content} for letter, content in zip(letters, contents, strict=True)]
        text = renderer.render(messages, add_generation_prompt=True)
        return text.removeprefix(bos) if adds_bos else text

    try:
        turns = _found(rendered)
        for letters in _TALKS if turns else ():
            if "s" in letters and "system" not in turns.around:
                continue
            contents = [f"{letter} number {place}?" for place, letter in enumerate(letters)]
            messages = [{"role": _ROLES[letter], "content": content} for letter, content in zip(letters, contents, strict=True)]
            if turns.text(messages) != rendered(letters, contents):
                return None
    except (TemplateRefused, LimitReached):
        return None
    texts = [] if turns is None else [turns.begin, turns.begin_with_system, turns.end, *(t for pair in turns.around.values() for t in pair)]
    unsayable = any(mark in text for mark in _UNSAYABLE for text in texts) or any(text.endswith("{") for text in texts)  # {{{ is no action
    return None if unsayable else turns


def _found(rendered) -> Turns | None:
    """From conversations with marked contents: `rendered(letters of the roles, contents)`."""
    alone = _between(rendered("u", [_USER]), [_USER])
    longer = _between(rendered("uau", [_USER, _ANSWER, _AGAIN]), [_USER, _ANSWER, _AGAIN])
    try:
        whole = _between(rendered("su", [_SYSTEM, _USER]), [_SYSTEM, _USER])
    except TemplateRefused:  # a template that knows no system messages
        whole = None
    if alone is None or longer is None:
        return None
    starts = [alone[0], longer[2], *([whole[1]] if whole else [])]  # all that may stand before a user's content
    user = os.path.commonprefix([text[::-1] for text in starts])[::-1]
    begin = alone[0].removesuffix(user)
    around = {"user": (user, ""), "assistant": (longer[1], longer[2].removesuffix(user))}
    if whole is None:
        return Turns(begin, begin, around, alone[1])
    shared = begin if whole[0].startswith(begin) else ""
    around = {"system": (whole[0].removeprefix(shared), whole[1].removesuffix(user)), **around}
    return Turns(begin, shared, around, alone[1])


def _between(text: str, marks: Sequence[str]) -> list[str] | None:
    """The texts around marks that stand in it once each and in this order; None where they do not."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            return None
        parts.append(before)
    return [*parts, text]


def modelfile(weights: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> str:
    """The text of a Modelfile.

    A template that Go's language cannot say so is left out, and a warning tells: Ollama then uses what it recognizes in the GGUF. Where
    a template writes the date, a warning tells that it is that of today.

    Args:
        weights: the name of the GGUF file beside it.
        tokenizer: its chat template is used, where it has one; without one Ollama gives the model the prompt as it is.
        stops: texts that end an answer.
    """
    lines = [f"FROM ./{weights}"]
    turns = turns_of(tokenizer) if tokenizer.chat_template else None
    if turns is not None:
        lines.append(f'TEMPLATE """{turns.go()}"""')
        if writes_date(tokenizer):
            warnings.warn("The chat template writes the date: the Modelfile has that of today, and keeps it.", stacklevel=2)
    elif tokenizer.chat_template:
        warnings.warn(
            "The chat template could not be said in the language of Ollama's templates: the Modelfile has none, so that Ollama uses the one"
            " that it recognizes in the GGUF, if any. Compare an answer with lm.chat before you use it.",
            stacklevel=2,
        )
    for stop in stops:
        if not stop or any(mark in stop for mark in _UNSAYABLE):
            warnings.warn(printable(f"The stop {stop!r} cannot stand in a Modelfile and was left out."), stacklevel=2)
            continue
        quotes = '"""' if '"' in stop or "\n" in stop else '"'
        lines.append(f"PARAMETER stop {quotes}{stop}{quotes}")
    return "\n".join(lines) + "\n"
