"""LanguageModel: loading a folder with its tokenizer, saving it, and what it says about itself."""

from __future__ import annotations

import json
import os

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.errors import ModelError, WeightsError
from fulltune_nb.models.folder import hf_tensors
from fulltune_nb.models.language_model import LanguageModel, load_model
from fulltune_nb.tensor_files import write_tensors
from nbs_tests.models.model_cases import FAMILIES, SMALL
from nbs_tests.models.parity import LOGITS_TOLERANCE, need_torch, relative_error

VOCAB = 500
CONFIG = {"model_type": "llama", **SMALL, "vocab_size": VOCAB, "rope_theta": 5e5, "made_up": "kept"}


def language_model(tokenizer, seed=0, **changes) -> LanguageModel:
    return LanguageModel.from_config({**CONFIG, **changes}, tokenizer, seed)


@pytest.fixture
def folder(make_tokenizer, tmp_path):
    """A saved model with a tokenizer."""
    return language_model(make_tokenizer("{{ messages[0]['content'] }}")).save(tmp_path / "source")


def logits(lm) -> np.ndarray:
    return np.array(lm.model(mx.array([[5, 6, 7, 8]])))


# ---- load and save ---------------------------------------------------------------------------------------------------------


def test_a_saved_model_loads_with_its_tokenizer_and_config(folder):
    lm, again = load_model(folder), load_model(str(folder))
    np.testing.assert_array_equal(logits(lm), logits(again))
    assert lm.tokenizer.encode("The quick brown fox") == again.tokenizer.encode("The quick brown fox")
    assert lm.tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert lm.config.raw["made_up"] == "kept" and lm.config.rope.theta == 5e5
    assert lm.source == str(folder) and isinstance(lm.model(mx.array([[1]])), mx.array)


def test_saving_a_loaded_model_gives_the_same_folder(folder, tmp_path):
    copy = load_model(folder).save(tmp_path / "copy")
    assert sorted(os.listdir(copy)) == sorted(os.listdir(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(os.listdir(copy))
    assert (copy / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert json.loads((copy / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_the_generation_config_comes_along(folder, tmp_path):
    given = {"eos_token_id": [1, 4], "temperature": 0.6, "do_sample": True, "something_new": {"a": 1}}
    (folder / "generation_config.json").write_text(json.dumps(given))
    copy = load_model(folder).save(tmp_path / "copy")
    assert json.loads((copy / "generation_config.json").read_text()) == given


def test_a_folder_with_something_in_it_is_not_overwritten(folder):
    with pytest.raises(ModelError, match="is not an empty folder"):
        load_model(folder).save(folder)


def test_paths_may_begin_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    load_model("~/source").save("~/copy")
    assert (folder.parent / "copy" / "config.json").exists()


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_a_model_file_is_laid_over_the_folder(ending, folder, tokenizer, tmp_path):
    other = language_model(tokenizer, seed=1)
    write_tensors(tmp_path / f"model{ending}", hf_tensors(other.model))
    np.testing.assert_array_equal(logits(load_model(folder, model_file=str(tmp_path / f"model{ending}"))), logits(other))


def test_a_model_file_of_another_model_is_refused(folder, tokenizer, tmp_path):
    write_tensors(tmp_path / "model.npz", hf_tensors(language_model(tokenizer, hidden_size=32).model))
    with pytest.raises(WeightsError, match="tensors of another shape"):
        load_model(folder, tmp_path / "model.npz")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_may_be_chosen(dtype, folder, tmp_path):
    lm = load_model(folder, dtype=dtype)
    assert lm.dtype == dtype
    assert load_model(lm.save(tmp_path / "copy")).dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_without_a_tokenizer_is_refused(family, tokenizer, tmp_path):
    folder = language_model(tokenizer, model_type=family, hidden_size=32).save(tmp_path / "source")
    for name in os.listdir(folder):
        if "token" in name:
            (folder / name).unlink()
    with pytest.raises(ModelError, match="there is no tokenizer. The folder needs one of tokenizer.json, tokenizer.model"):
        load_model(folder)


def test_a_tokenizer_that_cannot_be_read_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="the tokenizer could not be loaded"):
        load_model(folder)


def test_no_code_of_a_checkpoint_is_run(folder):
    (folder / "tokenization_evil.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()\nclass Evil: ...\n")
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described.update(auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]}, tokenizer_class="Evil")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "tokenization_evil.Evil", "AutoModelForCausalLM": "tokenization_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    try:
        load_model(folder)
    except ModelError:
        pass
    assert not (folder / "ran").exists()


def test_a_broken_generation_config_is_named(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="generation_config.json cannot be read as JSON"):
        load_model(folder)


# ---- random weights, stop ids, what it shows -------------------------------------------------------------------------------


def test_random_weights_come_from_their_seed(tokenizer):
    first, again, other = (logits(language_model(tokenizer, seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        (None, "the tokenizer's"),
        ({}, "the tokenizer's"),
        ({"eos_token_id": None}, "the tokenizer's"),
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 9]}, (7, 9)),
        ({"eos_token_id": 0}, (0,)),
    ],
)
def test_stop_ids_come_from_the_generation_config_then_the_tokenizer(generation_config, expected, tokenizer):
    lm = LanguageModel(language_model(tokenizer).model, tokenizer, generation_config=generation_config)
    assert lm.stop_ids == ((tokenizer.eos_token_id,) if expected == "the tokenizer's" else expected)


def test_a_tokenizer_without_an_end_has_no_stop_ids(make_tokenizer):
    assert language_model(make_tokenizer(eos_token=None)).stop_ids == ()


def test_tied_weights_count_once(tokenizer):
    untied, tied = (language_model(tokenizer, tie_word_embeddings=tie).num_parameters for tie in (False, True))
    assert untied - tied == VOCAB * SMALL["hidden_size"]


def test_the_repr_is_one_line(folder):
    lm = load_model(folder)
    assert repr(lm) == f"LanguageModel(llama, {lm.num_parameters:,} parameters, float32, source={str(folder)!r})"


def test_the_html_shows_the_facts_and_runs_no_code(tokenizer):
    changes = {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": 1234}
    lm = language_model(tokenizer, **changes)
    lm.source = "<script>alert(1)</script>"
    html = lm._repr_html_()
    assert all(text in html for text in ("mixtral", f"{lm.num_parameters:,}", "4, 2 a token", "1,234 tokens", "float32", "4 (2) of 6"))
    assert "<script" not in html and "&lt;script" in html


# ---- the whole way, in transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_saved_folder_and_continues_alike(family, tokenizer, tmp_path):
    need_torch()
    import torch
    from transformers import AutoTokenizer

    from nbs_tests.models import torch_reference

    window = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1} if family in ("mistral", "mixtral", "qwen2") else {}
    lm = language_model(tokenizer, model_type=family, hidden_size=32, **window)
    folder = load_model(lm.save(tmp_path / "first")).save(tmp_path / "second")
    model, theirs, prompt = torch_reference.load(folder), AutoTokenizer.from_pretrained(folder), "Which city has the most people?"
    tokens = theirs.encode(prompt)
    assert tokens == tokenizer.encode(prompt)
    expected = torch_reference.logits(model, np.array([tokens], dtype=np.int32))
    assert relative_error(lm.model(mx.array([tokens])), expected) < LOGITS_TOLERANCE

    ids, end = torch.tensor([tokens]), tokenizer.eos_token_id
    whole = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, eos_token_id=end, pad_token_id=end
    )
    text = theirs.decode(whole[0], skip_special_tokens=True)
    assert prompt + lm.generate(prompt, max_tokens=64) == text
