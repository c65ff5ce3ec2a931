"""What a chat template writes around the words of a conversation, learned from one row and looked for in others of its form.

To find the turns of a row takes two to four renderings (see `masks`). Rows whose messages have the same roles and the same kinds of
words nearly always differ in their words only. So what stands between the words is kept of the first of them; where the text of
another row is exactly that with its own words in it, its turns stand at the same places between them, and one rendering was enough.

A template may do otherwise for some words, as where `/no_think` in a question changes the generation prompt. It finds them by strings that
stand in the template. A row in whose words one of these stands has no form, and is looked at by itself.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from fulltune_nb.data.masks import TOOLS, Conversation


class Skeleton(NamedTuple):
    """The text of a conversation without its words, and some places in it."""

    words: tuple[int, ...]
    """Which of the conversation's words the template writes, in the order of the text; one may be there twice."""
    pieces: tuple[str, ...]
    """What stands before each of them, and behind the last."""
    places: tuple[tuple[int, int], ...]
    """Each place as the number of words before it, and of characters from the end of the last of them."""

    @classmethod
    def of(cls, talk: Conversation, places: Sequence[int]) -> Skeleton | None:
        """The skeleton of a conversation with these places (characters of its text).

        Returns:
            None where the words cannot be marked, the template has changed one of them, or a place is within one.
        """
        if (marked := talk.marked) is None:
            return None
        pieces, ends = [], [0]
        for end, _ in marked.marks:
            start = marked.start_of_word(end)
            if start is None or start < ends[-1]:
                return None
            pieces.append(talk.text[ends[-1] : start])
            ends.append(end)
        pieces.append(talk.text[ends[-1] :])
        before = [bisect_right(ends, place) - 1 for place in places]
        found = tuple((words, place - ends[words]) for words, place in zip(before, places, strict=True))
        if any(characters > len(pieces[words]) for words, characters in found):
            return None
        return cls(tuple(word for _, word in marked.marks), tuple(pieces), found)

    def places_in(self, talk: Conversation) -> list[int] | None:
        """The places in the text of a conversation of the same form; None where the text is not this skeleton with its words."""
        parts = [piece + talk.words[word].text for piece, word in zip(self.pieces, self.words, strict=False)]
        if "".join([*parts, self.pieces[-1]]) != talk.text:
            return None
        ends = [0, *accumulate(map(len, parts))]
        return [ends[words] + characters for words, characters in self.places]


# ---- forms

_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_LOOKS_FOR = frozenset(
    "startswith endswith split rsplit partition rpartition find rfind index rindex count replace removeprefix removesuffix".split()
)  # methods of strings; `replace` and `split` are filters too
_IDS = ("id", "tool_call_id")
_LONG = 64  # characters of a value that is no word and may choose what a template writes


class Forms:
    """Tells of a conversation all by which a chat template can write otherwise than for another, but for what it writes of the words.

    Attributes:
        sought: strings that the template looks for within others, in small letters.
        compared: strings that it compares others with.
        knows_tools: whether these are all that it can look for in rows with tools and calls; the names of arguments are compared there.
    """

    def __init__(self, chat_template: str | Mapping[str, str]):
        texts = chat_template.values() if isinstance(chat_template, Mapping) else [chat_template]
        self.sought: set[str] | None = set()
        self.compared: set[str] = set()
        self.knows_tools = True
        for text in texts:
            self._read(text)

    def of(self, talk: Conversation, *more: Any) -> tuple | None:
        """The form, which holds `more`; None where the template may do something else for just these words."""
        if self.sought is None:
            return None
        kinds = [(word.message, word.kind, word.spaces) for word in talk.words]
        if not self.knows_tools and any(message == TOOLS or kind == "calls" for message, kind, _ in kinds):
            return None
        words = [word.text for word in talk.words]
        together = "\0".join(words).lower()
        if any(part in together for part in self.sought) or not self.compared.isdisjoint(words):
            return None
        return tuple(_outside_words(message) for message in talk.messages), tuple(kinds), talk.tools is None, *more

    def _read(self, template: str) -> None:
        import jinja2
        from jinja2 import nodes

        try:
            tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
        except jinja2.TemplateSyntaxError:
            self.sought = None  # nothing is known, and nothing is learned
        if self.sought is None:
            return
        found = set()
        for node in tree.find_all(nodes.Compare):
            operands = [node.expr, *(operand.expr for operand in node.ops)]
            for left, operand in zip(operands, node.ops, strict=False):
                within = operand.op in ("in", "notin") and not isinstance(operand.expr, (nodes.List, nodes.Tuple))
                if within:
                    found.add(left)
                else:
                    self.compared.update(_strings(left), _strings(operand.expr))
        calls = [call for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Getattr) and call.node.attr in _LOOKS_FOR]
        filters = [call for call in tree.find_all((nodes.Filter, nodes.Test)) if call.name in (*_LOOKS_FOR, "in")]
        found.update(call.args[0] for call in (*calls, *filters) if call.args)
        for node in found:
            strings = set(_strings(node)) or set(_values(tree, node))
            self.sought.update(string.lower() for string in strings)
            self.knows_tools &= bool(strings)
        self.sought -= _keys(tree)


def _outside_words(message: Mapping[str, Any]) -> Any:
    """A message's role, and what else of it is no word."""
    if len(message) == 2 and isinstance(message.get("content"), str):
        return message["role"]
    kept = (str, bool, int, float, type(None))
    values = {key: value for key, value in message.items() if key not in _IDS and isinstance(value, kept) and len(str(value)) <= _LONG}
    content = message.get("content")
    values["content"] = type(content)
    return tuple((key, type(value), value) for key, value in values.items() if key not in ("reasoning_content", "reasoning", "thinking"))


def _strings(node: Any) -> Iterator[str]:
    """All strings that stand in a part of a template."""
    from jinja2 import nodes

    constants = [node] if isinstance(node, nodes.Const) else node.find_all(nodes.Const)
    return (constant.value for constant in constants if isinstance(constant.value, str))


def _values(tree: Any, node: Any) -> Iterator[str]:
    """The strings that a variable may be, where it is set to some or goes through a list of them."""
    from jinja2 import nodes

    for place in tree.find_all((nodes.Assign, nodes.For)):
        if isinstance(node, nodes.Name) and isinstance(place.target, nodes.Name) and place.target.name == node.name:
            yield from _strings(place.node if isinstance(place, nodes.Assign) else place.iter)


def _keys(tree: Any) -> set[str]:
    """The keys by which the template reads messages: that one is looked for says nothing of words."""
    from jinja2 import nodes

    keys = {place.attr for place in tree.find_all(nodes.Getattr)}
    keys.update(string for place in tree.find_all(nodes.Getitem) for string in _strings(place.arg))
    return keys
