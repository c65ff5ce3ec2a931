"""What the model reads: conversations through the tokenizer's chat template, plain texts and ids, all as token ids.

A chat template is a program and comes with a download: it may loop for ever or ask for all memory that there is. `ChatRenderer` is
the only place that runs one.
"""

from __future__ import annotations

import json
import operator
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import GenerationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

try:
    import resource
except ImportError:  # Windows
    resource = None

SECONDS = 10.0
"""Of computing, for one conversation, which takes thousandths of one."""
MEMORY = 2**30
"""Bytes, on top of what the process has."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TICK = 0.03  # seconds of computing between two looks at a template that runs
_KEPT_CHARACTERS = 2**26  # after so many the memory is bounded anew: texts that are kept must not count as a template's

# ---- running a template, within limits


class TemplateRefused(Exception):
    """The template raised an error; the message says which."""


class LimitReached(Exception):
    """The template took too much time or memory; the message says which."""


class ChatRenderer:
    """Runs a tokenizer's chat template, with at most `SECONDS` and `MEMORY` for each conversation.

        renderer = ChatRenderer(tokenizer)
        text = renderer.render(messages)
        with renderer.limits():                   # the same for many, with limits that are set once
            texts = [renderer.render(messages) for messages in conversations]

    The limits are the process's: its address space, and a timer whose signal looks at the time and memory that the template took.
    There are none on Windows and outside of the main thread, which signals do not reach; while somebody else uses the timer, only
    the memory is limited.

    `date`, such as "2026-11-29", stands for today in templates that write the date; None: today.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None):
        self._tokenizer = tokenizer
        self._date = date if writes_date(tokenizer) else None
        self._in_limits = False
        self._limits_before: tuple[int, int] | None = None  # of the address space; None where nothing is limited
        self._kept = 0  # characters of texts since the memory was limited

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False) -> str:
        """The text that the template makes of a conversation.

        Raises:
            TemplateRefused: the template raised an error.
            LimitReached: it took too much time or memory.
        """

        def apply() -> str:
            options = {"tools": tools, "add_generation_prompt": add_generation_prompt, "tokenize": False}
            if self._date is not None:
                options["chat_template"] = self._template(tools)
            # The conversation stands in a list because transformers refuses an empty one that does not.
            return self._tokenizer.apply_chat_template([messages], **options)[0]

        return self._run(apply)

    def render_answers(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """The text, and the character places [start, end) that the template marks by `{% generation %}`; None if it marks none.

        Raises:
            TemplateRefused, LimitReached: as in `render`.
        """
        template = self._run(lambda: self._template(tools))
        if not _GENERATION.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [{key: value for key, value in message.items() if value is not None} for message in messages]
        options = {"tools": tools, "chat_template": template, "return_assistant_tokens_mask": True, **self._tokenizer.special_tokens_map}
        texts, places = self._run(lambda: render_jinja_template(conversations=[conversation], **options))
        return texts[0], places[0]

    def _template(self, tools: Sequence[Any] | None) -> str:
        """The template for rows with or without tools, with the date that it is to write."""
        template = self._tokenizer.get_chat_template(tools=tools)
        return template if self._date is None else _dated(template, self._date)

    def _run(self, render: Callable[[], Any]) -> Any:
        if not self._in_limits:
            with self.limits():
                return self._run(render)
        limited = self._limits_before is not None
        if limited and self._kept > _KEPT_CHARACTERS:
            self._limit_memory()
        try:
            if limited:
                _watch.begin()
            result = render()
            self._kept += len(result) if isinstance(result, str) else len(result[0][0])
            return result
        # Failures are raised at the end, anew: an error from within would hold on to what the template has made.
        except MemoryError:
            failure = LimitReached(_too_large())
        except LimitReached as error:
            failure = LimitReached(str(error))
        except Exception as error:  # a template is code from outside: it can raise anything
            failure = TemplateRefused(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            if limited:
                _watch.active = False
        raise failure

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Within the block, which is for rendering only, limits are set once and not for each conversation."""
        limited = resource is not None and threading.current_thread() is threading.main_thread()
        timer, lowers = limited and _timer_is_free(), limited and _address_space() is not None
        before = resource.getrlimit(resource.RLIMIT_AS) if limited else None
        try:
            self._in_limits, self._limits_before = True, before
            if limited:
                self._limit_memory()
            if timer:
                signal.setitimer(signal.ITIMER_VIRTUAL, _TICK, _TICK)
            yield
        finally:  # nothing but these calls, so that an interrupt cannot come between them
            self._in_limits, self._limits_before = False, None
            try:
                if timer:
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            finally:
                if lowers:
                    resource.setrlimit(resource.RLIMIT_AS, before)

    def _limit_memory(self) -> None:
        """Allows `MEMORY` more than the process has now."""
        self._kept, _watch.most_memory = 0, _most_memory() + MEMORY
        if (size := _address_space()) is not None:
            finite = [limit for limit in self._limits_before if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min([size + MEMORY, *finite]), self._limits_before[1]))


class _Watch:
    """The timer's handler. It stays when the timer has ended: a late signal must not meet the default, which ends the process."""

    def __init__(self) -> None:
        self.active = False
        self.most_memory = 0
        self._deadline: float | None = None  # in seconds of this thread's computing; the first look at a conversation sets it

    def begin(self) -> None:
        self._deadline, self.active = None, True

    def __call__(self, number: int, frame: object) -> None:
        if not self.active:
            return
        now = time.thread_time()
        if self._deadline is None:
            self._deadline = now + SECONDS
        if now > self._deadline:
            raise LimitReached(f"it was not done after {SECONDS:g} seconds of computing")
        if _most_memory() > self.most_memory:
            raise LimitReached(_too_large())


_watch = _Watch()


def _timer_is_free() -> bool:
    """Whether nobody else uses the timer; then its signal is ours."""
    handler = signal.getsignal(signal.SIGVTALRM)
    if handler is _watch:
        return True
    if handler != signal.SIG_DFL or signal.getitimer(signal.ITIMER_VIRTUAL)[0]:
        return False
    signal.signal(signal.SIGVTALRM, _watch)
    return True


def _address_space() -> int | None:
    """Bytes of address space that the process has; None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _most_memory() -> int:
    """Bytes of memory that the process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _too_large() -> str:
    return f"it would take more than {MEMORY / 2**20:,.0f} MiB of memory"


# ---- templates that write the date

_DIRECTIVE = re.compile(r"%[-_0^#]?[A-Za-z]")  # of `strftime`, such as %d and %-d


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the date of today, as those of Llama 3.1 and later do."""
    return "strftime_now" in str(tokenizer.chat_template)


@lru_cache
def _dated(template: str, day: str) -> str:
    """The template with a `strftime_now` of its own in front, for which it is always midnight of one day.

    It is a macro, since transformers hands plain values to templates and no functions; it knows the directives that the template
    writes. It stands on a line of its own, of which Jinja leaves nothing, so that the template's own lines are what they were.
    """
    midnight = datetime.fromisoformat(day)
    texts = {directive: midnight.strftime(directive) for directive in _DIRECTIVE.findall(template)}
    texts = {"%%": "\0", **texts, "\0": "%"}
    filled = "".join(f" | replace({json.dumps(directive)}, {json.dumps(text)})" for directive, text in texts.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}\n{template}"


# ---- the template of a tokenizer that has none

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% if message['role'] == 'assistant' and eos_token and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""`<|im_end|>` is several tokens for a tokenizer that does not know it; the EOS behind it is one, at which every reader stops."""

CHATML_NOTE = (
    "The tokenizer has no chat template: the ChatML text <|im_start|>role, content, <|im_end|> is used, with the tokenizer's EOS behind "
    "each assistant turn. It is set on the tokenizer, so that generation uses it and an exported model carries it."
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


# ---- prompts

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
        text = ChatRenderer(tokenizer).render(list(messages), tools, add_generation_prompt=True)
    except (TemplateRefused, LimitReached) as error:
        raise GenerationError(f"The chat template refused these {len(messages)} messages: {error}") from error
    return _checked_ids(tokenizer.encode(text, add_special_tokens=False), vocab_size)


def answer_end(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What the chat template writes right after an assistant's answer: as stop ids, and as stop strings.

    A model trained through the template has learned to end there, whatever its generation config calls the end. The first special
    token is the stop id. Text before it, such as the `<|im_end|>` of ChatML where the tokenizer does not know it, is a stop string.
    """
    end = _after_an_answer(tokenizer)
    if not end:
        return (), ()
    known = end_tokens(tokenizer)
    first = next((token for token in tokenizer.encode(end, add_special_tokens=False) if token in known), None)
    text = (end if first is None else end.partition(tokenizer.convert_ids_to_tokens(first))[0]).strip()
    return () if first is None else (first,), (text.splitlines()[0],) if text else ()


def _after_an_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the template writes after an answer at the end; "" where it takes no such conversation, as text or in parts."""
    for content in (str, lambda text: [{"type": "text", "text": text}]):
        messages = [{"role": "user", "content": content("?")}, {"role": "assistant", "content": content(_MARK)}]
        try:
            _, mark, end = ChatRenderer(tokenizer).render(messages).rpartition(_MARK)
        except (TemplateRefused, LimitReached):
            continue
        if mark:
            return end.strip()
    return ""


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that can end a turn: special and added ones, which no ordinary text is made of."""
    return frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids)


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
