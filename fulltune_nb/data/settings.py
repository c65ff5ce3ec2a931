"""How rows become examples: the settings, checked, and how arguments and a config combine."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

from fulltune_nb.chat_template import writes_date
from fulltune_nb.errors import ConfigError
from fulltune_nb.html import facts
from fulltune_nb.settings import (
    SettingError,
    check_fields,
    choice,
    day,
    described,
    flag_or,
    names_of,
    number,
    optional,
    setting,
    show,
    text,
    whole,
)

FEATURES = ("prompt_feature", "completion_feature", "text_feature", "chat_feature")


@described
@dataclass(frozen=True)
class DataSettings:
    """How rows become examples.

    Raises:
        ConfigError: a value is of another type or out of range.
    """

    mask_prompt: bool | str = setting(
        False, flag_or("last"),
        "True: train on the assistant's turns (chat) or the completion only, not on what precedes them; \"last\": on the last turn only.",
    )  # fmt: skip
    max_seq_length: int = setting(2048, whole(2), "Tokens that a row has at most; `long_rows` says what becomes of a longer one.")
    prompt_feature: str = setting("prompt", text, "Key of the prompt in rows of the completions format.")
    completion_feature: str = setting("completion", text, "Key of the completion in rows of the completions format.")
    text_feature: str = setting("text", text, "Key of the text in rows of the text format.")
    chat_feature: str = setting("messages", text, "Key of the list of messages in rows of the chat format.")
    bad_rows: str = setting(
        "error", choice("error", "skip"), 'What rows that cannot be used do: an "error" that lists them all, or "skip", which counts them.'
    )
    long_rows: str = setting(
        "cut", choice("cut", "split", "drop"),
        'What becomes of a row with more tokens than `max_seq_length`: it is "cut" at the end, "split" into windows, in which each of its '
        'tokens is trained on exactly once, or left out ("drop").',
    )  # fmt: skip
    template_date: str | None = setting(
        None, optional(day),
        "The date that chat templates which write today's get, such as 2026-11-29; by default the day on which the data is loaded.",
    )  # fmt: skip
    mask_until: str | None = setting(
        None, optional(text), "A marker, such as A:, in rows of the text format; what follows its last occurrence is trained on.",
    )  # fmt: skip
    valid_fraction: float = setting(
        0.0, number(low=0.0, below=1.0),
        "Share of the train rows that becomes the valid split where there is none, chosen by the rows' texts; rows of the same text stay "
        "together. 0: none.",
    )  # fmt: skip

    def __post_init__(self):
        check_fields(self)
        if self.prompt_feature == self.completion_feature:
            message = f"prompt_feature and completion_feature are both {self.prompt_feature!r}: expected two different keys."
            raise SettingError(message, "prompt_feature")

    def _repr_html_(self) -> str:
        return facts("How rows become examples", vars(self).items())


def resolve_settings(given: dict[str, Any], config: object | None) -> DataSettings:
    """The settings that `load_data` uses.

    Args:
        given: explicit arguments; None stands for "not given".
        config: any object with attributes of the same names, such as a `TrainConfig`; or None.

    Raises:
        ConfigError: an explicit argument disagrees with the config, the config has none of the settings, or a value is
            wrong.
    """
    names = names_of(DataSettings)
    if config is not None and not any(hasattr(config, name) for name in names):
        raise ConfigError(f"config: expected an object with the fields {', '.join(names)} (a TrainConfig), got {show(config)}.")
    explicit = {name: value for name, value in given.items() if value is not None}
    stored = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    settings = DataSettings(**{**stored, **explicit})
    differing = [name for name in explicit if name in stored and stored[name] != explicit[name]]
    if differing:
        what = "; ".join(f"{name}: {stored[name]!r} in config, {explicit[name]!r} given" for name in differing)
        raise ConfigError(f"load_data and config disagree ({what}). Give each setting in one place, or the same in both.")
    return settings


DATE_VARIABLE = "FULLTUNE_TEMPLATE_DATE"
"""Environment variable that says what today is: runs of a sweep get the day on which the sweep began."""


def today() -> str:
    """The date of today, or the one in the environment variable `FULLTUNE_TEMPLATE_DATE`."""
    return os.environ.get(DATE_VARIABLE) or date.today().isoformat()


def with_date(settings: DataSettings, tokenizer: Any) -> DataSettings:
    """The settings with the date of today, where none is given and the tokenizer's chat template can write one.

    Raises:
        ConfigError: the environment variable `FULLTUNE_TEMPLATE_DATE` has no date.
    """
    if settings.template_date is not None or not writes_date(tokenizer):
        return settings
    return replace(settings, template_date=today())
