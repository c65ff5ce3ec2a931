"""Chat templates that would take very much time or memory are ended, and leave nothing behind."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time

import pytest

import fulltune_nb as ft
from fulltune_nb import chat_template as render_limits
from fulltune_nb.chat_template import ChatRenderer, chat_ids
from fulltune_nb.errors import DataError, GenerationError

WASTEFUL = {
    "loops within loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops of a macro": "{% macro m(n) %}{% for i in range(99) %}{{ m(n - 1) if n }}{% endfor %}{% endmacro %}{{ m(50) }}",
    "a long text at once": "{{ ('a' * 10**11) | length }}",
    "a long list at once": "{{ ([1] * 10**11) | length }}",
    "a wide column": "{{ 'a'.ljust(10**11) | length }}",
    "a wide format": "{{ '%99999999999d' % 1 }}",
    "a text that doubles": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "a list that grows": "{% for i in range(99999) %}{{ 'a' * 10**6 }}{% endfor %}",
    "a large number": "{{ 9 ** (9 ** 9) % 7 }}",
    "lorem ipsum": "{{ lipsum(n=10**9) }}",
    "a filter": "{{ 'a' | center(10**11) }}",
}


@pytest.mark.parametrize("case", WASTEFUL)
def test_a_chat_template_that_wastes_time_or_memory_is_ended(case, make_tokenizer, monkeypatch):
    monkeypatch.setattr(render_limits, "SECONDS", 0.3)
    monkeypatch.setattr(render_limits, "MEMORY", 2**28)
    tokenizer, before = make_tokenizer(WASTEFUL[case]), resource.getrlimit(resource.RLIMIT_AS)
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    started = time.thread_time()
    with pytest.raises(DataError, match=r"chat template cannot be used for this row: it (was not done|would take)") as error:
        ft.load_data({"train": [{"messages": conversation}] * 1000}, tokenizer)
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith("train:1: ")
    with pytest.raises(GenerationError, match="chat template refused .* it (was not done|would take)"):
        chat_ids(tokenizer, conversation, None, 500)
    assert time.thread_time() - started < 10
    assert resource.getrlimit(resource.RLIMIT_AS) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_the_limits_are_for_each_conversation_and_not_for_all_together(make_tokenizer, monkeypatch):
    monkeypatch.setattr(render_limits, "SECONDS", 0.1)
    monkeypatch.setattr(render_limits, "MEMORY", 2**28)
    renderer = ChatRenderer(make_tokenizer("{% for i in range(99999) %}{% endfor %}" * 3 + "{{ 'a' * 2**23 }}"))
    started = time.thread_time()
    with renderer.limits():
        texts = [renderer.render([]) for _ in range(50)]  # 400 MiB are kept
    assert {len(text) for text in texts} == {2**23} and time.thread_time() - started > 0.1


def test_an_interrupt_ends_a_chat_template(make_tokenizer, monkeypatch):
    monkeypatch.setattr(render_limits, "SECONDS", 60.0)
    before = resource.getrlimit(resource.RLIMIT_AS)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        chat_ids(make_tokenizer(WASTEFUL["loops within loops"]), [{"role": "user", "content": "Hi"}], None, 500)
    assert resource.getrlimit(resource.RLIMIT_AS) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_timer_of_somebody_elses_is_left_alone(make_tokenizer):
    calls = []
    previous = signal.signal(signal.SIGVTALRM, lambda *_: calls.append(1))
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.01)
        assert chat_ids(make_tokenizer("{% for i in range(99999) %}{% endfor %}Hi"), [{"role": "user", "content": "Hi"}], None, 500)
        while not calls:
            sum(range(1000))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
