"""Chat templates that would take very much time or memory are ended, and leave nothing behind."""

from __future__ import annotations

import mmap
import os
import resource
import signal
import threading

import pytest

import fulltune_nb as ft
from fulltune_nb import chat_template as render_limits
from fulltune_nb.chat_template import ChatRenderer, LimitReached, TemplateRefused, chat_ids
from fulltune_nb.errors import DataError, GenerationError

CONVERSATION = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

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
    with pytest.raises(DataError, match=r"chat template cannot be used for this row: it (was not done|would take|made)") as error:
        ft.load_data({"train": [{"messages": CONVERSATION}] * 1000}, tokenizer)
    assert len(error.value.problems) == 1 and error.value.problems[0].startswith("train:1: ")
    with pytest.raises(GenerationError, match="chat template refused .* it (was not done|would take|made)"):
        chat_ids(tokenizer, CONVERSATION, None, 500)
    assert resource.getrlimit(resource.RLIMIT_AS) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_text_of_20_megabytes_is_refused_with_its_length(make_tokenizer):
    with pytest.raises(LimitReached, match="a text of 20,000,000 characters, of at most 16,777,216"):
        ChatRenderer(make_tokenizer("{{ 'a' * 20000000 }}")).render(CONVERSATION)


def test_the_limits_are_for_each_conversation_and_not_for_all_together(make_tokenizer, monkeypatch):
    monkeypatch.setattr(render_limits, "SECONDS", 0.1)
    monkeypatch.setattr(render_limits, "MEMORY", 2**26)
    renderer = ChatRenderer(make_tokenizer("{% for i in range(9999) %}{% endfor %}{{ 'a' * 2**20 }}"))
    texts = [renderer.render([]) for _ in range(80)]  # 80 MiB are kept
    assert {len(text) for text in texts} == {2**20}


def test_other_threads_are_free_of_the_limits_and_may_render_too(make_tokenizer, monkeypatch):
    """Memory that another thread asks for while a template is ended for its own; before, the process could die of it."""
    monkeypatch.setattr(render_limits, "MEMORY", 2**28)
    renderer, wrong = ChatRenderer(make_tokenizer(WASTEFUL["a list that grows"])), []

    def allocate():
        try:
            for _ in range(100):
                mmap.mmap(-1, 2**33).close()
            with pytest.raises(LimitReached, match="would take"):
                renderer.render(CONVERSATION)
        except BaseException as error:  # whatever it is, it is told by the other thread
            wrong.append(error)

    threads = [threading.Thread(target=allocate) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with pytest.raises(LimitReached, match="would take"):
            renderer.render(CONVERSATION)
    assert not wrong


def test_what_is_rendered_ahead_is_what_is_rendered_one_by_one(make_tokenizer, monkeypatch):
    """Conversations that are refused or meet a limit are told when they are asked for; those behind them are rendered then."""
    monkeypatch.setattr(render_limits, "MEMORY", 2**28)
    template = "{{ raise_exception('no') if messages[0]['content'] == '1' }}{{ messages[0]['content'] * messages[0]['times'] }}"
    renderer = ChatRenderer(make_tokenizer(template))
    conversations = [[{"role": "user", "content": str(i), "times": 10**11 if i == 2 else 1}] for i in range(4)]
    asked, ask = [], render_limits._rendering.ask
    monkeypatch.setattr(render_limits._rendering, "ask", lambda requests: asked.append(len(requests)) or ask(requests))
    renderer.read_ahead((conversation, None) for conversation in conversations)
    assert renderer.render(conversations[0]) == "0"
    with pytest.raises(TemplateRefused, match="no"):
        renderer.render(conversations[1])
    with pytest.raises(LimitReached, match="would take"):
        renderer.render(conversations[2])
    assert asked == [4] and renderer.render(conversations[3]) == "3" and asked == [4, 1]


def test_a_process_that_is_gone_is_told_and_begun_anew(make_tokenizer):
    renderer = ChatRenderer(make_tokenizer("Hi"))
    renderer.render(CONVERSATION)
    render_limits._rendering._process.kill()
    render_limits._rendering._process.wait()
    with pytest.raises(LimitReached, match="ended with exit code -9"):
        renderer.render(CONVERSATION)
    assert renderer.render(CONVERSATION) == "Hi"


def test_an_interrupt_ends_a_chat_template(make_tokenizer, monkeypatch):
    monkeypatch.setattr(render_limits, "SECONDS", 60.0)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        chat_ids(make_tokenizer(WASTEFUL["loops within loops"]), CONVERSATION, None, 500)
    assert ChatRenderer(make_tokenizer("Hi")).render(CONVERSATION) == "Hi"


def test_objects_in_messages_that_cannot_be_handed_over_are_refused(make_tokenizer):
    with pytest.raises(GenerationError, match="chat template refused"):
        chat_ids(make_tokenizer("Hi"), [{"role": "user", "content": lambda: 1}], None, 500)


def test_functions_are_tools_by_their_signature(make_tokenizer):
    def add(a: int):
        """Adds.

        Args:
            a: a number
        """

    tokenizer = make_tokenizer("{{ tools[0]['function']['name'] }}")
    assert tokenizer.decode(chat_ids(tokenizer, CONVERSATION, [add], 500)) == "add"
