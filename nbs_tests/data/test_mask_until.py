"""Texts with a marker: what follows the last one is trained on."""

import pytest

from fulltune_nb.data import load_data
from fulltune_nb.errors import ConfigError, DataError
from nbs_tests.data.chat_templates import CHATML

TEXTS = ["Q: What is it? A: It is a fox.", "Q: A: B? A:\nnaïve 東京 café", "A: 1\nA: 2", "Q: nothing A:", "A:all of it"]


def trained(example, tokenizer):
    return tokenizer.decode(example.tokens[example.loss_mask].tolist(), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_what_follows_the_last_marker_is_trained_on_to_the_end_token(make_tokenizer, adds_bos):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    data = load_data({"train": [{"text": text} for text in TEXTS]}, tokenizer, mask_until="A:")
    assert [trained(example, tokenizer) for example in data.train] == [text.rpartition("A:")[2] + "</s>" for text in TEXTS]
    whole = load_data({"train": [{"text": text} for text in TEXTS]}, tokenizer).train
    assert [e.tokens.tolist() for e in data.train] == [e.tokens.tolist() for e in whole]


def test_an_end_that_the_tokenizer_puts_behind_texts_is_trained_on(make_tokenizer):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = around
    data = load_data({"train": [{"text": text} for text in TEXTS]}, tokenizer, mask_until="A:")
    assert [trained(example, tokenizer) for example in data.train] == [text.rpartition("A:")[2] + "</s>" for text in TEXTS]


def test_a_token_across_the_end_of_the_marker_is_trained_on(make_tokenizer):
    tokenizer = make_tokenizer()
    text = "Q: What is it? A: It is a fox."
    for marker in ("A: ", "A", "? A: It i"):
        example = load_data({"train": [{"text": text}]}, tokenizer, mask_until=marker).train[0]
        answer = text.rpartition(marker)[2] + "</s>"
        found = trained(example, tokenizer)
        assert found.endswith(answer)
        first = int(example.loss_mask.argmax())
        assert found == answer or len(answer) > len(tokenizer.decode(example.tokens[first + 1 :].tolist()))  # by that token only


def test_tokenizers_that_do_not_tell_places_find_the_same_by_the_text_before(make_tokenizer):
    fast = make_tokenizer(adds_bos=True)

    class Slow:
        """Answers as a tokenizer written in Python does: ids, and no places."""

        def __getattr__(self, name):
            return getattr(fast, name)

        def __call__(self, texts, **options):
            found = fast(texts, **options)
            found._encodings = None
            return found

    rows = [{"text": text} for text in TEXTS]
    one, other = (load_data({"train": rows}, tokenizer, mask_until="A:").train for tokenizer in (fast, Slow()))
    assert [e.loss_mask.tolist() for e in one] == [e.loss_mask.tolist() for e in other]


def test_a_text_without_the_marker_is_a_bad_row(make_tokenizer):
    rows = [{"text": TEXTS[0]}, {"text": "Q: and no answer"}]
    with pytest.raises(DataError) as error:
        load_data({"train": rows}, make_tokenizer(), mask_until="A:")
    assert error.value.problems == ["train:2: mask_until: the text has no 'A:', behind which it would be trained on"]
    data = load_data({"train": rows}, make_tokenizer(), mask_until="A:", bad_rows="skip")
    assert len(data.train) == 1 and len(data.train.skipped) == 1


def test_it_is_for_texts_only(make_tokenizer):
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(ConfigError, match=r"mask_until='A:' means nothing for train: its rows have the completions.*mask_prompt=True"):
        load_data({"train": rows}, make_tokenizer(CHATML), mask_until="A:")
    with pytest.raises(ConfigError, match="mask_until"):
        load_data({"train": [{"text": "A: b"}]}, make_tokenizer(), mask_until="")
