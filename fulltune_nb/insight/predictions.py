"""What a model says at each place of a text: how well the next token was predicted, and which ones were the likeliest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from fulltune_nb.chat_template import prompt_ids
from fulltune_nb.cpu import softmax_statistics
from fulltune_nb.data.example import Example, visible
from fulltune_nb.data.split import check_ids
from fulltune_nb.errors import IN_EVALUATION, ConfigError, tells_device_errors
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.training.loss import chunks

ALTERNATIVES = 5
_POSITIONS = 4096  # B * T of a forward pass


def as_examples(lm: LanguageModel, given: Any) -> list[Example]:
    """One example or text, or many; a text is tokenized with the special tokens its tokenizer adds, and all of it counts as trained on.

    Raises:
        ConfigError: something else.
        DataError: token ids that the model has not.
        TornStepError: the model's weights are not those of a whole step.
    """
    lm.check_whole()
    if isinstance(given, (str, Example)):
        given = [given]
    if not isinstance(given, Sequence) or not all(isinstance(one, (str, Example)) for one in given):
        hint = " Pass one of its splits, such as data.valid." if hasattr(given, "splits") else ""
        raise ConfigError(f"Expected an example, a text, or a list of them, got {type(given).__name__}.{hint}")
    examples = [text_example(lm, one, number) if isinstance(one, str) else one for number, one in enumerate(given)]
    check_ids(examples, lm.config.vocab_size, lm.tokenizer)
    return examples


def text_example(lm: LanguageModel, text: str | Sequence[int], number: int = 0) -> Example:
    """A text, or token ids, as an example of its own, for a model that is whole."""
    lm.check_whole()
    tokens = np.array(prompt_ids(lm.tokenizer, text, lm.config.vocab_size), dtype=np.int32)
    return Example(tokens, np.arange(len(tokens)) > 0, text, f"text:{number + 1}", 0, {"text": text}, lm.tokenizer)


def trained_tokens(example: Example) -> np.ndarray:
    """(T,) bool: the tokens that the loss is taken over; never the first, which nothing predicts."""
    mask = np.array(example.loss_mask, dtype=bool)
    mask[:1] = False
    return mask


def check_same_tokens(lm: LanguageModel, other: LanguageModel, examples: Sequence[Example]) -> None:
    """That a token id means the same to two models."""
    used = np.unique(np.concatenate([example.tokens for example in examples] or [np.zeros(0, np.int32)])).tolist()
    if used and used[-1] >= other.config.vocab_size:
        there = other.config.vocab_size
        raise ConfigError(f"base: it has {there} token ids, the examples use id {used[-1]}. Compare models of one tokenizer.")
    for token, here, there in zip(used, *(m.tokenizer.convert_ids_to_tokens(used) for m in (lm, other)), strict=True):
        if here != there:
            raise ConfigError(f"base: token id {token} is {there!r} there and {here!r} here. Compare models of one tokenizer.")


# -- how well a model predicts ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """How well each token of a row was predicted from those before it; the first, which nothing predicts, has NaN and rank 0."""

    losses: np.ndarray
    """(T,) float32, nats: -log p(token)."""
    ranks: np.ndarray
    """(T,) int32; 1 is the likeliest token. Ties count for the token."""
    top_ids: np.ndarray
    """(T, K) int32, the likeliest tokens at each place, best first; empty where none were asked for."""
    top_probabilities: np.ndarray
    """(T, K) float32."""

    @property
    def probabilities(self) -> np.ndarray:
        """(T,) float32."""
        return np.exp(-self.losses)


@tells_device_errors(IN_EVALUATION)
def token_statistics(
    model: Decoder, rows: Sequence[np.ndarray], alternatives: int = ALTERNATIVES, last: Sequence[int] | None = None
) -> list[TokenStatistics]:
    """One for each row of token ids, in their order. `alternatives=0` leaves out ranks and alternatives, and takes less time; so does
    `last`, of how many of each row's last tokens there are some: before them stand NaN and rank 0, as for a first token.
    """
    found: list[TokenStatistics | None] = [None] * len(rows)
    for numbers in _batches([len(row) for row in rows]):
        inputs = np.zeros((len(numbers), max(1, *(len(rows[i]) - 1 for i in numbers))), dtype=np.int32)
        for b, i in enumerate(numbers):
            inputs[b, : max(0, len(rows[i]) - 1)] = rows[i][:-1]
        # (B, T - 1, D); padding stands to the right, where nothing looks from
        lengths = mx.array([max(0, len(rows[i]) - 1) for i in numbers])
        hidden = model.hidden_states(mx.array(inputs), dtype=model.compute_dtype, lengths=lengths)
        mx.eval(hidden)
        for b, i in enumerate(numbers):
            size = len(rows[i])
            first = min(1, size) if last is None else max(min(1, size), size - last[i])
            losses, _, ranks, *top = predictions(model, hidden[b, max(0, first - 1) : max(0, size - 1)], rows[i][first:], alternatives)
            losses, ranks, *top = (_with_first(array, first) for array in (losses, ranks, *top))
            losses[:first] = np.nan
            found[i] = TokenStatistics(losses, ranks, *top)
    return found


def _with_first(array: np.ndarray, first: int) -> np.ndarray:
    """(T, ...) from (T - first, ...): zeros for the first tokens, which nothing predicts or nobody asks about."""
    return np.concatenate([np.zeros((first, *array.shape[1:]), array.dtype), array])


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of about one length together, at most `_POSITIONS` positions (or one row) at a time."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > _POSITIONS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def predictions(model: Decoder, normed: mx.array, targets: np.ndarray, alternatives: int = ALTERNATIVES) -> tuple[np.ndarray, ...]:
    """What a model says at n places, and how it fares with the m <= n tokens that follow the first of them; a chunk of logits at a time.

    Args:
        model: the decoder.
        normed: (n, D), hidden states behind the final norm.
        targets: (m,) token ids.
        alternatives: K, of the likeliest tokens; 0 leaves out all but the losses.

    Returns:
        Of the targets losses (m,) float32 in nats, probabilities (m,) float32 and ranks (m,) int32; of the likeliest tokens ids (n, K)
        int32 and probabilities (n, K) float32.
    """
    size, vocab_size = len(targets), model.config.vocab_size
    count = min(alternatives, vocab_size)
    losses, probabilities, ranks = np.zeros(size, np.float32), np.zeros(size, np.float32), np.zeros(size, np.int32)
    top_ids, top_probabilities = np.zeros((len(normed), count), np.int32), np.zeros((len(normed), count), np.float32)
    for chunk in chunks(len(normed), vocab_size):
        logits = model.head(normed[chunk]).astype(mx.float32)  # (n, V)
        log_sum, shares = softmax_statistics(logits)
        if count:
            top_ids[chunk], top_probabilities[chunk] = _top_tokens(logits, shares, count)
        wanted = mx.array(targets[chunk].astype(np.int32))[:, None]  # the last place of a text has none
        if not len(wanted):
            continue
        logits, log_sum, shares = logits[: len(wanted)], log_sum[: len(wanted)], shares[: len(wanted)]
        at_target = mx.take_along_axis(logits, wanted, axis=1)  # (m, 1)
        losses[chunk] = np.array(log_sum - at_target[:, 0])
        if count:
            probabilities[chunk] = np.array(mx.take_along_axis(shares, wanted, axis=1)[:, 0])
            ranks[chunk] = np.array((logits > at_target).sum(axis=1) + 1)
    return losses, probabilities, ranks, top_ids, top_probabilities


def _top_tokens(logits: mx.array, shares: mx.array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and probabilities (n, K) of the likeliest tokens of logits and their softmax (n, V), best first."""
    ids = mx.argpartition(-logits, kth=count - 1, axis=-1)[:, :count]
    ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(logits, ids, axis=-1), axis=-1), axis=-1)
    return np.array(ids), np.array(mx.take_along_axis(shares, ids, axis=-1))


def ranking(texts: Sequence[str], probabilities: np.ndarray) -> str:
    """Lines such as `1. 12.30% city`, of tokens and their probabilities, the likeliest first."""
    pairs = zip(texts, probabilities.tolist(), strict=True)
    return "\n".join(f"{place}. {share:.2%} {short(text, 40)}" for place, (text, share) in enumerate(pairs, 1))


def short(text: str, limit: int) -> str:
    """A token's text in one line."""
    text = visible(text).replace("\n", "")
    return text if len(text) <= limit else f"{text[:limit]}…"
