"""A tokenizer from a model folder, and into one."""

import json
import shutil

import pytest

import fulltune_nb as ft
from fulltune_nb import tiny
from fulltune_nb import tokenizer as tokenizer_files
from fulltune_nb.errors import ModelError
from fulltune_nb.tokenizer import load_tokenizer, save_tokenizer


@pytest.fixture
def source(tmp_path):
    """The tiny model's folder with a SentencePiece vocabulary besides, as those of Mistral and Gemma have it."""
    folder = shutil.copytree(tiny.BASE_MODEL, tmp_path / "source")
    (folder / "tokenizer.model").write_bytes(b"\n\x0c pieces")
    return folder


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
