"""What is learned of a row of one form: the rows after it are rendered once, and their masks are what they are by themselves."""

import random
from collections import Counter

import pytest

from fulltune_nb.chat_template import ChatRenderer
from fulltune_nb.data import encode
from fulltune_nb.data.encode import encode_rows
from fulltune_nb.data.settings import DataSettings
from nbs_tests.conftest import CHATML
from nbs_tests.data import chat_templates

TEMPLATES = {name: text for name, text in vars(chat_templates).items() if name.isupper() and isinstance(text, str)}
TEXTS = ["Fine.", " Fine.", "Fine.\n", "The answer is 42.", "the", "of the", "naïve 東京", "", "x</think>y"]
TEXTS += ["<think>Hm.</think>Yes.", "<think>\nHm.\n</think>\n\nYes"]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": "the"}}}]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds the numbers.", "parameters": {}}}]


def random_row(draw):
    messages = [{"role": "system", "content": draw.choice(TEXTS)}] if draw.random() < 0.2 else []
    for _ in range(draw.choice([1, 1, 2, 3])):
        messages.append({"role": "user", "content": draw.choice(TEXTS)})
        if draw.random() < 0.1:
            messages += [CALL, {"role": "tool", "name": "add", "content": draw.choice(TEXTS)}]
        messages.append({"role": "assistant", "content": draw.choice(TEXTS), **({"weight": 0} if draw.random() < 0.1 else {})})
    return {"messages": messages, **({"tools": TOOLS} if draw.random() < 0.1 else {})}


def found(encoded):
    return [(e.source, e.text, e.tokens.tolist(), e.loss_mask.tolist()) for e in encoded.examples], encoded.problems, encoded.left_out


@pytest.mark.parametrize("mask", [True, "last"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_rows_mask_is_the_same_whatever_rows_stand_before_it(template, mask, make_tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_ROWS", 5)
    tokenizer, settings, draw = make_tokenizer(TEMPLATES[template]), DataSettings(mask_prompt=mask), random.Random(template)
    rows = [(f"train:{i}", random_row(draw)) for i in range(12)]
    examples, problems, left_out = [], [], {}
    for row in rows:
        ours = found(encode_rows([row], "chat", tokenizer, settings))
        examples += ours[0]
        problems += ours[1]
        for what, sources in ours[2].items():
            left_out.setdefault(what, []).extend(sources)
    assert found(encode_rows(rows, "chat", tokenizer, settings)) == (examples, problems, left_out)


@pytest.mark.parametrize("mask", [True, "last"])
def test_rows_of_a_known_form_are_rendered_once(mask, make_tokenizer, monkeypatch):
    rendered, render = Counter(), ChatRenderer.render

    def counted(self, messages, *arguments):
        rendered[messages[0]["content"].rstrip("\U000f0000")] += 1
        return render(self, messages, *arguments)

    monkeypatch.setattr(ChatRenderer, "render", counted)
    turns = [{"role": role, "content": "the"} for role in ("user", "assistant") * 3]
    rows = [(f"train:{i}", {"messages": [{"role": "user", "content": f"question {i}"}, *turns[1:]]}) for i in range(20)]
    assert len(encode_rows(rows, "chat", make_tokenizer(CHATML), DataSettings(mask_prompt=mask)).examples) == 20
    assert [rendered[f"question {i}"] for i in range(1, 20)] == [1] * 19


# The generation prompt depends on the question, the turn itself does not.
LOOKS_FOR_WORDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + ('<think></think>' if m.role == 'assistant' else '') + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}"
    "{{ '</think>' if '/no_think' in messages[-1].content }}{% endif %}"
)


def test_words_that_a_template_looks_for_are_not_taken_for_words_of_a_form(make_tokenizer):
    tokenizer, settings = make_tokenizer(LOOKS_FOR_WORDS), DataSettings(mask_prompt=True)
    pairs = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "Fine."}]
        for text in ("Is it?", "Is it? /NO_think", "Is it? /no_think")
    ]
    encoded = encode_rows([(f"train:{i}", {"messages": pair}) for i, pair in enumerate(pairs)], "chat", tokenizer, settings)
    trained = [tokenizer.decode(e.tokens[e.loss_mask]) for e in encoded.examples]
    assert trained == ["</think>Fine.<|im_end|>\n", "</think>Fine.<|im_end|>\n", "Fine.<|im_end|>\n"]


# The template's own markers depend on a key that it does not write.
MARKS_BY_MODE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and m.mode != 'off' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)


def test_what_a_message_has_besides_words_is_of_its_form(make_tokenizer):
    tokenizer, settings = make_tokenizer(MARKS_BY_MODE), DataSettings(mask_prompt=True)
    rows = [
        [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Fine.", "mode": mode}] for mode in ("on", "off", "on")
    ]
    encoded = encode_rows([(f"train:{i}", {"messages": row}) for i, row in enumerate(rows)], "chat", tokenizer, settings)
    assert [tokenizer.decode(e.tokens[e.loss_mask]) for e in encoded.examples] == ["Fine.", "", "Fine."]


def test_no_rows_at_all_are_no_examples(make_tokenizer):
    assert found(encode_rows([], "chat", make_tokenizer(CHATML), DataSettings())) == ([], [], {})
