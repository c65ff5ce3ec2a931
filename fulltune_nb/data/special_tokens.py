"""Begin and end tokens in the rows: how many there are, and where one is doubled, missing or never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fulltune_nb.data.encoding import Example

_CHUNK_ROWS = 4096  # looked at together: bounds the memory
_END_TOKENS = 3  # an end token stands among the last ones: templates often put a line break behind it


@dataclass(frozen=True)
class SpecialTokenCheck:
    """What stands at the beginnings and ends of some examples; all arrays go by example."""

    bos: np.ndarray
    """(rows,) int64, BOS tokens in each."""
    eos: np.ndarray
    """(rows,) int64, EOS tokens in each."""
    problems: dict[str, np.ndarray]
    """What is wrong -> the indices of the examples, ascending. Only what occurs."""

    @property
    def rows(self) -> np.ndarray:
        """Indices of all examples with a problem, ascending."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self.problems.values()]))

    def of(self, row: int) -> list[str]:
        """What is wrong with one example."""
        return [name for name, rows in self.problems.items() if row in rows]


BOS_DOUBLED = "BOS stands twice in a row"
BOS_MISSING = "does not begin with BOS, which the tokenizer puts before every text"
EOS_DOUBLED = "EOS stands twice in a row"
END_MISSING = "ends with neither EOS nor another special token"
END_NOT_TRAINED = "is trained on, but its end token is not"

ADVICE = {
    BOS_DOUBLED: "Remove the one in the rows: the tokenizer or the chat template puts its own.",
    BOS_MISSING: "The chat template leaves it out. A model that always saw it may do worse; its own template may write it.",
    EOS_DOUBLED: "Remove the one in the rows: another is put behind them.",
    END_MISSING: "The model does not learn a token to stop at: answers end at max_tokens, or at a text that stands for the end.",
    END_NOT_TRAINED: "The model does not learn to stop. Is the last turn the assistant's?",
}
"""What each problem means and what to do."""


def special_ids(tokenizer) -> set[int]:
    """Ids of all special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {i for i, token in added.items() if getattr(token, "special", False)}


def check_special_tokens(examples: Sequence[Example], tokenizer) -> SpecialTokenCheck:
    """Counts and checks BOS and EOS. Where one token is both, only its uses as an end are checked.

    An end that `max_seq_length` has cut off is not counted as missing here: cut rows are counted by the split.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    ends = np.array(sorted(special_ids(tokenizer) - ({bos} if bos != eos else set())), dtype=np.int64)
    chunks = []
    for start in range(0, len(examples), _CHUNK_ROWS):
        chunks.append(_check_chunk(_Flat(examples[start : start + _CHUNK_ROWS]), bos, eos, adds_bos, ends))
    counts = [np.concatenate([np.empty(0, np.int64), *(chunk[name] for chunk in chunks)]) for name in ("bos", "eos")]
    problems = {}
    for name in ADVICE:
        found = [np.flatnonzero(chunk[name]) + _CHUNK_ROWS * number for number, chunk in enumerate(chunks)]
        rows = np.concatenate([np.empty(0, np.int64), *found])
        if len(rows):
            problems[name] = rows
    return SpecialTokenCheck(*counts, problems)


class _Flat:
    """Examples one behind the other: N tokens of R rows."""

    def __init__(self, examples: Sequence[Example]):
        self.lengths = np.array([len(example.tokens) for example in examples], dtype=np.int64)  # (R,)
        self.cut = np.array([example.cut > 0 for example in examples], dtype=bool)  # (R,)
        self.tokens = np.concatenate([np.empty(0, np.int32), *(example.tokens for example in examples)])  # (N,)
        self.trained = np.concatenate([np.empty(0, bool), *(example.loss_mask for example in examples)])  # (N,)
        self.row = np.repeat(np.arange(len(examples), dtype=np.int32), self.lengths)  # (N,)
        starts = np.cumsum(self.lengths) - self.lengths
        self.from_start = np.arange(len(self.tokens)) - starts[self.row]  # (N,) 0 for a row's first token
        self.from_end = self.lengths[self.row] - 1 - self.from_start  # (N,) 0 for its last

    def count(self, mask: np.ndarray) -> np.ndarray:
        """(N,) bool -> (R,) how many of each row's tokens."""
        return np.bincount(self.row[mask], minlength=len(self.lengths)).astype(np.int64)

    def doubled(self, token: int | None) -> np.ndarray:
        """(R,) bool, rows in which the token follows itself."""
        same = (self.tokens[1:] == token) & (self.tokens[:-1] == token) & (self.row[1:] == self.row[:-1])
        return self.count(np.concatenate([np.zeros(min(1, len(self.tokens)), bool), same])) > 0


def _check_chunk(flat: _Flat, bos: int | None, eos: int | None, adds_bos: bool, ends: np.ndarray) -> dict[str, np.ndarray]:
    is_bos = flat.tokens == (-1 if bos is None else bos)
    is_eos = flat.tokens == (-1 if eos is None else eos)
    nothing = np.zeros(len(flat.lengths), dtype=bool)
    at_end = np.isin(flat.tokens, ends) & (flat.from_end < _END_TOKENS)
    has_end = flat.count(at_end) > 0
    whole = ~flat.cut & (flat.lengths > 0)
    is_trained, end_is_trained = flat.count(flat.trained) > 0, flat.count(at_end & flat.trained) > 0
    return {
        "bos": flat.count(is_bos),
        "eos": flat.count(is_eos),
        BOS_DOUBLED: flat.doubled(bos) if bos is not None and bos != eos else nothing,
        BOS_MISSING: (flat.lengths > 0) & (flat.count(is_bos & (flat.from_start == 0)) == 0) if adds_bos else nothing,
        EOS_DOUBLED: flat.doubled(eos) if eos is not None else nothing,
        END_MISSING: whole & ~has_end if len(ends) else nothing,
        END_NOT_TRAINED: whole & has_end & is_trained & ~end_is_trained,
    }
