"""What the model reads: texts, ids and conversations, and where a chat answer ends."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.chat_template import CHATML, answer_end, chat_ids, prompt_ids
from fulltune_nb.errors import GenerationError

HELLO = [{"role": "user", "content": "Hello!"}]


def test_a_text_gets_the_special_tokens_of_its_tokenizer(make_tokenizer):
    plain, with_bos = make_tokenizer(), make_tokenizer(adds_bos=True)
    assert prompt_ids(with_bos, "Hello", 500) == [with_bos.bos_token_id, *prompt_ids(plain, "Hello", 500)]


def test_an_eos_that_the_tokenizer_adds_is_left_out_but_a_written_one_stays(make_tokenizer):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = both
    assert tokenizer.encode("Hello")[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in prompt_ids(tokenizer, "Hello", 500)
    assert tokenizer.eos_token_id in prompt_ids(tokenizer, "Hello</s>", 500)


@pytest.mark.parametrize("kind", [list, tuple, np.array, mx.array])
def test_ids_are_taken_as_they_are(tokenizer, kind):
    assert prompt_ids(tokenizer, kind([5, 6, 7]), 500) == [5, 6, 7]


def test_an_empty_text_starts_from_the_bos(make_tokenizer):
    assert prompt_ids(make_tokenizer(), "", 500) == [0]
    with pytest.raises(GenerationError, match="no BOS"):
        prompt_ids(make_tokenizer(bos_token=None), "", 500)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "no tokens"), ([3, 500], "Token 1 of the prompt is 500.*0 to 499"), ([-1], "is -1"), ([1.5], "list of token ids"),
     (7, "list of token ids"), (None, "list of token ids"), (["a"], "list of token ids")],
)
def test_what_is_no_prompt_is_refused(tokenizer, prompt, message):
    with pytest.raises(GenerationError, match=message):
        prompt_ids(tokenizer, prompt, 500)


def test_a_text_whose_ids_the_model_does_not_have_is_refused(tokenizer):
    with pytest.raises(GenerationError, match="from 0 to 9"):
        prompt_ids(tokenizer, "Hello", 10)


def test_a_conversation_is_what_transformers_makes_of_it(tokenizer, make_tokenizer):
    expected = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert chat_ids(tokenizer, HELLO, None, 500) == expected
    with_bos = make_tokenizer(CHATML, adds_bos=True)
    assert with_bos.bos_token_id not in chat_ids(with_bos, HELLO, None, 500)


def test_tools_reach_the_template(make_tokenizer):
    tokenizer = make_tokenizer("{% for tool in tools %}{{ tool['name'] }}{% endfor %}")
    assert tokenizer.decode(chat_ids(tokenizer, HELLO, [{"name": "add"}], 500)) == "add"


@pytest.mark.parametrize(
    ("messages", "message"),
    [("Hello", "list of messages"), ({"role": "user"}, "list of messages"), ([], "empty"), (["Hello"], r"messages\[0\]"),
     ([*HELLO, {"content": "x"}], r"messages\[1\]"), (None, "list of messages")],
)
def test_what_is_no_conversation_is_refused(tokenizer, messages, message):
    with pytest.raises(GenerationError, match=message):
        chat_ids(tokenizer, messages, None, 500)


def test_what_the_template_refuses_is_an_error_with_its_words(make_tokenizer):
    tokenizer = make_tokenizer("{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(GenerationError, match="Roles must alternate"):
        chat_ids(tokenizer, HELLO, None, 500)


def test_an_answer_ends_where_the_template_ends_it(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    assert answer_end(tokenizer) == ((tokenizer.convert_tokens_to_ids("<|im_end|>"),), ())
    eos_after_a_space = make_tokenizer("{% for m in messages %}{{ m['content'] + ' ' + eos_token }}{% endfor %}")
    assert answer_end(eos_after_a_space) == ((eos_after_a_space.eos_token_id,), ())


def test_an_end_that_is_ordinary_text_is_a_stop_string(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] + '[end of turn]\n' }}{% endfor %}")
    assert answer_end(tokenizer) == ((), ("[end of turn]",))


@pytest.mark.parametrize("template", ["{{ messages[-1]['content'] }}\n", "{{ raise_exception('no') }}", "fixed"])
def test_templates_that_end_answers_with_nothing_add_no_stop(make_tokenizer, template):
    assert answer_end(make_tokenizer(template)) == ((), ())
