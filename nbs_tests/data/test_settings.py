"""Settings of the data, alone and together with a config."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from fulltune_nb.data.settings import DataSettings, resolve_settings
from fulltune_nb.errors import ConfigError


def test_defaults():
    assert DataSettings() == DataSettings(False, 2048, "prompt", "completion", "text", "messages")


@pytest.mark.parametrize(
    "name, value",
    [("mask_prompt", "false"), ("mask_prompt", 1), ("max_seq_length", 1), ("max_seq_length", "2048"), ("max_seq_length", True)]
    + [("max_seq_length", 10.5), ("max_seq_length", float("nan")), ("text_feature", ""), ("chat_feature", 3)]
    + [("prompt_feature", "completion")],
)
def test_wrong_value_is_an_error_that_names_the_setting(name, value):
    with pytest.raises(ConfigError, match=name):
        DataSettings(**{name: value})


def test_whole_numbers_of_other_types_become_int():
    assert DataSettings(max_seq_length=1e3).max_seq_length == 1000
    assert type(DataSettings(max_seq_length=np.int64(64)).max_seq_length) is int


@dataclass
class Config:
    mask_prompt: bool = True
    max_seq_length: int = 128
    learning_rate: float = 1e-5


def test_settings_come_from_the_config_where_it_has_them():
    assert resolve_settings({"mask_prompt": None, "text_feature": "body"}, Config()) == DataSettings(True, 128, text_feature="body")


def test_the_same_value_in_config_and_argument_is_no_disagreement():
    assert resolve_settings({"max_seq_length": 128.0}, Config()).max_seq_length == 128


@pytest.mark.parametrize("given", [{"mask_prompt": False}, {"max_seq_length": 2048}])
def test_disagreement_with_the_config_is_an_error_even_if_the_argument_is_the_default(given):
    with pytest.raises(ConfigError, match="disagree"):
        resolve_settings(given, Config())


@pytest.mark.parametrize("config", [SimpleNamespace(learning_rate=1.0), {"mask_prompt": True}, "config.yaml"])
def test_config_with_none_of_the_settings_is_an_error(config):
    with pytest.raises(ConfigError, match="config"):
        resolve_settings({}, config)


def test_settings_show_themselves_harmlessly():
    shown = DataSettings(prompt_feature="<b>")._repr_html_()
    assert "prompt_feature" in shown and "&lt;b&gt;" in shown and "<b>" not in shown
