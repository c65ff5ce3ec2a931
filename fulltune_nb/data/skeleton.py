"""What a chat template writes around the words of a conversation, learned from one row and looked for in others of its form.

To find the turns of a row takes two to four renderings (see `masks`). Rows whose messages have the same roles and the same kinds of
words nearly always differ in their words only. So what stands between the words is kept of the first of them; where the text of
another row is exactly that with its own words in it, its turns stand at the same places between them, and one rendering was enough.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from fulltune_nb.data.masks import Conversation


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
