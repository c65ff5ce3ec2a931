"""Mistakes that a first-time user of the commands makes, and what is said about them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fulltune_nb import __main__ as commands
from fulltune_nb import full
from fulltune_nb.full import main
from fulltune_nb.models.language_model import LanguageModel, load_model
from fulltune_nb.models.model_file import save_model_file
from nbs_tests.training.conftest import TINY_LLAMA


@pytest.fixture
def base(make_tokenizer, tmp_path):
    return LanguageModel.from_config(TINY_LLAMA, make_tokenizer()).save(tmp_path / "base")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text('{"text": "one row"}\n')
    return folder


def said(capsys, *argv) -> str:
    assert main([str(word) for word in argv]) == 2
    return capsys.readouterr().err


def test_a_file_in_place_of_the_data_folder_is_told_with_the_folder(base, data, capsys):
    error = said(capsys, "--model", base, "--train", "--data", data / "train.jsonl")
    assert "is a file" in error and f"Give the folder it is in: {str(data)!r}" in error


def test_a_misspelt_data_folder_is_told_with_the_nearest_name(base, data, capsys):
    assert "data." in said(capsys, "--model", base, "--train", "--data", data.with_name("dataa")).split("Near it")[1]


def test_weights_of_another_model_are_told_with_the_model_they_belong_to(base, data, make_tokenizer, tmp_path, capsys):
    other = LanguageModel.from_config({**TINY_LLAMA, "hidden_size": 16}, make_tokenizer()).save(tmp_path / "other")
    path = tmp_path / "model.npz"
    save_model_file(path, load_model(other), "text")
    error = said(capsys, "--model", base, "--train", "--data", data, "--model-file", path)
    assert "does not fit" in error and f"was trained from {other}, and --model is {base}. Name another --model-file" in error
    error = said(capsys, "--model", base, "--train", "--data", data, "--model-file", tmp_path / "weights")
    assert "found no ending" in error


@pytest.mark.parametrize(("before", "now", "flag"), [(True, False, "--mask-prompt"), (False, True, "--no-mask-prompt"), (True, True, None)])
def test_weights_tested_on_other_tokens_than_they_were_trained_on_are_told_with_the_flag(before, now, flag, base, data, tmp_path, capsys):
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text('{"prompt": "one", "completion": "row"}\n')
    path, words = tmp_path / "model.npz", ["--model", base, "--data", data, "--mask-prompt" if now else "--no-mask-prompt"]
    save_model_file(path, load_model(base), "completions", before)
    assert main([str(word) for word in (*words, "--test", "--model-file", path)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "was trained on" in line]
    assert told == [] if flag is None else len(told) == 1 and f" {flag} " in told[0]


def test_the_package_itself_names_its_commands():
    done = subprocess.run([sys.executable, "-m", "fulltune_nb"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == commands.overview()
    for name in commands.COMMANDS:
        assert f"fulltune {name} " in done.stdout


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_of_the_program_is_there_and_calls_itself_by_its_name(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fulltune"])
    with pytest.raises(SystemExit) as stopped:
        commands.main([name, "--help"])
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith(f"usage: fulltune {name} ")


def test_train_and_test_are_the_full_command_with_their_flag(monkeypatch):
    called = []
    monkeypatch.setattr(full, "main", lambda: called.append(sys.argv))
    for words in (["train", "--iters", "3"], ["test", "--model", "m"]):
        monkeypatch.setattr(sys, "argv", ["fulltune", *words])
        commands.main()
    assert called == [["fulltune train", "--train", "--iters", "3"], ["fulltune test", "--no-train", "--test", "--model", "m"]]


def test_a_command_that_does_not_exist_is_answered_with_the_nearest(monkeypatch, capsys):
    assert commands.main(["genrate"]) == 2
    assert capsys.readouterr().err == "fulltune: error: there is no command 'genrate'. Did you mean 'generate'?\n"
    assert commands.main(["--version"]) == 0 and commands.main(["--help"]) == 0


def test_the_overview_needs_nothing_heavy():
    code = "import sys, fulltune_nb.__main__ as c; c.main([]); assert not {'mlx', 'numpy', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
