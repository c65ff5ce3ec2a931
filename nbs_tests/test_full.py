"""`python -m fulltune_nb.full`: flags and YAML, what training writes, warm start, resume, test, bad input, Ctrl-C."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import signal
import subprocess
import sys

import mlx.core as mx
import pytest

from fulltune_nb.command_line import add_fields
from fulltune_nb.data.dataset import load_data
from fulltune_nb.errors import ConfigError
from fulltune_nb.full import Options, build_parser, main, read_settings
from fulltune_nb.full import test_line as line_of_test
from fulltune_nb.models.language_model import LanguageModel, load_model
from fulltune_nb.models.model_file import EXPORT_NOTE, export_folder, read_metadata
from fulltune_nb.settings import number, setting
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.loss import evaluate_loss
from fulltune_nb.training.trainer import Trainer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TEST_LINE = re.compile(r"Test loss (\d+\.\d{3}), Test ppl (\d+\.\d{3})\.")
QUICK = ["--iters", "3", "--batch-size", "2", "--learning-rate", "1e-2", "--val-batches", "1", "--steps-per-report", "1"]


@pytest.fixture(scope="module")
def base(make_tokenizer, tmp_path_factory):
    return LanguageModel.from_config(CONFIG, make_tokenizer()).save(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, size in (("train", 12), ("valid", 4), ("test", 9)):
        rows = [{"text": f"{split} row {number} says that {number} and {number} make {2 * number}"} for number in range(size)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    """A folder in which `--train --test` was run, and what the command printed."""
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "fulltune_nb.full", "--model", str(base), "--data", str(data), "--train", "--test", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
    return folder, done.stdout


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, so that the default model file does not land in the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(path):
    return mx.load(str(path))


def equal(one, other):
    return set(one) == set(other) and all(mx.array_equal(one[name], other[name]) for name in one)


def code_of(argv):
    try:
        return main(argv)
    except SystemExit as stop:
        return stop.code


# Flags


def test_every_setting_is_a_flag_with_a_help_text():
    actions = {action.dest: action for action in build_parser()._actions}
    for cls in (Options, TrainConfig):
        for field in dataclasses.fields(cls):
            assert f"--{field.name.replace('_', '-')}" in actions[field.name].option_strings
            assert actions[field.name].help


@pytest.mark.parametrize(
    "flag",
    ["--model", "--train", "--test", "--data", "--config", "-c", "--model-file", "--batch-size", "--grad-checkpoint", "--max-seq-length",
     "--iters", "--learning-rate", "--lr-schedule", "--val-batches", "--steps-per-report", "--steps-per-eval", "--save-every",
     "--test-batches", "--seed", "--dtype", "--mask-prompt", "--prompt-feature", "--completion-feature", "--text-feature",
     "--chat-feature", "--run-dir", "--epochs", "--optimizer", "--grad-accumulation-steps"],
)  # fmt: skip
def test_the_flags_of_the_old_command_are_there(flag):
    assert any(flag in action.option_strings for action in build_parser()._actions)


def settings_of(*argv):
    return read_settings(vars(build_parser().parse_args(argv)))


def test_what_is_not_given_has_the_defaults_of_the_old_command():
    config = settings_of("--train").config
    found = (config.batch_size, config.iters, config.learning_rate, config.val_batches, config.steps_per_report, config.steps_per_eval)
    assert found == (4, 1000, 1e-5, 25, 10, 200)
    assert (config.save_every, config.test_batches, config.seed) == (100, 500, 0)
    assert config == TrainConfig()


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--batch-size", "8"], "batch_size", 8), (["--iters", "1e3"], "iters", 1000), (["--learning-rate", "3e-5"], "learning_rate", 3e-5),
        (["--grad-checkpoint"], "grad_checkpoint", True), (["--compile"], "compile", True), (["--no-compile"], "compile", False),
        (["--no-mask-prompt"], "mask_prompt", False),
        (["--mask-prompt"], "mask_prompt", True),
        (["--mask-prompt", "last"], "mask_prompt", "last"),
        (["--bad-rows", "skip"], "bad_rows", "skip"),
        (["--val-batches", "-1"], "val_batches", -1), (["--lr-schedule", "cosine"], "lr_schedule", "cosine"),
        (["--optimizer-config", '{"betas": [0.9, 0.95]}'], "optimizer_config", {"betas": (0.9, 0.95)}),
        (["--lr-factors", '{"*embed*": 0.1}'], "lr_factors", {"*embed*": 0.1}),
        (["--freeze", "*.mlp.*", "*norm*"], "freeze", ("*.mlp.*", "*norm*")),
        (["--patience", "none"], "patience", None), (["--lr-schedule", "none"], "lr_schedule", None),
        (["--optimizer-config", "{betas: [0.9, 0.95]}"], "optimizer_config", {"betas": (0.9, 0.95)}),
        (["--text-feature", "body"], "text_feature", "body"), (["--epochs", "2"], "epochs", 2),
    ],
)  # fmt: skip
def test_values_arrive_in_their_types(argv, name, value):
    assert getattr(settings_of("--train", *argv).config, name) == value


def test_flags_win_over_the_file_also_when_their_value_is_falsy(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("train: true\ntest: true\nmask_prompt: true\nseed: 7\nval-batches: 3\niters: 50\nbatch_size: 2\nexport: true\n")
    settings = settings_of("-c", str(path), "--no-mask-prompt", "--seed", "0", "--val-batches", "0", "--no-test", "--no-export")
    config = settings.config
    assert (config.mask_prompt, config.seed, config.val_batches, config.iters, config.batch_size) == (False, 0, 0, 50, 2)
    assert (settings.options.train, settings.options.test, settings.options.export) == (True, False, False)


def test_the_example_file_is_read_and_holds_the_defaults():
    from pathlib import Path

    settings = settings_of("--config", str(Path(__file__).parents[1] / "docs" / "example_config.yaml"))
    assert settings.config == TrainConfig()
    assert dataclasses.replace(settings.options, model=None, train=False, test=False) == Options()
    missing = {f.name for cls in (Options, TrainConfig) for f in dataclasses.fields(cls)} - settings.given
    assert missing == {"epochs"}  # stands there commented out, since it takes the place of iters


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_sise: 3", r"config.yaml:1.*batch_size"), ("iters: 5\nmodl: x", r"config.yaml:2.*'model'"),
        ("iters: many", "config.yaml:1.*iters"),
        ("train: 'yes'", "config.yaml:1.*train"), ("model: 3", "config.yaml:1.*model"), ("iters: [", "config.yaml"), ("- a", "config.yaml"),
    ],
)  # fmt: skip
def test_mistakes_in_the_file_name_the_line_and_the_nearest_name(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        settings_of("-c", str(path), "--test")


def test_help_texts_may_hold_percent_signs():
    @dataclasses.dataclass
    class Given:
        share: float = setting(0.5, number(), "Share, as 50% or so.")

    parser = argparse.ArgumentParser()
    add_fields(parser, Given)
    assert "50% or so" in parser.format_help()


# Training and testing


def test_training_writes_the_model_file_and_a_model_folder(trained, base, data):
    folder, output = trained
    names = set(weights(base / "model.safetensors"))
    assert set(weights(folder / "model.npz")) == names
    assert not equal(weights(folder / "model.npz"), weights(base / "model.safetensors"))
    assert equal(weights(folder / "model.npz"), weights(folder / "model_hf" / "model.safetensors"))
    metadata = read_metadata(folder / "model.npz")
    assert (metadata["base_model"], metadata["data_format"], metadata["dtype"]) == (str(base), "text", "float32")
    assert metadata["mask_prompt"] == "false"
    assert sorted(path.name for path in folder.iterdir()) == ["model.npz", "model.npz.json", "model_hf"]
    assert "model.npz" in output and "model_hf" in output


def test_the_output_ends_with_the_test_line_of_the_final_weights(trained, data):
    folder, output = trained
    loss, perplexity = map(float, TEST_LINE.fullmatch(output.splitlines()[-1]).groups())
    lm = load_model(folder / "model_hf")
    expected = evaluate_loss(lm.model, load_data(data, lm.tokenizer).test, 2).loss
    assert abs(loss - expected) < 1e-3
    assert abs(perplexity - math.exp(expected)) < 1e-2 * perplexity


def test_the_model_file_and_the_data_are_enough_to_test(trained, data, capsys):
    folder, output = trained
    assert main(["--model-file", str(folder / "model.npz"), "--data", str(data), "--test", "--batch-size", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == output.splitlines()[-1]


def test_the_memory_it_will_take_is_announced_and_too_much_is_refused_unless_forced(trained, base, data, here, capsys, monkeypatch):
    assert re.search(r"^Memory: about [\d.]+ [KMG]?B at the peak, of [\d.]+ GB\.$", trained[1], re.M)
    monkeypatch.setattr("fulltune_nb.training.memory.machine_limit", lambda: 1000)
    flags = ["--model", str(base), "--data", str(data), "--train", *QUICK, "--iters", "0", "--no-export"]
    assert main(flags) == 1
    assert "What would make it fit" in capsys.readouterr().err
    assert main([*flags, "--force"]) == 0


def test_progress_comes_in_plain_lines_where_no_terminal_is(trained):
    assert re.search(r"^step 3/3: loss ", trained[1], re.M)
    assert "\r" not in trained[1]


def test_the_same_command_again_goes_on_from_the_model_file(base, data, here, capsys):
    flags = ["--model", str(base), "--data", str(data), "--train", "--model-file", "weights/own.safetensors", *QUICK]
    assert main(flags) == 0
    first = weights("weights/own.safetensors")
    mx.eval(first)
    assert "goes on from" not in capsys.readouterr().out
    assert main([*flags, "--iters", "0"]) == 0
    assert "goes on from the weights in weights/own.safetensors" in capsys.readouterr().out
    assert equal(weights("weights/own.safetensors"), first)
    assert (here / "weights" / "own_hf" / "config.json").exists()


def test_without_a_model_file_the_model_itself_is_tested(base, data, here, capsys):
    assert main(["--model", str(base), "--data", str(data), "--test", "--test-batches", "-1"]) == 0
    output = capsys.readouterr().out.splitlines()
    lm = load_model(base)
    assert output[-1] == line_of_test(evaluate_loss(lm.model, load_data(data, lm.tokenizer).test, 4)[0])
    assert "There is no model.npz" in output[0]


def test_test_batches_limits_the_test(base, data, here, capsys):
    lines = []
    for size in ("1", "-1"):
        assert main(["--model", str(base), "--data", str(data), "--test", "--batch-size", "2", "--test-batches", size]) == 0
        lines.append(capsys.readouterr().out.splitlines()[-1])
    assert all(TEST_LINE.fullmatch(line) for line in lines)
    assert lines[0] != lines[1]


def test_the_test_line_has_three_decimals_and_no_separators():
    assert line_of_test(math.log(12345.6789)) == "Test loss 9.421, Test ppl 12345.679."
    assert line_of_test(800.0) == "Test loss 800.000, Test ppl inf."


def test_a_run_directory_is_resumed_exactly(base, data, here, capsys):
    flags = ["--model", str(base), "--data", str(data), "--train", *QUICK, "--save-every", "2", "--no-export"]
    assert main([*flags, "--model-file", "whole.npz"]) == 0
    lm = load_model(base)
    Trainer(lm, load_data(data, lm.tokenizer), settings_of(*flags).config, "run").run(2)
    assert main([*flags, "--run-dir", "run"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["--train", "--run-dir", "run", "--resume", "--model-file", "resumed.npz", "--iters", "3", "--no-export"]) == 0
    assert equal(weights("whole.npz"), weights("resumed.npz"))
    assert read_metadata(here / "resumed.npz")["base_model"] == str(base)
    assert main(["--train", "--run-dir", "run", "--resume", "--iters", "4"]) == 2
    assert "iters is 4 here and 3 in the run" in capsys.readouterr().err


def test_a_run_whose_data_has_changed_is_resumed_only_when_forced(base, data, here, capsys):
    flags = ["--model", str(base), "--data", str(data), "--train", *QUICK, "--save-every", "2", "--no-export"]
    lm = load_model(base)
    Trainer(lm, load_data(data, lm.tokenizer), settings_of(*flags).config, "run").run(2)
    with (data / "train.jsonl").open("a") as file:
        file.write((data / "train.jsonl").read_text().splitlines()[0] + "\n")
    resume = ["--train", "--run-dir", "run", "--resume", "--no-export"]
    assert main(resume) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*resume, "--force"]) == 0


def test_without_a_run_directory_the_weights_are_saved_on_the_way(base, data, here, monkeypatch):
    saved = []
    monkeypatch.setattr("fulltune_nb.full.save_weights", lambda trainer, path: saved.append(trainer.step_count))
    assert main(["--model", str(base), "--data", str(data), "--train", *QUICK, "--iters", "5", "--save-every", "2", "--no-export"]) == 0
    assert saved == [2, 4, 5]


def test_a_float16_checkpoint_is_announced(base, data, here, capsys, make_tokenizer):
    lm = LanguageModel.from_config({**CONFIG, "torch_dtype": "float16"}, make_tokenizer())
    lm.model.set_dtype(mx.float16)
    lm.save("half")
    assert main(["--model", "half", "--data", str(data), "--train", *QUICK, "--iters", "1", "--no-export"]) == 0
    assert capsys.readouterr().out.count("trained in float32") == 1
    assert all(array.dtype == mx.float32 for array in weights("model.npz").values())


# Export


def test_an_unchanged_export_is_replaced_and_anything_else_stays(base, tmp_path):
    lm = load_model(base)
    place = tmp_path / "out"
    assert export_folder(lm, place, {"steps": 1}) == place
    assert export_folder(lm, place, {"steps": 2}) == place
    assert json.loads((place / EXPORT_NOTE).read_text())["steps"] == 2
    (place / "my notes.txt").write_text("precious")
    assert export_folder(lm, place, {"steps": 3}) == tmp_path / "out-2"
    assert (place / "my notes.txt").read_text() == "precious"
    assert export_folder(lm, base, {}) == base.with_name("model-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2"]
    assert load_model(tmp_path / "out-2").config == lm.config


# What goes wrong


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--train"), (["--train", "--data", "DATA"], "--model"), (["--train", "--data", "nowhere", "--model", "BASE"], "nowhere"),
        (["--train", "--model", "./nowhere", "--data", "DATA"], "nowhere"), (["--test", "--model", "BASE", "--data", "."], "test.jsonl"),
        (["--test", "--model", "BASE", "--data", "DATA", "--model-file", "none.npz"], "none.npz"),
        (["--train", "--batch-size", "0"], "batch_size"),
        (["--train", "--model-file", "model.bin"], ".bin"), (["--train", "--learning-rate", "fast"], "learning_rate"),
        (["--train", "--iters", "3", "--epochs", "1"], "epochs"), (["--train", "--optimizer", "adamv"], "adamw"),
        (["--train", "--learning_rat", "1"], "--learning-rate"), (["--train", "--optimizer-config", "{"], "optimizer_config: expected"),
        (["--train", "--resume"], "--run-dir"), (["--train", "--run-dir", "none", "--resume"], "none"), (["-c", "none.yaml"], "none.yaml"),
        (["--train", "--model", "BASE", "--data", "DATA", "--dtype", "float16"], "float16"),
        (["--train", "--model", "BASE", "--data", "DATA", "--mask-prompt"], "mask_prompt"), (["train"], "train"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_two_and_one_message(base, data, here, flags, message, capsys):
    assert code_of([{"BASE": str(base), "DATA": str(data)}.get(flag, flag) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_bad_rows_are_listed_with_file_and_line(base, here, capsys):
    (here / "train.jsonl").write_text('{"text": "fine"}\n{"text": 3}\nno json\n')
    assert main(["--train", "--model", str(base), "--data", "."]) == 2
    error = capsys.readouterr().err
    assert "train.jsonl:2" in error and "train.jsonl:3" in error


def test_a_step_that_is_not_finite_ends_with_one(base, data, here, capsys):
    flags = ["--model", str(base), "--data", str(data), "--train", "--iters", "30", "--learning-rate", "1e38", "--val-batches", "0"]
    assert main([*flags, "--optimizer", "sgd"]) == 1
    assert "nothing was updated" in capsys.readouterr().err


def test_ctrl_c_saves_the_weights_and_ends_with_130(base, data, here, capsys, monkeypatch):
    step = Trainer.step

    def interrupted_step(trainer):
        report = step(trainer)
        if report.step == 2:
            signal.raise_signal(signal.SIGINT)
        return report

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    assert main(["--model", str(base), "--data", str(data), "--train", "--test", *QUICK]) == 130
    output = capsys.readouterr().out
    assert "Interrupted after step 2 of 3" in output
    assert not TEST_LINE.search(output)
    assert not equal(weights("model.npz"), weights(base / "model.safetensors"))
    assert not (here / "model_hf").exists()
