"""`python -m fulltune_nb.generate`: what goes to standard output, where model and template come from, bad input."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import mlx.core as mx
import pytest

from fulltune_nb.chat_template import CHATML
from fulltune_nb.generate import main
from fulltune_nb.models.language_model import LanguageModel, load_model
from fulltune_nb.models.model_file import EXPORT_NOTE, load_with_model_file, read_metadata, save_model_file, trained_format

CONFIG = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHORT = ["--max-tokens", "8"]


@pytest.fixture(scope="module")
def folder(make_tokenizer, tmp_path_factory):
    """A model folder without a chat template."""
    return LanguageModel.from_config(CONFIG, make_tokenizer()).save(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def chat_folder(make_tokenizer, tmp_path_factory):
    """A model folder with one."""
    return LanguageModel.from_config(CONFIG, make_tokenizer(CHATML)).save(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def model_file(folder, tmp_path):
    """Builds a model file with other weights than the folder's."""

    def make(name, data_format=None, base=folder):
        lm = load_model(base)
        lm.model.norm.weight = lm.model.norm.weight + mx.arange(24)
        save_model_file(tmp_path / name, lm, data_format)
        return tmp_path / name

    return make


def test_the_answer_alone_goes_to_standard_output(folder, capsys):
    assert main(["--model", str(folder), "--prompt", "The quick", *SHORT]) == 0
    assert capsys.readouterr().out == load_model(folder).generate("The quick", max_tokens=8) + "\n"


def test_sampling_flags_reach_the_sampler(folder, capsys):
    flags = ["--temp", "0.8", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.01", "--seed", "3", "-m", "12"]
    assert main(["--model", str(folder), "-p", "The quick", *flags]) == 0
    expected = load_model(folder).generate("The quick", 12, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, seed=3)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("name", ["model.npz", "model.safetensors"])
def test_the_model_file_tells_which_model_it_belongs_to(model_file, folder, name, capsys):
    path = model_file(name)
    assert main(["--model-file", str(path), "--prompt", "The quick", *SHORT]) == 0
    found = capsys.readouterr()
    assert found.out == load_model(folder, path).generate("The quick", max_tokens=8) + "\n"
    assert found.out != load_model(folder).generate("The quick", max_tokens=8) + "\n"
    assert str(folder) in found.err


def test_a_model_file_that_tells_nothing_needs_the_model(model_file, folder, capsys):
    path = model_file("model.npz")
    path.with_name("model.npz.json").unlink()
    assert main(["--model-file", str(path), "--prompt", "a", *SHORT]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["--model-file", str(path), "--model", str(folder), "--prompt", "a", *SHORT]) == 0


def test_a_model_that_has_gone_is_named(model_file, make_tokenizer, tmp_path, capsys):
    gone = LanguageModel.from_config(CONFIG, make_tokenizer()).save(tmp_path / "gone")
    path = model_file("model.npz", base=gone)
    gone.rename(tmp_path / "moved")
    assert main(["--model-file", str(path), "--prompt", "a"]) == 2
    assert str(gone) in capsys.readouterr().err


def test_weights_keep_the_dtype_of_the_file(folder, tmp_path):
    save_model_file(tmp_path / "model.safetensors", load_model(folder, dtype="bfloat16"))
    assert load_with_model_file(None, tmp_path / "model.safetensors").dtype == "bfloat16"
    assert load_with_model_file(None, tmp_path / "model.safetensors", "float32").dtype == "float32"


def test_what_a_file_was_trained_on_is_kept(model_file):
    for name in ("a.npz", "a.safetensors"):
        assert read_metadata(model_file(name, "text"))["data_format"] == "text"
        assert "data_format" not in read_metadata(model_file(name))


def test_with_a_template_the_prompt_goes_through_it_unless_told_otherwise(chat_folder, capsys):
    lm = load_model(chat_folder)
    chat, raw = lm.chat([{"role": "user", "content": "Hello!"}], max_tokens=8), lm.generate("Hello!", max_tokens=8)
    assert chat != raw
    for flags, expected in ([], chat), (["--chat"], chat), (["--no-chat"], raw), (["--ignore-chat-template"], raw):
        assert main(["--model", str(chat_folder), "--prompt", "Hello!", *SHORT, *flags]) == 0
        assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(("data_format", "way"), [("text", "raw"), ("chat", "through"), ("completions", "through")])
def test_the_format_trained_on_decides(model_file, chat_folder, folder, data_format, way, capsys):
    for base in (chat_folder, folder):
        assert main(["--model-file", str(model_file("m.npz", data_format, base)), "--prompt", "Hello!", *SHORT]) == 0
        assert f"sent {way}" in capsys.readouterr().err


def test_an_exported_folder_tells_the_format_too(chat_folder, tmp_path):
    lm = load_model(chat_folder)
    assert trained_format(lm, None) is None
    exported = lm.save(tmp_path / "exported")
    (exported / EXPORT_NOTE).write_text(json.dumps({"data_format": "text"}))
    assert trained_format(load_model(exported), None) == "text"


def test_a_system_prompt_goes_through_the_template(chat_folder, capsys):
    assert main(["--model", str(chat_folder), "--prompt", "Hello!", "--system-prompt", "Be kind.", *SHORT]) == 0
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    assert capsys.readouterr().out == load_model(chat_folder).chat(messages, max_tokens=8) + "\n"
    assert main(["--model", str(chat_folder), "--prompt", "Hello!", "--system-prompt", "x", "--no-chat"]) == 2


def test_without_a_template_chat_uses_chatml_and_says_so(folder, capsys, recwarn):
    assert main(["--model", str(folder), "--prompt", "Hello!", "--chat", *SHORT]) == 0
    assert "ChatML" in capsys.readouterr().err
    assert not recwarn.list


def test_the_prompt_may_come_from_standard_input_or_hold_escapes(folder, capsys, monkeypatch):
    expected = load_model(folder).generate("a\nb\t", max_tokens=8) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\t\n"))
    assert main(["--model", str(folder), "--prompt", "-", *SHORT]) == 0
    assert capsys.readouterr().out == expected
    assert main(["--model", str(folder), "--prompt", r"a\nb\t", *SHORT]) == 0
    assert capsys.readouterr().out == expected


def test_stop_strings_may_be_given_several_times(folder, capsys):
    whole = load_model(folder).generate("The quick", max_tokens=30)
    flags = ["--stop", "never said", "--stop", whole[5:8]]
    assert main(["--model", str(folder), "--prompt", "The quick", "--max-tokens", "30", *flags]) == 0
    assert capsys.readouterr().out == whole[: whole.index(whole[5:8])] + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--prompt"), (["--prompt", "a"], "--model"), (["--prompt", "a", "--model", "./nowhere"], "nowhere"),
        (["--prompt", "a", "--model-file", "none.npz", "--model", "./nowhere"], "none.npz"),
        (["--prompt", "a", "--model-file", "x.bin"], ".bin"),
        (["--prompt", "a", "--temp", "-1"], "temperature"), (["--prompt", "a", "--temp", "warm"], "--temp"),
        (["--prompt", "a", "--top-p", "2"], "top_p"), (["--prompt", "a", "--max-tokens", "0"], "max_tokens"),
        (["--prompt", "a", "--max-token", "3"], "--max-tokens"), (["--prompt", "a", "--seed", "-1"], "seed"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_two_and_one_message(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(flags)
    except SystemExit as stop:
        code = stop.code
    found = capsys.readouterr()
    assert (code, found.out) == (2, "")
    assert message in found.err
    assert "Traceback" not in found.err


def test_ctrl_c_ends_with_130(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        yield "so far"
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "stream", interrupted)
    assert main(["--model", str(folder), "--prompt", "a"]) == 130
    assert capsys.readouterr().out == "so far"


def test_the_module_runs_as_a_command(folder):
    command = [sys.executable, "-m", "fulltune_nb.generate", "--model", str(folder), "--prompt", "The quick", *SHORT]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout == load_model(folder).generate("The quick", max_tokens=8) + "\n"
    refused = subprocess.run([*command[:3], "--model", "./nowhere", "--prompt", "a"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: No model folder at")
