"""Streaming text: characters, spaces and stop strings at piece borders."""

from __future__ import annotations

import random

import pytest

from fulltune_nb.models.detokenizer import ByteDetokenizer, StopStrings, WindowDetokenizer, decode_text, make_detokenizer
from fulltune_nb.tokenizer import special_ids

TEXTS = [
    "plain words, with punctuation .",
    "emoji 🙂👩‍👩‍👧‍👦 and 東京 and naïve café",
    "  two leading spaces\n\n\tand a tab ",
    "ß" * 40 + "日本" * 20,
]


@pytest.fixture(scope="module")
def sentencepiece_like():
    """Builds a tokenizer as Llama 2 (drops the space before the first word) or Gemma (does not) have it: BPE with byte tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    def make(strips: bool):
        words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdeéhlorw", "\u2581h", "\u2581w", "lo"]
        vocabulary = {word: number for number, word in enumerate(words)}
        model = models.BPE(vocabulary, [("\u2581", "h"), ("\u2581", "w"), ("l", "o")], unk_token="<unk>", byte_fallback=True)
        backend = Tokenizer(model)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strips else steps)
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    return make


@pytest.fixture(scope="module")
def word_level():
    """A tokenizer of another kind: whole words, which `decode` joins with spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1, "one": 2, "two": 3, "three": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def pieces(tokenizer, tokens, context=()):
    detokenizer = make_detokenizer(tokenizer, context)
    return [detokenizer.add(token) for token in tokens]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_byte_level_bpe_join_to_the_text_and_hold_whole_characters_only(tokenizer, text):
    tokens = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(tokenizer, tokens)
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("strips", [True, False])
def test_pieces_of_a_sentencepiece_vocabulary_join_to_what_decode_gives(sentencepiece_like, text, strips):
    tokenizer = sentencepiece_like(strips)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(tokenizer, tokens)
    assert "".join(found) == decode_text(tokenizer, tokens)
    assert "".join(found) == (text if strips else " " + text)
    assert not any("\ufffd" in piece for piece in found)


def test_an_emoji_of_four_byte_tokens_comes_whole_with_its_last_byte(sentencepiece_like):
    tokenizer = sentencepiece_like(True)
    tokens = tokenizer.convert_tokens_to_ids(["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"])
    assert pieces(tokenizer, tokens) == ["", "", "", "🙂"]


@pytest.mark.parametrize("strips", [True, False])
def test_the_space_between_prompt_and_answer_is_kept(sentencepiece_like, strips):
    tokenizer = sentencepiece_like(strips)
    tokens = tokenizer.convert_tokens_to_ids(["\u2581w", "o", "r", "l", "d"])
    prompt = tokenizer.encode("hello")
    assert "".join(pieces(tokenizer, tokens, context=prompt)) == " world"
    assert "".join(pieces(tokenizer, tokens)) == ("world" if strips else " world")


def test_after_a_prompt_of_special_tokens_only_the_answer_is_a_text_of_its_own(sentencepiece_like):
    tokenizer = sentencepiece_like(True)
    tokens = tokenizer.convert_tokens_to_ids(["\u2581w", "o"])
    assert "".join(pieces(tokenizer, tokens, context=[tokenizer.bos_token_id])) == "wo"


def test_other_tokenizers_are_decoded_by_a_window(word_level):
    assert isinstance(make_detokenizer(word_level), WindowDetokenizer)
    assert pieces(word_level, [2, 3, 4, 3]) == ["one", " two", " three", " two"]
    assert pieces(word_level, [3], context=[2]) == [" two"]


def test_the_window_gives_the_same_text_as_the_bytes(tokenizer):
    tokens = tokenizer.encode(" ".join(TEXTS), add_special_tokens=False)
    window = WindowDetokenizer(tokenizer, [], special_ids(tokenizer))
    found = [window.add(token) for token in tokens]
    assert "".join(found) == " ".join(TEXTS)
    assert not any("\ufffd" in piece for piece in found)


def test_the_window_stays_small(tokenizer, monkeypatch):
    decoded, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda tokens, **options: decoded.append(len(tokens)) or decode(tokens, **options))
    window = WindowDetokenizer(tokenizer, [], special_ids(tokenizer))
    broken = tokenizer.convert_tokens_to_ids("ð")  # the byte 0xF0, never followed by the rest of a character
    for token in [*tokenizer.encode("many words " * 30), *[broken] * 50]:
        window.add(token)
    assert decoded and max(decoded) <= 17


def test_special_tokens_are_left_out(tokenizer):
    tokens = tokenizer.encode("<s>a<|im_end|>b</s>", add_special_tokens=False)
    assert "".join(pieces(tokenizer, tokens)) == "ab"


def test_added_tokens_that_are_not_special_are_text(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokens = tokenizer.encode("a <tool> b", add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("<tool>") in tokens
    assert "".join(pieces(tokenizer, tokens)) == "a <tool> b"


def test_random_bytes_are_decoded_as_the_tokenizer_does(tokenizer):
    pick = random.Random(0)
    plain = [token for token in range(len(tokenizer)) if token not in special_ids(tokenizer)]
    for _ in range(100):
        tokens = [*pick.choices(plain, k=30), *tokenizer.encode("end", add_special_tokens=False)]
        assert "".join(pieces(tokenizer, tokens)) == decode_text(tokenizer, tokens)


def test_broken_byte_tokens_become_one_replacement_character_each(sentencepiece_like):
    tokenizer = sentencepiece_like(True)
    tokens = tokenizer.convert_tokens_to_ids(["a", "<0xE4>", "<0xBD>", "b"])
    assert "".join(pieces(tokenizer, tokens)) == decode_text(tokenizer, tokens) == "a\ufffd\ufffdb"


def test_a_prompt_that_ends_within_a_character_is_completed(tokenizer):
    tokens = tokenizer.convert_tokens_to_ids(["ð", "Ł", "Ļ", "Ĥ"])  # 🙂, byte by byte
    assert None not in tokens
    assert pieces(tokenizer, tokens[2:], context=tokens[:2]) == ["", "🙂"]


def test_ids_beyond_the_tokenizer_are_no_text(tokenizer):
    assert isinstance(make_detokenizer(tokenizer), ByteDetokenizer)
    assert pieces(tokenizer, [len(tokenizer) + 3]) == [""]


def through(stops, parts):
    held = StopStrings(stops)
    shown = [held.add(part) for part in parts]
    return "".join(shown) + ("" if held.found else held.finish()), held.found, shown


def test_a_stop_string_across_pieces_is_never_shown():
    text, found, shown = through(["\nQ:"], ["A: 4", "\n", "Q", ": next"])
    assert (text, found) == ("A: 4", True)
    assert shown == ["A: 4", "", "", ""]


def test_what_only_looks_like_a_stop_string_is_shown_later():
    text, found, shown = through(["\nQ:"], ["a\n", "Q", "b"])
    assert (text, found) == ("a\nQb", False)
    assert shown == ["a", "", "\nQb"]


def test_what_was_held_back_comes_at_the_end():
    text, found, _ = through(["stop"], ["a sto"])
    assert (text, found) == ("a sto", False)


@pytest.mark.parametrize("stops", [["aab"], ["abc", "b"], ["ab", "abab"], ["aa", "b", "cab"]])
def test_the_result_does_not_depend_on_how_the_text_is_cut(stops):
    pick = random.Random(1)
    for _ in range(200):
        text = "".join(pick.choices("abc", k=10))
        whole = through(stops, [text])[:2]
        assert through(stops, list(text))[:2] == whole
        cut = pick.randrange(1, 9)
        assert through(stops, [text[:cut], text[cut:]])[:2] == whole
        first_end = min((text.find(stop) + len(stop) for stop in stops if stop in text), default=None)
        assert whole[1] == (first_end is not None)
        assert not any(stop in whole[0] for stop in stops)
