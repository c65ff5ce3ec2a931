"""What the insight functions accept as examples, and what they read from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fulltune_nb.data.encoding import Example
from fulltune_nb.errors import ConfigError, DataError
from fulltune_nb.language_model import LanguageModel
from fulltune_nb.prompts import prompt_ids


def as_examples(lm: LanguageModel, given: Any) -> list[Example]:
    """One example or text, or many; a text is tokenized with the special tokens its tokenizer adds, and all of it counts as trained on.

    Raises:
        ConfigError: something else.
        DataError: token ids that the model has not.
    """
    if isinstance(given, (str, Example)):
        given = [given]
    if not isinstance(given, Sequence) or not all(isinstance(one, (str, Example)) for one in given):
        hint = " Pass one of its splits, such as data.valid." if hasattr(given, "splits") else ""
        raise ConfigError(f"Expected an example, a text, or a list of them, got {type(given).__name__}.{hint}")
    examples = [text_example(lm, one, number) if isinstance(one, str) else one for number, one in enumerate(given)]
    for example in examples:
        if len(example.tokens) and not 0 <= example.tokens.min() <= example.tokens.max() < lm.config.vocab_size:
            raise DataError(
                f"{example.source}: token ids from {example.tokens.min()} to {example.tokens.max()}, but the model has 0 to "
                f"{lm.config.vocab_size - 1}. Load the data with this model's tokenizer."
            )
    return examples


def text_example(lm: LanguageModel, text: str, number: int = 0) -> Example:
    """A text as an example of its own."""
    tokens = np.array(prompt_ids(lm.tokenizer, text, lm.config.vocab_size), dtype=np.int32)
    mask = np.arange(len(tokens)) > 0
    return Example(tokens, mask, text, f"text:{number + 1}", 0, {"text": text}, lm.tokenizer)


def check_same_tokens(lm: LanguageModel, other: LanguageModel, examples: Sequence[Example]) -> None:
    """That a token id means the same to two models.

    Raises:
        ConfigError: it does not.
    """
    used = np.unique(np.concatenate([example.tokens for example in examples] or [np.zeros(0, np.int32)])).tolist()
    if used and used[-1] >= other.config.vocab_size:
        there = other.config.vocab_size
        raise ConfigError(f"base: it has {there} token ids, the examples use id {used[-1]}. Compare models of one tokenizer.")
    for token, here, there in zip(used, *(m.tokenizer.convert_ids_to_tokens(used) for m in (lm, other)), strict=True):
        if here != there:
            raise ConfigError(f"base: token id {token} is {there!r} there and {here!r} here. Compare models of one tokenizer.")
