"""Generation: sampling, reading prompts into the cache, and answers as text, one at a time or many side by side.

Dimension letters: B rows, T tokens, V vocabulary, N candidates that are left after top-k.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from fulltune_nb.cpu import on_cpu
from fulltune_nb.device import machine_limit, memory_limits, recommended_working_set
from fulltune_nb.errors import IN_GENERATION, GenerationError, tells_device_errors
from fulltune_nb.html import counted, human_bytes, printable
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.detokenizer import Detokenizer, StopStrings, make_detokenizer
from fulltune_nb.models.kv_cache import KVCache, make_cache
from fulltune_nb.models.parameters import parameters_of
from fulltune_nb.settings import Refused, SettingError, check_fields, described, number, optional, setting, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PREFILL_TOKENS = 512  # of one row at a time: bounds the attention scores of a long prompt
_FUSED_PREFILL_TOKENS = 2048  # where no scores are held: bounds what else a block computes, and is enough work for a GPU
_PREFILL_BATCH_TOKENS = 8192  # of all rows at a time
_CHUNK_WORK = 2**31  # multiply-adds on a CPU at a time, in a prompt that has several chunks: some tenths of a second
_SCORE_WORK = 256  # multiply-adds that take as long as the mask and the exponential of one attention score
_HALF_PRECISION_WORK = 4  # so many times as long take products that are not in float32, which alone have a fast BLAS
_FEWEST_TOKENS = {"products": 32, "scores": 8}  # in a chunk; with fewer, reading weights, keys and values would cost more than the work
_MAX_SPREAD = 16  # tokens between the shortest and the longest prompt of a batch; each costs a step


def _share_above_0(value: Any) -> float:
    share = number(0, 1)(value)
    if share == 0:
        raise Refused("a number above 0 and up to 1 (for the likeliest token only, use temperature=0)")
    return share


def _stop_texts(value: Any) -> tuple[str, ...]:
    texts = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple, set, frozenset)) or not all(isinstance(text, str) and text for text in texts):
        raise Refused("a text or a list of texts, none of them empty")
    return tuple(texts)


@described
@dataclass(frozen=True)
class Sampling:
    """How answers are drawn and where they end.

    Raises:
        GenerationError: a value of the wrong type or range.
    """

    max_tokens: int = setting(256, whole(1), "tokens after which an answer ends in any case")
    temperature: float = setting(0.0, number(0), "0 takes the likeliest token each time, 1 draws from the model's own probabilities")
    top_p: float = setting(
        1.0, _share_above_0, "draw among the fewest likeliest tokens that hold this much probability (Holtzman et al. 2020), after top_k"
    )
    top_k: int = setting(0, whole(0), "draw among this many likeliest tokens; 0: all")
    min_p: float = setting(
        0.0, number(0, 1), "draw among tokens with at least this share of the likeliest one's probability (Nguyen et al. 2024)"
    )
    stop: str | Sequence[str] | None = setting(
        None, _stop_texts, "texts, or special tokens by their names, that end an answer and are no part of it; held as a tuple"
    )
    seed: int | None = setting(
        None, optional(whole(0, 2**63 - 1)), "of the drawing; the global random state is neither used nor changed. None: another each time"
    )

    def __post_init__(self):
        try:
            check_fields(self)
        except SettingError as error:
            raise GenerationError(str(error)) from None

    def first_seed(self) -> int:
        """The seed, or a new one."""
        return int.from_bytes(os.urandom(4)) if self.seed is None else self.seed


class Sampler:
    """Draws the next token of each row, every row with a random key of its own.

    Row `i` draws as the only row of a sampler with seed `seeds[i]` would: what stands beside it does not matter.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]):
        self._sampling = sampling
        self._keys = None
        if sampling.temperature > 0:
            self._keys = mx.stack([mx.random.key(seed) for seed in seeds])  # (B, 2)

    def __call__(self, logits: mx.array, drawing: mx.array | None = None) -> mx.array:
        """Logits (B, V) -> token ids (B,).

        Args:
            logits: of the next token.
            drawing: (B,) bool, which rows use their token; the others' keys stay as they are. None: all.
        """
        if self._keys is None:
            return mx.argmax(logits, axis=-1)
        pairs = mx.vmap(mx.random.split)(self._keys)  # (B, 2) -> (B, 2, 2): the key to go on with, the key to use
        following = pairs[:, 0]
        self._keys = following if drawing is None else mx.where(drawing[:, None], following, self._keys)
        candidates, scores = candidate_scores(logits, self._sampling)
        drawn = mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(scores, pairs[:, 1])
        return drawn if candidates is None else mx.take_along_axis(candidates, drawn[:, None], axis=-1)[:, 0]


def candidate_scores(logits: mx.array, sampling: Sampling) -> tuple[mx.array | None, mx.array]:
    """The tokens that may be drawn, and their logits with the temperature applied: minus infinity for what is filtered out.

    The order is that of Hugging Face: temperature, top-k, top-p, min-p.

    Returns:
        ids (B, N), likeliest first, or None for all ids in their order; and scores (B, N).
    """
    logits = logits.astype(mx.float32)
    # The maximum first, so that nothing overflows; and a temperature that float32 can divide by.
    scores = (logits - logits.max(axis=-1, keepdims=True)) / max(sampling.temperature, 1e-6)
    size = scores.shape[-1]
    top_k = min(sampling.top_k or size, size)
    if top_k == size and sampling.top_p == 1.0 and sampling.min_p == 0.0:
        return None, scores
    if top_k < size:
        candidates = mx.argpartition(-scores, kth=top_k - 1, axis=-1)[:, :top_k]
        within = mx.argsort(-mx.take_along_axis(scores, candidates, axis=-1), axis=-1)
        candidates = mx.take_along_axis(candidates, within, axis=-1)
    else:
        candidates = mx.argsort(-scores, axis=-1)
    scores = mx.take_along_axis(scores, candidates, axis=-1)
    probabilities = mx.softmax(scores, axis=-1)
    likelier = mx.cumsum(probabilities, axis=-1) - probabilities  # the sum of the ones before
    first = mx.arange(top_k) == 0  # is always kept, whatever rounding does
    kept = first | ((likelier < sampling.top_p) & (probabilities >= sampling.min_p * probabilities[:, :1]))
    return candidates, mx.where(kept, scores, -mx.inf)


class Reading(str):
    """An empty piece of an answer that has not begun yet: of the prompt's `total` tokens, so many are `read`."""

    def __new__(cls, read: int, total: int):
        made = super().__new__(cls)
        made.read, made.total = read, total
        return made


def prefill(model: Decoder, ids: mx.array, cache: Sequence[KVCache]) -> Generator[Reading, None, mx.array]:
    """Reads prompts (B, T) into the cache, some ten to thousand tokens at a time.

    Yields:
        After each chunk but the last, how far it is.

    Returns:
        The next token's logits (B, V).
    """
    (rows, length), begin = ids.shape, 0
    lengths = {"lengths": mx.array([length])} if model.config.by_length else {}
    for end in _chunk_ends(model, rows, length):
        hidden, begin = model.hidden_states(ids[:, begin:end], cache, **lengths), end
        if end < length:
            mx.eval([layer.arrays for layer in cache])  # of these tokens later ones need keys and values alone
            yield Reading(end, length)
    return model.head(hidden[:, -1])


def _most_tokens(model: Decoder, rows: int) -> int:
    """Of each row in a chunk."""
    fused = not on_cpu() and model.config.score_cap is None and not model.config.sinks
    return max(1, min(_FUSED_PREFILL_TOKENS if fused else _PREFILL_TOKENS, _PREFILL_BATCH_TOKENS // rows))


def _chunk_ends(model: Decoder, rows: int, length: int) -> Iterator[int]:
    """Where the chunks of each row end, in tokens. On a CPU those of a long prompt get smaller the more each token costs, so that a
    notebook can be used between them; how small is a matter of the model and the place alone, so that answers can be repeated."""
    config, most = model.config, _most_tokens(model, rows)
    if length <= most or not on_cpu():
        yield from (*range(most, length, most), length)
        return
    slower = 1 if model.embed_tokens.weight.dtype == mx.float32 else _HALF_PRECISION_WORK
    products, end = slower * sum(array.size for layer in model.layers for array in parameters_of(layer).values()), 0
    while end < length:
        scores = config.num_heads * sum(min(window or end, end) + most for window in config.windows)
        work = {"products": products, "scores": scores * (_SCORE_WORK + slower * 2 * config.head_dim)}  # of one token
        size = min(most, *(max(_FEWEST_TOKENS[kind], _CHUNK_WORK // (rows * own)) for kind, own in work.items()))
        end = min(length, end + size)
        yield end


@tells_device_errors(IN_GENERATION)
def decode(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
) -> Iterator[list[int | None] | Reading]:
    """Token after token, all prompts side by side.

    The prompts may differ in length: all are read up to the length of the shortest; then, step by step, the longer ones take
    their own next token where the shorter ones already take what is drawn. So no padding and no masks are needed, and a row
    is computed as it would be alone.

    Yields:
        While prompts of several chunks are read, how far that is. Then for each step and row, the token drawn, or None while the row's
        prompt is still being read. Rows go on until the last has had `max_tokens`; the caller ends them earlier.

    Raises:
        GenerationError: the model's output is NaN or inf, or the prompts need more memory than there is.
    """
    longest = max(map(len, prompts))
    _check_memory(model, len(prompts), longest)
    with _memory_limits(model, len(prompts), longest + sampling.max_tokens):
        yield from _decoded(model, prompts, sampling, seeds)


def warn_of_length(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    """Tells of prompts with more tokens than the model was made for."""
    lengths = [len(prompt) for prompt in prompts]
    if limit is not None and (longer := sum(length > limit for length in lengths)):
        which = "The prompt" if len(lengths) == 1 else f"{longer:,} of {counted(len(lengths), 'prompt')}, the longest of which"
        text = f"{which} has {max(lengths):,} tokens, but the model was made for {limit:,}: answers to longer texts are often nonsense."
        warnings.warn(printable(f"{text} Ask something shorter."), stacklevel=4)


def _check_memory(model: Decoder, rows: int, tokens: int) -> None:
    """
    Raises:
        GenerationError: weights, and keys and values of so many prompts of so many tokens, are more than this machine has.
    """
    needed, limit = _cache_bytes(model, rows, tokens), machine_limit()
    if needed + sum(array.nbytes for array in parameters_of(model).values()) > limit:
        prompts = f"{counted(rows, 'prompt')} of up to {tokens:,} tokens"
        raise GenerationError(
            f"{prompts}: keys and values take {human_bytes(needed)} beside the weights, and this machine has {human_bytes(limit)}."
            " Shorten what is asked; of many prompts, answer fewer at a time (batch_size)."
        )


def _cache_bytes(model: Decoder, rows: int, tokens: int) -> int:
    """Of the keys and values of so many tokens."""
    config = model.config
    kept = rows * sum(min(window or tokens, tokens) for window in config.windows) * 2 * config.num_kv_heads * config.head_dim
    return kept * model.embed_tokens.weight.itemsize


def _memory_limits(model: Decoder, rows: int, tokens: int) -> AbstractContextManager[None]:
    """On a Mac what answers of so many rows and tokens need at most is wired, and freed arrays are kept up to what they need besides
    the weights."""
    if not recommended_working_set():
        return nullcontext()
    config, weights = model.config, parameters_of(model)
    size, at_once = model.embed_tokens.weight.itemsize, rows * _most_tokens(model, rows)
    other = at_once * (4 * config.hidden_size + 3 * config.intermediate_size) + rows * config.vocab_size
    needed = _cache_bytes(model, rows, tokens) + size * other
    return memory_limits(sum(array.nbytes for array in weights.values()) + needed, needed)


def _decoded(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
) -> Iterator[list[int | None] | Reading]:
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    cache, sampler = make_cache(model.config.windows), Sampler(sampling, seeds)
    ids = mx.array([list(prompt[:shortest]) for prompt in prompts])
    logits = yield from prefill(model, ids, cache)
    if not mx.isfinite(logits).all().item():
        raise GenerationError("The model's output holds NaN or inf: its weights are broken. Load them again, or go back to a checkpoint.")
    tokens = _next_tokens(sampler, logits, prompts, shortest)
    end, switches = longest + sampling.max_tokens, [rope.switches_at for rope in model.config.ropes if rope and rope.switches_at]
    for position in range(shortest, end):
        following = None
        if position <= max(switches, default=-1):
            ids = mx.concatenate([ids, tokens[:, None]], axis=1)
        if position + 1 < end:  # set the next step going before this one is looked at, so that the device need not wait
            if position in switches:  # from here on all tokens are rotated otherwise, those in the cache too
                cache = make_cache(model.config.windows)
                logits = yield from prefill(model, ids, cache)
            else:
                logits = model(tokens[:, None], cache)[:, -1]  # (B, 1) -> (B, V)
            following = _next_tokens(sampler, logits, prompts, position + 1)
            mx.async_eval(following)
        values = tokens.tolist()
        yield [value if position >= len(prompt) else None for value, prompt in zip(values, prompts, strict=True)]
        tokens = following


def _next_tokens(sampler: Sampler, logits: mx.array, prompts: Sequence[Sequence[int]], position: int) -> mx.array:
    """The tokens at a position: a prompt's own where it reaches that far, else drawn. (B, V) -> (B,)"""
    given = [int(prompt[position]) if position < len(prompt) else -1 for prompt in prompts]
    if max(given) < 0:
        return sampler(logits)
    own = mx.array(given)
    return mx.where(own < 0, sampler(logits, own < 0).astype(own.dtype), own)


class Answer:
    """One answer as it grows.

    Attributes:
        tokens: ids so far, without the stop id.
        finished: nothing more is to come.
        cut: it ended because it had `max_tokens`.
    """

    def __init__(self, detokenizer: Detokenizer, sampling: Sampling, stop_ids: frozenset[int]):
        self._detokenizer, self._stop_ids, self._max_tokens = detokenizer, stop_ids, sampling.max_tokens
        self._stops = StopStrings(sampling.stop)
        self.tokens: list[int] = []
        self.finished = self.cut = False

    def add(self, token: int) -> str:
        """The text that became certain with this token. A character that is unfinished at the end is left out."""
        if token in self._stop_ids:
            self.finished = True
            return self._stops.finish()
        self.tokens.append(token)
        text = self._stops.add(self._detokenizer.add(token))
        if self._stops.found:
            self.finished = True
        elif len(self.tokens) >= self._max_tokens:
            self.finished = self.cut = True
            text += self._stops.finish()
        return text


class AnswerStream(Generator[str, None, None]):
    """Pieces of an answer's text, none of them empty.

    Attributes:
        steps: the same, and a `Reading` after each chunk of a long prompt.
        answer: as it grows.
    """

    def __init__(self, model: Decoder, answer: Answer, prompt: Sequence[int], sampling: Sampling, limit: int | None):
        """
        Args:
            model: the weights as they are at each step.
            answer: a new one.
            prompt: ids, at least one.
            sampling: how to draw.
            limit: tokens of the longest text that the model was made for, or None.
        """
        self.steps = stream_answer(model, answer, prompt, sampling)
        self.answer = answer
        self._prompt_tokens, self._limit = len(prompt), limit

    @property
    def outgrown(self) -> bool:
        """Whether prompt and answer have more tokens together than the model was made for, and the prompt alone has not."""
        return self._limit is not None and self._prompt_tokens <= self._limit < self._prompt_tokens + len(self.answer.tokens)

    def send(self, value: None) -> str:
        return next(filter(None, self.steps))

    def throw(self, *error: Any) -> str:
        return self.steps.throw(*error)


def stream_answer(model: Decoder, answer: Answer, prompt: Sequence[int], sampling: Sampling) -> Generator[str, None, None]:
    """Pieces of text, none of them empty but those that say how far a long prompt is read. The arguments are those of `AnswerStream`."""
    for step in decode(model, [prompt], sampling, [sampling.first_seed()]):
        if isinstance(step, Reading):
            yield step
        elif piece := answer.add(step[0]):
            yield piece
        if answer.finished:
            return


def new_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], sampling: Sampling, stop_ids: frozenset[int], continues: bool
) -> Answer:
    """An answer that has not begun.

    Args:
        tokenizer: of the model.
        prompt: ids.
        sampling: its `stop` holds all stop strings.
        stop_ids: tokens that end an answer.
        continues: the answer goes on with the prompt's text, so that a space between them is kept; False: it is a text of its own.
    """
    return Answer(make_detokenizer(tokenizer, prompt if continues else ()), sampling, stop_ids)


def answer_many(
    model: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
    continues: bool = True,
    batch_size: int = 32,
) -> list[str]:
    """The answers to many prompts, in their order; prompts of about one length are decoded side by side.

    Greedy answers are those of `stream_answer`, up to rounding in the matrix products. With a temperature, prompt `i` draws with
    `seed + i`.
    """
    first_seed, texts = sampling.first_seed(), [""] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    for batch in batches_by_length(lengths, batch_size, _spread(model, max(lengths, default=0))):
        answers = {row: new_answer(tokenizer, prompts[row], sampling, stop_ids, continues) for row in batch}
        for tokens in decode(model, [prompts[row] for row in batch], sampling, [first_seed + row for row in batch]):
            if isinstance(tokens, Reading):
                continue
            for row, token in zip(batch, tokens, strict=True):
                if token is not None and not answers[row].finished:
                    texts[row] += answers[row].add(token)
            if all(answer.finished for answer in answers.values()):
                break
    return texts


def _spread(model: Decoder, longest: int) -> int:
    """Tokens between the shortest and the longest prompt of a batch: none where a `dynamic` rotation of a prompt's first tokens depends
    on how long it is, since those of several are read up to the end of the shortest."""
    config = model.config
    dynamic = any(rope is not None and rope.scaling == "dynamic" for rope in config.ropes)
    return 0 if dynamic and longest > config.max_position_embeddings else _MAX_SPREAD


def batches_by_length(lengths: Sequence[int], batch_size: int, spread: int = _MAX_SPREAD) -> list[list[int]]:
    """Row numbers in batches whose lengths differ by no more than `spread`; every row once."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batches and len(batches[-1]) < batch_size and lengths[row] - lengths[batches[-1][0]] <= spread:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
