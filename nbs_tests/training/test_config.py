import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest

from fulltune_nb.data import DataSettings
from fulltune_nb.errors import ConfigError
from fulltune_nb.settings import read_yaml
from fulltune_nb.training.config import TrainConfig


def write(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_defaults_are_those_of_the_old_command():
    config = TrainConfig()
    expected = dict(batch_size=4, iters=1000, epochs=None, learning_rate=1e-5, optimizer="adamw", weight_decay=0.01, seed=0, save_every=100)
    expected |= dict(steps_per_report=10, steps_per_eval=200, val_batches=25, test_batches=500, mask_prompt=None, max_seq_length=None)
    assert {name: getattr(config, name) for name in expected} == expected
    resolved = config.for_data(DataSettings())
    assert (resolved.mask_prompt, resolved.max_seq_length, resolved.chat_feature) == (False, 2048, "messages")


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().iters = 5


@pytest.mark.parametrize(
    "settings",
    [
        dict(grad_checkpoint="false"),
        dict(mask_prompt="true"),
        dict(mask_prompt=1),
        dict(batch_size="4"),
        dict(batch_size=True),
        dict(batch_size=2.5),
        dict(batch_size=0),
        dict(batch_size=None),
        dict(iters=-1),
        dict(iters=float("inf")),
        dict(epochs=0),
        dict(epochs=1.5),
        dict(learning_rate="1e-5"),
        dict(learning_rate=-1e-5),
        dict(learning_rate=float("nan")),
        dict(learning_rate=float("inf")),
        dict(learning_rate=10**400),
        dict(learning_rate=False),
        dict(optimizer="AdamW"),
        dict(optimizer=None),
        dict(optimizer="sgdd"),
        dict(optimizer_config=[("betas", 1)]),
        dict(optimizer_config={"beta": (0.9, 0.99)}),
        dict(optimizer_config={"betas": 0.9}),
        dict(optimizer_config={"betas": (0.9, 1.0)}),
        dict(optimizer_config={"betas": (0.9, 0.99, 0.999)}),
        dict(optimizer_config={"betas": "ab"}),
        dict(optimizer_config={"eps": "1e-8"}),
        dict(optimizer_config={"momentum": 0.9}),
        dict(optimizer_config={"weight_decay": 0.1}),
        dict(optimizer_config={"bias_correction": "false"}),
        dict(optimizer="sgd", optimizer_config={"nesterov": True}),
        dict(optimizer="adafactor", optimizer_config={"relative_step": True}),
        dict(optimizer="muon", optimizer_config={"ns_steps": 0}),
        dict(weight_decay=-0.1),
        dict(weights="float16"),
        dict(weights=None),
        dict(rounding="up"),
        dict(lr_schedule="cosin"),
        dict(warmup=-1),
        dict(grad_accumulation_steps=0),
        dict(max_grad_norm=0),
        dict(max_grad_norm="1"),
        dict(lr_factors={"*": -1}),
        dict(lr_factors=["*"]),
        dict(lr_factors={1: 1.0}),
        dict(train_only=3),
        dict(freeze=[""]),
        dict(freeze={"a": 1}),
        dict(steps_per_report=0),
        dict(steps_per_eval=0),
        dict(val_batches=-2),
        dict(test_batches=0),
        dict(save_every=0),
        dict(keep=0),
        dict(patience=0),
        dict(seed=-1),
        dict(seed=2**64),
        dict(max_seq_length=1),
        dict(text_feature=""),
        dict(chat_feature=3),
    ],
    ids=lambda settings: "-".join(f"{k}={v}" for k, v in settings.items())[:60],
)
def test_a_wrong_value_is_refused_by_name(settings):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**settings)
    name = "optimizer_config" if "optimizer_config" in settings else next(iter(settings))
    assert str(caught.value).startswith(name)
    assert caught.value.setting == name


@pytest.mark.parametrize(
    "settings",
    [
        dict(iters=0),
        dict(iters=1e3),
        dict(learning_rate=0),
        dict(val_batches=-1),
        dict(val_batches=0),
        dict(test_batches=-1),
        dict(optimizer="sgd", optimizer_config={"momentum": 0.9, "nesterov": True}),
        dict(optimizer="adafactor", optimizer_config={"relative_step": False, "eps": [1e-30, 1e-3]}),
        dict(optimizer="muon", optimizer_config={"ns_steps": 3.0}),
        dict(batch_size=np.int64(2), learning_rate=np.float32(0.5)),
    ],
    ids=str,
)
def test_a_right_value_is_taken_and_has_its_own_type(settings):
    config = TrainConfig(**settings)
    assert type(config.iters) is int and type(config.batch_size) is int and type(config.learning_rate) is float
    for name, value in settings.items():
        if name != "optimizer_config":
            assert getattr(config, name) == value
    json.dumps(config.to_dict(), allow_nan=False)


@pytest.mark.parametrize("make", [lambda kw: TrainConfig(**kw), TrainConfig.from_dict, lambda kw: TrainConfig().replace(**kw)])
def test_an_unknown_name_is_answered_with_the_nearest(make):
    with pytest.raises(ConfigError, match="batch_size"):
        make({"batchsize": 3})


def test_one_of_iters_and_epochs():
    with pytest.raises(ConfigError, match="iters=5 and epochs=2"):
        TrainConfig(iters=5, epochs=2)
    config = TrainConfig(epochs=2)
    assert config.iters is None and config.total_steps(7) == 14
    assert TrainConfig(iters=5).total_steps(7) == 5
    assert config.replace(iters=5).epochs is None
    assert TrainConfig(iters=5).replace(epochs=3).iters is None
    assert config.replace(epochs=None).iters == 1000


def test_weight_decay_defaults_to_the_optimizers_own():
    assert [TrainConfig(optimizer=o).weight_decay for o in ("adamw", "muon")] == [0.01, 0.01]
    assert [TrainConfig(optimizer=o).weight_decay for o in ("adam", "sgd", "lion", "adafactor")] == [0, 0, 0, 0]
    assert TrainConfig(optimizer="sgd", weight_decay=0.1).weight_decay == 0.1


def test_another_optimizer_takes_its_own_settings():
    config = TrainConfig(optimizer_config={"betas": (0.8, 0.9)}).replace(optimizer="sgd")
    assert config.optimizer_config == {} and config.weight_decay == 0
    assert TrainConfig(weight_decay=0.3).replace(optimizer="sgd").weight_decay == 0.3


def test_a_config_keeps_no_hold_of_what_it_was_given():
    settings, patterns = {"eps": 1e-6}, ["*norm*"]
    config = TrainConfig(optimizer_config=settings, freeze=patterns)
    settings["eps"] = 1.0
    patterns.append("*")
    assert config.optimizer_config == {"eps": 1e-6} and config.freeze == ("*norm*",)


def test_a_single_pattern_may_be_a_text():
    assert TrainConfig(train_only="*.mlp.*").train_only == ("*.mlp.*",)


FULL = dict(
    iters=7,
    optimizer="adam",
    optimizer_config={"betas": (0.8, 0.95)},
    lr_schedule={"name": "cosine_decay", "arguments": [1e-5, 100, 1e-7], "warmup": 5, "warmup_init": 1e-7},
    lr_factors={"*embed*": 0.1},
    freeze=("*norm*",),
    max_grad_norm=1.0,
    text_feature="1e-5",
    prompt_feature="no",
    completion_feature="été: #x",
    seed=2**40,
)


@pytest.mark.parametrize("settings", [{}, FULL, dict(epochs=3), dict(learning_rate=1e-7), dict(text_feature="2024-01-01")], ids=str)
def test_yaml_json_and_pickle_give_the_same_config_back(tmp_path, settings):
    config = TrainConfig(**settings)
    path = tmp_path / "c.yaml"
    config.to_yaml(path)
    assert TrainConfig.from_yaml(path) == config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert eval(repr(config)) == config
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_yaml_numbers_are_numbers(tmp_path):
    path = write(tmp_path, "learning_rate: 1e-5\nweight-decay: 2E-2\niters: 1e3\nmax_grad_norm: 1.\nsave_every: 0100\nbatch_size: 1_0\n")
    config = TrainConfig.from_yaml(path)
    found = (config.learning_rate, config.weight_decay, config.iters, config.max_grad_norm, config.save_every, config.batch_size)
    assert found == (1e-5, 2e-2, 1000, 1.0, 100, 10)


def test_yaml_of_the_old_command_is_read(tmp_path):
    text = """\
model: "some/model"     # belongs to the command
train: true
data: data/
lr_schedule: {name: cosine_decay, warmup: 100, warmup_init: 1e-7, arguments: [1e-5, 1000, 1e-7]}
steps-per-eval: 20
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    weight_decay: 0.1
  sgd: {}
"""
    config = TrainConfig.from_yaml(write(tmp_path, text), ignore={"model", "train", "data", "model_file"})
    assert config.steps_per_eval == 20 and config.weight_decay == 0.1 and config.optimizer_config == {"betas": (0.9, 0.98)}
    assert config.lr_schedule["arguments"] == [1e-5, 1000, 1e-7]


def test_yaml_unknown_keys_name_the_nearest_with_file_and_line(tmp_path):
    path = write(tmp_path, "iters: 5\n\nsteps-per-evall: 3\n")
    with pytest.raises(ConfigError, match="steps_per_eval") as caught:
        TrainConfig.from_yaml(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    with pytest.raises(ConfigError, match="'model_file'"):
        TrainConfig.from_yaml(write(tmp_path, "modelfile: 1"), ignore={"model-file"})


def test_yaml_wrong_values_are_refused_with_file_and_line(tmp_path):
    path = write(tmp_path, "# settings\niters: 5\ngrad-checkpoint: 'false'\n")
    with pytest.raises(ConfigError, match="expected True or False") as caught:
        TrainConfig.from_yaml(path)
    assert str(caught.value).startswith(f"{path}:3: ")


def test_overrides_win_whatever_their_value(tmp_path):
    path = write(tmp_path, "iters: 5\nmask_prompt: true\nlearning_rate: 0.1\nmax_grad_norm: 1\nbatch_size: wrong\n")
    config = TrainConfig.from_yaml(path, iters=0, mask_prompt=False, learning_rate=0.0, max_grad_norm=None, batch_size=2)
    assert (config.iters, config.mask_prompt, config.learning_rate, config.max_grad_norm, config.batch_size) == (0, False, 0.0, None, 2)


def test_an_override_of_iters_takes_the_place_of_the_files_epochs(tmp_path):
    assert TrainConfig.from_yaml(write(tmp_path, "epochs: 5"), iters=3).total_steps(10) == 3
    assert TrainConfig.from_yaml(write(tmp_path, "iters: 5"), epochs=3).total_steps(10) == 30
    with pytest.raises(ConfigError, match="expected one of them"):
        TrainConfig.from_yaml(write(tmp_path, "iters: 1000\nepochs: 2"))


def test_a_wrong_override_is_not_blamed_on_the_file(tmp_path):
    path = write(tmp_path, "iters: 5")
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(path, iters="x")
    assert str(path) not in str(caught.value)
    with pytest.raises(ConfigError, match="batch_size"):
        TrainConfig.from_yaml(path, batchsize=3)


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("iters: 5\niters: 6\n", 2, "twice"),
        ("steps-per-eval: 5\nsteps_per_eval: 6\n", 2, "same setting"),
        ("a: 1\nlr_schedule: {name: x, name: y}\n", 2, "twice"),
        ("iters: 5\nx: !!python/object/apply:os.system ['touch hacked']\n", 2, "python"),
        ("iters: [1, 2\nbatch_size: 3\n", 2, "expected"),
        ("iters: 5\n---\niters: 6\n", 2, "document"),
        ("- iters\n- 5\n", 1, "expected settings"),
        ("just words\n", 1, "expected settings"),
        ("iters: 5\n\tbatch_size: 3\n", 2, "token"),
    ],
    ids=str,
)
def test_bad_yaml_is_refused_with_file_and_line(tmp_path, monkeypatch, text, line, words):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_yaml(path)
    assert f"{path}:{line}:" in str(caught.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00iters", b"x" * 1_500_000, b"a: " + b"[" * 3_000, b"1: 2", b"a: &x [*x]", b"iters: \x00"],
    ids=["not utf-8", "too large", "deep", "number as key", "refers to itself", "control character"],
)
def test_what_is_no_settings_file_is_refused(tmp_path, content):
    with pytest.raises(ConfigError, match="settings.yaml"):
        TrainConfig.from_yaml(write(tmp_path, content))


def test_a_missing_file_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        TrainConfig().to_yaml(tmp_path / "none" / "c.yaml")


def test_aliases_that_multiply_cost_nothing(tmp_path):
    names = "abcdefghijklm"
    rows = ["a: &a [x, x]", *(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in itertools.pairwise(names))]
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_yaml(write(tmp_path, "\n".join(rows) + "\noptimizer_config: *m\n"), ignore=set(names))
    assert len(str(caught.value)) < 1000


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert TrainConfig.from_yaml(write(tmp_path, "# nothing\n")) == TrainConfig()
    assert TrainConfig.from_yaml(write(tmp_path, b"\xef\xbb\xbfiters: 5\r\n")).iters == 5


def test_repr_is_one_line_of_what_differs():
    assert repr(TrainConfig()) == "TrainConfig()"
    assert repr(TrainConfig(iters=600, learning_rate=1e-4)) == "TrainConfig(iters=600, learning_rate=0.0001)"
    assert repr(TrainConfig(epochs=2)) == "TrainConfig(epochs=2)"
    assert repr(TrainConfig(mask_prompt=False)) == "TrainConfig(mask_prompt=False)"  # given: data with another value is refused


def test_the_cell_shows_every_setting_and_escapes_texts():
    shown = TrainConfig(text_feature="<script>alert(1)</script>")._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert all(f.name in shown for f in dataclasses.fields(TrainConfig))


def test_the_cell_begins_with_what_was_set_and_says_what_it_means():
    first, folded = TrainConfig(learning_rate=1e-4, epochs=2)._repr_html_().split("<details>")
    assert "learning_rate" in first and "Peak learning rate." in first and "epochs" in first and "seed" not in first
    assert "seed" in folded and "nothing was set" in TrainConfig()._repr_html_()
