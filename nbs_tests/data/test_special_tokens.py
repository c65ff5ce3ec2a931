"""BOS and EOS: counted, and named where they are doubled, missing or not trained on."""

from dataclasses import replace

import numpy as np
import pytest

from fulltune_nb.data import load_data
from fulltune_nb.data.example import (
    ADVICE,
    BOS_DOUBLED,
    BOS_MISSING,
    END_MISSING,
    END_NOT_TRAINED,
    EOS_DOUBLED,
    SPECIAL_IN_WORDS,
    check_special_tokens,
)
from nbs_tests.data.chat_templates import CHATML, GEMMA, LLAMA2, LLAMA3

PAIR = {"prompt": "What is it?", "completion": "It is a fox."}
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Fine"}] * 2


def check(tokenizer, rows, **settings):
    return check_special_tokens(load_data({"train": rows}, tokenizer, **settings).train, tokenizer)


@pytest.mark.parametrize("template, bos, eos", [(LLAMA2, 2, 2), (LLAMA3, 1, 0), (GEMMA, 1, 0)], ids=["llama2", "llama3", "gemma"])
def test_templates_as_they_should_be_have_no_problem(make_tokenizer, template, bos, eos):
    found = check(make_tokenizer(template, adds_bos=True), [{"messages": TALK}], mask_prompt=True)
    assert found.problems == {} and (found.bos.tolist(), found.eos.tolist()) == ([bos], [eos])


def test_plain_texts_get_one_of_each(make_tokenizer):
    found = check(make_tokenizer(adds_bos=True), [{"text": "a fox"}, {"text": "a dog"}])
    assert found.problems == {} and found.bos.tolist() == found.eos.tolist() == [1, 1]


def test_specials_written_into_texts_are_doubled(make_tokenizer):
    rows = [{"text": "a fox"}, {"text": "<s>a fox"}, {"text": "a fox</s></s>"}, {"text": "a fox</s>"}]
    found = check(make_tokenizer(adds_bos=True), rows)
    assert {name: list(rows) for name, rows in found.problems.items()} == {BOS_DOUBLED: [1], EOS_DOUBLED: [2]}
    assert found.of(1) == [BOS_DOUBLED] and found.of(0) == [] and found.rows.tolist() == [1, 2]
    assert found.bos.tolist() == [1, 2, 1, 1] and found.eos.tolist() == [1, 1, 2, 1]


def test_the_end_of_one_row_and_the_begin_of_the_next_are_no_pair(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<s>", bos_token=None)
    assert EOS_DOUBLED not in check(tokenizer, [{"text": "a"}, {"text": "<s>b"}]).problems


def test_a_template_without_the_tokenizers_bos_is_told(make_tokenizer):
    assert check(make_tokenizer(CHATML, adds_bos=True), [PAIR]).of(0) == [BOS_MISSING]
    assert check(make_tokenizer(CHATML), [PAIR]).problems == {}  # this tokenizer puts none before texts either


def test_an_end_that_is_ordinary_text_is_told(make_tokenizer):
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    assert check(make_tokenizer(plain), [PAIR]).of(0) == [END_MISSING]
    assert check(make_tokenizer(plain), [PAIR], max_seq_length=5).problems == {}  # cut: counted as such


@pytest.mark.parametrize("mask", [True, False, "last"])
@pytest.mark.parametrize("template", [CHATML, LLAMA2, LLAMA3, GEMMA], ids=["chatml", "llama2", "llama3", "gemma"])
def test_a_row_that_ends_with_the_users_turn_has_learned_to_stop_before(make_tokenizer, template, mask):
    longer = {"role": "user", "content": "And now a question of more than three tokens, which nobody answers?"}
    found = check(make_tokenizer(template), [{"messages": TALK}, {"messages": TALK[:3]}, {"messages": [*TALK, longer]}], mask_prompt=mask)
    assert found.problems == {}


def test_an_end_that_is_not_trained_on_is_told(make_tokenizer):
    tokenizer = make_tokenizer(CHATML)
    (example,) = load_data({"train": [PAIR]}, tokenizer, mask_prompt=True).train
    without_end = replace(example, loss_mask=example.loss_mask & (example.tokens != tokenizer.convert_tokens_to_ids("<|im_end|>")))
    assert check_special_tokens([without_end], tokenizer).of(0) == [END_NOT_TRAINED]
    assert check_special_tokens([replace(without_end, cut=3)], tokenizer).problems == {}
    for window in ((0, 5), (5, 0)):  # it may be in the other one
        assert check_special_tokens([replace(without_end, window=window)], tokenizer).problems == {}


def test_an_end_of_several_tokens_is_one(make_tokenizer):
    answers = "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n### End\n' }}{% endfor %}"
    parts = answers.replace("m['content']", "m['content'][0]['text']")
    for template in (answers, parts):  # one of which takes content in parts only
        assert check(make_tokenizer(template), [PAIR]).problems == {}


def test_special_tokens_in_a_rows_own_words_are_told(make_tokenizer):
    asks = [{"role": "user", "content": "What does <|im_end|> mean?"}, {"role": "assistant", "content": "It ends."}]
    rows = [{"messages": TALK}, {"messages": TALK, "stop": "<|im_end|>", "comment": "a comment on <|im_end|>"}]
    rows += [{"messages": asks}]
    tokenizer = make_tokenizer(CHATML)
    assert {name: list(rows) for name, rows in check(tokenizer, rows).problems.items()} == {SPECIAL_IN_WORDS: [2]}
    text = [{"text": "a fox</s>"}, {"text": "a </s> fox"}]
    assert {name: list(rows) for name, rows in check(tokenizer, text).problems.items()} == {SPECIAL_IN_WORDS: [1]}
    tokenizer.split_special_tokens = True  # then they are letters
    assert check(tokenizer, text[1:]).problems == {}


def test_what_is_found_stands_in_the_notes(make_tokenizer):
    asks = {"prompt": "Is <|im_end|> one?", "completion": "Yes."}
    data = load_data({"train": [PAIR] * 3, "valid": [PAIR, asks]}, make_tokenizer(CHATML, adds_bos=True))
    train, valid, words = data.notes
    assert train.startswith(f"train: 3 of 3 rows: {BOS_MISSING} (first: train:1)") and valid.startswith("valid: 2 of 2 rows")
    assert words == f"valid: 1 of 2 rows: {SPECIAL_IN_WORDS} (first: valid:2). {ADVICE[SPECIAL_IN_WORDS]}"


def test_one_token_for_begin_and_end_is_checked_as_an_end(make_tokenizer):
    tokenizer = make_tokenizer(bos_token="</s>")
    found = check(tokenizer, [{"text": "a fox"}, {"text": "a fox</s></s>"}])
    assert {name: list(rows) for name, rows in found.problems.items()} == {EOS_DOUBLED: [1]}


def test_many_rows_give_what_each_gives_alone(make_tokenizer):
    texts = ["a fox", "<s>a", "b</s></s>", "", "<s><s>", "c</s>d</s>", "e"]
    tokenizer = make_tokenizer(adds_bos=True)
    examples = load_data({"train": [{"text": text} for text in texts]}, tokenizer).train
    found = check_special_tokens(examples, tokenizer)
    for row, example in enumerate(examples):
        alone = check_special_tokens([example], tokenizer)
        assert found.of(row) == alone.of(0) and (found.bos[row], found.eos[row]) == (alone.bos[0], alone.eos[0])


def test_no_rows_and_no_special_tokens_are_no_problem(make_tokenizer):
    assert check_special_tokens([], make_tokenizer()).rows.tolist() == []
    bare = make_tokenizer(bos_token=None, eos_token=None)
    found = check(bare, [{"text": ""}, {"text": "a fox"}])
    assert np.all(found.bos == 0) and set(found.problems) <= {END_MISSING}


def test_every_problem_has_advice():
    assert set(ADVICE) == {BOS_DOUBLED, BOS_MISSING, EOS_DOUBLED, END_MISSING, END_NOT_TRAINED, SPECIAL_IN_WORDS}
