"""Messages and tools as people have them, turned into what the chat template takes.

    {"from": "gpt", "value": ...}                               ShareGPT's names -> role and content
    "[{...}]"                                                   JSON text: messages, tools, tool calls, functions -> parsed
    {"function": {"name": ..., "arguments": "{...}"}}           arguments as JSON text -> an object, where the template takes one
    {"content": [{"type": "text", "text": ...}, ...]}           parts -> a text, where the template takes texts
    {"function_call": {...}}, {"role": "function"}              OpenAI's older form -> tool_calls, tool

Text that is written twice in JSON would be trained with backslashes before its quotes, and parts as Python writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fulltune_nb.chat_template import ChatRenderer, TemplateRefused
from fulltune_nb.data.rows import RowError, Tally, kind
from fulltune_nb.files import KeyTwice, no_key_twice

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
    "system": "system",
}
"""ShareGPT's `from` -> role."""
LOOKS_LIKE_DATA = frozenset(
    "system system_prompt history input context instruction output question answer response query prompt completion text messages"
    " conversations conversation chat dialogue dialog turns tools functions function_call documents image images video videos audio audios"
    " chosen rejected reasoning reasoning_content thinking rationale solution weight chat_template_kwargs".split()
)
"""Keys that hold data elsewhere: where nothing reads one, that is told. Of other keys (id, source, score) nothing is said."""

_SAY_WHAT_IS_TRAINED = frozenset("training trainable loss loss_weight loss_mask mask masked ignore label".split())
_PLAIN = {"role", "content"}
_TEXT_TYPES = ("text", "input_text", "output_text")


def parsed(value: Any, where: str, expected: str) -> Any:
    """The value of a JSON text; any other value is itself.

    Raises:
        RowError: it is a text and no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=no_key_twice)
    except json.JSONDecodeError as error:
        near = value[max(0, error.pos - 10) : error.pos + 20]
        reason = f"{error.msg} at character {error.pos + 1}, near {near!r}"
    except (KeyTwice, ValueError, RecursionError) as error:
        reason = str(error)[:200]
    raise RowError(f"{where!r} is a string, expected {expected}, or JSON text of it; as JSON: {reason}")


def holds_messages(value: Any) -> bool:
    """Whether a text is JSON of a list of messages, as CSV has them."""
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{", value) or '"role"' not in value:
        return False
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return all(isinstance(message, dict) and "role" in message for message in messages)


class MessageConformer:
    """Turns messages and tools; what it does is counted in the tally. What it does not know it leaves, for `row_problem` to tell."""

    def __init__(self, tokenizer, tally: Tally):
        self._tokenizer = tokenizer
        self._forms = TemplateForms(tokenizer)
        self._tally = tally
        self._with_tools = False
        self._text_stays: dict[Any, bool] = {}  # role -> whether its content may stay a string

    def messages(self, value: Any, key: str, with_tools: bool) -> Any:
        """A row's messages; the same object where nothing is to be done.

        Args:
            key: where they stand in the row.
            with_tools: whether the row has tools: some templates write calls only then.

        Raises:
            RowError: JSON text or a role that cannot be read, or a part that is no text.
        """
        self._with_tools = with_tools
        if isinstance(value, str):
            value = parsed(value, key, "a list of messages")
            self._tally.add(f"with {key!r} as JSON text: parsed")
        if isinstance(value, Mapping) and value.keys() in ({"role", "content"}, {"from", "value"}):
            value = _by_message(value)
            self._tally.add(f"with {key!r} as an object of lists: read as a list of messages")
        if not isinstance(value, (list, tuple)):
            return value
        turned = [self._message(message, key, i) for i, message in enumerate(value)]
        return value if all(new is old for new, old in zip(turned, value, strict=True)) else turned

    def _message(self, message: Any, key: str, number: int) -> Any:
        if not isinstance(message, Mapping):
            return message
        role, content = message.get("role"), message.get("content")
        if message.keys() == _PLAIN and isinstance(content, str) and isinstance(role, str) and self._stays(role):
            return message
        where = f"{key}[{number}]"
        new = dict(message)
        if "role" not in new and "from" in new and "value" in new:
            _rename(new, where)
        if isinstance(new.get("function_call"), Mapping) and not new.get("tool_calls"):
            new["tool_calls"] = [_wrapped(new.pop("function_call"))]
            new["role"] = new.get("role", "assistant")
            self._tally.add("with 'function_call' (OpenAI's older form): read as tool calls")
        if new.get("role") == "function" and "name" in new:
            new["role"] = "tool"
        if new.get("tool_calls"):
            new["tool_calls"] = self._calls(new["tool_calls"], f"{where}.tool_calls")
        self._put_content(new, where)
        self._name_unread(new)
        return message if new == message else new

    def takes_text(self) -> bool:
        """Whether the template takes content as text from a user and an assistant."""
        return self._stays("user") and self._stays("assistant")

    def _stays(self, role: str) -> bool:
        if role not in self._text_stays:
            self._text_stays[role] = self._forms.content(role, in_parts=False) == TEXT
        return self._text_stays[role]

    # ---- content

    def _put_content(self, message: dict[str, Any], where: str) -> None:
        """Content in the form that the template takes from this role."""
        content, role = message.get("content"), message.get("role")
        if not isinstance(role, str):
            return
        if content is None:
            if message.get("tool_calls") and self._forms.call_needs_content(self._with_tools):
                message["content"] = ""
        elif isinstance(content, str) and not self._stays(role):
            message["content"] = [text_part(content)]
            self._tally.add("with content as text: given in parts, which the chat template takes")
        elif isinstance(content, (list, tuple)):
            texts = [_text_of(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
            form = self._forms.content(role, in_parts=True)
            if form == PARTS:
                message["content"] = [text_part(text) for text in texts]
                self._tally.add("with content in parts: given so, as the chat template takes it")
            else:
                message["content"] = "".join(texts) if form == TEXT else [text_part("".join(texts))]
                self._tally.add("with content in parts: their texts are joined")

    def _name_unread(self, message: dict[str, Any]) -> None:
        """Counts pictures, documents and the like that stand beside the content, and that the template never names; and what other
        trainers read in place of `weight` and `train`."""
        for key in message.keys() - _PLAIN:
            value = message[key]
            is_data = key in LOOKS_LIKE_DATA and isinstance(value, (list, dict)) and value
            if (is_data or (key in _SAY_WHAT_IS_TRAINED and value is not None)) and key not in str(self._tokenizer.chat_template):
                self._tally.unread(f"messages[].{key}")

    # ---- tool calls and tools

    def _calls(self, calls: Any, where: str) -> Any:
        if isinstance(calls, str):
            calls = parsed(calls, where, "a list of calls")
            self._tally.add("with 'tool_calls' as JSON text: parsed")
        return [self._call(call, f"{where}[{i}]") for i, call in enumerate(calls)] if isinstance(calls, (list, tuple)) else calls

    def _call(self, call: Any, where: str) -> Any:
        call = self._object(call, where, "a call")
        if not isinstance(call, Mapping):
            return call
        if "function" in call:
            function = self._object(call["function"], f"{where}.function", "an object with name and arguments")
            return {**call, "function": self._with_arguments(function, f"{where}.function")}
        return self._with_arguments(call, where)

    def _with_arguments(self, function: Any, where: str) -> Any:
        if not isinstance(function, Mapping) or "arguments" not in function:
            return function
        return {**function, "arguments": self._arguments(function["arguments"], f"{where}.arguments")}

    def _arguments(self, arguments: Any, where: str) -> Any:
        form = self._forms.arguments(self._with_tools)
        if isinstance(arguments, str):
            found = parsed(arguments, where, "an object") if arguments.strip() else {}
            if form != OBJECT:
                return arguments
            if not isinstance(found, dict):
                raise RowError(f"{where!r} is JSON text of {kind(found)}, expected of an object")
            self._tally.add("with a call's arguments as JSON text: parsed")
            return found
        if isinstance(arguments, Mapping) and None in arguments.values():
            self._tally.add(
                "with null as a call's argument, which is written. Where it stands for no argument, as in rows that were taken out of a"
                " table, give the table itself, a Dataset or a Parquet file"
            )
        if isinstance(arguments, Mapping) and form == TEXT:
            self._tally.add("with a call's arguments as an object: given as JSON text, which the chat template takes")
            return _json_text(arguments, where)
        return arguments

    def tools(self, row: Mapping[str, Any], are_bare: bool = False) -> Any:
        """A row's tools, parsed where they are JSON text; the same object where nothing is to be done.

        Args:
            are_bare: the row's form has functions for tools, which are wrapped as OpenAI does.

        Raises:
            RowError: JSON text that cannot be read.
        """
        key = "functions" if row.get("tools") is None else "tools"
        tools = row.get(key)
        if isinstance(tools, str):
            if not tools.strip():
                return None
            tools = parsed(tools, key, "a list of tool descriptions")
            self._tally.add(f"with {key!r} as JSON text: parsed")
        if key == "functions" and isinstance(tools, list):
            self._tally.add("with 'functions' (OpenAI's older form): read as tools")
            tools = [_wrapped(function) for function in tools]
        if not isinstance(tools, (list, tuple)):
            return tools
        turned = [self._tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
        if are_bare:
            turned = [_wrapped(tool) for tool in turned]
        return tools if all(new is old for new, old in zip(turned, tools, strict=True)) else turned

    def _tool(self, tool: Any, where: str) -> Any:
        """A tool, each of whose texts that should be an object is parsed."""
        turned = self._object(tool, where, "a tool description")
        for key, turn in (("function", self._tool), ("parameters", self._object)):
            if isinstance(turned, Mapping) and isinstance(turned.get(key), (str, Mapping)):
                inner = turn(turned[key], f"{where}.{key}")
                turned = turned if inner is turned[key] else {**turned, key: inner}
        return turned

    def _object(self, value: Any, where: str, expected: str = "an object") -> Any:
        if not isinstance(value, str):
            return value
        self._tally.add(f"with {where.rpartition('.')[2].partition('[')[0]!r} as JSON text: parsed")
        return parsed(value, where, expected)


def _by_message(columns: Mapping[str, Any]) -> Any:
    """The messages of an object of lists of one length, as older tables of `datasets` have them; any other object is itself."""
    names, lists = list(columns), list(columns.values())
    if not all(isinstance(values, (list, tuple)) and len(values) == len(lists[0]) for values in lists):
        return columns
    return [dict(zip(names, values, strict=True)) for values in zip(*lists, strict=True)]


def _rename(message: dict[str, Any], where: str) -> None:
    """ShareGPT's `from` and `value` as role and content; what it calls `function_call` becomes the assistant's tool calls."""
    name, value = message.pop("from"), message.pop("value")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{where}: 'from' is {name!r:.60}, expected {', '.join(ROLES)}")
    message["role"] = role
    if name.lower() != "function_call":
        message["content"] = value
        return
    calls = parsed(value, f"{where}.value", "a call")
    message["tool_calls"] = [_wrapped(call) for call in (calls if isinstance(calls, list) else [calls])]


def _wrapped(function: Any) -> Any:
    """A tool or a call as OpenAI has it; the same object where it is one, or no object."""
    is_bare = isinstance(function, Mapping) and "function" not in function
    return {"type": "function", "function": function} if is_bare else function


def _text_of(part: Any, where: str) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_TYPES and isinstance(part.get("text"), str):
        return part["text"]
    found = f"a part of the type {part['type']!r:.60}" if isinstance(part, Mapping) and "type" in part else kind(part)
    raise RowError(f"{where} is {found}, expected a part with a text: only texts are trained on. Take it out, or leave the row out")


def _json_text(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"{where!r} cannot be written as JSON: {str(error)[:200]}") from None


# ---- what a chat template takes: content as a text or as parts, a call's arguments as an object or as JSON text

# No template says so. Small conversations with marked words are rendered, and the words are looked for in the text.

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
    """A text as a part of a message's content."""
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
