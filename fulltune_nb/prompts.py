"""What the model reads before it answers: texts, ids and conversations as token ids, and where an answer ends."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import GenerationError
from fulltune_nb.render_limits import bounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int]
_MARK = "ANSWER-7c31"  # stands for an answer while we look at what a template writes after one


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, vocab_size: int) -> list[int]:
    """A prompt as ids: a text gets the special tokens its tokenizer adds, ids are taken as they are.

    An EOS that the tokenizer puts after every text is left out, since the answer is to go on there. An empty text is the BOS.

    Raises:
        GenerationError: nothing to start from, another type, or ids outside the vocabulary.
    """
    if not isinstance(prompt, str):
        return _checked_ids(prompt, vocab_size)
    tokens = list(tokenizer.encode(prompt))
    if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
        tokens.pop()
    if not tokens and tokenizer.bos_token_id is not None:
        tokens = [tokenizer.bos_token_id]
    if not tokens:
        raise GenerationError(f"The prompt is {prompt!r} and the tokenizer has no BOS token to start from. Give at least one word.")
    return _checked_ids(tokens, vocab_size)


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, vocab_size: int
) -> list[int]:
    """A conversation through the tokenizer's chat template, up to where the assistant's answer begins.

    Raises:
        GenerationError: not a list of messages, or the template refuses them.
    """
    _check_messages(messages)
    try:
        text = bounded(
            lambda: tokenizer.apply_chat_template(list(messages), tools=tools, add_generation_prompt=True, tokenize=False)
        )
    except Exception as error:  # templates raise whatever they like
        raise GenerationError(f"The chat template refused these {len(messages)} messages: {error}") from error
    return _checked_ids(tokenizer.encode(text, add_special_tokens=False), vocab_size)


def answer_end(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What the chat template writes right after an assistant's answer: as stop ids, or as stop strings.

    A model trained through the template has learned to end there, whatever its generation config calls the end. ChatML on a
    tokenizer that does not know `<|im_end|>` is an ordinary text, hence the strings.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        rendered = bounded(lambda: tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template that takes no such conversation tells nothing about its ends
        return (), ()
    _, mark, end = rendered.rpartition(_MARK)
    end = end.strip()
    if not mark or not end:
        return (), ()
    tokens = tokenizer.encode(end, add_special_tokens=False)
    if tokens and tokens[0] in tokenizer.added_tokens_decoder:
        return (tokens[0],), ()
    return (), (end.splitlines()[0],)


def _check_messages(messages: Any) -> None:
    example = "[{'role': 'user', 'content': 'Hello'}]"
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise GenerationError(f"Expected a list of messages such as {example}, found a {type(messages).__name__}.")
    if not messages:
        raise GenerationError(f"The list of messages is empty. Expected at least one, such as {example}.")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise GenerationError(f"messages[{number}]: expected a role and its content, as in {example}, found {message!r:.80}.")


def _checked_ids(ids: Any, vocab_size: int) -> list[int]:
    try:
        tokens = [operator.index(token) for token in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError:
        raise GenerationError(f"A prompt is a text or a list of token ids, found {ids!r:.80}.") from None
    if not tokens:
        raise GenerationError("The prompt has no tokens. Give at least one.")
    for place, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise GenerationError(f"Token {place} of the prompt is {token}, but the model's ids go from 0 to {vocab_size - 1}.")
    return tokens
