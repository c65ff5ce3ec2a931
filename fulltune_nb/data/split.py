"""A split: its examples, what there is to count of them, whether a model has rows for their tokens, and how a part is held out."""

from __future__ import annotations

import hashlib
import operator
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, overload
from weakref import WeakValueDictionary

import numpy as np

from fulltune_nb.data.example import Example, decode, flat
from fulltune_nb.data.look import split_html
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.errors import ConfigError, DataError, listed
from fulltune_nb.html import printable

# ---- examples in a few flat arrays: 5 bytes a token, and no object a row but what was read


class ExampleTable(Sequence[Example]):
    """Examples in flat arrays. An `Example`, of views of them, is made when it is asked for; it stays the same while somebody holds it.

    Attributes:
        tokens: (tokens,) int32, those of all examples one after another.
        loss_mask: (tokens,) bool.
        begins: (examples + 1,) int64; example i has tokens[begins[i]:begins[i + 1]].
        columns: (3, examples) int64, whose rows are the next three.
        cut: tokens cut off at the end of each.
        before, behind: tokens of its row that stand in other windows; 0 where rows are whole.
        texts: the text of each example's row.
        sources: file and line of each.
        rows: each one's row as it was read.
        dropped: rows left out because they have more tokens than `max_seq_length`.
        tokens_dropped: tokens of those.
    """

    def __init__(
        self, tokens: np.ndarray, loss_mask: np.ndarray, begins: np.ndarray, columns: np.ndarray,
        texts: list[str], sources: list[str], rows: list[Mapping[str, Any]], tokenizer: Any = None,
    ):  # fmt: skip
        self.tokens, self.loss_mask, self.begins = tokens, loss_mask, begins
        self.columns = columns
        self.cut, self.before, self.behind = columns
        self.texts, self.sources, self.rows, self._tokenizer = texts, sources, rows, tokenizer
        self.dropped = self.tokens_dropped = 0
        self._made: WeakValueDictionary[int, Example] = WeakValueDictionary()
        for values in (tokens, loss_mask, begins, columns):
            values.setflags(write=False)

    @classmethod
    def of(cls, examples: Sequence[Example]) -> ExampleTable:
        """The table of examples that were made one by one."""
        if isinstance(examples, cls):
            return examples
        examples = list(examples)
        texts, sources, rows = ([getattr(e, name) for e in examples] for name in ("text", "source", "row"))
        table = cls(*flat(examples), texts, sources, rows, examples[0].tokenizer if examples else None)
        table._made.update(enumerate(examples))
        return table

    def take(self, indices: np.ndarray) -> ExampleTable:
        """A table of some of the examples, in the order of `indices` (int64)."""
        lengths = np.diff(self.begins)[indices]
        begins = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.begins[indices] - begins[:-1], lengths) + np.arange(begins[-1])
        lists = ([column[i] for i in indices.tolist()] for column in (self.texts, self.sources, self.rows))
        return ExampleTable(self.tokens[places], self.loss_mask[places], begins, self.columns[:, indices], *lists, self._tokenizer)

    @classmethod
    def joined(cls, tables: Sequence[ExampleTable]) -> ExampleTable:
        """The examples of several tables, one table after the other."""
        tokens, loss_mask = (np.concatenate([getattr(table, name) for table in tables]) for name in ("tokens", "loss_mask"))
        begins = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(table.begins) for table in tables]))])
        columns = np.concatenate([table.columns for table in tables], axis=1)
        lists = (list(chain.from_iterable(getattr(table, name) for table in tables)) for name in ("texts", "sources", "rows"))
        table = cls(tokens, loss_mask, begins, columns, *lists, tables[0]._tokenizer)
        table.dropped, table.tokens_dropped = (sum(getattr(t, name) for t in tables) for name in ("dropped", "tokens_dropped"))
        return table

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[operator.index(index)]
        if (example := self._made.get(i)) is None:
            at = slice(self.begins[i], self.begins[i + 1])
            tokens, window = self.tokens[at], (int(self.before[i]), int(self.behind[i]))
            text = decode(self._tokenizer, tokens) if any(window) else self.texts[i]
            example = Example(
                tokens, self.loss_mask[at], text, self.sources[i], int(self.cut[i]), self.rows[i], self._tokenizer, window
            )  # fmt: skip
            self._made[i] = example
        return example

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


class TableWriter:
    """Makes a table row by row, with no numpy object for any; rows longer than `max_seq_length` become what `long_rows` says."""

    def __init__(self, settings: DataSettings, tokenizer: Any):
        self._limit, self._long_rows, self._tokenizer = settings.max_seq_length, settings.long_rows, tokenizer
        self._tokens, self._loss_mask, self._lengths = array("i"), bytearray(), array("q")
        self._columns = array("q")  # cut, before and behind of each example
        self._texts: list[str] = []
        self._sources: list[str] = []
        self._rows: list[Mapping[str, Any]] = []
        self._dropped = self._tokens_dropped = 0

    def add(self, tokens: Sequence[int], spans: Iterable[tuple[int, int]], text: str, source: str, row: Mapping[str, Any]) -> None:
        """A row.

        Args:
            tokens: all of its ids.
            spans: positions [start, end) in `tokens` that are trained on.
        """
        size, limit = len(tokens), self._limit
        loss_mask = bytearray(size)
        for start, end in spans:
            loss_mask[start:end] = b"\1" * (min(end, size) - start)
        if size <= limit:
            self._write(tokens, loss_mask, (0, 0, 0), text, source, row)
            return
        if self._long_rows == "drop":
            self._dropped += 1
            self._tokens_dropped += size
        elif self._long_rows == "cut":
            self._write(tokens[:limit], loss_mask[:limit], (size - limit, 0, 0), text, source, row)
        else:
            # A window begins with the last token of the one before, which is there as context: so each token is a target exactly once.
            for start in range(0, size - 1, limit - 1):
                end = min(start + limit, size)
                self._write(tokens[start:end], loss_mask[start:end], (0, start, size - end), text, source, row)

    def _write(self, tokens, loss_mask: bytearray, columns: tuple[int, int, int], text: str, source: str, row: Mapping[str, Any]) -> None:
        loss_mask[:1] = bytes(min(len(tokens), 1))  # nothing precedes the first token, so nothing predicts it
        self._tokens.extend(tokens)
        self._loss_mask += loss_mask
        self._lengths.append(len(tokens))
        self._columns.extend(columns)
        self._texts.append(text)
        self._sources.append(source)
        self._rows.append(row)

    def table(self) -> ExampleTable:
        """All rows that were added; the writer is not to be used any more."""
        tokens, loss_mask = np.frombuffer(self._tokens, dtype=np.int32), np.frombuffer(self._loss_mask, dtype=bool)
        begins = np.concatenate([[0], np.cumsum(np.frombuffer(self._lengths, dtype=np.int64))])
        columns = np.ascontiguousarray(np.frombuffer(self._columns, dtype=np.int64).reshape(-1, 3).T)
        table = ExampleTable(tokens, loss_mask, begins, columns, self._texts, self._sources, self._rows, self._tokenizer)
        table.dropped, table.tokens_dropped = self._dropped, self._tokens_dropped
        return table


# ---- splits


@dataclass(frozen=True)
class Part:
    """The examples of one data set in a split that several make up."""

    name: str
    """What stands before the sources of its rows: the end of its folder's path, or its name on the hub."""
    weight: float
    """Its share of an epoch's rows; those of all parts make 1."""
    begin: int
    """Its first example's index in the split."""
    end: int
    """The index behind its last example."""


class Split(Sequence[Example]):
    """The examples of one split, in the order of the file; rows that occur twice occur twice.

    Attributes:
        name: "train", "valid" or "test".
        format: "chat", "completions" or "text".
        examples: all of them, the untrainable ones too.
        lengths: (rows,) int64, tokens of each example.
        trained_lengths: (rows,) int64, those of them that are trained on.
        trainable: (rows with a trained token,) int64, their indices; only these get into batches.
        untrainable: indices of the rows with no trained token.
        truncated: rows cut at the end by `max_seq_length`.
        tokens_cut: tokens lost that way.
        split_rows: rows that became several examples, windows of their tokens (`long_rows="split"`).
        windows: those examples.
        dropped: rows left out because they have more tokens than `max_seq_length` (`long_rows="drop"`).
        tokens_dropped: tokens lost that way.
        tokens: tokens of all examples.
        trained_tokens: tokens that are trained on.
        blank_lines: blank lines of the file, which are no rows.
        skipped: with `bad_rows="skip"` a line for each row that could not be used, `"train.jsonl:12: reason"`.
        parts: whose examples are which, where several data sets with weights make up the split; else empty.
    """

    def __init__(
        self, name: str, format: str, examples: Sequence[Example], blank_lines: int = 0, skipped: Sequence[str] = (),
        parts: Sequence[Part] = (),
    ):  # fmt: skip
        self.name = name
        self.format = format
        self.examples = table = ExampleTable.of(examples)
        self.blank_lines = blank_lines
        self.skipped = list(map(printable, skipped))
        self.parts = tuple(parts)
        self.lengths = np.diff(table.begins)
        up_to = np.concatenate([[0], np.cumsum(table.loss_mask, dtype=np.int64)])  # trained tokens before each token
        self.trained_lengths = trained = np.diff(up_to[table.begins])
        self.trainable = np.flatnonzero(trained)
        self.untrainable = np.flatnonzero(trained == 0)
        self.truncated = int(np.count_nonzero(table.cut))
        self.tokens_cut = int(table.cut.sum())
        self.split_rows = int(np.count_nonzero((table.before == 0) & (table.behind > 0)))
        self.windows = int(np.count_nonzero(table.before + table.behind))
        self.dropped, self.tokens_dropped = table.dropped, table.tokens_dropped
        self.tokens = int(self.lengths.sum())
        self.trained_tokens = int(trained.sum())

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self.examples[index]

    @cached_property
    def largest_id(self) -> int:
        """The largest token id of any example; -1 where there are no tokens."""
        return int(self.examples.tokens.max(initial=-1))

    def trainable_parts(self) -> list[np.ndarray]:
        """`trainable`, for each of the parts; all of it where there are none."""
        if not self.parts:
            return [self.trainable]
        borders = np.searchsorted(self.trainable, [(part.begin, part.end) for part in self.parts])
        return [self.trainable[begin:end] for begin, end in borders]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over lengths, tokens, masks and weights: equal for splits that train alike."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for part in self.parts:
            digest.update(f"{part.weight.hex()} {part.begin} {part.end}\n".encode())
        tokens, loss_mask = memoryview(self.examples.tokens.astype("<i4").view(np.uint8)), memoryview(self.examples.loss_mask)
        begins = self.examples.begins.tolist()
        for begin, end in pairwise(begins):
            digest.update(tokens[4 * begin : 4 * end])
            digest.update(loss_mask[begin:end])
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Split({printable(self.name)}: {len(self):,} {self.format} rows, {self.tokens:,} tokens, {self.trained_tokens:,} trained)"

    def _repr_html_(self) -> str:
        return split_html(self)


# ---- token ids against a model's vocabulary

# MLX reads and writes beside the embedding for an id that it has no row for, and says nothing.

_SHOWN = 8  # tokens named in an error message


def check_ids(examples: Sequence[Example], vocab_size: int, tokenizer: Any = None) -> None:
    """That a model has a row for every token. Of a `Split`, which knows its largest id, no row is looked at.

    Args:
        examples: a split, or any examples.
        vocab_size: rows of the model's embedding.
        tokenizer: names the tokens in the message; None: the examples' own.

    Raises:
        DataError: ids that the model has no row for, with the rows and the way to give it some.
    """
    largest = getattr(examples, "largest_id", None)
    if largest is not None and largest < vocab_size:
        return
    outside = {}
    for example in examples:
        if len(example.tokens) and not 0 <= example.tokens.min() <= example.tokens.max() < vocab_size:
            outside[example.source] = example.tokens[(example.tokens < 0) | (example.tokens >= vocab_size)]
            tokenizer = tokenizer or example.tokenizer
    if not outside:
        return
    ids = np.unique(np.concatenate(list(outside.values()))).tolist()
    texts = {token: tokenizer.convert_ids_to_tokens(token) if tokenizer is not None and token >= 0 else None for token in ids}
    names = listed([f"{text!r} (id {token})" if text else f"id {token}" for token, text in texts.items()], _SHOWN)
    known = listed([repr(text) for text in texts.values() if text], _SHOWN)
    remedy = f" Give the model rows for them: lm.add_tokens([{known}])." if known and len(texts) <= _SHOWN else ""
    raise DataError(
        f"{listed(list(outside), 3)}: the model has no row for {names}; its {vocab_size:,} rows are for the ids from 0 to"
        f" {vocab_size - 1:,}.{remedy} Or load the data with the tokenizer that belongs to the model."
    )


# ---- a part of the train split that becomes the valid split: a function of the rows' texts alone

SEED = b"fulltune_nb valid 0"
"""Of every division, whatever the seed of a run is: runs with other seeds are compared on the same held-out rows."""


def with_valid(splits: Mapping[str, Split], fraction: float, notes: list[str]) -> dict[str, Split]:
    """The splits with a part of train as valid; `notes` grows by what became of that.

    Raises:
        ConfigError: there is a valid split, or no train split.
        DataError: a side would have no row.
    """
    if "valid" in splits or "train" not in splits:
        why = "there is a valid split" if "valid" in splits else "there is no train split to take it from"
        raise ConfigError(f"valid_fraction={fraction:g}: {why}. Leave valid_fraction out.")
    train = splits["train"]
    rows = held_out(train.examples.texts, train.trainable.tolist(), fraction)
    if not len(rows):
        raise DataError(f"valid_fraction={fraction:g}: all rows of train have the same text, so none can be held out. Leave it out.")
    kept = np.setdiff1d(np.arange(len(train)), rows)
    places = [np.searchsorted(kept, (part.begin, part.end)).tolist() for part in train.parts]
    parts = [replace(part, begin=begin, end=end) for part, (begin, end) in zip(train.parts, places, strict=True)]
    share = f"{len(rows):,} of {len(train):,} examples of train ({100 * len(rows) / len(train):.1f} %)"
    notes.append(f"valid: {share} are held out, chosen by their texts; rows of the same text stay together.")
    valid, rest = Split("valid", train.format, train.examples.take(rows)), train.examples.take(kept)
    rest.dropped, rest.tokens_dropped = train.dropped, train.tokens_dropped
    divided = Split("train", train.format, rest, train.blank_lines, train.skipped, parts)
    if not all(map(len, divided.trainable_parts())):
        raise DataError(f"valid_fraction={fraction:g}: a data set has no row left for training. Make it smaller.")
    return {**splits, "train": divided, "valid": valid}


def held_out(texts: list[str], candidates: Iterable[int], fraction: float) -> np.ndarray:
    """Which examples are held out: (k,) int64, ascending.

    Rows are ordered by a hash of their text, and the first of them are taken up to `fraction` of all, at least one. What has the very same
    text goes together: the windows of a row, and rows that occur twice. Such a group that would be too many is passed over.

    Args:
        texts: of all examples' rows.
        candidates: the examples that have a token to train on; only their texts are held out.
        fraction: above 0 and below 1.

    Returns:
        No index where there is only one text.
    """
    of_text: dict[bytes, list[int]] = {}
    digests = [hashlib.blake2b(text.encode(), digest_size=16, key=SEED).digest() for text in texts]
    for i, digest in enumerate(digests):
        of_text.setdefault(digest, []).append(i)
    order = sorted({digests[i] for i in candidates})
    if len(order) < 2:
        return np.empty(0, dtype=np.int64)
    left, taken = max(1, round(fraction * len(texts))), []
    for digest in order[:-1]:  # one stays for training, however large the fraction
        if len(of_text[digest]) <= left:
            taken += of_text[digest]
            left -= len(of_text[digest])
    return np.array(sorted(taken or min((of_text[digest] for digest in order), key=len)), dtype=np.int64)
