"""Data settings that a config leaves out are the data's; one that was given must agree, wherever the two meet."""

import json

import pytest
import yaml

import fulltune_nb as ft
from fulltune_nb.experiments.parameters import read_experiment
from fulltune_nb.full import main
from nbs_tests.training.conftest import make_rows


def test_what_a_config_leaves_out_is_taken_from_the_data(make_lm, make_data):
    trainer = ft.Trainer(make_lm(), make_data(mask_prompt=True, max_seq_length=64), ft.TrainConfig(batch_size=3))
    assert (trainer.config.mask_prompt, trainer.config.max_seq_length, trainer.config.prompt_feature) == (True, 64, "prompt")
    assert trainer.config.changed() == {"batch_size": 3, "mask_prompt": True, "max_seq_length": 64}
    assert ft.Trainer(make_lm(), make_data()).config.max_seq_length == 2048


@pytest.mark.parametrize("given", [{"mask_prompt": False}, {"max_seq_length": 2048}, {"prompt_feature": "question"}], ids=str)
def test_a_given_value_that_disagrees_is_an_error_also_if_it_is_the_default(given, make_lm, make_data):
    [(name, value)] = given.items()
    data = make_data(mask_prompt=True, max_seq_length=64)
    with pytest.raises(ft.ConfigError, match=f"{name} is .* in the data but {value!r} in the config"):
        ft.Trainer(make_lm(), data, ft.TrainConfig(**given))


def test_given_values_that_agree_are_taken(make_lm, make_data):
    config = ft.TrainConfig(mask_prompt=True, max_seq_length=64)
    assert ft.Trainer(make_lm(), make_data(mask_prompt=True, max_seq_length=64), config).config == config.fill_from(make_data().settings)


def test_the_readme_example_needs_mask_prompt_once(make_lm, make_data, tmp_path):
    lm, data = make_lm(), make_data(mask_prompt=True)
    config = ft.TrainConfig(iters=2, batch_size=4, learning_rate=1e-5)
    assert ft.preflight(lm, data, config).fits
    trainer = ft.Trainer(lm, data, config, run_dir=tmp_path / "a")
    trainer.run()
    assert trainer.config.mask_prompt is True and trainer.done


def test_load_data_reads_a_config_and_fills_what_that_leaves_out(make_data):
    config = ft.TrainConfig(max_seq_length=64)
    assert make_data(config=config, mask_prompt=True).settings == make_data(mask_prompt=True, max_seq_length=64).settings
    with pytest.raises(ft.ConfigError, match="disagree"):
        make_data(config=config, max_seq_length=2048)


def test_preflight_plans_for_the_rows_as_they_were_cut(make_lm, make_data):
    packed = ft.TrainConfig(packing=True)
    assert ft.preflight(make_lm(), make_data(60, max_seq_length=16), packed).peak < ft.preflight(make_lm(), make_data(60), packed).peak
    rows_of_2048 = ft.preflight(make_lm(), None, ft.TrainConfig()).peak
    assert rows_of_2048 == ft.preflight(make_lm(), None, ft.TrainConfig(max_seq_length=2048)).peak


def test_yaml_holds_what_was_left_out_as_null(tmp_path):
    config = ft.TrainConfig(max_seq_length=64)
    config.to_yaml(tmp_path / "c.yaml")
    stored = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert stored["max_seq_length"] == 64 and stored["mask_prompt"] is None
    assert ft.TrainConfig.from_yaml(tmp_path / "c.yaml") == config
    assert "as the data" in config._repr_html_()


def test_a_parameterised_notebook_may_leave_them_out(make_lm, make_data):
    config = read_experiment({"batch_size": "2", "mask_prompt": None}).config
    assert ft.Trainer(make_lm(), make_data(mask_prompt=True), config).config.mask_prompt is True
    with pytest.raises(ft.ConfigError, match="mask_prompt"):
        ft.Trainer(make_lm(), make_data(mask_prompt=True), read_experiment({"mask_prompt": "false"}).config)


def test_a_run_stores_the_datas_values_and_resumes_with_them(make_lm, make_data, tmp_path):
    data, run_dir = make_data(mask_prompt=True, max_seq_length=64), tmp_path / "run"
    ft.Trainer(make_lm(), data, ft.TrainConfig(iters=4, batch_size=2, save_every=2), run_dir).run(2)
    path = run_dir / "config.yaml"
    stored = ft.TrainConfig.from_yaml(path)
    assert (stored.mask_prompt, stored.max_seq_length) == (True, 64)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("mask_prompt")))
    trainer = ft.Trainer.resume(run_dir, data=data)
    assert trainer.step_count == 2 and trainer.config == stored
    del trainer
    with pytest.raises(ft.CheckpointError, match="the data differs"):
        ft.Trainer.resume(run_dir, data=make_data(max_seq_length=64))


def test_the_command_trains_on_the_defaults_and_resumes_with_what_the_run_has(make_lm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_lm().save("base")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(8)))
    (tmp_path / "c.yaml").write_text("model: base\nmask_prompt: null\nno_such: 1\n")
    assert main(["-c", "c.yaml", "--train"]) == 2 and "c.yaml:3" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("model: base\nmax_seq_length: 32\nmask_prompt: null\n")
    flags = ["-c", "c.yaml", "--train", "--iters", "1", "--no-export", "--run-dir", "run"]
    assert main(flags) == 0
    stored = ft.TrainConfig.from_yaml("run/config.yaml")
    assert (stored.max_seq_length, stored.mask_prompt) == (32, False)
    assert main([*flags, "--resume"]) == 0
    assert main([*flags, "--resume", "--mask-prompt"]) == 2
    assert "mask_prompt is True here and False in the run" in capsys.readouterr().err
