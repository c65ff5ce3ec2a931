"""Tokens and loss masks of rows, against expectations written by hand."""

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulltune_nb.data.encode import encode_rows
from fulltune_nb.data.settings import DataSettings
from nbs_tests.data import chat_templates as templates

MASKED = DataSettings(mask_prompt=True)
SYSTEM = {"role": "system", "content": "Be brief."}
Q1, A1 = {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}
Q2, A2 = {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Still fine."}

THINKING = {"role": "assistant", "content": "<think>Hm.</think>Fine."}


def encode(rows, format, tokenizer, data_settings=MASKED):
    return encode_rows([(f"train:{i}", row) for i, row in enumerate(rows, 1)], format, tokenizer, data_settings)


def encode_one(row, format, tokenizer, data_settings=MASKED):
    encoded = encode([row], format, tokenizer, data_settings)
    assert encoded.problems == []
    return encoded.examples[0]


def problem(row, format, tokenizer, data_settings=MASKED):
    encoded = encode([row], format, tokenizer, data_settings)
    assert len(encoded.examples) == 0 and len(encoded.problems) == 1
    return encoded.problems[0]


def trained_runs(example, tokenizer):
    """The text of each run of trained tokens."""
    pairs = zip(example.loss_mask.tolist(), example.tokens.tolist(), strict=True)
    return [tokenizer.decode([t for _, t in run]) for trained, run in groupby(pairs, key=lambda pair: pair[0]) if trained]


CHATML_ENDS = ["Fine.<|im_end|>\n", "Still fine.<|im_end|>\n"]
CASES = {
    "chatml": (templates.CHATML, [Q1, A1, Q2, A2], CHATML_ENDS),
    "chatml with system prompt": (templates.CHATML, [SYSTEM, Q1, A1], CHATML_ENDS[:1]),
    "chatml ending with a question": (templates.CHATML, [Q1, A1, Q2], CHATML_ENDS[:1]),
    "chatml with two assistant turns in a row": (templates.CHATML, [Q1, A1, A2], CHATML_ENDS),
    "chatml starting with the assistant": (templates.CHATML, [A1, Q2, A2], CHATML_ENDS),
    "llama 2": (templates.LLAMA2, [SYSTEM, Q1, A1, Q2, A2], [" Fine. </s>", " Still fine. </s>"]),
    "llama 3": (templates.LLAMA3, [SYSTEM, Q1, A1, Q2, A2], ["Fine.<|eot_id|>", "Still fine.<|eot_id|>"]),
    "gemma": (templates.GEMMA, [Q1, A1, Q2, A2], ["Fine.<end_of_turn>\n", "Still fine.<end_of_turn>\n"]),
    "thinking in the only turn": (templates.DROPS_EARLIER_THINKING, [Q1, THINKING], ["<think>Hm.</think>Fine.<|im_end|>\n"]),
    "conversation closed by </s>": (templates.CLOSES_CONVERSATION, [Q1, A1], ["Fine.<|im_end|>\n</s>"]),
}


@pytest.mark.parametrize("template, messages, expected", CASES.values(), ids=CASES)
def test_masked_prompt_trains_every_assistant_turn_with_its_end_and_not_its_header(make_tokenizer, template, messages, expected):
    tokenizer = make_tokenizer(template)
    example = encode_one({"messages": messages}, "chat", tokenizer)
    assert trained_runs(example, tokenizer) == expected
    assert tokenizer.decode(example.tokens) == example.text


@pytest.mark.parametrize("template", [templates.CHATML, templates.LLAMA2, templates.LLAMA3, templates.GEMMA])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_tokens_are_those_of_apply_chat_template_without_a_second_bos(make_tokenizer, template, adds_bos):
    tokenizer = make_tokenizer(template, adds_bos=adds_bos)
    rows = [{"messages": [{"role": "user", "content": f"Übung {i} 東京 \U0001f600"}, A1, Q2, A2][: 2 + 2 * (i % 2)]} for i in range(20)]
    for mask_prompt in (False, True):
        examples = encode(rows, "chat", tokenizer, DataSettings(mask_prompt=mask_prompt)).examples
        expected = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in rows]
        assert [e.tokens.tolist() for e in examples] == expected


def test_template_that_trims_contents_trains_the_trimmed_ones(make_tokenizer):
    tokenizer = make_tokenizer(templates.LLAMA3)
    example = encode_one({"messages": [Q1, {"role": "assistant", "content": "\n  Fine. \n"}]}, "chat", tokenizer)
    assert trained_runs(example, tokenizer) == ["Fine.<|eot_id|>"]


def test_without_mask_prompt_every_token_but_the_first_is_trained(tokenizer):
    example = encode_one({"messages": [Q1, A1]}, "chat", tokenizer, DataSettings())
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
    assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == bool and example.tokens.shape == example.loss_mask.shape


def test_completion_is_a_user_and_assistant_pair_and_trained_with_its_end(make_tokenizer):
    tokenizer = make_tokenizer(templates.LLAMA3)
    row = {"prompt": "How are you?", "completion": "Fine."}
    example = encode_one(row, "completions", tokenizer)
    assert trained_runs(example, tokenizer) == ["Fine.<|eot_id|>"]
    assert example.tokens.tolist() == tokenizer.apply_chat_template([Q1, A1], return_dict=False)
    assert example.row is row


def test_empty_completion_trains_the_end_of_the_turn(tokenizer):
    example = encode_one({"prompt": "Say nothing.", "completion": ""}, "completions", tokenizer)
    assert trained_runs(example, tokenizer) == ["<|im_end|>\n"]


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
RESULT = {"role": "tool", "content": "42"}


def test_tools_are_rendered_and_tool_calls_are_trained(make_tokenizer):
    tokenizer = make_tokenizer(templates.TOOLS)
    row = {"messages": [Q1, CALL, RESULT, A1], "tools": [TOOL]}
    example = encode_one(row, "chat", tokenizer)
    assert example.text.startswith("<|im_start|>system\nTools:") and '"Adds."' in example.text
    call = '<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>\n'
    assert trained_runs(example, tokenizer) == [call, "Fine.<|im_end|>\n"]
    assert example.tokens.tolist() == tokenizer.apply_chat_template(row["messages"], tools=[TOOL], return_dict=False)


def test_completions_take_tools_too(make_tokenizer):
    tokenizer = make_tokenizer(templates.TOOLS)
    example = encode_one({"prompt": "Add.", "completion": "42", "tools": [TOOL]}, "completions", tokenizer)
    assert '"Adds."' in example.text and trained_runs(example, tokenizer) == ["42<|im_end|>\n"]


def test_tools_left_out_by_the_template_are_counted(make_tokenizer):
    rows = [{"messages": [Q1, A1], "tools": [TOOL]}, {"messages": [Q1, A1]}]
    assert encode(rows, "chat", make_tokenizer(templates.LLAMA3)).left_out == {"the tools": ["train:1"]}
    assert encode(rows, "chat", make_tokenizer(templates.TOOLS)).left_out == {}


def test_tool_calls_left_out_by_the_template_are_an_error_of_the_row(make_tokenizer):
    call = {**CALL, "content": "Wait."}
    for mask_prompt in (False, True):
        text = problem({"messages": [Q1, call]}, "chat", make_tokenizer(templates.LLAMA3), DataSettings(mask_prompt=mask_prompt))
        assert text.startswith("train:1: ") and "tool calls" in text


@pytest.mark.parametrize(
    "template, messages, said",
    [
        (templates.GEMMA, [SYSTEM, Q1, A1], "System role not supported"),
        (templates.LLAMA2, [Q1, Q2, A1], "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", [Q1, A1], "TypeError"),
        ("{% for m in messages %}{{ m.nothing.more }}{% endfor %}", [Q1, A1], "UndefinedError"),
        ("{% for m in messages %}", [Q1, A1], "TemplateSyntaxError"),
    ],
)
def test_what_the_template_raises_is_reported_by_row(make_tokenizer, template, messages, said):
    for mask_prompt in (False, True):
        text = problem({"messages": messages}, "chat", make_tokenizer(template), DataSettings(mask_prompt=mask_prompt))
        assert text.startswith("train:1: the chat template refuses this row") and said in text


BROKEN = {
    "earlier thinking dropped": (templates.DROPS_EARLIER_THINKING, [Q1, THINKING, Q2, A2]),
    "an answer behind the tool's result": (templates.ANSWERS_BEHIND_RESULT, [Q1, {**CALL, "content": "Let me see."}, RESULT, A1]),
}


@pytest.mark.parametrize("template, messages", BROKEN.values(), ids=BROKEN)
def test_row_whose_turns_cannot_be_found_is_an_error_of_the_row_only_with_mask_prompt(make_tokenizer, template, messages):
    tokenizer = make_tokenizer(template)
    good = {"messages": [Q1]}
    encoded = encode([good, {"messages": messages}, good], "chat", tokenizer)
    assert len(encoded.examples) == 2
    assert [p.split(" ")[0] for p in encoded.problems] == ["train:2:"] and "mask_prompt" in encoded.problems[0]
    assert encode([{"messages": messages}], "chat", tokenizer, DataSettings()).problems == []


def test_row_without_assistant_turn_has_no_trained_token_with_mask_prompt(tokenizer):
    assert not encode_one({"messages": [Q1]}, "chat", tokenizer).loss_mask.any()


def test_text_gets_an_end_of_text_token_once(make_tokenizer):
    tokenizer = make_tokenizer()
    eos = tokenizer.eos_token_id
    plain, ended = encode([{"text": "The fox."}, {"text": "The fox.</s>"}], "text", tokenizer, DataSettings()).examples
    assert plain.tokens.tolist() == [*tokenizer.encode("The fox."), eos] == ended.tokens.tolist()
    assert plain.text == "The fox."
    assert plain.loss_mask.tolist() == [False] + [True] * (len(plain.tokens) - 1)


def test_text_keeps_the_bos_token_that_the_tokenizer_puts(make_tokenizer):
    tokenizer = make_tokenizer(adds_bos=True)
    example = encode_one({"text": "The fox."}, "text", tokenizer, DataSettings())
    words = tokenizer.encode("The fox.", add_special_tokens=False)
    assert example.tokens.tolist() == [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]


def test_text_of_a_tokenizer_without_end_of_text_gets_none(make_tokenizer):
    tokenizer = make_tokenizer(eos_token=None)
    assert encode_one({"text": "The fox."}, "text", tokenizer, DataSettings()).tokens.tolist() == tokenizer.encode("The fox.")


def test_empty_text_is_an_example_with_nothing_to_train_on(make_tokenizer):
    assert encode_one({"text": ""}, "text", make_tokenizer(), DataSettings()).loss_mask.tolist() == [False]
    assert encode_one({"text": ""}, "text", make_tokenizer(eos_token=None), DataSettings()).tokens.shape == (0,)


def test_truncation_keeps_the_first_tokens_and_counts_the_others(tokenizer):
    whole = encode_one({"messages": [Q1, A1, Q2, A2]}, "chat", tokenizer)
    cut = encode_one({"messages": [Q1, A1, Q2, A2]}, "chat", tokenizer, DataSettings(mask_prompt=True, max_seq_length=20))
    assert cut.tokens.tolist() == whole.tokens[:20].tolist() and cut.loss_mask.tolist() == whole.loss_mask[:20].tolist()
    assert cut.cut == len(whole.tokens) - 20 and whole.cut == 0
    exact = encode_one({"messages": [Q1, A1, Q2, A2]}, "chat", tokenizer, DataSettings(max_seq_length=len(whole.tokens)))
    assert exact.cut == 0


@pytest.mark.parametrize("row, format", [({"text": "a\ud800b"}, "text"), ({"prompt": "a\ud800b", "completion": "c"}, "completions")])
def test_half_a_surrogate_pair_is_an_error_of_the_row(tokenizer, row, format):
    assert "surrogate" in problem(row, format, tokenizer, DataSettings())


def test_rows_of_more_than_one_chunk_keep_their_order_and_masks(make_tokenizer, monkeypatch):
    monkeypatch.setattr("fulltune_nb.data.encode.CHUNK_ROWS", 3)
    tokenizer = make_tokenizer(templates.GEMMA)
    rows = [{"messages": [{"role": "user", "content": f"Number {i}"}, {"role": "assistant", "content": str(i)}]} for i in range(10)]
    rows[4] = {"messages": [SYSTEM]}
    encoded = encode(rows, "chat", tokenizer)
    assert [e.source for e in encoded.examples] == [f"train:{i}" for i in range(1, 11) if i != 5]
    assert [trained_runs(e, tokenizer) for e in encoded.examples] == [[f"{i}<end_of_turn>\n"] for i in range(10) if i != 4]
    assert [p.split(" ")[0] for p in encoded.problems] == ["train:5:"]


words = st.text("abcdefghij éß東 .,?<>[]", min_size=1, max_size=20).map(str.strip).filter(bool)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), words), min_size=1, max_size=6)


@given(turns)
@settings(max_examples=150, deadline=None)
def test_trained_tokens_of_any_conversation_are_its_assistant_turns(tokenizer, conversation):
    messages = [{"role": role, "content": content} for role, content in conversation]
    example = encode_one({"messages": messages}, "chat", tokenizer)
    expected = [content + "<|im_end|>\n" for role, content in conversation if role == "assistant"]
    assert trained_runs(example, tokenizer) == expected
    assert tokenizer.decode(example.tokens) == example.text


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    """`make(template)`: a tokenizer that marks spaces by ▁ and puts one in front, as Llama 2, Mistral and Gemma have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)]
    )
    backend.train_from_iterator(["How are you? Fine. And now? Still fine. user model assistant [INST] [/INST]"] * 3, trainer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    description = backend.to_str()

    def make(template):
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(description), chat_template=template, **tokens)

    return make


@pytest.mark.parametrize(
    "template, expected",
    [
        (templates.LLAMA2, [" Fine. </s>", " Still fine. </s>"]),
        (templates.GEMMA, ["Fine.<end_of_turn>\n", "Still fine.<end_of_turn>\n"]),
        (templates.CHATML, CHATML_ENDS),
    ],
)
def test_turns_are_found_with_a_sentencepiece_tokenizer(sentencepiece_tokenizer, template, expected):
    tokenizer = sentencepiece_tokenizer(template)
    example = encode_one({"messages": [Q1, A1, Q2, A2]}, "chat", tokenizer)
    assert trained_runs(example, tokenizer) == expected
    assert example.tokens.tolist() == tokenizer.apply_chat_template([Q1, A1, Q2, A2], return_dict=False)
