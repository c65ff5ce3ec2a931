"""Chat and completions rows: the text of a row, what of it is trained on, and which of its words the template leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fulltune_nb.chat_template import ChatRenderer
from fulltune_nb.data.masks import WAYS_OUT, Conversation, Span
from fulltune_nb.data.rows import RowError
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.data.words import TOOLS, Word, is_written, words_of

NO_TOOLS = "the tools"
EARLIER_REASONING = "the reasoning of earlier turns"
UNMARKED = "of training (by its {% generation %}) words of assistant turns"

HELP = {
    NO_TOOLS: "Use a template that writes them, or write them into the messages.",
    EARLIER_REASONING: 'The model will not see it in a conversation either; mask_prompt="last" trains the last turn only.',
    "the words of system messages": "Put them into the first user message, or use a template that writes them.",
}
"""What helps where a template leaves something out."""

_OWN_KINDS = ("content", "reasoning", "calls")


@dataclass
class Rendered:
    """What the model is to see of a row, before it is tokenized."""

    text: str
    spans: list[Span] | None = None
    """Characters that are trained on; None: all."""
    is_marked_by_template: bool = False
    """Whether the spans are those of the template's own `{% generation %}`."""
    left_out: list[str] = field(default_factory=list)
    """What the template does not write of it, such as "the tools"."""


def messages_of(row: Mapping[str, Any], format: str, settings: DataSettings) -> list[Mapping[str, Any]]:
    """The conversation of a chat or completions row; a completion is a user/assistant pair."""
    if format == "chat":
        return list(row[settings.chat_feature])
    return [
        {"role": "user", "content": row[settings.prompt_feature]},
        {"role": "assistant", "content": row[settings.completion_feature]},
    ]


class ChatRows:
    """Renders the rows of a split, one after the other."""

    def __init__(self, renderer: ChatRenderer, format: str, settings: DataSettings):
        self._renderer, self._format, self._settings = renderer, format, settings
        self._written: set[tuple] = set()  # places of a conversation whose words the template has been seen to write

    def render(self, row: Mapping[str, Any]) -> Rendered:
        """The row's text and what is trained of it.

        Raises:
            RowError: the template refuses the row, words that are to be trained are lost, or their places cannot be told.
        """
        try:
            return self._rendered(messages_of(row, self._format, self._settings), row.get("tools"))
        except RecursionError:
            raise RowError("messages or tools are nested too deeply: no template needs so many levels") from None

    def _rendered(self, messages: list[Mapping[str, Any]], tools: Any) -> Rendered:
        untrained = [i for i, message in enumerate(messages) if not _is_trained(message, i)]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [i for i in (answers[-1:] if self._settings.mask_prompt == "last" else answers) if i not in untrained]
        talk = Conversation(self._renderer, messages, tools, words_of(messages, tools))
        left_out = self._left_out(talk, wanted)
        if not self._settings.mask_prompt:
            return Rendered(talk.text, self._all_but(talk, untrained), left_out=left_out)
        if (spans := talk.generated(wanted)) is not None:
            marked = talk.marked()
            if marked is not None and any(word.message in wanted and marked.is_beside(n, spans) for n, word in enumerate(talk.words)):
                left_out.append(UNMARKED)
            return Rendered(talk.text, spans, True, left_out)
        return Rendered(talk.text, self._spans(talk, wanted, answers[-1:]), left_out=left_out)

    def _spans(self, talk: Conversation, wanted: list[int], last: list[int]) -> list[Span]:
        try:
            return talk.spans(wanted) if wanted else []
        except RowError as error:
            if wanted == last:
                raise
            try:
                talk.spans(last)
            except RowError:
                raise error from None
            raise RowError(f'{error}. mask_prompt="last", which trains the last assistant turn only, is possible') from None

    def _all_but(self, talk: Conversation, untrained: list[int]) -> list[Span] | None:
        """The whole text without some of the messages; None where there are none of them."""
        try:
            return _all_but(talk.spans(untrained), len(talk.text)) if untrained else None
        except RowError as error:
            reason = str(error).removeprefix("mask_prompt: ").removesuffix(f". {WAYS_OUT}")
            raise RowError(f"a message with weight 0 or train false cannot be told from the others: {reason}") from None

    def _left_out(self, talk: Conversation, wanted: Sequence[int]) -> list[str]:
        """What the template does not write of the conversation and may leave out.

        Raises:
            RowError: it is what the user says, or what is to be trained.
        """
        asked = max((i for i, message in enumerate(talk.messages) if message["role"] == "user"), default=-1)
        # A string can stand in the text by chance, so the first of its kind is marked; then it is enough to look for the others.
        places = {(_role(talk, word), word.kind, word.message > asked) for word in talk.words}
        is_marked_anyway = self._settings.mask_prompt and len(wanted) > 1
        marked = talk.marked() if is_marked_anyway or not places <= self._written else None
        if marked is None:
            missing = [word for word in talk.words if not is_written(word.text, talk.text)]
        else:
            missing = [word for number, word in enumerate(talk.words) if marked.is_missing(number)]
            self._written |= set() if missing else places
        if not missing:
            return []
        own = [word for word in missing if self._is_own(talk, word, wanted, asked)]
        if own:
            raise RowError(_lost(talk, own, wanted))
        return list(dict.fromkeys(_name(talk, word, missing) for word in missing))

    def _is_own(self, talk: Conversation, word: Word, wanted: Sequence[int], asked: int) -> bool:
        """Whether the word is what the user says or what the model is to learn."""
        role = _role(talk, word)
        if role == "assistant" and word.kind == "reasoning" and not self._settings.mask_prompt:
            return word.message in wanted and word.message > asked
        return word.kind in _OWN_KINDS and (role == "user" or word.message in wanted)


def _role(talk: Conversation, word: Word) -> str:
    return "" if word.message == TOOLS else talk.messages[word.message]["role"]


def _name(talk: Conversation, word: Word, missing: Sequence[Word]) -> str:
    """What has been left out, as it is named in the notes."""
    role = _role(talk, word)
    if word.message == TOOLS:
        return NO_TOOLS if sum(w.message == TOOLS for w in missing) == sum(w.message == TOOLS for w in talk.words) else "words of the tools"
    if word.kind not in _OWN_KINDS:
        return f"the key {word.kind!r} of {role} messages"
    if role != "assistant":
        return f"the words of {role} messages"
    return EARLIER_REASONING if word.kind == "reasoning" else "words of assistant turns that are not trained"


def _lost(talk: Conversation, own: Sequence[Word], wanted: Sequence[int]) -> str:
    """Why a row cannot be used whose own words are lost."""
    word, role = own[0], _role(talk, own[0])
    number = sum(message["role"] == role for message in talk.messages[: word.message + 1])
    what = {"calls": "the tool calls", "reasoning": "the reasoning", "content": "words"}[word.kind]
    ways = "use a template that writes them, or remove them"
    if wanted and all(w.message in wanted[:-1] for w in own):
        ways += ', or use mask_prompt="last", which trains the last assistant turn only'
    return f"the chat template leaves out {what} of {role} turn {number} ({word.text[:40]!r}): {ways}"


def _is_trained(message: Mapping[str, Any], i: int) -> bool:
    """Whether `weight` and `train`, which a message may have, let it be trained.

    Raises:
        RowError: they are neither yes nor no.
    """
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"messages[{i}]: 'weight' is {weight!r:.40}, expected 0 (not trained) or 1")
    if train is not None and train not in (True, False):
        raise RowError(f"messages[{i}]: 'train' is {train!r:.40}, expected true or false")
    return weight != 0 and train is not False and train != 0


def _all_but(spans: Sequence[Span], size: int) -> list[Span]:
    """The rest of [0, size)."""
    borders = [0, *(border for span in sorted(spans) for border in span), size]
    return [(start, end) for start, end in zip(borders[::2], borders[1::2], strict=True) if start < end]
