"""A tokenizer from a model folder, and into one."""

import json
import shutil

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fulltune_nb as ft
from fulltune_nb import tiny
from fulltune_nb import tokenizer as tokenizer_files
from fulltune_nb.errors import ModelError
from fulltune_nb.models.language_model import LanguageModel
from fulltune_nb.tokenizer import load_tokenizer, save_tokenizer
from nbs_tests.models.parity import need
from nbs_tests.training.conftest import TINY_LLAMA

INST = "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"

@pytest.fixture
def source(tmp_path):
    """The tiny model's folder with a SentencePiece vocabulary besides, as those of Mistral and Gemma have it."""
    folder = shutil.copytree(tiny.BASE_MODEL, tmp_path / "source")
    (folder / "tokenizer.model").write_bytes(b"\n\x0c pieces")
    return folder


@pytest.fixture
def legacy(tmp_path):
    """A small tokenizer in the shape of Llama 2's: SentencePiece-like, with `legacy: true`, which puts a space behind special tokens."""
    from tokenizers import AddedToken, decoders, models, normalizers

    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzIH?!."]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters, "▁a", "▁th", "th"])}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a"), ("t", "h"), ("▁", "th")], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    folder = tmp_path / "legacy"
    LanguageModel.from_config({**TINY_LLAMA, "vocab_size": len(vocab)}, PreTrainedTokenizerFast(tokenizer_object=backend)).save(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": INST}))
    return folder


def bytes_of(folder, names=("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")):
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def test_files_are_copied_byte_for_byte_while_the_tokenizer_is_unchanged(legacy, tmp_path):
    (legacy / "special_tokens_map.json").write_text('{"bos_token":   "<s>"}')
    lm = ft.load_model(legacy)
    lm.tokenizer(["a", "that"], padding=False, truncation=True, max_length=1)  # leaves its mark in the tokenizer
    lm.save(tmp_path / "out")
    assert bytes_of(tmp_path / "out") == bytes_of(legacy) and len(bytes_of(legacy)) == 3
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == INST


@pytest.mark.parametrize("before", ['"</s>"', '{"__type": "AddedToken", "content": "</s>{}"}', "null"])
def test_another_eos_changes_nothing_else_of_the_files(legacy, tmp_path, before):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = {"legacy": True, "tokenizer_class": "LlamaTokenizer", "é": {"eos_token": 1}, "eos_token": 0, "chat_template": "{{ 1 }}"}
        (legacy / name).write_text(json.dumps(settings, indent=4).replace('"eos_token": 0', f'"eos_token"  :  {before}'))
    source = bytes_of(legacy)
    save_tokenizer(load_tokenizer(legacy), tmp_path / "out", ends=[0])
    for name, content in source.items():
        changed = content.replace(before.encode(), b'"<unk>"') if name != "tokenizer.json" else content
        assert (tmp_path / "out" / name).read_bytes() == changed


def test_a_run_resumes_right_after_a_checkpoint_with_a_tokenizer_whose_settings_transformers_drops(legacy, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "Is that a hat?", "completion": "a hat."}\n' * 3)
    lm = ft.load_model(legacy)
    assert lm.tokenizer.convert_ids_to_tokens(lm.tokenizer.encode("</s>a", add_special_tokens=False))[1] == "▁a"
    data = ft.load_data(tmp_path, lm.tokenizer, max_seq_length=64)
    ft.Trainer(lm, data, ft.TrainConfig(iters=1, learning_rate=1e-3, max_seq_length=64), run_dir=tmp_path / "run").run()
    assert ft.Trainer.resume(tmp_path / "run").data.fingerprint == data.fingerprint


def test_other_readers_split_texts_as_they_were_trained_where_transformers_has_a_way_of_its_own(make_tokenizer, tmp_path):
    """Its class for Qwen2 splits digits off words, whatever tokenizer.json says."""
    tokenizer, text = make_tokenizer(), "population > 1000 and 1 2 3"
    ft.LanguageModel.from_config({**TINY_LLAMA, "model_type": "qwen2"}, tokenizer).save(tmp_path / "base")
    lm = ft.load_model(tmp_path / "base")
    assert lm.tokenizer.encode(text) != tokenizer.encode(text)
    lm.save(tmp_path / "out")
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(text).ids == lm.tokenizer.encode(text)
    assert load_tokenizer(tmp_path / "out").encode(text) == lm.tokenizer.encode(text)


def test_only_the_template_changes_where_only_that_was_changed(legacy, tmp_path):
    tokenizer = load_tokenizer(legacy)
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_tokenizer(tokenizer, tmp_path / "out")
    before, now = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (legacy, tmp_path / "out"))
    assert now == {**before, "chat_template": "{{ messages[0].content }}"}
    assert load_tokenizer(tmp_path / "out").chat_template == now["chat_template"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (legacy / "tokenizer.json").read_bytes()


def test_of_a_changed_tokenizer_the_other_settings_stay(legacy, tmp_path):
    tokenizer, text = load_tokenizer(legacy), "</s>a<|im_start|>that</s> a"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    save_tokenizer(tokenizer, tmp_path / "out")
    shutil.copy(legacy / "config.json", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["legacy"] is True
    again = load_tokenizer(tmp_path / "out")
    assert again.encode(text) == tokenizer.encode(text) and again.all_special_ids == tokenizer.all_special_ids


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_stands_in_both_places_wherever_it_was(legacy, tmp_path, place):
    settings = json.loads((legacy / "tokenizer_config.json").read_text())
    if place == "chat_template.jinja":
        (legacy / place).write_text(settings.pop("chat_template"))
        (legacy / "tokenizer_config.json").write_text(json.dumps(settings))
    ft.load_model(legacy).save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {**settings, "chat_template": INST}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == INST


@pytest.mark.parametrize("as_files", [False, True])
def test_several_templates_stay_several(legacy, tmp_path, as_files):
    several = {"default": INST, "tool_use": "{{ tools }}"}
    settings = json.loads((legacy / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": text} for name, text in several.items()]
    (legacy / "tokenizer_config.json").write_text(json.dumps(settings))
    if as_files:
        tokenizer = AutoTokenizer.from_pretrained(legacy)
        tokenizer.save_pretrained(legacy)
        assert (legacy / "additional_chat_templates" / "tool_use.jinja").exists()
    lm = ft.load_model(legacy)
    data = ft.load_data({"train": [{"prompt": "Is that a hat?", "completion": "a hat."}]}, lm.tokenizer, max_seq_length=64)
    ft.Trainer(lm, data, ft.TrainConfig(iters=1, max_seq_length=64), run_dir=tmp_path / "run").run()
    assert ft.load_model(lm.save(tmp_path / "out")).tokenizer.chat_template == several
    assert ft.load_model(tmp_path / "run" / "checkpoints" / "step-000001").tokenizer.chat_template == several


def test_a_tokenizer_whose_folder_is_gone_is_written_as_it_was(legacy, tmp_path):
    before, lm = bytes_of(legacy), ft.load_model(legacy)
    shutil.rmtree(legacy)
    lm.save(tmp_path / "out")
    assert bytes_of(tmp_path / "out") == before


def test_merges_that_sentencepiece_does_not_make_are_warned_of(tmp_path):
    """Of a tokenizer.model alone; transformers' Llama class makes other merges of it."""
    need("sentencepiece", "pip install sentencepiece")
    import sentencepiece

    lines = ["    return that  # a hat", "def that(a):\n    return a", "if a  b   c    d: return"] * 50
    with (tmp_path / "tokenizer.model").open("wb") as file:
        options = {"model_type": "bpe", "vocab_size": 312, "hard_vocab_limit": False, "byte_fallback": True, "minloglevel": 2}
        options |= {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
        trainer = sentencepiece.SentencePieceTrainer
        trainer.train(sentence_iterator=iter(lines), model_writer=file, **options)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": true}')
    with pytest.warns(UserWarning, match="does not split texts as SentencePiece"):
        tokenizer = load_tokenizer(tmp_path)
    save_tokenizer(tokenizer, tmp_path / "out")
    shutil.copy(tmp_path / "config.json", tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").encode("return  a    b") == tokenizer.encode("return  a    b")


def test_the_sentencepiece_vocabulary_goes_along_from_folder_to_folder(source, tmp_path):
    ft.load_model(source).save(tmp_path / "first")
    ft.load_model(tmp_path / "first").save(tmp_path / "second")
    assert (tmp_path / "second" / "tokenizer.model").read_bytes() == b"\n\x0c pieces"


def test_checkpoints_have_it_too(source, tmp_path):
    lm = ft.load_model(source)
    data = ft.load_data({"train": [{"text": "There are five ships."}]}, lm.tokenizer)
    ft.Trainer(lm, data, ft.TrainConfig(iters=1, learning_rate=1e-3), run_dir=tmp_path / "run").run()
    ft.load_model(tmp_path / "run" / "checkpoints" / "step-000001").save(tmp_path / "tuned")
    assert (tmp_path / "tuned" / "tokenizer.model").exists()


def test_where_there_is_none_none_is_written(tmp_path):
    save_tokenizer(load_tokenizer(tiny.BASE_MODEL), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "tokenizer.model").exists()


def test_the_settings_are_in_words_that_transformers_4_knows_too_and_the_tokens_stay(tmp_path):
    tokenizer = load_tokenizer(tiny.BASE_MODEL)
    save_tokenizer(tokenizer, tmp_path / "first")
    save_tokenizer(load_tokenizer(tmp_path / "first"), tmp_path / "second")
    for name in ("first", "second"):
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in config
        assert config["additional_special_tokens"] == ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
        again, text = load_tokenizer(tmp_path / name), "<|user|>How many ships?<|assistant|>5<|end|>"
        assert again(text) == tokenizer(text) and again.all_special_ids == tokenizer.all_special_ids
        assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == "How many ships?5"


def test_nothing_of_this_machine_is_written(source, tmp_path):
    save_tokenizer(load_tokenizer(source), tmp_path / "out")
    text = (tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8")
    assert str(source) not in text and "local" not in text


def test_folder_with_nothing_else_names_the_packages_that_read_it(source, monkeypatch):
    (source / "tokenizer.json").unlink()
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda module: None)
    with pytest.raises(ModelError, match="pip install sentencepiece protobuf"):
        load_tokenizer(source)
