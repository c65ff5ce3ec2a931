"""Splits and data sets: what `load_data` returns."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from fulltune_nb.chat_template import ensure_chat_template, writes_date
from fulltune_nb.data.cache import with_cache
from fulltune_nb.data.conform import conform
from fulltune_nb.data.encode import HELP, Ends, encode_rows, trained_ends
from fulltune_nb.data.example import Lens, SpecialTokenCheck, check_special_tokens, special_token_notes
from fulltune_nb.data.look import dataset_html
from fulltune_nb.data.mixture import is_mixture, joined, read_mixture, weights_note
from fulltune_nb.data.read import read_source, stored
from fulltune_nb.data.rows import SPLITS, RawSplit, bad_rows_error, detect_format, row_problem
from fulltune_nb.data.settings import FEATURES, DataSettings, resolve_settings, with_date
from fulltune_nb.data.split import Split, with_valid
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.html import counted, printable
from fulltune_nb.settings import whole_number

_REASONS_SHOWN = 3  # of the rows that are left out, in the notes


class DataSet:
    """What `load_data` returns.

    Attributes:
        train, valid, test: a `Split`, or None where there is none.
        settings: the `DataSettings` it was made with.
        source: absolute path of the folder, `hf:` and the name for a data set of the hub, an object of JSON where each split has its
            own place or each data set a weight, None for rows in memory; `load_data` takes it again.
        tokenizer: the one it was made with.
        notes_shown: whether somebody has shown `notes`, so that no other need.
        date_is_todays: whether `settings.template_date` was not given, but is the day on which this was loaded.
        load_again: loads the same rows again, with the `template_date` it is called with; None where rows can be read once only.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        settings: DataSettings,
        source: str | dict[str, float] | None,
        notes: Sequence[str],
        tokenizer: Any,
    ):  # fmt: skip
        self.train: Split | None = splits.get("train")
        self.valid: Split | None = splits.get("valid")
        self.test: Split | None = splits.get("test")
        self.settings = settings
        self.source = source
        self._notes = list(notes)
        self.notes_shown = False
        self.tokenizer = tokenizer
        self.date_is_todays = False
        self.load_again: Callable[[str | None], DataSet] | None = None

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that there are, by name."""
        named = {name: getattr(self, name) for name in SPLITS}
        return {name: split for name, split in named.items() if split is not None}

    @property
    def notes(self) -> list[str]:
        """Lines to announce once: what was cut, left out or put in place of something missing, and `special_token_notes`."""
        return [printable(note) for note in (*self._notes, *self.special_token_notes)]

    @cached_property
    def special_tokens(self) -> dict[str, SpecialTokenCheck]:
        """What `check_special_tokens` finds in each split; nothing for ids that no tokenizer of ours made."""
        splits = {} if self.tokenizer is None else self.splits
        return {name: check_special_tokens(split, self.tokenizer) for name, split in splits.items()}

    @cached_property
    def special_token_notes(self) -> list[str]:
        """A line for each problem with special tokens in each split."""
        return [note for name, check in self.special_tokens.items() for note in special_token_notes(self.splits[name], check)]

    @property
    def trained_ends(self) -> Ends:
        """The ends that `train` trains: stop ids, first the one that ends a conversation's last answer, and stop strings."""
        return trained_ends(self.train, self.tokenizer, self.settings)

    @cached_property
    def single_turn(self) -> bool:
        """Whether each row of `train` is one question and its answer; of plain text none is."""
        if self.train is None or self.train.format != "chat":
            return self.train is not None and self.train.format == "completions"
        conversations = (row.get(self.settings.chat_feature) or () for row in self.train.examples.rows)
        return all(sum(message.get("role") == "user" for message in messages) == 1 for messages in conversations)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the fingerprints of all splits."""
        return hashlib.sha256("\n".join(f"{name} {split.fingerprint}" for name, split in self.splits.items()).encode()).hexdigest()

    def show(self, n: int = 3, split: str = "train") -> Lens:
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
    tokenizer: Any,
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
    mask_until: str | None = None,
    valid_fraction: float | None = None,
    config: object | None = None,
) -> DataSet:
    """Read rows, find their format, and make tokens and loss masks of them.

    Args:
        source: a folder with `train.jsonl`, `valid.jsonl`, `test.jsonl` (any of them; `.csv` too, and `.parquet` with the
            extra `datasets`), a data set of the hub as `"hf:org/name"` (same extra; `"hf:folder"` for one in the hub's layout), or
            the rows themselves as `{"train": rows, "valid": rows, "test": rows}`, each a list of dicts, a table, or in their place
            where they are (`"hf:org/name:train[:90%]"`, a file, a folder). Several folders or data sets of
            the hub with weights, `{"a": 0.7, "hf:org/b": 0.3}`: 70 % of the rows of each epoch are drawn from a; see `StepBatches`.
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
        mask_until: a marker such as "A:" in rows of the text format: trained on is what follows its last occurrence. A token that reaches
            across the marker's end is; a row without the marker is a bad one.
        valid_fraction: share of the train rows that becomes the valid split, where there is none: at least one row, chosen by the rows'
            texts, so that they are the same whatever the order of the rows and the seed of a run. Rows of the same text stay together.
        config: an object with fields of these names, such as a `TrainConfig`, to take them from.

    Raises:
        DataError: nothing to read, or bad rows (with `bad_rows="skip"`: a split of nothing else); all of them are collected, with file
            and line, in `.problems`.
        ConfigError: a setting is wrong, disagrees with `config`, or means nothing for the format found.
        MissingDependencyError: the package `datasets` is needed and not installed.
    """
    given = {"mask_prompt": mask_prompt, "max_seq_length": max_seq_length, "prompt_feature": prompt_feature}
    given |= {"completion_feature": completion_feature, "text_feature": text_feature, "chat_feature": chat_feature}
    given |= {"bad_rows": bad_rows, "long_rows": long_rows, "mask_until": mask_until, "valid_fraction": valid_fraction}
    given |= {"template_date": template_date}
    settings = resolve_settings(given, config)
    _check_tokenizer(tokenizer)
    undated, settings = settings, with_date(settings, tokenizer)
    where, raw_splits, notes, weights = _read(source)
    built, problems = {}, []
    for data_set, raw in raw_splits:
        name = f"{data_set}/{raw.name}" if data_set else raw.name
        split = built[data_set, raw.name] = _build(raw, name, tokenizer, settings, notes)
        problems += split.skipped if settings.bad_rows == "error" or not len(split) else []
    if problems:
        usable = settings.bad_rows == "error" and all(map(len, built.values()))
        remedy = "Correct or remove these rows" + (', or leave them out by bad_rows="skip"' if usable else "")
        raise bad_rows_error(problems, where or "the rows given", remedy)
    for split in built.values():
        _check_trainable(split, settings)
    if all(split.format == "text" for split in built.values()):
        settings = undated
    splits = joined(built, weights) if weights else {name: split for (_, name), split in built.items()}
    if settings.valid_fraction:
        splits = with_valid(splits, settings.valid_fraction, notes)
    if weights and "train" in splits:
        notes.append(weights_note(splits["train"]))
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


def _read(source: Any) -> tuple[str | None, list[tuple[str, RawSplit]], list[str], dict[str, float]]:
    """`DataSet.source`, the splits of each data set with the name it is given by ("" for a single one), notes on what was not read, and
    the weights of several data sets."""
    if isinstance(source, str) and source.startswith("{"):
        source = stored(source)
    if is_mixture(source):
        return read_mixture(source)
    where, raw_splits, notes = read_source(source)
    return where, [("", raw) for raw in raw_splits], notes, {}


def _build(raw: RawSplit, name: str, tokenizer, settings: DataSettings, notes: list[str]) -> Split:
    """The split of all rows that can be used; `notes` grows by what is to be announced, `name` standing before it."""
    conform(raw, name, tokenizer, settings)
    format = detect_format((row for _, row in raw.rows), settings)
    if format is not None:
        notes += _before_encoding(raw, name != raw.name, format, tokenizer, settings)
    good, problems = [], list(raw.problems)
    for source, row in raw.rows:
        problem = row_problem(row, format, settings)
        good.append((source, row)) if problem is None else problems.append(f"{source}: {problem}")
    format = format or "text"
    encoded = with_cache(good, format, tokenizer, settings, lambda: encode_rows(good, format, tokenizer, settings, name), notes)
    problems = sorted(problems + encoded.problems, key=_line_number)
    split = Split(name, format, encoded.examples, raw.blank_lines, problems)
    notes += raw.notes + _left_out(split, encoded.left_out, settings)
    return split


def _before_encoding(raw: RawSplit, is_one_of_several: bool, format: str, tokenizer, settings: DataSettings) -> list[str]:
    """Notes on what the format needs of settings and tokenizer, which gets a chat template where it has none."""
    notes = []
    setting, hint = _meaningless(format, settings)
    if setting and not is_one_of_several:
        raise ConfigError(f"{setting} means nothing for {raw.label}: its rows have the {format} format. {hint}")
    if setting:
        notes.append(f"{raw.label}: {setting} means nothing for its rows, which have the {format} format: all of them is trained on.")
    if format != "text":
        notes += [note for note in [ensure_chat_template(tokenizer)] if note]
        if settings.template_date and writes_date(tokenizer):
            notes.append(f"The chat template can write a date into the rows: it is {settings.template_date} (template_date).")
    elif tokenizer.eos_token_id is None:
        notes.append("The tokenizer has no end-of-text token: none is put behind the texts.")
    defaults = DataSettings()
    for name in FEATURES:
        key = getattr(settings, name)
        if key != getattr(defaults, name) and not any(key in row for _, row in raw.rows):
            notes.append(f"{raw.label}: no row has the key {key!r} that {name} names.")
    return notes


def _meaningless(format: str, settings: DataSettings) -> tuple[str, str]:
    """The mask that rows of a format cannot have, as it is set, and what to do; empty where there is none."""
    if format == "text" and settings.mask_prompt:
        hint = 'There is no prompt to mask. Use mask_prompt=False, rows of the chat or completions format, or mask_until="A:"'
        return f"mask_prompt={settings.mask_prompt}", f"{hint}, which trains on what follows a marker."
    if format != "text" and settings.mask_until is not None:
        return f"mask_until={settings.mask_until!r}", "It is for texts; use mask_prompt=True, which trains on the answers."
    return "", ""


def _left_out(split: Split, by_template: Mapping[str, Sequence[str]], settings: DataSettings) -> list[str]:
    """What is to be announced of a split: what was cut, not shown or is not trained on."""
    limit, cut, dropped, untrainable = f"max_seq_length={settings.max_seq_length:,}", split.truncated, split.dropped, len(split.untrainable)
    of_rows = f"of {len(split) + dropped - split.windows + split.split_rows:,} rows"
    of_examples = f"of {len(split):,} windows and rows" if split.windows else of_rows
    notes = [
        cut and f"{cut:,} {of_rows} cut to {limit} tokens ({counted(split.tokens_cut, 'token')} lost).",
        dropped
        and f"{dropped:,} {of_rows} left out, because they have more than {limit} tokens ({counted(split.tokens_dropped, 'token')} lost).",
        split.windows and f"{split.split_rows:,} {of_rows} split into {split.windows:,} windows of at most {limit} tokens.",
        untrainable and f"{untrainable:,} {of_examples} have no token to train on and stay out of the batches.",
        *(
            f"the chat template leaves out {what} of {len(sources):,} {of_rows}, first {sources[0]}. {HELP.get(what, '')}".rstrip()
            for what, sources in by_template.items()
        ),
        split.blank_lines and f"{split.blank_lines:,} blank lines, which are no rows.",
        split.skipped and _skipped(split),
    ]
    return [f"{split.name}: {note}" for note in notes if note]


def _skipped(split: Split) -> str:
    """What `bad_rows="skip"` has left out, with the first reasons."""
    first = "; ".join(split.skipped[:_REASONS_SHOWN])
    more = f"; and {len(split.skipped) - _REASONS_SHOWN:,} more" if len(split.skipped) > _REASONS_SHOWN else ""
    place = f"data.{split.name.rpartition('/')[2]}.skipped"
    return f"{len(split.skipped):,} rows cannot be used and are left out ({first}{more}). All of them: {place}."


def _line_number(problem: str) -> int:
    """The line of a problem `"file:line: reason"`; 0 where it is about the whole file."""
    line = problem.partition(": ")[0].rpartition(":")[2]
    return int(line) if line.isdigit() else 0


def _check_trainable(split: Split, settings: DataSettings) -> None:
    if len(split.trainable):
        return
    why = []
    if split.truncated:
        why.append(f"{split.truncated:,} of them are cut at max_seq_length={settings.max_seq_length:,}: raise it")
    if split.dropped:
        why.append(f"{split.dropped:,} are left out, longer than max_seq_length={settings.max_seq_length:,}: raise it")
    if split.format == "chat" and len(split):
        messages = [message for example in split for message in example.row[settings.chat_feature]]
        roles = sorted({str(message["role"])[:40] for message in messages})
        if settings.mask_prompt and "assistant" not in roles:
            found = ", ".join(map(repr, roles[:8]))
            why.append(f"mask_prompt={settings.mask_prompt} trains on turns of the role 'assistant' only, found are {found}")
        if any(message.get("weight") == 0 or message.get("train") in (False, 0) for message in messages):
            why.append("messages with weight 0 or train false are not trained on")
    reason = "; ".join(why) or "each is shorter than two tokens: give them more text"
    raise DataError(f"{split.name}: none of the {len(split):,} rows has a token to train on ({reason}).")
