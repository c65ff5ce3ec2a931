"""`load_data` from end to end, and what a data set says about itself."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from fulltune_nb.chat_template import CHATML, ensure_chat_template
from fulltune_nb.data import DataSettings, load_data
from fulltune_nb.errors import ConfigError, DataError, FulltuneError
from nbs_tests.data import chat_templates as templates

TEXTS = [{"text": f"The quick brown fox number {i}."} for i in range(5)]
PAIRS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(5)]
LONG = {"prompt": "What is it? " * 20, "completion": "It."}
CHATS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]


def write(folder, **splits):
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_folder_is_read_with_the_format_of_each_split(tmp_path, tokenizer):
    data = load_data(write(tmp_path, train=PAIRS, valid=CHATS, test=TEXTS), tokenizer)
    found = [(split.name, split.format, len(split)) for split in data.splits.values()]
    assert found == [("train", "completions", 5), ("valid", "chat", 1), ("test", "text", 5)]
    assert data.train[1].source == "train.jsonl:2" and data.train[1].row == PAIRS[1]
    assert data.source == str(tmp_path) and data.settings == DataSettings() and data.tokenizer is tokenizer and data.notes == []


def test_folder_can_be_given_as_text_or_relative_and_is_kept_absolute(tmp_path, tokenizer, monkeypatch):
    write(tmp_path, train=TEXTS)
    monkeypatch.chdir(tmp_path.parent)
    assert load_data(tmp_path.name, tokenizer).source == str(tmp_path)


def test_rows_in_memory_give_the_same_data_as_files(tmp_path, tokenizer):
    files = load_data(write(tmp_path, train=PAIRS, test=PAIRS[:2]), tokenizer, mask_prompt=True)
    memory = load_data({"train": PAIRS, "test": PAIRS[:2]}, tokenizer, mask_prompt=True)
    assert memory.fingerprint == files.fingerprint and memory.source is None and memory.valid is None
    assert memory.train[0].source == "train:1"


def test_duplicate_rows_are_kept(tokenizer):
    assert len(load_data({"train": TEXTS[:1] * 3}, tokenizer).train) == 3


def test_train_may_be_missing(tmp_path, tokenizer):
    data = load_data(write(tmp_path, test=TEXTS), tokenizer)
    assert data.train is None and len(data.test) == 5


def test_split_is_a_sequence(tokenizer):
    split = load_data({"train": TEXTS}, tokenizer).train
    assert split[-1].source == "train:5" and [e.source for e in split[1:3]] == ["train:2", "train:3"]
    assert len(list(split)) == 5 and split[np.int64(2)] is split.examples[2]
    with pytest.raises(IndexError):
        split[5]


def test_counts_of_a_split(tokenizer):
    split = load_data({"train": [*PAIRS, LONG]}, tokenizer, mask_prompt=True, max_seq_length=40).train
    assert split.lengths.tolist() == [len(e.tokens) for e in split] and split.lengths.max() == 40
    assert split.tokens == sum(split.lengths) and split.trained_tokens == sum(int(e.loss_mask.sum()) for e in split)
    assert split.truncated == 1 and split.tokens_cut == split[5].cut > 0
    assert split.untrainable.tolist() == [5] and split.trainable.tolist() == [0, 1, 2, 3, 4]


def test_what_was_cut_or_left_out_is_noted(tokenizer, tmp_path):
    notes = load_data({"train": [*PAIRS, LONG]}, tokenizer, mask_prompt=True, max_seq_length=40).notes
    assert any("train: 1 of 6 rows cut to max_seq_length=40" in note for note in notes)
    assert any("train: 1 of 6 rows have no token to train on" in note for note in notes)
    (tmp_path / "train.jsonl").write_text('{"text": "a b"}\n\n{"text": "c d"}\n')
    assert load_data(tmp_path, tokenizer).notes == ["train: 1 blank lines, which are no rows."]


def test_split_without_any_trained_token_is_an_error_that_says_why(tokenizer):
    question = {"messages": [{"role": role, "content": "a"} for role in ("system", "user")]}
    with pytest.raises(DataError, match=r"valid: none of the 1 rows.*'assistant' only, found are 'system', 'user'"):
        load_data({"train": CHATS, "valid": [question]}, tokenizer, mask_prompt=True)
    with pytest.raises(DataError, match="5 of them are cut at max_seq_length=4"):
        load_data({"train": PAIRS}, tokenizer, mask_prompt=True, max_seq_length=4)
    with pytest.raises(DataError, match="shorter than two tokens"):
        load_data({"train": [{"text": ""}]}, tokenizer)
    untrained = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}
    with pytest.raises(DataError, match=r"\(messages with weight 0 or train false are not trained on\)"):
        load_data({"train": [untrained]}, tokenizer, mask_prompt="last")
    with pytest.raises(DataError, match=r"\(5 are left out, longer than max_seq_length=4: raise it\)"):
        load_data({"train": PAIRS}, tokenizer, mask_prompt=True, max_seq_length=4, long_rows="drop")


def test_mask_prompt_for_text_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match=r"mask_prompt=True means nothing for test.*no prompt"):
        load_data({"train": PAIRS, "test": TEXTS}, tokenizer, mask_prompt=True)


def test_settings_come_from_a_config_and_must_agree_with_it(tokenizer):
    config = SimpleNamespace(mask_prompt=True, max_seq_length=64)
    assert load_data({"train": PAIRS}, tokenizer, config=config).settings == DataSettings(True, 64)
    with pytest.raises(ConfigError, match="disagree"):
        load_data({"train": PAIRS}, tokenizer, mask_prompt=False, config=config)


def test_renamed_keys(tokenizer):
    rows = [{"question": "What?", "answer": "That."}]
    renamed = load_data({"train": rows}, tokenizer, prompt_feature="question", completion_feature="answer")
    plain = load_data({"train": [{"prompt": "What?", "completion": "That."}]}, tokenizer)
    assert renamed.fingerprint == plain.fingerprint


def test_renamed_key_that_no_row_has_is_noted(tokenizer):
    assert "'question'" in load_data({"train": TEXTS}, tokenizer, prompt_feature="question").notes[0]


def test_all_bad_rows_of_all_splits_are_collected_in_the_order_of_lines(tmp_path, make_tokenizer):
    system = {"messages": [{"role": "system", "content": "a"}]}
    lines = [json.dumps(CHATS[0]), "nonsense", json.dumps(system), json.dumps(TEXTS[0]), json.dumps({"messages": 3}), json.dumps(CHATS[0])]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "valid.jsonl").write_bytes(b'{"text": "a"}\n\xff\n')
    (tmp_path / "test.jsonl").write_bytes(b"")
    with pytest.raises(DataError) as error:
        load_data(tmp_path, make_tokenizer(templates.GEMMA))
    starts = ["train.jsonl:2: not JSON", "train.jsonl:3: the chat template refuses", "train.jsonl:4: mixed formats"]
    starts += ["train.jsonl:5: 'messages' is a number", "valid.jsonl:2: not UTF-8", "test.jsonl: an empty file"]
    assert len(error.value.problems) == len(starts)
    for problem, start in zip(error.value.problems, starts, strict=True):
        assert problem.startswith(start) and problem in str(error.value)
    assert 'bad_rows="skip"' not in str(error.value)  # test would be empty all the same
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match='leave them out by bad_rows="skip"'):
        load_data(tmp_path, make_tokenizer(templates.GEMMA))


def test_rows_of_no_known_format_are_told_the_keys_expected_and_found(tokenizer):
    said = r"train:1: no known format: has the keys 'question', 'answer'.*'prompt' and 'completion'.*prompt_feature="
    with pytest.raises(DataError, match=said):
        load_data({"train": [{"question": "a", "answer": "b"}]}, tokenizer)


@pytest.mark.parametrize("source", [None, 3, [{"text": "a"}], b"folder-that-is-not-there"])
def test_source_of_another_type_is_an_error(tokenizer, source):
    with pytest.raises(DataError):
        load_data(source, tokenizer)


def test_object_that_is_no_tokenizer_is_an_error_that_says_what_to_pass(tokenizer):
    with pytest.raises(ConfigError, match=r"Pass its \.tokenizer"):
        load_data({"train": TEXTS}, SimpleNamespace(tokenizer=tokenizer))
    with pytest.raises(FulltuneError, match="tokenizer"):
        load_data({"train": TEXTS}, None)


# ---------------------------------------------------------------- chat template


def test_tokenizer_without_chat_template_gets_chatml_once_and_says_so(make_tokenizer):
    tokenizer = make_tokenizer()
    data = load_data({"train": CHATS, "valid": PAIRS}, tokenizer)
    assert data.train[0].text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|></s>\n"
    assert tokenizer.chat_template == CHATML and len(data.notes) == 1 and "ChatML" in data.notes[0]
    assert load_data({"train": CHATS}, tokenizer).notes == []


def test_chatml_is_saved_with_the_tokenizer(make_tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_tokenizer()
    load_data({"train": CHATS}, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template == CHATML


def test_text_rows_leave_the_tokenizer_without_a_chat_template(make_tokenizer):
    tokenizer = make_tokenizer()
    assert load_data({"train": TEXTS}, tokenizer).notes == [] and tokenizer.chat_template is None


def test_chat_template_that_is_there_is_left_alone(make_tokenizer):
    tokenizer = make_tokenizer(templates.LLAMA3)
    assert ensure_chat_template(tokenizer) is None and tokenizer.chat_template == templates.LLAMA3


def test_what_the_template_leaves_out_is_noted(make_tokenizer):
    rows = [{**CHATS[0], "tools": [{"type": "function", "function": {"name": "add"}}]}]
    assert "leaves out the tools of 1 of 1 rows" in load_data({"train": rows}, make_tokenizer(templates.LLAMA3)).notes[0]


def test_missing_end_of_text_token_is_noted(make_tokenizer):
    assert "no end-of-text token" in load_data({"train": TEXTS}, make_tokenizer(eos_token=None)).notes[0]


# ---------------------------------------------------------------- fingerprints, showing


def test_fingerprint_depends_on_tokens_masks_and_borders_only(tokenizer):
    def fingerprint(rows, **settings):
        return load_data({"train": rows}, tokenizer, **settings).train.fingerprint

    assert fingerprint(PAIRS) == fingerprint([{**row, "id": 1} for row in PAIRS])
    different = [fingerprint(rows) for rows in (PAIRS, PAIRS[::-1], PAIRS[:4])]
    different += [fingerprint(PAIRS, mask_prompt=True), fingerprint(PAIRS, max_seq_length=8)]
    assert len(set(different)) == 5
    one, two = load_data({"train": TEXTS}, tokenizer), load_data({"train": TEXTS, "test": TEXTS}, tokenizer)
    assert one.fingerprint != two.fingerprint and one.train.fingerprint == two.test.fingerprint


def test_reprs_are_one_line(tokenizer):
    data = load_data({"train": PAIRS, "test": TEXTS}, tokenizer)
    assert repr(data).startswith("DataSet(train=5 completions, test=5 text, ")
    for text in (repr(data), repr(data.train), repr(data.train[0]), repr(data.show())):
        assert "\n" not in text and len(text) < 200


def test_loading_prints_nothing(make_tokenizer, capfd):
    load_data({"train": CHATS, "valid": TEXTS}, make_tokenizer(model_max_length=4))
    assert capfd.readouterr() == ("", "")


GOOD = {"messages": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}]}


def test_bad_rows_are_skipped_where_asked_counted_and_told(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(GOOD), "no JSON", '{"messages": []}', json.dumps(GOOD)]))
    with pytest.raises(DataError, match="2 problems"):
        load_data(tmp_path, tokenizer)
    data = load_data(tmp_path, tokenizer, bad_rows="skip", mask_prompt=True)
    assert [example.source for example in data.train] == ["train.jsonl:1", "train.jsonl:4"]
    assert [line.split(": ")[0] for line in data.train.skipped] == ["train.jsonl:2", "train.jsonl:3"]
    assert "train: 2 rows cannot be used and are left out (train.jsonl:2: not JSON" in data.notes[-1]
    assert "rows left out" in data._repr_html_()


def test_a_split_of_bad_rows_only_is_an_error_also_where_they_are_skipped(tokenizer):
    with pytest.raises(DataError, match="valid:1"):
        load_data({"train": [GOOD], "valid": [{"messages": []}]}, tokenizer, bad_rows="skip")


def test_last_trains_the_last_assistant_turn_only(tokenizer):
    messages = [*GOOD["messages"], {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Still fine."}]
    example = load_data({"train": [{"messages": messages}]}, tokenizer, mask_prompt="last").train[0]
    assert tokenizer.decode(example.tokens[example.loss_mask]) == "Still fine.<|im_end|>\n"
