"""Keys of a config.json that nobody reads: refused where they make another computation of the model, named where they may."""

import json
import re
import warnings
from pathlib import Path

import pytest

from fulltune_nb.errors import ModelError
from fulltune_nb.models.folder import load_decoder
from fulltune_nb.models.model_config import read_config
from fulltune_nb.models.unread_keys import check_unread
from nbs_tests.models.parity import RAW

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text(encoding="utf-8"))
REFUSED = {"is_causal": False, "add_cross_attention": True, "is_encoder_decoder": True, "alibi": 1, "layer_types": ["linear_attention"]}
NAMED = {
    "attention_dropout": 0.1, "resid_pdrop": 0.2, "hidden_dropout": 0.05, "attn_logit_softcapping": 30.0, "embedding_multiplier": 12,
    "use_qk_norm": True, "position_embedding_type": "alibi", "logit_scale": 0.0625, "layer_types": ["sliding_attention"],
}  # fmt: skip
SAY_NOTHING = {
    "is_causal": True, "attention_dropout": 0.0, "classifier_dropout": 0.1, "attn_logit_softcapping": None, "residual_multiplier": 1.0,
    "use_qk_norm": False, "made_up": {"a": 1}, "_name_or_path": "a/b", "initializer_range": 0.02,
    "_sliding_window_pattern": 6, "sliding_window": None,
}  # fmt: skip


def told(raw):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_unread(read_config(raw), "config.json")
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("key", REFUSED)
def test_another_computation_is_refused(key, model_folder):
    with pytest.raises(ModelError, match=f"config.json: {key} (is|has) .*not supported"):
        load_decoder(model_folder(raw={**RAW, key: REFUSED[key]}))


@pytest.mark.parametrize("key", NAMED)
def test_what_may_have_changed_the_computation_is_named(key, model_folder):
    with pytest.warns(UserWarning, match=re.escape(f"{key} is {NAMED[key]}")):
        load_decoder(model_folder(raw={**RAW, key: NAMED[key]}))


@pytest.mark.parametrize("key", SAY_NOTHING)
def test_what_says_nothing_is_not(key):
    assert told({**RAW, key: SAY_NOTHING[key]}) == []


@pytest.mark.parametrize("name", [name for name, raw in PUBLISHED.items() if "text_config" not in raw])
def test_of_published_models_only_dropout_is_named(name):
    assert [text for text in told(PUBLISHED[name]) if "drops nothing out" not in text] == []


def test_a_pattern_of_windows_beside_the_kinds_of_layers_is_not_named():
    kinds = ["sliding_attention", "full_attention"]
    assert told({**RAW, "model_type": "gemma3_text", "head_dim": 8, "sliding_window_pattern": 2, "layer_types": kinds}) == []
