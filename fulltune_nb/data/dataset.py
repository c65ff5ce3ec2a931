"""Splits and data sets: what `load_data` returns."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from fulltune_nb.chat_template import ensure_chat_template, writes_date
from fulltune_nb.data.encode import encode_rows
from fulltune_nb.data.example import Example, Lens
from fulltune_nb.data.look import dataset_html, split_html
from fulltune_nb.data.raw import SPLITS, RawSplit
from fulltune_nb.data.read import read_source
from fulltune_nb.data.rows import bad_rows_error, detect_format, row_problem
from fulltune_nb.data.settings import FEATURES, DataSettings, resolve_settings, with_date
from fulltune_nb.data.table import ExampleTable
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.settings import whole_number

_REASONS_SHOWN = 3  # of the rows that are left out, in the notes


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
    """

    def __init__(self, name: str, format: str, examples: Sequence[Example], blank_lines: int = 0, skipped: Sequence[str] = ()):
        self.name = name
        self.format = format
        self.examples = table = ExampleTable.of(examples)
        self.blank_lines = blank_lines
        self.skipped = list(skipped)
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

    def __getitem__(self, index):
        return self.examples[index]

    @cached_property
    def largest_id(self) -> int:
        """The largest token id of any example; -1 where there are no tokens."""
        return max((int(example.tokens.max()) for example in self.examples if len(example.tokens)), default=-1)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over lengths, tokens and masks: equal for splits that train alike."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        tokens, loss_mask = memoryview(self.examples.tokens.astype("<i4").view(np.uint8)), memoryview(self.examples.loss_mask)
        begins = self.examples.begins.tolist()
        for begin, end in pairwise(begins):
            digest.update(tokens[4 * begin : 4 * end])
            digest.update(loss_mask[begin:end])
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"Split({self.name}: {len(self):,} {self.format} rows, {self.tokens:,} tokens, {self.trained_tokens:,} trained)"

    def _repr_html_(self) -> str:
        return split_html(self)


class DataSet:
    """What `load_data` returns.

    Attributes:
        train, valid, test: a `Split`, or None where there is none.
        settings: the `DataSettings` it was made with.
        source: absolute path of the folder, `hf:` and the name for a data set of the hub, an object of JSON where each split has its
            own place, None for rows in memory; `load_data` takes it again.
        notes: lines to announce once: what was cut, left out or put in place of something missing.
        tokenizer: the one it was made with.
        date_is_todays: whether `settings.template_date` was not given, but is the day on which this was loaded.
        load_again: loads the same rows again, with the `template_date` it is called with; None where rows can be read once only.
    """

    def __init__(self, splits: Mapping[str, Split], settings: DataSettings, source: str | None, notes: Sequence[str], tokenizer):
        self.train: Split | None = splits.get("train")
        self.valid: Split | None = splits.get("valid")
        self.test: Split | None = splits.get("test")
        self.settings = settings
        self.source = source
        self.notes = list(notes)
        self.tokenizer = tokenizer
        self.date_is_todays = False
        self.load_again: Callable[[str | None], DataSet] | None = None

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        named = {name: getattr(self, name) for name in SPLITS}
        return {name: split for name, split in named.items() if split is not None}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the fingerprints of all splits."""
        return hashlib.sha256("\n".join(f"{name} {split.fingerprint}" for name, split in self.splits.items()).encode()).hexdigest()

    def show(self, n: int = 3, split: str = "train"):
        """The first `n` examples token by token: trained, masked and special tokens told apart.

        Raises:
            ConfigError: `n` is no whole number of at least 1.
            DataError: there is no such split.
        """
        n = whole_number("show", n, low=1)
        if split not in self.splits:
            raise DataError(f"There is no split {split!r} in this data set; it has {', '.join(self.splits)}.")
        return Lens(self.splits[split][:n], self.tokenizer)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={len(split):,} {split.format}" for name, split in self.splits.items())
        return f"DataSet({parts}, {sum(s.tokens for s in self.splits.values()):,} tokens)"

    def _repr_html_(self) -> str:
        return dataset_html(self)


def load_data(
    source: str | os.PathLike | Mapping[str, Any],
    tokenizer,
    *,
    mask_prompt: bool | str | None = None,
    max_seq_length: int | None = None,
    prompt_feature: str | None = None,
    completion_feature: str | None = None,
    text_feature: str | None = None,
    chat_feature: str | None = None,
    bad_rows: str | None = None,
    long_rows: str | None = None,
    template_date: str | None = None,
    config: object | None = None,
) -> DataSet:
    """Read rows, find their format, and make tokens and loss masks of them.

    Args:
        source: a folder with `train.jsonl`, `valid.jsonl`, `test.jsonl` (any of them; `.csv` too, and `.parquet` with the
            extra `datasets`), a data set of the hub as `"hf:org/name"` (same extra; `"hf:folder"` for one in the hub's layout), or
            the rows themselves as `{"train": rows, "valid": rows, "test": rows}`, each a list of dicts.
        tokenizer: `lm.tokenizer`, or any tokenizer of `transformers`. One without a chat template gets ChatML set on it when
            the rows need one; `.notes` says so.
        mask_prompt: True: train on assistant turns and completions only; "last": on the last of them only. Default False.
        max_seq_length: tokens that a row has at most. Default 2048.
        prompt_feature: key of the prompt in the rows. Default "prompt".
        completion_feature: key of the completion. Default "completion".
        text_feature: key of the text. Default "text".
        chat_feature: key of the messages. Default "messages".
        bad_rows: "error" (default) or "skip", which leaves rows out that cannot be used; they are counted, see `Split.skipped`.
        long_rows: what becomes of a longer row. "cut" (default) at its end; "split" into windows of `max_seq_length` tokens, each of
            which begins with the last token of the one before, so that each token is trained on exactly once; or "drop". All are counted.
        template_date: the date, such as "2026-11-29", that a chat template gets which writes today's into the rows. Default: today,
            or the day that the environment variable `FULLTUNE_TEMPLATE_DATE` names. A run keeps it when it is resumed.
        config: an object with fields of these names, such as a `TrainConfig`, to take them from.

    Raises:
        DataError: nothing to read, or bad rows (with `bad_rows="skip"`: a split of nothing else); all of them are collected, with file
            and line, in `.problems`.
        ConfigError: a setting is wrong, disagrees with `config`, or means nothing for the format found.
        MissingDependencyError: the package `datasets` is needed and not installed.
    """
    given = {"mask_prompt": mask_prompt, "max_seq_length": max_seq_length, "prompt_feature": prompt_feature}
    given |= {"completion_feature": completion_feature, "text_feature": text_feature, "chat_feature": chat_feature}
    given |= {"bad_rows": bad_rows, "long_rows": long_rows}
    given |= {"template_date": template_date}
    settings = resolve_settings(given, config)
    _check_tokenizer(tokenizer)
    undated, settings = settings, with_date(settings, tokenizer)
    where, raw_splits, notes = read_source(source)
    splits, problems = {}, []
    for raw in raw_splits:
        split = splits[raw.name] = _build(raw, tokenizer, settings, notes)
        problems += split.skipped if settings.bad_rows == "error" or not len(split) else []
    if problems:
        raise bad_rows_error(problems, where or "the rows given")
    for split in splits.values():
        _check_trainable(split, settings)
    if all(split.format == "text" for split in splits.values()):
        settings = undated
    data = DataSet(splits, settings, where, list(dict.fromkeys(notes)), tokenizer)
    data.date_is_todays = settings != undated
    if not (isinstance(source, Mapping) and any(isinstance(rows, Iterator) for rows in source.values())):  # those are read by now
        data.load_again = lambda date: load_data(source, tokenizer, config=replace(undated, template_date=date))
    return data


def _check_tokenizer(tokenizer) -> None:
    if callable(tokenizer) and hasattr(tokenizer, "apply_chat_template"):
        return
    hint = " Pass its .tokenizer." if hasattr(tokenizer, "tokenizer") else ""
    raise ConfigError(f"tokenizer: expected a tokenizer of transformers (lm.tokenizer), got {type(tokenizer).__name__}.{hint}")


def _build(raw: RawSplit, tokenizer, settings: DataSettings, notes: list[str]) -> Split:
    """The split of all rows that can be used; `notes` grows by what is to be announced."""
    format = detect_format((row for _, row in raw.rows), settings)
    if format is not None:
        notes += _before_encoding(raw, format, tokenizer, settings)
    good, problems = [], list(raw.problems)
    for source, row in raw.rows:
        problem = row_problem(row, format, settings)
        good.append((source, row)) if problem is None else problems.append(f"{source}: {problem}")
    encoded = encode_rows(good, format or "text", tokenizer, settings)
    problems = sorted(problems + encoded.problems, key=_line_number)
    split = Split(raw.name, format or "text", encoded.examples, raw.blank_lines, problems)
    notes += raw.notes + _left_out(split, encoded.unshown_tools, settings)
    return split


def _before_encoding(raw: RawSplit, format: str, tokenizer, settings: DataSettings) -> list[str]:
    """Notes on what the format needs of settings and tokenizer, which gets a chat template where it has none."""
    notes = []
    if format != "text":
        notes += [note for note in [ensure_chat_template(tokenizer)] if note]
        if settings.template_date and writes_date(tokenizer):
            notes.append(f"The chat template can write a date into the rows: it is {settings.template_date} (template_date).")
    elif settings.mask_prompt:
        raise ConfigError(
            f"mask_prompt={settings.mask_prompt} means nothing for {raw.label}: its rows have the text format, in which there is no prompt "
            "to mask. Use mask_prompt=False, or rows of the chat or completions format."
        )
    elif tokenizer.eos_token_id is None:
        notes.append("The tokenizer has no end-of-text token: none is put behind the texts.")
    defaults = DataSettings()
    for name in FEATURES:
        key = getattr(settings, name)
        if key != getattr(defaults, name) and not any(key in row for _, row in raw.rows):
            notes.append(f"{raw.label}: no row has the key {key!r} that {name} names.")
    return notes


def _left_out(split: Split, unshown_tools: int, settings: DataSettings) -> list[str]:
    """What is to be announced of a split: what was cut, not shown or is not trained on."""
    limit, cut, dropped, untrainable = f"max_seq_length={settings.max_seq_length:,}", split.truncated, split.dropped, len(split.untrainable)
    of_rows = f"of {len(split) + dropped - split.windows + split.split_rows:,} rows"
    of_examples = f"of {len(split):,} windows and rows" if split.windows else of_rows
    notes = [
        cut and f"{cut:,} {of_rows} cut to {limit} tokens ({split.tokens_cut:,} tokens lost).",
        dropped and f"{dropped:,} {of_rows} left out, because they have more than {limit} tokens ({split.tokens_dropped:,} tokens lost).",
        split.windows and f"{split.split_rows:,} {of_rows} split into {split.windows:,} windows of at most {limit} tokens.",
        untrainable and f"{untrainable:,} {of_examples} have no token to train on and stay out of the batches.",
        unshown_tools and f"the chat template leaves out the tools of {unshown_tools:,} {of_rows}.",
        split.blank_lines and f"{split.blank_lines:,} blank lines, which are no rows.",
        split.skipped and _skipped(split),
    ]
    return [f"{split.name}: {note}" for note in notes if note]


def _skipped(split: Split) -> str:
    """What `bad_rows="skip"` has left out, with the first reasons."""
    first = "; ".join(split.skipped[:_REASONS_SHOWN])
    more = f"; and {len(split.skipped) - _REASONS_SHOWN:,} more" if len(split.skipped) > _REASONS_SHOWN else ""
    return f"{len(split.skipped):,} rows cannot be used and are left out ({first}{more}). All of them: data.{split.name}.skipped."


def _line_number(problem: str) -> int:
    """The line of a problem `"file:line: reason"`; 0 where it is about the whole file."""
    part = problem.split(":", 2)[1]
    return int(part) if part.isdigit() else 0


def _check_trainable(split: Split, settings: DataSettings) -> None:
    if len(split.trainable):
        return
    why = []
    if split.truncated:
        why.append(f"{split.truncated:,} of them are cut at max_seq_length={settings.max_seq_length:,}: raise it")
    if split.dropped:
        why.append(f"{split.dropped:,} are left out, longer than max_seq_length={settings.max_seq_length:,}: raise it")
    if split.format == "chat" and settings.mask_prompt:
        roles = sorted({str(m["role"])[:40] for e in split for m in e.row[settings.chat_feature]})
        found = ", ".join(map(repr, roles[:8]))
        why.append(f"mask_prompt={settings.mask_prompt} trains on turns of the role 'assistant' only, found are {found}")
    reason = "; ".join(why) or "each is shorter than two tokens: give them more text"
    raise DataError(f"{split.name}: none of the {len(split):,} rows has a token to train on ({reason}).")
