"""The chat template a tokenizer gets where it has none of its own.

Base models such as Mistral-7B-v0.1 come without a chat template. The text then used is ChatML, the one that the
documentation of the `mlx_lm` commands shows for such models: `<|im_start|>role\\ncontent<|im_end|>\\n` per message. It is
set on the tokenizer, so that generation uses what training used and an exported folder carries it.
"""

from __future__ import annotations

import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fulltune_nb.errors import GenerationError

if TYPE_CHECKING:
        from transformers import PreTrainedTokenizerBase

# -- render_limits: A bound on the time and the memory that a chat template takes: it is a program, and comes with a dow

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS = 10.0
"""Of computing; rendering a conversation takes thousandths of one."""
MEMORY = 2**30
"""Bytes, on top of what the process has."""
T = TypeVar("T")
_TICK = 0.03  # seconds between two looks
_PAGE = os.sysconf("SC_PAGE_SIZE") if resource else 0
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


class LimitReached(Exception):
    """The template took too much time or memory; the message says which."""


class _Watch:
    """The timer's handler. It stays when the timer has ended: a late signal must not meet the default, which ends the process."""

    def __init__(self) -> None:
        self.active = False
        self._until = 0.0
        self._most = 0

    def start(self) -> None:
        self._until, self._most = time.thread_time() + SECONDS, _largest_size() + MEMORY
        self.active = True

    def __call__(self, number: int, frame: object) -> None:
        if not self.active:
            return
        if time.thread_time() > self._until:
            raise LimitReached(f"it was not done after {SECONDS:g} seconds of computing")
        if _largest_size() > self._most:
            raise LimitReached(_too_large())


_watch = _Watch()


def bounded(render: Callable[[], T]) -> T:
    """What `render()` gives, which runs a template.

    Raises:
        LimitReached: it took more than `SECONDS` or `MEMORY`.
    """
    if resource is None or _watch.active or threading.current_thread() is not threading.main_thread():
        return render()
    timer, limits = _timer_is_free(), resource.getrlimit(resource.RLIMIT_AS)
    lower = _lower_limit(*limits)
    # The reason is raised at the end, anew: an error from within would hold on to what the template has made.
    try:
        if lower is not None:
            resource.setrlimit(resource.RLIMIT_AS, (lower, limits[1]))
        if timer:
            _watch.start()
            signal.setitimer(signal.ITIMER_VIRTUAL, _TICK, _TICK)
        return render()
    except MemoryError:
        reason = _too_large()
    except LimitReached as error:
        reason = str(error)
    finally:  # nothing but these calls, so that an interrupt cannot come between them
        _watch.active = False
        try:
            if timer:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        finally:
            if lower is not None:
                resource.setrlimit(resource.RLIMIT_AS, limits)
    raise LimitReached(reason)


def _too_large() -> str:
    return f"it would take more than {MEMORY / 2**20:,.0f} MiB of memory"


def _timer_is_free() -> bool:
    """Whether nobody else uses the timer; then its signal is ours."""
    handler = signal.getsignal(signal.SIGVTALRM)
    if handler is _watch:
        return True
    if handler != signal.SIG_DFL or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        return False
    signal.signal(signal.SIGVTALRM, _watch)
    return True


def _lower_limit(soft: int, hard: int) -> int | None:
    """Bytes of address space: `MEMORY` more than there is, or the limits if they are lower. None where the system does not say."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)  # Python's files take three times as long, and rows are many
        try:
            size = int(os.read(descriptor, 100).split()[0]) * _PAGE
        finally:
            os.close(descriptor)
    except (OSError, ValueError, IndexError):
        return None
    return min(size + MEMORY, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY), 2**62)


def _largest_size() -> int:
    """Bytes of memory that the process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_UNIT


# -- chat_template: The chat template a tokenizer gets where it has none of its own

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CHATML_NOTE = (
    "The tokenizer has no chat template: the ChatML text <|im_start|>role, content, <|im_end|> is used. "
    "It is set on the tokenizer, so that generation uses it and an exported model carries it."
)


def ensure_chat_template(tokenizer) -> str | None:
    """Give `tokenizer` the ChatML template if it has none; one with a template is left as it is.

    Returns:
        The line to announce where the template was set, None where there was one.
    """
    if tokenizer.chat_template:
        return None
    tokenizer.chat_template = CHATML
    return CHATML_NOTE


# -- prompts: What the model reads before it answers: texts, ids and conversations as token ids, and where an answ

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
