"""In which form a chat template takes what it writes: content as a text or as parts, a call's arguments as an object or as JSON text.

No template says so. Small conversations with marked words are rendered, and the words are looked for in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from fulltune_nb.chat_template import ChatRenderer, TemplateRefused

# In no text by chance; a template that trims or capitalizes leaves them as they are.
_FIRST, _SECOND, _KEY = "mark-7c31", "mark-9d52", "key_4b17"
_ARGUMENTS = {_KEY: _FIRST}
_NAME, _ID = "lookup", "call00001"  # Mistral's templates want ids of nine letters and digits
_PARAMETERS = {"type": "object", "properties": {_KEY: {"type": "string", "description": "What to look for."}}, "required": [_KEY]}
_TOOLS = [{"type": "function", "function": {"name": _NAME, "description": "Looks something up.", "parameters": _PARAMETERS}}]
_IN_A_PART = re.compile(r"""["']text["']\s*:\s*["']$""")  # what stands before a word where the part itself was written out

MOST_KNOWN = 64
"""Answers that are looked for: rows may have as many roles as there are rows, and an answer takes milliseconds."""

TEXT, PART, PARTS = "text", "one part", "parts"
OBJECT, EITHER = "object", "either"


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


class TemplateForms:
    """What the chat template of a tokenizer takes. Nothing is rendered before it is asked, and nothing twice.

    All methods may raise `LimitReached`. A tokenizer without a template is to get ChatML, which takes texts.
    """

    def __init__(self, tokenizer):
        self._renderer = ChatRenderer(tokenizer) if tokenizer.chat_template else None
        self._known: dict[tuple, Any] = {}

    def content(self, role: str, in_parts: bool) -> str:
        """The form to give a role's content in, by the one it has: `TEXT`, `PART` (a list of one) or `PARTS`.

        The form that it has comes first, if the template writes its words and nothing of the form; where it takes none, `TEXT`.
        """
        key = ("content", role, in_parts)
        if self._renderer is None or (len(self._known) >= MOST_KNOWN and key not in self._known):
            return TEXT
        order = (PARTS, TEXT, PART) if in_parts else (TEXT, PART)
        return self._once(key, lambda: next((form for form in order if self._takes(role, form)), TEXT))

    def arguments(self, with_tools: bool) -> str | None:
        """The form to give a call's arguments in: `OBJECT`, `TEXT` (of JSON), `EITHER` where both become the same; None: as it is.

        An object comes first. The template does not take one where it refuses it or writes it as Python does, in single quotes.
        """
        return self._once(("arguments", with_tools), lambda: self._arguments(with_tools)) if self._renderer else None

    def call_needs_content(self, with_tools: bool) -> bool:
        """Whether the template writes calls of a message with empty content, but not of one without."""

        def look() -> bool:
            arguments = json.dumps(_ARGUMENTS) if self.arguments(with_tools) == TEXT else _ARGUMENTS
            bare, empty = (self._call(content, arguments, with_tools) for content in ({}, {"content": ""}))
            return _FIRST not in bare and _FIRST in empty

        return self._once(("call", with_tools), look) if self._renderer else False

    def _once(self, key: tuple, find: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]

    def _takes(self, role: str, form: str) -> bool:
        """Whether the template writes two words of that role, be the content of the other roles texts or parts."""
        if form == PARTS:
            content, between = [text_part(_FIRST), text_part(_SECOND)], r"(?s:.{0,20})"
        else:
            content, between = _FIRST + _SECOND, ""
            content = [text_part(content)] if form == PART else content
        for in_parts in (False, True):
            text = self._render(self._conversation(role, content, in_parts))
            found = re.search(_FIRST + between + _SECOND, text)
            places = [found.start(), found.end() - len(_SECOND)] if found else []
            if found and not any(_IN_A_PART.search(text, max(0, place - 20), place) for place in places):
                return True
        return False

    def _conversation(self, role: str, content: Any, in_parts: bool) -> list[dict[str, Any]]:
        """A short conversation in which a message of that role has the content, and the others have theirs as texts or as parts."""
        question, answer = ([text_part(text)] if in_parts else text for text in ("Is it?", "It is."))
        user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        own = {"role": role, "content": content}
        if role == "user":
            return [own, assistant]
        if role == "assistant":
            return [user, own]
        if role != "tool":
            return [own, user, assistant]
        arguments = json.dumps(_ARGUMENTS) if self.arguments(with_tools=False) == TEXT else _ARGUMENTS
        call = {"role": "assistant", "content": "", "tool_calls": _calls(arguments)}
        return [user, call, {**own, "name": _NAME, "tool_call_id": _ID}, assistant]

    def _arguments(self, with_tools: bool) -> str | None:
        as_text = json.dumps(_ARGUMENTS)
        for content in ({"content": ""}, {}, {"content": "Let us see."}):
            of_object, of_text = (self._call(content, arguments, with_tools) for arguments in (_ARGUMENTS, as_text))
            if _FIRST in of_object and _KEY in of_object and str(_ARGUMENTS) not in of_object:
                return EITHER if of_object == of_text else OBJECT
            if as_text in of_text:
                return TEXT
        return None

    def _call(self, content: dict[str, str], arguments: Any, with_tools: bool) -> str:
        message = {"role": "assistant", **content, "tool_calls": _calls(arguments)}
        return self._render([{"role": "user", "content": "Is it?"}, message], _TOOLS if with_tools else None)

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> str:
        try:
            return self._renderer.render(messages, tools)
        except TemplateRefused:
            return ""


def _calls(arguments: Any) -> list[dict[str, Any]]:
    return [{"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": arguments}}]
