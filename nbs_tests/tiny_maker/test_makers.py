"""The packaged base is what its makers make."""

import json

import pytest

import fulltune_nb as ft
from fulltune_nb import tiny
from nbs_tests.tiny_maker.pretrain import SETTINGS, model_config, pretrain
from nbs_tests.tiny_maker.tokenizer import SPECIAL_TOKENS, build_tokenizer


@pytest.fixture(scope="module")
def lm():
    return ft.load_model(tiny.BASE_MODEL)


def test_its_config_is_what_the_pretraining_script_writes(lm):
    config = json.loads((tiny.BASE_MODEL / "config.json").read_text())
    expected = model_config(lm.tokenizer)
    assert {name: config[name] for name in expected} == expected


def test_its_tokenizer_is_what_the_pretraining_script_trains(lm):
    assert json.loads(build_tokenizer().backend_tokenizer.to_str()) == json.loads(lm.tokenizer.backend_tokenizer.to_str())


def test_every_mark_is_a_special_token(lm):
    assert set(SPECIAL_TOKENS) == set(lm.tokenizer.all_special_tokens)


def test_pretraining_begins(tmp_path):
    trainer = pretrain(SETTINGS.replace(iters=1, batch_size=2, steps_per_eval=5), number=20)
    trainer.run()
    assert trainer.done and trainer.config.max_seq_length == 128
