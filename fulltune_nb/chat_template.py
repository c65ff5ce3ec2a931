"""What the model reads: conversations through the tokenizer's chat template, plain texts and ids, all as token ids.

A chat template is a program and comes with a download: it may loop for ever or ask for all memory that there is. `ChatRenderer` is
the only place that runs one.
"""

from __future__ import annotations

import atexit
import json
import operator
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulltune_nb.errors import GenerationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 10.0
"""Of computing, for one conversation, which takes thousandths of one."""
MEMORY = 2**30
"""Bytes, on top of what the process that renders has."""
CHARACTERS = 2**24
"""Of one text."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# ---- running a template, within limits


class TemplateRefused(Exception):
    """The template raised an error; the message says which."""


class LimitReached(Exception):
    """The template took too much time or memory, or made too long a text; the message says which."""


class ChatRenderer:
    """Runs a tokenizer's chat template, with at most `SECONDS`, `MEMORY` and `CHARACTERS` for each conversation.

    It runs in a process of its own (`template_process.py`), which all renderers share, so that no other thread feels its limits. There are
    none on Windows.

    `date`, such as "2026-11-29", stands for today in templates that write the date; None: today.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str | None = None):
        self._tokenizer = tokenizer
        self._date = date if writes_date(tokenizer) else None
        self._ahead: dict[bytes, dict[str, Any]] = {}

    def read_ahead(self, conversations: Iterable[tuple[Sequence[Mapping[str, Any]], Sequence[Any] | None]]) -> None:
        """Renders many conversations at once, each messages and tools, for `render` to be asked for next: many times as fast.

        What cannot be rendered is told by `render`.
        """
        pickled = []
        for messages, tools in conversations:
            with suppress(TemplateRefused):
                pickled.append(_pickled(self._request(messages, tools, add_generation_prompt=False)))
        self._ahead = dict(zip(pickled, _rendering.ask(pickled), strict=False)) if pickled else {}

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False) -> str:
        """The text that the template makes of a conversation.

        Raises:
            TemplateRefused: the template raised an error.
            LimitReached: it took too much time or memory.
        """
        return self._run(self._request(messages, tools, add_generation_prompt=add_generation_prompt))[0]

    def render_answers(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> tuple[str, list[tuple[int, int]]] | None:
        """The text, and the character places [start, end) that the template marks by `{% generation %}`; None if it marks none.

        Raises:
            TemplateRefused, LimitReached: as in `render`.
        """
        request = self._request(messages, tools, return_assistant_tokens_mask=True)
        return self._run(request) if _GENERATION.search(request["chat_template"]) else None

    def _request(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, **options: bool) -> dict[str, Any]:
        """What `render_jinja_template` of transformers takes, for one conversation.

        Raises:
            TemplateRefused: there is no template for it.
        """
        try:
            template = self._tokenizer.get_chat_template(tools=tools)
            tools = tools and [_schema(tool) if callable(tool) else tool for tool in tools]
        except Exception as error:  # transformers raises many kinds
            raise TemplateRefused(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
        template = template if self._date is None else _dated(template, self._date)
        conversation = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return {
            **self._tokenizer.special_tokens_map, "conversations": [conversation], "tools": tools, "chat_template": template, **options,
            "limits": (SECONDS, MEMORY, CHARACTERS),
        }  # fmt: skip

    def _run(self, request: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        pickled = _pickled(request)
        answer = self._ahead.pop(pickled, None) or _rendering.ask([pickled])[0]
        if "refused" in answer:
            raise TemplateRefused(answer["refused"])
        if "limit" in answer:
            raise LimitReached(answer["limit"])
        return answer["text"], [tuple(place) for place in answer["places"]]


def _pickled(request: Mapping[str, Any]) -> bytes:
    """
    Raises:
        TemplateRefused: there are objects in it that cannot be handed over.
    """
    try:
        return pickle.dumps(request)
    except Exception as error:  # they can be of any kind
        raise TemplateRefused(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from None


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    """A function as a template is told of it."""
    from transformers.utils import get_json_schema

    return get_json_schema(function)


class _Rendering:
    """The process that runs templates: started when one is first to be run, and again when it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def ask(self, requests: Sequence[bytes]) -> list[dict[str, Any]]:
        """The answers of `template_process`; of several requests those to the first ones, up to where it met a limit."""
        data = pickle.dumps(requests)
        with self._lock:
            if self._process is None or self._owner != os.getpid():  # a forked process may not ask its parent's
                self._start()
            process = self._process
            try:
                process.stdin.write(len(data).to_bytes(8, "little") + data)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            except BaseException:  # an interrupt: the answer that is under way must not be taken for the next one's
                self.end()
                raise
            if answer:
                return json.loads(answer)
            self.end()
        timed_out = sys.platform != "win32" and process.returncode == -signal.SIGVTALRM
        died = f"the process that runs it ended with exit code {process.returncode}"
        told = {"limit": f"it was not done after {SECONDS:g} seconds of computing" if timed_out else died}
        return [told] if len(requests) == 1 else []  # of several it is not known which it was

    def _start(self) -> None:
        quiet = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-P", str(Path(__file__).with_name("template_process.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **quiet}
        )
        self._owner = os.getpid()
        self._process.stdin.write(json.dumps([path for path in sys.path if path]).encode() + b"\n")

    def end(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()  # closes the pipes
        self._process = None


_rendering = _Rendering()
atexit.register(_rendering.end)


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
