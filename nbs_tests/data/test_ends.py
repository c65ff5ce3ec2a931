"""An end that was trained is a stop: which ends a data set trains, and where they are told."""

import json

import pytest

import fulltune_nb as ft
from fulltune_nb.chat_template import answer_end
from fulltune_nb.tokenizer import save_tokenizer, special_ids
from nbs_tests.conftest import CHATML
from nbs_tests.data.chat_templates import PLAIN_CHATML
from nbs_tests.training.conftest import TINY_LLAMA, make_rows

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": "1"}}}]}
CALLS = [TALK[0], CALL, {"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2"}]
SEVERAL_CALLS = [TALK[0], {**CALL, "tool_calls": CALL["tool_calls"] * 2}, *CALLS[2:]]

GEMMA = (
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}"
    "{% endfor %}"
)
CALLS_END_OTHERWISE = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}<|im_end|>{% else %}{{ m['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
THINKING = (  # <|im_end|> stands between thinking and answer, which then ends with <|eot_id|>
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>{% if m.reasoning %}{{ m.reasoning }}<|im_end|>{% endif %}"
    "{{ m['content'] }}{{ '<|eot_id|>' if m.reasoning else '<|im_end|>' }}{% else %}[{{ m['content'] }}]{% endif %}{% endfor %}"
)
ENDS_CALLS_ONLY = (  # as GLM's: a plain answer has no end, and a call's end may stand between two calls
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<start_of_turn>"
    "{{ c.function | tojson }}<end_of_turn>{% endfor %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n###\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"

CASES = {
    "chatml": (CHATML, [TALK], ["<|im_end|>"], ()),
    "a line break behind the end": (GEMMA, [TALK], ["<end_of_turn>"], ()),
    "the tokenizer's EOS": (MISTRAL, [TALK, TALK * 2], ["</s>"], ()),
    "calls end otherwise": (CALLS_END_OTHERWISE, [CALLS, TALK], ["<|eot_id|>", "<|im_end|>"], ()),
    "a row that ends with calls": (CALLS_END_OTHERWISE, [CALLS[:2], TALK], ["<|eot_id|>", "<|im_end|>"], ()),
    "calls in a later row": (CALLS_END_OTHERWISE, [*[TALK] * 9, CALLS], ["<|eot_id|>", "<|im_end|>"], ()),
    "an end that stands within turns too": (
        THINKING, [[*TALK, TALK[0], {**TALK[1], "reasoning": "Hm"}]], ["<|eot_id|>"], (),
    ),
    "one call": (ENDS_CALLS_ONLY, [CALLS], ["<end_of_turn>"], ()),
    "several calls in a later row": (ENDS_CALLS_ONLY, [*[CALLS] * 9, SEVERAL_CALLS], [], ()),
    "words with the end in them": (CHATML, [[TALK[0], {"role": "assistant", "content": "It is <|im_end|>, so."}]], ["<|im_end|>"], ()),
    "several tokens": (PLAIN, [TALK], [], ("###",)),
    "no template": (None, [TALK], ["<|im_end|>", "</s>"], ()),
}  # fmt: skip


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_ends_are_those_that_the_rows_train(make_tokenizer, case, mask_prompt):
    template, rows, ends, strings = CASES[case]
    tokenizer = make_tokenizer(template)
    data = ft.load_data({"train": [{"messages": row} for row in rows]}, tokenizer, mask_prompt=mask_prompt)
    ids, texts = data.trained_ends
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ends and texts == strings


def test_text_trains_the_tokenizers_eos(make_tokenizer):
    tokenizer = make_tokenizer()
    assert ft.load_data({"train": [{"text": "one"}]}, tokenizer).trained_ends == ((tokenizer.eos_token_id,), ())
    assert ft.load_data({"train": [{"text": "one"}]}, make_tokenizer(eos_token=None)).trained_ends == ((), ())


@pytest.fixture
def tuned(make_tokenizer, tmp_path):
    """`tuned(template, generation_config, rows)`: a trained model, and the folder of its run."""

    def make(template, generation_config, rows):
        tokenizer = make_tokenizer(template)
        lm = ft.LanguageModel.from_config(TINY_LLAMA, tokenizer, seed=1)
        lm.generation_config = generation_config
        data = ft.load_data({"train": rows, "valid": rows[:2]}, tokenizer, max_seq_length=128)
        ft.Trainer(lm, data, ft.TrainConfig(iters=1, batch_size=2, learning_rate=1e-3, max_seq_length=128), tmp_path / "run").run()
        return lm, tmp_path / "run"

    return make


def test_every_folder_that_is_written_names_the_trained_ends(tuned, tmp_path):
    lm, run = tuned(CHATML, {"eos_token_id": 1, "top_p": 0.9}, make_rows(4))
    end = lm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    folders = [lm.save(tmp_path / "out"), run / "best", run / "checkpoints" / "step-000000", run / "checkpoints" / "step-000001"]
    for folder in folders:
        assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [1, end], "top_p": 0.9}
    assert lm.stop_ids == ft.load_model(tmp_path / "out").stop_ids == (1, end)


def test_exports_name_the_trained_end_as_eos_and_checkpoints_keep_the_tokenizer(tuned, tmp_path):
    lm, run = tuned(CALLS_END_OTHERWISE, None, [{"messages": CALLS}] * 4)
    steps = run / "checkpoints"
    names = [steps / "step-000000", steps / "step-000001", run / "best", lm.save(tmp_path / "out")]
    texts = [(folder / "tokenizer_config.json").read_text() for folder in names]
    assert [json.loads(text)["eos_token"] for text in texts] == ["</s>", "</s>", "<|eot_id|>", "<|eot_id|>"]
    assert {text.replace('"eos_token": "<|eot_id|>"', '"eos_token": "</s>"') for text in texts} == {texts[0]}
    assert lm.tokenizer.eos_token == "</s>"
    again, text = ft.load_model(tmp_path / "out").tokenizer, "</s>Hello<|eot_id|> 1</s>"
    assert again.encode(text) == lm.tokenizer.encode(text) and special_ids(again) == special_ids(lm.tokenizer)


WRITES_EOS = CHATML.replace("{% for", "{{ eos_token }}{% for", 1)


@pytest.mark.parametrize(("template", "row"), [(MISTRAL, TALK), (WRITES_EOS, TALK), (PLAIN, TALK), (None, TALK), (CHATML, None)])
def test_the_eos_stays_where_it_was_trained_or_is_written_or_the_end_is_no_token(tuned, tmp_path, template, row):
    rows = [{"text": "Hello"} if row is None else {"messages": row}] * 4
    lm, _ = tuned(template, None, rows)
    assert json.loads((lm.save(tmp_path / "out") / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_the_eos_stays_where_texts_get_it_from_the_tokenizer(make_tokenizer, tmp_path):
    from tokenizers import processors

    tokenizer = make_tokenizer(CHATML)
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    puts_eos = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)])
    for post_processor, eos in ((None, "<|im_end|>"), (puts_eos, "</s>")):
        tokenizer.backend_tokenizer.post_processor = post_processor
        save_tokenizer(tokenizer, tmp_path / eos.strip("<|/>"), ends)
        assert json.loads((tmp_path / eos.strip("<|/>") / "tokenizer_config.json").read_text())["eos_token"] == eos


def test_an_end_of_several_tokens_is_a_stop_string(tuned, tmp_path):
    lm, _ = tuned(PLAIN, None, make_rows(4))
    assert json.loads((lm.save(tmp_path / "out") / "generation_config.json").read_text())["stop_strings"] == ["###"]
    assert ft.load_model(tmp_path / "out").stop_strings == ("###",)


@pytest.mark.parametrize("found", [{"eos_token_id": ["</s>", 3, 3, True, [4]]}, {"eos_token_id": 3, "stop_strings": [1, "", None]}])
def test_values_of_another_kind_are_no_stops(tokenizer, found):
    lm = ft.LanguageModel.from_config(TINY_LLAMA, tokenizer, seed=1)
    lm.generation_config = found
    assert (lm.stop_ids, lm.stop_strings) == ((3,), ())


# ---- the template of tokenizers that have none


def test_the_fallback_is_the_documented_text_with_the_eos_behind_assistant_turns(make_tokenizer):
    plain, ours = make_tokenizer(PLAIN_CHATML), make_tokenizer()
    rows = {"train": [{"messages": [*TALK, *TALK]}]}
    before, now = (ft.load_data(rows, tokenizer, mask_prompt=True).train[0] for tokenizer in (plain, ours))
    assert now.text == before.text.replace("Hello<|im_end|>", "Hello<|im_end|></s>")
    assert now.loss_mask[now.tokens == ours.eos_token_id].all() and (now.tokens == ours.eos_token_id).sum() == 2
    end = ours.convert_tokens_to_ids("<|im_end|>")  # this tokenizer knows it
    assert ft.load_data(rows, ours).trained_ends == ((end, ours.eos_token_id), ())


def test_chatml_that_is_ordinary_text_ends_with_a_stop_string_here_and_with_the_eos_elsewhere(make_tokenizer):
    template = CHATML.replace("im_end", "im_over").replace("<|im_over|>\n'", "<|im_over|></s>\n'")
    tokenizer = make_tokenizer(template)
    assert answer_end(tokenizer) == ((tokenizer.eos_token_id,), ("<|im_over|>",))
    assert ft.load_data({"train": [{"messages": TALK}]}, tokenizer).trained_ends == ((tokenizer.eos_token_id,), ())


def test_an_eos_that_ends_the_turn_already_is_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer(eos_token="<|im_end|>")
    (example,) = ft.load_data({"train": [{"messages": TALK}]}, tokenizer).train
    assert example.text.count("<|im_end|>") == 2


@pytest.mark.parametrize("way", ["resume with its model", "resume with nothing", "the cell again", "the cell again, with no template yet"])
def test_a_run_begun_with_the_fallback_of_then_goes_on_with_it(make_tokenizer, tmp_path, way):
    rows, config = {"train": make_rows(6)}, ft.TrainConfig(iters=2, batch_size=2, learning_rate=1e-3, max_seq_length=128)

    def begun(template):
        lm = ft.LanguageModel.from_config(TINY_LLAMA, make_tokenizer(template), seed=1)
        return lm, ft.load_data(rows, lm.tokenizer, max_seq_length=128)

    ft.Trainer(*begun(PLAIN_CHATML), config, tmp_path / "run").run(1)
    straight = ft.Trainer(*begun(PLAIN_CHATML), config)
    straight.run()
    lm, data = begun(None)
    if way == "the cell again, with no template yet":
        lm.tokenizer.chat_template = None
    if way.startswith("resume"):
        own = lm if way == "resume with its model" else None
        trainer = ft.Trainer.resume(tmp_path / "run", lm=own, data=data if own else begun(PLAIN_CHATML)[1])
    else:
        trainer = ft.Trainer(lm, data, config, tmp_path / "run", resume="auto")
    trainer.run()
    assert trainer.lm.tokenizer.chat_template == PLAIN_CHATML and trainer.data.fingerprint == straight.data.fingerprint
    assert [r.loss for r in trainer.history.steps] == [r.loss for r in straight.history.steps]


def test_of_data_sets_in_several_formats_all_ends_are_found(make_tokenizer, tmp_path):
    for name, row in (("a", {"messages": TALK}), ("b", {"prompt": "Hi", "completion": "Hello"}), ("c", {"text": "Hello"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps(row) + "\n")
    tokenizer = make_tokenizer(CHATML)
    ends = {}
    for names in ("ab", "abc"):
        data = ft.load_data({str(tmp_path / name): 1.0 for name in names}, tokenizer)
        ids, strings = data.trained_ends
        ends[names] = tokenizer.convert_ids_to_tokens(ids)
        assert strings == ()
    assert ends == {"ab": ["<|im_end|>"], "abc": ["</s>", "<|im_end|>"]}
