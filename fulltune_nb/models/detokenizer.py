"""Token ids to text while they come, one at a time: no half characters, no lost spaces, constant work a token.

Byte-level BPE (Llama 3, Qwen2, Phi-2, OLMo) and SentencePiece-style (Llama 2, Mistral, Gemma) vocabularies are turned into
bytes token by token, and an incremental UTF-8 decoder holds back what is not a whole character yet. Any other tokenizer is
asked to decode the last few tokens only.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fulltune_nb.tokenizer import BYTE_ALPHABET, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8  # tokens of the prompt that the first piece may depend on; a UTF-8 character has at most 4
_MAX_PENDING = 8  # tokens; longer than any unfinished character, so what is pending then is broken text
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # SentencePiece's visible space


class Detokenizer(Protocol):
    """Ids in, text out."""

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished, and for special tokens."""


def make_detokenizer(tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> Detokenizer:
    """A detokenizer for one answer.

    Args:
        tokenizer: whose ids will come.
        context: ids that the answer continues, so that a space between them and the answer is kept. Without, the answer is a
            text of its own, and where the tokenizer's `decode` drops the space before the first word, so does this.
    """
    skipped = special_ids(tokenizer)
    context = [token for token in context if token not in skipped][-_CONTEXT:]
    kind, strip = _vocabulary_kind(tokenizer)
    if kind == "other":
        return WindowDetokenizer(tokenizer, context, skipped)
    return ByteDetokenizer(tokenizer, context, skipped, kind, strip)


def decode_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The text of ids, exactly: "cleaning up" spaces before punctuation would change what the model wrote."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class ByteDetokenizer:
    """For vocabularies whose every token stands for bytes."""

    def __init__(self, tokenizer, context: Sequence[int], skipped: frozenset[int], kind: str, strip: int):
        self._tokenizer, self._skipped, self._kind = tokenizer, skipped, kind
        # `decode` writes one replacement character a byte where byte tokens spell no text; byte-level BPE one a broken character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace" if kind == "byte_level" else _ONE_PER_BYTE)
        self._strip = 0 if context else strip
        for token in context:
            self._text(token)  # a prompt may end within a character

    def add(self, token: int) -> str:
        """The text that this token completes."""
        if token in self._skipped:
            return ""
        text = self._text(token)
        while self._strip and text:
            if not text.startswith(" "):
                self._strip = 0
            else:
                text, self._strip = text[1:], self._strip - 1
        return text

    def _text(self, token: int) -> str:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a vocabulary padded beyond the tokenizer's
            return ""
        return self._decoder.decode(_byte_level_bytes(piece) if self._kind == "byte_level" else _sentencepiece_bytes(piece))


class WindowDetokenizer:
    """For any tokenizer: decodes the last piece and what is pending, and shows the difference."""

    def __init__(self, tokenizer, context: Sequence[int], skipped: frozenset[int]):
        self._tokenizer, self._skipped = tokenizer, skipped
        self._shown, self._pending = list(context), []

    def add(self, token: int) -> str:
        """The text that this token completes."""
        if token in self._skipped:
            return ""
        self._pending.append(token)
        before = decode_text(self._tokenizer, self._shown)
        text = decode_text(self._tokenizer, [*self._shown, *self._pending])
        if (text.endswith(UNFINISHED) or len(text) <= len(before)) and len(self._pending) < _MAX_PENDING:
            return ""
        self._shown, self._pending = self._pending, []
        return text[len(before) :]


def _byte_level_bytes(piece: str) -> bytes:
    if all(character in BYTE_ALPHABET for character in piece):
        return bytes(BYTE_ALPHABET[character] for character in piece)
    return piece.encode("utf-8")  # an added token, written as it is


def _sentencepiece_bytes(piece: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(_SPACE, " ").encode("utf-8")


def _one_per_byte(error: UnicodeError) -> tuple[str, int]:
    return UNFINISHED * (error.end - error.start), error.end


_ONE_PER_BYTE = "fulltune_nb.one_per_byte"
codecs.register_error(_ONE_PER_BYTE, _one_per_byte)


def _vocabulary_kind(tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """`"byte_level"`, `"sentencepiece"` or `"other"`, and how many leading spaces `decode` drops from a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return ("sentencepiece", 1) if hasattr(tokenizer, "sp_model") else ("other", 0)
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    steps = state.get("decoders", [state])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte_level", 0
    if kinds == ["Metaspace"] and steps[0]["replacement"] == _SPACE:
        return "sentencepiece", int(steps[0].get("prepend_scheme") != "never")
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0]["pattern"] == {"String": _SPACE} and steps[0]["content"] == " ":
        if kinds[3:] == []:
            return "sentencepiece", 0
        if kinds[3:] == ["Strip"] and steps[3]["content"] == " " and not steps[3]["stop"]:
            return "sentencepiece", steps[3]["start"]
    return "other", 0


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and ends the answer before a whole one.

    Which stop string counts depends on the text only, not on how it is cut into pieces: the one that is complete first, and of
    several complete at once, the longest.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if self.found or not self._stops:
            return "" if self.found else text
        self._held += text
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._held[: min(ends)[1]]
        begun = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - begun
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self) -> str:
        """What was held back, when the answer ends without a stop string."""
        return "" if self.found else self._held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of the text begin the stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
