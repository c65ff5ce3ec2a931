"""New tokens: the tokenizer learns them, the model gets rows for them, and what was there stays as it was."""

import json

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.errors import ConfigError, TrainingError
from fulltune_nb.models.folder import hf_tensors
from nbs_tests.conftest import CHATML
from nbs_tests.models.parity import need_torch, relative_error
from nbs_tests.training.conftest import TINY_LLAMA, make_rows

NEW = ["<|tool|>", "<|result|>"]
PHI = {"model_type": "phi", "num_key_value_heads": 4}
SHAPES = {"untied": {}, "tied": {"tie_word_embeddings": True}, "with a head bias": PHI}


@pytest.fixture
def make(make_tokenizer):
    """`make(**changes of config.json)`: a model that has a row for each token and no more."""

    def make(**changes):
        tokenizer = make_tokenizer(CHATML)
        return ft.LanguageModel.from_config({**TINY_LLAMA, "vocab_size": len(tokenizer), **changes}, tokenizer, seed=1)

    return make


def rows_of(lm):
    """The arrays with a row for each token, by name."""
    tensors = {name: np.array(array) for name, array in hf_tensors(lm.model).items()}
    return {name: array for name, array in tensors.items() if array.shape[0] == lm.config.vocab_size and "layers" not in name}


@pytest.mark.parametrize("shape", SHAPES)
def test_old_rows_stay_and_new_ones_are_near_their_mean(make, shape):
    lm = make(**SHAPES[shape])
    before, size = rows_of(lm), lm.config.vocab_size
    assert lm.add_tokens(NEW) == {NEW[0]: size, NEW[1]: size + 1}
    after = rows_of(lm)
    assert lm.config.vocab_size == size + 2 and lm.tokenizer.encode(f"a{NEW[1]}")[-1] == size + 1
    assert after.keys() == before.keys() and len(before) == {"untied": 2, "tied": 1, "with a head bias": 3}[shape]
    for name, old in before.items():
        np.testing.assert_array_equal(after[name][:size], old)
        assert (np.abs(after[name][size:] - old.mean(axis=0)) <= 0.5 * old.std(axis=0) + 1e-7).all()
        assert old.ndim == 1 or (after[name][size] != after[name][size + 1]).any()


def test_the_same_seed_gives_the_same_rows(make):
    first, again, other = (make() for _ in range(3))
    for lm, seed in ((first, 3), (again, 3), (other, 4)):
        lm.add_tokens(NEW, seed=seed)
    assert all((rows_of(first)[name] == rows_of(again)[name]).all() for name in rows_of(first))
    assert any((rows_of(first)[name] != rows_of(other)[name]).any() for name in rows_of(first))


def test_free_rows_are_used_before_any_is_added(make):
    size = make().config.vocab_size
    lm = make(vocab_size=size + 3)
    lm.model.embed_tokens.weight[size:] = 100.0
    assert lm.add_tokens(NEW) == {NEW[0]: size, NEW[1]: size + 1} and lm.config.vocab_size == size + 3
    assert np.abs(rows_of(lm)["model.embed_tokens.weight"][size : size + 2]).max() < 10
    lm.add_tokens(["<|more|>", "<|most|>"])
    assert lm.config.vocab_size == size + 4


def test_the_rows_become_a_multiple(make):
    lm = make()
    lm.add_tokens(NEW, pad_to_multiple_of=64)
    assert lm.config.vocab_size % 64 == 0 and lm.model(mx.array([[0, 1]])).shape[-1] == lm.config.vocab_size


def test_tokens_that_are_there_are_told_and_left(make):
    lm = make()
    before = rows_of(lm)
    with pytest.warns(UserWarning, match=r"knows '<\|im_end\|>' already"):
        assert lm.add_tokens(["<|im_end|>"]) == {"<|im_end|>": lm.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert all((rows_of(lm)[name] == before[name]).all() for name in before)


def test_tokens_that_only_the_tokenizer_has_get_rows(make):
    lm = make()
    lm.tokenizer.add_special_tokens({"additional_special_tokens": NEW})
    data = ft.load_data({"train": [{"prompt": NEW[0], "completion": NEW[1]}]}, lm.tokenizer, max_seq_length=64)
    lm.add_tokens(NEW)
    assert lm.config.vocab_size == len(lm.tokenizer)
    ft.Trainer(lm, data, ft.TrainConfig(iters=1, max_seq_length=64)).step()


@pytest.mark.parametrize("wrong", ["<|tool|>", [""], [3]])
def test_what_is_no_list_of_texts_is_refused(make, wrong):
    with pytest.raises(ConfigError, match="list of texts"):
        make().add_tokens(wrong)


def test_a_trainer_made_before_refuses_clearly_and_one_made_after_trains_and_resumes(make, tmp_path):
    lm, settings = make(), {"iters": 2, "batch_size": 2, "max_seq_length": 64, "learning_rate": 1e-3}
    data = ft.load_data({"train": make_rows(4)}, lm.tokenizer, max_seq_length=64)
    before = ft.Trainer(lm, data, ft.TrainConfig(**settings), run_dir=tmp_path / "before")
    before.step()
    lm.add_tokens(NEW)
    for refused in (before.step, before.save, before.snapshot):
        with pytest.raises(TrainingError, match="make the trainer anew"):
            refused()
    rows = [{"prompt": NEW[0], "completion": NEW[1]}, *make_rows(3)]
    data = ft.load_data({"train": rows}, lm.tokenizer, max_seq_length=64)
    ft.Trainer(lm, data, ft.TrainConfig(**settings), run_dir=tmp_path / "after").run()
    again = ft.Trainer.resume(tmp_path / "after", data=data)
    assert again.lm.config.vocab_size == lm.config.vocab_size == len(again.lm.tokenizer)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_what_is_saved(make, shape, tmp_path):
    need_torch()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = make(**SHAPES[shape])
    lm.add_tokens(NEW, pad_to_multiple_of=8)
    lm.save(tmp_path / "out")
    text = f"the quick{NEW[0]} brown{NEW[1]}"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").encode(text)
    assert ids == lm.tokenizer.encode(text) and json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] % 8 == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(torch.tensor([ids])).logits
    assert relative_error(np.array(lm.model(mx.array([ids]))), theirs.detach().numpy()) < 1e-5
    assert relative_error(np.array(ft.load_model(tmp_path / "out").model(mx.array([ids]))), theirs.detach().numpy()) < 1e-5
