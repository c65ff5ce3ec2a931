"""Splits and data sets: what `load_data` returns."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fulltune_nb.chat_template import ensure_chat_template
from fulltune_nb.data.encode import Example, encode_rows
from fulltune_nb.data.read import PREFIX, SPLITS, RawSplit, hub_id, read_folder, read_hub, read_memory
from fulltune_nb.data.rows import bad_rows_error, detect_format, expected_keys, feature_hint, names_of, row_problem
from fulltune_nb.data.settings import FEATURES, DataSettings, resolve_settings
from fulltune_nb.errors import ConfigError, DataError


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
        tokens: tokens of all examples.
        trained_tokens: tokens that are trained on.
        blank_lines: blank lines of the file, which are no rows.
    """

    def __init__(self, name: str, format: str, examples: Sequence[Example], blank_lines: int = 0):
        self.name = name
        self.format = format
        self.examples = list(examples)
        self.blank_lines = blank_lines
        trained = np.array([int(e.loss_mask.sum()) for e in self.examples], dtype=np.int64)
        self.trained_lengths = trained
        self.lengths = np.array([len(e.tokens) for e in self.examples], dtype=np.int64)
        self.trainable = np.flatnonzero(trained)
        self.untrainable = np.flatnonzero(trained == 0)
        self.truncated = sum(e.cut > 0 for e in self.examples)
        self.tokens_cut = sum(e.cut for e in self.examples)
        self.tokens = int(self.lengths.sum())
        self.trained_tokens = int(trained.sum())

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over lengths, tokens and masks: equal for splits that train alike."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for example in self.examples:
            digest.update(example.tokens.astype("<i4").tobytes())
            digest.update(example.loss_mask.tobytes())
        return digest.hexdigest()

    @cached_property
    def bucket_lengths(self) -> np.ndarray:
        """The at most 12 values that T, the length of a batch's inputs, takes where a batch is made by itself; ascending int64."""
        from fulltune_nb.data.shapes import choose_buckets

        return choose_buckets(self.lengths[self.trainable] - 1)

    def __repr__(self) -> str:
        return f"Split({self.name}: {len(self):,} {self.format} rows, {self.tokens:,} tokens, {self.trained_tokens:,} trained)"

    def _repr_html_(self) -> str:
        from fulltune_nb.data.look import split_html

        return split_html(self)


class DataSet:
    """What `load_data` returns.

    Attributes:
        train, valid, test: a `Split`, or None where there is none.
        settings: the `DataSettings` it was made with.
        source: absolute path of the folder, `hf:` and the name for a data set of the hub, None for rows in memory.
        notes: lines to announce once: what was cut, left out or put in place of something missing.
        tokenizer: the one it was made with.
    """

    def __init__(self, splits: Mapping[str, Split], settings: DataSettings, source: str | None, notes: Sequence[str], tokenizer):
        self.train: Split | None = splits.get("train")
        self.valid: Split | None = splits.get("valid")
        self.test: Split | None = splits.get("test")
        self.settings = settings
        self.source = source
        self.notes = list(notes)
        self.tokenizer = tokenizer

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
        from fulltune_nb.data.look import Lens

        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigError(f"show: expected a whole number of examples, at least 1, got {n!r}.")
        if split not in self.splits:
            raise DataError(f"There is no split {split!r} in this data set; it has {', '.join(self.splits)}.")
        return Lens(self.splits[split][:n], self.tokenizer)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={len(split):,} {split.format}" for name, split in self.splits.items())
        return f"DataSet({parts}, {sum(s.tokens for s in self.splits.values()):,} tokens)"

    def _repr_html_(self) -> str:
        from fulltune_nb.data.look import dataset_html

        return dataset_html(self)


def load_data(
    source: str | os.PathLike | Mapping[str, Any],
    tokenizer,
    *,
    mask_prompt: bool | None = None,
    max_seq_length: int | None = None,
    prompt_feature: str | None = None,
    completion_feature: str | None = None,
    text_feature: str | None = None,
    chat_feature: str | None = None,
    config: object | None = None,
) -> DataSet:
    """Read rows, find their format, and make tokens and loss masks of them.

    Args:
        source: a folder with `train.jsonl`, `valid.jsonl`, `test.jsonl` (any of them; `.csv` too, and `.parquet` with the
            extra `datasets`), a data set of the hub as `"hf:org/name"` (same extra; `"hf:folder"` for one in the hub's layout), or
            the rows themselves as `{"train": rows, "valid": rows, "test": rows}`, each a list of dicts.
        tokenizer: `lm.tokenizer`, or any tokenizer of `transformers`. One without a chat template gets ChatML set on it when
            the rows need one; `.notes` says so.
        mask_prompt: train on assistant turns and completions only. Default False.
        max_seq_length: tokens kept of a row. Default 2048. What is cut is counted.
        prompt_feature: key of the prompt in the rows. Default "prompt".
        completion_feature: key of the completion. Default "completion".
        text_feature: key of the text. Default "text".
        chat_feature: key of the messages. Default "messages".
        config: an object with fields of these names, such as a `TrainConfig`, to take them from.

    Raises:
        DataError: nothing to read, or bad rows; all of them are collected, with file and line, in `.problems`.
        ConfigError: a setting is wrong, disagrees with `config`, or means nothing for the format found.
        MissingDependencyError: the package `datasets` is needed and not installed.
    """
    given = {"mask_prompt": mask_prompt, "max_seq_length": max_seq_length, "prompt_feature": prompt_feature}
    given |= {"completion_feature": completion_feature, "text_feature": text_feature, "chat_feature": chat_feature}
    settings = resolve_settings(given, config)
    _check_tokenizer(tokenizer)
    if isinstance(source, Mapping):
        path, raw_splits, notes = None, read_memory(source), []
    elif isinstance(source, str) and (name := hub_id(source)) is not None:
        path, (raw_splits, notes) = f"{PREFIX}{name}", read_hub(name)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(os.path.abspath(os.path.expanduser(os.fsdecode(source))))
        raw_splits, notes = read_folder(path)
    else:
        hint = ' Give the rows their split: {"train": rows}.' if isinstance(source, (list, tuple)) else ""
        raise DataError(f'Expected a folder or {{"train": rows, ...}}, got {type(source).__name__}.{hint}')
    builder = _Builder(tokenizer, settings, notes)
    splits = {raw.name: builder.build(raw) for raw in raw_splits}
    if builder.problems:
        raise bad_rows_error(builder.problems, str(path) if path else "the rows given")
    for split in splits.values():
        _check_trainable(split, settings)
    return DataSet(splits, settings, None if path is None else str(path), builder.notes, tokenizer)


def _check_tokenizer(tokenizer) -> None:
    if callable(tokenizer) and hasattr(tokenizer, "apply_chat_template"):
        return
    hint = " Pass its .tokenizer." if hasattr(tokenizer, "tokenizer") else ""
    raise ConfigError(f"tokenizer: expected a tokenizer of transformers (lm.tokenizer), got {type(tokenizer).__name__}.{hint}")


class _Builder:
    """Makes splits of rows, and gathers what is wrong and what is to be announced, over all splits."""

    def __init__(self, tokenizer, settings: DataSettings, notes: list[str]):
        self.tokenizer = tokenizer
        self.settings = settings
        self.notes = list(notes)
        self.problems: list[str] = []

    def build(self, raw: RawSplit) -> Split:
        """The split of all rows that can be used; `problems` grows by a line for each that cannot.

        Raises:
            ConfigError: the prompt is to be masked in a format that has none.
        """
        problems = list(raw.problems)
        good: list[tuple[str, Mapping]] = []
        format = detect_format([row for _, row in raw.rows], self.settings)
        if format is None:
            problems += [f"{source}: {_no_format(row, self.settings)}" for source, row in raw.rows]
        else:
            self._prepare(raw, format)
            for source, row in raw.rows:
                problem = row_problem(row, format, self.settings)
                good.append((source, row)) if problem is None else problems.append(f"{source}: {problem}")
        encoded = encode_rows(good, format or "text", self.tokenizer, self.settings)
        self.problems += sorted(problems + encoded.problems, key=_line_number)
        split = Split(raw.name, format or "text", encoded.examples, raw.blank_lines)
        self._announce(split, encoded.unshown_tools)
        return split

    def _prepare(self, raw: RawSplit, format: str) -> None:
        if format == "text":
            if self.settings.mask_prompt:
                raise ConfigError(
                    f"mask_prompt=True means nothing for {raw.label}: its rows have the text format, in which there is no prompt to mask. "
                    "Use mask_prompt=False, or rows of the chat or completions format."
                )
            if self.tokenizer.eos_token_id is None:
                self._note("The tokenizer has no end-of-text token: none is put behind the texts.")
        else:
            self._note(ensure_chat_template(self.tokenizer))
            if "strftime_now" in str(self.tokenizer.chat_template):
                self._note("The chat template can write the date of today into the rows: their tokens may differ from day to day.")
        defaults = DataSettings()
        for name in FEATURES:
            key = getattr(self.settings, name)
            if key != getattr(defaults, name) and not any(key in row for _, row in raw.rows):
                self._note(f"{raw.label}: no row has the key {key!r} that {name} names.")

    def _announce(self, split: Split, unshown_tools: int) -> None:
        label, rows = split.name, len(split)
        if split.truncated:
            limit, lost = self.settings.max_seq_length, split.tokens_cut
            self._note(f"{label}: {split.truncated:,} of {rows:,} rows cut to max_seq_length={limit:,} tokens ({lost:,} tokens lost).")
        if len(split.untrainable):
            self._note(f"{label}: {len(split.untrainable):,} of {rows:,} rows have no token to train on and stay out of the batches.")
        if unshown_tools:
            self._note(f"{label}: the chat template leaves out the tools of {unshown_tools:,} of {rows:,} rows.")
        if split.blank_lines:
            self._note(f"{label}: {split.blank_lines:,} blank lines, which are no rows.")

    def _note(self, note: str | None) -> None:
        if note and note not in self.notes:
            self.notes.append(note)


def _no_format(row: Mapping, settings: DataSettings) -> str:
    hint = feature_hint(row, settings) or " Other names: prompt_feature=, completion_feature=, text_feature=, chat_feature=."
    return f"no known format: has the keys {names_of(row, empty='(none)')}, expected {expected_keys(settings)}.{hint}"


def _line_number(problem: str) -> int:
    """The line of a problem `"file:line: reason"`; 0 where it is about the whole file."""
    part = problem.split(":", 2)[1]
    return int(part) if part.isdigit() else 0


def _check_trainable(split: Split, settings: DataSettings) -> None:
    """Refuse a split with nothing to train on.

    Raises:
        DataError: no row of it has a trained token.
    """
    if len(split.trainable):
        return
    why = []
    if split.truncated:
        why.append(f"{split.truncated:,} of them are cut at max_seq_length={settings.max_seq_length:,}: raise it")
    if split.format == "chat" and settings.mask_prompt:
        roles = sorted({str(m["role"])[:40] for e in split for m in e.row[settings.chat_feature]})
        why.append(f"mask_prompt=True trains on turns of the role 'assistant' only, found are {', '.join(map(repr, roles[:8]))}")
    reason = "; ".join(why) or "each is shorter than two tokens: give them more text"
    raise DataError(f"{split.name}: none of the {len(split):,} rows has a token to train on ({reason}).")
