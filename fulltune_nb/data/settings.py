"""How rows become examples: the settings, checked, and how they combine with a training config."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from fulltune_nb.errors import ConfigError
from fulltune_nb.html import facts
from fulltune_nb.settings import show, whole_number


@dataclass(frozen=True)
class DataSettings:
    """How rows become examples.

    Raises:
        ConfigError: a value is of another type or out of range.
    """

    mask_prompt: bool = False
    """Train on the assistant's turns (chat) or the completion only, not on what precedes them."""
    max_seq_length: int = 2048
    """Tokens of a row that are kept, counted from its start."""
    prompt_feature: str = "prompt"
    """Key of the prompt in rows of the `completions` format."""
    completion_feature: str = "completion"
    """Key of the completion in rows of the `completions` format."""
    text_feature: str = "text"
    """Key of the text in rows of the `text` format."""
    chat_feature: str = "messages"
    """Key of the list of messages in rows of the `chat` format."""

    def _repr_html_(self) -> str:
        return facts("How rows become examples", [(f.name, getattr(self, f.name)) for f in fields(self)])

    def __post_init__(self):
        if not isinstance(self.mask_prompt, bool):
            raise ConfigError(f"mask_prompt: expected True or False, got {show(self.mask_prompt)}.")
        object.__setattr__(self, "max_seq_length", whole_number("max_seq_length", self.max_seq_length, low=2))
        for name in FEATURES:
            key = getattr(self, name)
            if not isinstance(key, str) or not key:
                raise ConfigError(f"{name}: expected the name of a key in the rows, got {show(key)}.")
        if self.prompt_feature == self.completion_feature:
            raise ConfigError(f"prompt_feature and completion_feature are both {self.prompt_feature!r}: expected two different keys.")


FEATURES = ("prompt_feature", "completion_feature", "text_feature", "chat_feature")


def resolve_settings(given: dict[str, Any], config: object | None) -> DataSettings:
    """The settings that `load_data` uses.

    Args:
        given: explicit arguments; None stands for "not given".
        config: any object with attributes of the same names, such as a `TrainConfig`; or None.

    Raises:
        ConfigError: an explicit argument disagrees with the config, the config has none of the settings, or a value is
            wrong.
    """
    names = [f.name for f in fields(DataSettings)]
    explicit = {name: value for name, value in given.items() if value is not None}
    if config is None:
        return DataSettings(**explicit)
    stored = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if not stored:
        raise ConfigError(f"config: expected an object with the fields {', '.join(names)} (a TrainConfig), got {show(config)}.")
    settings = DataSettings(**{**stored, **explicit})
    differing = [name for name in explicit if name in stored and stored[name] != explicit[name]]
    if differing:
        what = "; ".join(f"{name}: {stored[name]!r} in config, {explicit[name]!r} given" for name in differing)
        raise ConfigError(f"load_data and config disagree ({what}). Give each setting in one place, or the same in both.")
    return settings
