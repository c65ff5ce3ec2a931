"""What examples, splits and data sets show in a cell."""

import re
from html.parser import HTMLParser

import pytest

from fulltune_nb.data import load_data
from fulltune_nb.data.example import BOS_DOUBLED, CUT_TOKENS_SHOWN, TOKENS_SHOWN, pieces, runs_html, token_texts
from fulltune_nb.errors import ConfigError, DataError

PAIRS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(5)]
ATTACK = "<img src=x onerror=alert(1)></pre><script>alert(2)</script>$x$\u202e"


class Page(HTMLParser):
    """Collects the elements of a page and checks that they are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.boxes = [], set(), []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.open.append(tag)
        if "token" in dict(attributes).get("title", ""):
            self.boxes.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def data(tokenizer):
    return load_data({"train": PAIRS, "test": PAIRS[:1]}, tokenizer, mask_prompt=True, max_seq_length=64)


def test_lens_as_text_puts_brackets_around_what_is_trained_on(data, tokenizer):
    first, second = str(data.show(2)).split("\n\n")
    example = data.train[0]
    assert first.splitlines()[0] == f"train:1: {len(example.tokens)} tokens, {example.loss_mask.sum()} trained on"
    inside = first.split("[[")[1].split("]]")[0]
    assert inside == tokenizer.decode(example.tokens[example.loss_mask].tolist()) and "It is 0." in inside
    assert first.split("\n", 1)[1].replace("[[", "").replace("]]", "") == tokenizer.decode(example.tokens.tolist())
    assert second.startswith("train:2: ")


def test_lens_shows_each_token_once_as_trained_masked_or_special(data, tokenizer):
    boxes = Page(data.show(2)._repr_html_()).boxes
    examples = data.train[:2]
    assert len(boxes) == sum(len(e.tokens) for e in examples)
    flat = [(int(t), bool(m)) for e in examples for t, m in zip(e.tokens, e.loss_mask, strict=True)]
    for (tag, attributes), (token, trained) in zip(boxes, flat, strict=True):
        assert tag == ("u" if trained else "span")
        kinds = attributes["class"].split()
        is_special = tokenizer.added_tokens_decoder[token].special if token in tokenizer.added_tokens_decoder else False
        assert ("trained" in kinds, "masked" in kinds, "special" in kinds) == (trained, not trained, is_special)
        assert f"id {token}" in attributes["title"]


def test_trained_and_special_tokens_can_be_told_without_colour(data):
    for _, attributes in Page(data.show(1)._repr_html_()).boxes:
        kinds = attributes["class"].split()
        assert ("underline" in attributes["style"]) == ("trained" in kinds) and ("dashed" in attributes["style"]) == ("special" in kinds)


@pytest.mark.parametrize("view", ["dataset", "split", "example", "lens"])
def test_rows_cannot_bring_markup_into_the_page(tokenizer, view):
    data = load_data({"train": [{"prompt": ATTACK, "completion": ATTACK}]}, tokenizer, mask_prompt=True)
    shown = {"dataset": data, "split": data.train, "example": data.train[0], "lens": data.show()}[view]
    page = Page(shown._repr_html_())
    assert not page.tags & {"img", "script"} and "\u202e" not in shown._repr_html_()


def test_long_example_shows_both_ends_and_counts_what_is_between(tokenizer):
    data = load_data({"train": [{"prompt": "What? " * 300, "completion": "Yes. " * 200}]}, tokenizer, mask_prompt=True)
    example = data.train[0]
    html = data.show(1)._repr_html_()
    assert len(Page(html).boxes) == TOKENS_SHOWN
    hidden = example.loss_mask[TOKENS_SHOWN // 2 : -TOKENS_SHOWN // 2]
    assert f"{len(hidden):,} tokens not shown, {hidden.sum():,} of them trained on" in html


def test_show_takes_a_count_and_a_split(data):
    assert len(data.show(99).examples) == 5 and [e.source for e in data.show(3, split="test").examples] == ["test:1"]
    for n in (0, -1, True, "3"):
        with pytest.raises(ConfigError, match="show"):
            data.show(n)
    with pytest.raises(DataError, match="no split 'valid'.*train, test"):
        data.show(split="valid")


def test_data_set_shows_counts_share_notes_and_marked_examples(tokenizer):
    rows = [*PAIRS, {"prompt": "What is it? " * 20, "completion": "It."}]
    data = load_data({"train": rows, "test": PAIRS}, tokenizer, mask_prompt=True, max_seq_length=40)
    html = data._repr_html_()
    Page(html)
    share = f"{100 * data.train.trained_tokens / data.train.tokens:.1f}\u00a0%"
    for part in (f"{data.train.tokens:,}", share, "completions", data.notes[0], "max_seq_length", "<svg"):
        assert part in html
    assert re.findall(r'<u class="trained"[^>]*>([^<]*)</u>', html) == ["It is 0.&lt;|im_end|&gt;\n", "It is 1.&lt;|im_end|&gt;\n"]


def test_tokens_that_are_part_of_a_character_are_given_by_their_bytes(tokenizer):
    texts = token_texts(tokenizer, tokenizer.encode("a\U0001f600"))
    assert texts[0] == "a" and " ".join(t.strip("<>") for t in texts[1:]) == "F0 9F 98 80"


def test_unknown_id_is_named(tokenizer):
    assert token_texts(tokenizer, [10**6]) == ["<id 1000000>"]


def test_example_of_no_tokens_can_be_shown(make_tokenizer):
    split = load_data({"train": [{"text": ""}, {"text": "a b"}]}, make_tokenizer(eos_token=None)).train
    Page(split._repr_html_())
    Page(split[0]._repr_html_())


def test_tokens_cut_off_are_shown_struck_through_and_counted(tokenizer):
    row = {"prompt": "What is it?", "completion": " ".join(str(i) for i in range(400))}
    whole = load_data({"train": [row]}, tokenizer).train[0]
    data = load_data({"train": [row]}, tokenizer, max_seq_length=30)
    html = data.show(1)._repr_html_()
    shown = re.findall(r'<s class="cut"[^>]*>([^<]*)</s>', html)
    assert [text.replace("·", " ") for text in shown] == token_texts(tokenizer, whole.tokens[30 : 30 + CUT_TOKENS_SHOWN].tolist())
    assert f"{len(whole.tokens) - 30 - CUT_TOKENS_SHOWN:,} more cut off" in html


def test_an_end_token_that_was_cut_off_is_shown(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    html = load_data({"train": [{"text": "a fox"}]}, tokenizer, max_seq_length=2).show(1)._repr_html_()
    assert re.findall(r'<s class="cut"[^>]*>([^<]*)</s>', html)[-1] == "&lt;/s&gt;" and "more cut off" not in html


def test_begin_and_end_tokens_are_counted_and_warned_about(make_tokenizer):
    html = load_data({"train": [{"text": "<s>a fox"}]}, make_tokenizer(adds_bos=True)).show(1)._repr_html_()
    assert "2 BOS, 1 EOS" in html and f"⚠ {BOS_DOUBLED}" in html


WORDS = "日本 שלום \U0001f600"


def letters_of(html):
    """What the boxes show, and the ids in their hover texts."""
    boxes = re.findall(r'<(?:u|span) [^>]*title="([^"]*)">([^<]*)</(?:u|span)>', html)
    return [text for _, text in boxes], [int(token) for title, _ in boxes for token in re.findall(r"id (\d+)", title)]


def test_letters_of_several_tokens_are_shown_as_letters_with_all_their_tokens_behind_them(tokenizer):
    example = load_data({"train": [{"text": WORDS}]}, tokenizer).train[0]
    texts, ids = letters_of(example._repr_html_())
    assert "".join(texts) == WORDS.replace(" ", "·") + "&lt;/s&gt;" and ids == example.tokens.tolist()


@pytest.mark.parametrize("character", ["e\u0301", "ש\u05c1\u05b8", "❤\ufe0f", "👍🏽", "👨\u200d👩\u200d👧", "🇩🇪", "한", "ก\u0e49"])
def test_a_character_of_several_code_points_is_one(tokenizer, character):
    found = pieces(tokenizer, tokenizer.encode(f"{character * 2}</s>{character}", add_special_tokens=False))
    assert [piece.text for piece in found] == [character, character, "</s>", character]


def test_letters_at_the_edge_of_what_is_shown_or_trained_on_stay_whole(tokenizer):
    example = load_data({"train": [{"text": "語字" * 200}]}, tokenizer).train[0]
    texts, _ = letters_of(example._repr_html_())
    assert set(texts) == {*"語字", "&lt;/s&gt;"}
    assert "\ufffd" not in runs_html(example)  # the first token, a part of the first letter, is not trained on


def test_byte_tokens_of_sentencepiece_are_letters_too():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    found = pieces(PreTrainedTokenizerFast(tokenizer_object=backend), [*"本é".encode(), 0xE6])
    assert [piece.text for piece in found] == ["本", "é", "<E6>"]
