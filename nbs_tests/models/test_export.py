"""`lm.export`: quantized folders, GGUF, a Modelfile and the hub, each compared with the model that was exported.

llama.cpp is no package: with LLAMA_CPP naming a built checkout, and its Python binding on the path, its answers are compared too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import stat
import sys
from datetime import date
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.chat_template import ChatRenderer
from fulltune_nb.errors import ConfigError, MissingDependencyError, ModelError
from fulltune_nb.export import main
from fulltune_nb.models import gguf
from fulltune_nb.models.folder import hf_tensors
from fulltune_nb.models.ollama import modelfile, turns_of
from nbs_tests.conftest import CHATML
from nbs_tests.models.parity import need, relative_error
from nbs_tests.training.conftest import TINY_LLAMA

ANSWER, MOST = "I am fine, thank you.", 40
ROWS = [{"prompt": "How are you today?", "completion": ANSWER}] * 4
QUESTION = [{"role": "user", "content": ROWS[0]["prompt"]}]
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SHAPES = {
    "llama": {**TINY_LLAMA, **SHAPE, "architectures": ["LlamaForCausalLM"]},
    "qwen3": {**TINY_LLAMA, **SHAPE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
}


@pytest.fixture(scope="module")
def tuned(make_tokenizer):
    """`tuned(shape)`: a model that has learnt the answer through ChatML; `</s>` is the tokenizer's EOS."""
    found = {}

    def make(shape):
        if shape not in found:
            tokenizer = make_tokenizer(CHATML)
            lm = ft.LanguageModel.from_config({**SHAPES[shape], "eos_token_id": 1, "bos_token_id": 0}, tokenizer, seed=1)
            config = ft.TrainConfig(iters=40, batch_size=4, learning_rate=1e-2, mask_prompt=True, max_seq_length=96)
            ft.Trainer(lm, ft.load_data({"train": ROWS}, tokenizer, config=config), config).run()
            assert lm.chat(QUESTION, max_tokens=MOST) == ANSWER
            found[shape] = lm
        return found[shape]

    return make


def is_gone(folder, *names):
    """Whether nothing but these is there, unfinished or whole."""
    return sorted(os.listdir(folder)) == sorted(names)


# ---- MLX


@pytest.mark.parametrize(("to", "error"), [("mlx-8bit", 0.01), ("mlx-4bit", 0.12)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_quantized_folder_answers_alike_in_mlx_lm_and_stops(shape, to, error, tuned, tmp_path):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    import mlx_lm

    lm = tuned(shape)
    assert lm.export(tmp_path / "out", to) == tmp_path / "out" and is_gone(tmp_path, "out")
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    assert model.model.layers[0].mlp.up_proj.bits == int(to[4])
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    pieces = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=MOST))
    assert pieces[-1].finish_reason == "stop" and "".join(piece.text for piece in pieces).removesuffix("<|im_end|>") == ANSWER
    again = ft.load_model(tmp_path / "out", dtype="float32", dequantize=True)
    ours = hf_tensors(lm.model)
    errors = {name: relative_error(array, np.array(ours[name])) for name, array in hf_tensors(again.model).items()}
    assert 0 < max(errors.values()) < error


def test_a_quantized_folder_has_the_files_beside_the_weights_that_a_saved_one_has(tuned, tmp_path):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    lm = tuned("llama")
    saved, out = lm.save(tmp_path / "saved"), lm.export(tmp_path / "out", "mlx-8bit")
    beside = [path for path in saved.iterdir() if path.name not in ("config.json", "model.safetensors")]
    assert beside and all((out / path.name).read_bytes() == path.read_bytes() for path in beside)


def test_without_mlx_lm_the_command_to_install_it_is_named(tuned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fulltune_nb\[mlx-lm\]'"):
        tuned("llama").export(tmp_path / "out", "mlx-4bit")
    assert is_gone(tmp_path)


def test_what_mlx_lm_cannot_read_is_said_and_leaves_nothing(tuned, tmp_path, monkeypatch):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    import mlx_lm

    def refuse(*given, **options):
        raise ValueError("Model type llama not supported.")

    monkeypatch.setattr(mlx_lm, "convert", refuse)
    with pytest.raises(ModelError, match="could not quantize.*not supported"):
        tuned("llama").export(tmp_path / "out", "mlx-4bit")
    assert is_gone(tmp_path)


# ---- GGUF

CONVERTER = """
import json, sys
from pathlib import Path
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")
def main():
    model, _, out, _, kind = sys.argv[1:]
    assert (Path(model) / "config.json").is_file()
    Path(out).write_bytes(b"GGUF" + json.dumps([kind, TextModel().get_vocab_base_pre(None)]).encode())
if __name__ == "__main__":
    main()
"""
QUANTIZER = "#!/bin/sh\nprintf 'GGUF %s of ' \"$3\" > \"$2\"; cat \"$1\" >> \"$2\"\n"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with a converter and a quantizer that write what they were told."""
    folder = tmp_path / "llama.cpp"
    (folder / "build/bin").mkdir(parents=True)
    (folder / gguf.CONVERTER).write_text(CONVERTER)
    quantizer = folder / "build/bin" / gguf.QUANTIZER
    quantizer.write_text(QUANTIZER)
    quantizer.chmod(quantizer.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(gguf.FOLDER, str(folder))
    return folder


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [(None, b'GGUF["bf16", "gpt-2"]'), ("q8_0", b'GGUF["q8_0", "gpt-2"]'), ("Q4_K_M", b'GGUF Q4_K_M of GGUF["bf16", "gpt-2"]')],
)
def test_the_converter_is_told_the_quantization_and_how_texts_are_cut(quantization, expected, tuned, checkout, tmp_path):
    place = tuned("llama").export(tmp_path / "m.gguf", "gguf", quantization)
    assert place.read_bytes() == expected and is_gone(tmp_path, "llama.cpp", "m.gguf")


def test_a_converter_that_fails_is_quoted_and_nothing_stays(tuned, checkout, tmp_path):
    broken = "def main():\n    raise SystemExit('no \x1b[31mtorch')\n"
    (checkout / gguf.CONVERTER).write_text(CONVERTER.replace("def main():\n", broken))
    with pytest.raises(ModelError, match=r"no \\x1b\[31mtorch"):
        tuned("llama").export(tmp_path / "m.gguf", "gguf")
    assert is_gone(tmp_path, "llama.cpp")


@pytest.mark.parametrize("tool", [gguf.CONVERTER, gguf.QUANTIZER])
def test_without_llama_cpp_the_commands_are_named_before_anything_is_written(tool, tuned, checkout, tmp_path, monkeypatch):
    next(checkout.rglob(tool)).unlink()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError) as caught:
        tuned("llama").export(tmp_path / "m.gguf", "gguf", "q4_k_m")
    for command in ("git clone", "LLAMA_CPP", "--outtype bf16", "model.gguf Q4_K_M"):
        assert command in str(caught.value)
    assert is_gone(tmp_path, "llama.cpp")


def pre_tokenizer(*steps):
    return {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (pre_tokenizer(BYTES), "gpt-2"),
        (pre_tokenizer(DIGITS, BYTES), "smollm"),
        (pre_tokenizer({**DIGITS, "individual_digits": False}, BYTES), None),
        (pre_tokenizer({**BYTES, "add_prefix_space": True}), None),
        ({**pre_tokenizer(BYTES), "normalizer": {"type": "NFC"}}, None),
        ({"pre_tokenizer": None}, None),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": "hostile"}}, None),
    ],
)
def test_only_ways_to_cut_texts_that_llama_cpp_has_are_named(tokenizer, name):
    assert gguf.pre_tokenizer_name(tokenizer) == name


@pytest.mark.parametrize("quantization", ["f32", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_itself_gives_the_same_answer_and_stops(shape, quantization, tuned, tmp_path):
    if not os.environ.get(gguf.FOLDER) or importlib.util.find_spec("llama_cpp") is None:
        pytest.skip(f"needs {gguf.FOLDER} to name a built checkout of llama.cpp, and llama_cpp on the path")
    import llama_cpp

    lm = tuned(shape)
    folder = lm.export(tmp_path / "out", "ollama", quantization)
    theirs = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=128, logits_all=True, verbose=False)
    text = ChatRenderer(lm.tokenizer).render(QUESTION, add_generation_prompt=True)
    ids = theirs.tokenize(text.encode(), add_bos=False, special=True)
    assert ids == lm.chat_tokens(QUESTION)
    every = "It's 12,345 größer — 東京!  \n\n\tselect  x"
    assert theirs.tokenize(every.encode(), add_bos=False, special=False) == lm.tokenizer.encode(every, add_special_tokens=False)
    stops = re.findall(r'^PARAMETER stop "(.*)"$', (folder / "Modelfile").read_text(), re.MULTILINE)
    answer = theirs.create_completion(text, max_tokens=MOST, temperature=0.0, stop=stops)["choices"][0]
    assert (answer["text"], answer["finish_reason"]) == (ANSWER, "stop")
    theirs.reset()
    theirs.eval(ids)
    ours = np.array(lm.model(mx.array([ids]))[0].astype(mx.float32))
    assert relative_error(np.array(theirs.scores[: len(ids)]), ours) < {"f32": 2e-3, "q8_0": 3e-2, "q4_k_m": 0.2}[quantization]


# ---- Ollama

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
MERGED = (
    "{% for m in messages %}{% if m.role == 'system' %}[INST] {{ m.content }}\n\n{% elif m.role == 'user' %}"
    "{{ '' if loop.index0 and messages[loop.index0 - 1].role == 'system' else '[INST] ' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA3, "no system": NO_SYSTEM, "default system": DEFAULT_SYSTEM, "merged": MERGED}


def go(template, messages):
    """What Go's text/template makes of `.System` and `.Messages`: as much of the language as stands in these templates."""
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    tokens, out = re.split(r"(\{\{.*?\}\})", template), []

    def run(place, message, shown):
        while place < len(tokens):
            token = tokens[place]
            word = token.strip("{} ") if token.startswith("{{") else None
            if word in ("end", "else"):
                return place
            if word is None:
                out.extend([token] if shown else [])
            elif word == ".Content":
                out.extend([message["content"]] if shown else [])
            elif word.startswith("range"):
                for one in messages:
                    end = run(place + 1, one, shown)
                place = end
            else:
                role = re.fullmatch(r'if eq \.Role "(\w+)"', word)
                yes = message["role"] == role[1] if role else {"if .System": bool(system)}[word]
                place = run(place + 1, message, shown and yes)
                if tokens[place].strip("{} ") == "else":
                    place = run(place + 1, message, shown and not yes)
            place += 1
        return place

    run(0, None, True)
    return "".join(out)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_in_gos_language_writes_what_the_chat_template_does(name, adds_bos, make_tokenizer):
    tokenizer = make_tokenizer(TEMPLATES[name], adds_bos=adds_bos)
    text = modelfile("model.gguf", tokenizer, ["<|im_end|>", 'a "quoted" end'])
    template = re.search(r'TEMPLATE """(.*?)"""\n', text, re.DOTALL)[1]
    talk = [{"role": role, "content": f"What is {role}?"} for role in ("system", "user", "assistant", "user", "assistant", "user")]
    for messages in (talk[1:2], talk[1:4], talk[1:], *([] if name == "no system" else [talk[:2], talk[:4]])):
        expected = ChatRenderer(tokenizer).render(messages, add_generation_prompt=True)
        assert go(template, messages) == (expected.removeprefix("<s>") if adds_bos else expected)
    assert text.endswith('PARAMETER stop "<|im_end|>"\nPARAMETER stop """a "quoted" end"""\n') and text.startswith("FROM ./model.gguf\n")


@pytest.mark.parametrize(
    "template",
    [
        '{% for m in messages %}{{ m.role }}"""\nFROM /etc/passwd\n{{ m.content }}{% endfor %}',
        "{% for m in messages %}{{ m.role }} {{ '{{ .System }}' }} {{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}: {{ '{' }}{{ m.content }}{{ '}' }}{% endfor %}",
        "{% for m in messages %}{{ loop.index }} {{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    ],
)
def test_a_template_that_go_cannot_say_is_left_out_and_told(template, make_tokenizer):
    tokenizer = make_tokenizer(template)
    assert turns_of(tokenizer) is None
    with pytest.warns(UserWarning, match="has none"):
        assert modelfile("model.gguf", tokenizer, ["</s>"]) == 'FROM ./model.gguf\nPARAMETER stop "</s>"\n'


def test_a_template_that_writes_the_date_keeps_that_of_today_and_tells(make_tokenizer):
    with pytest.warns(UserWarning, match="writes the date"):
        assert f"It is {date.today():%Y}." in modelfile("model.gguf", make_tokenizer("It is {{ strftime_now('%Y') }}. " + CHATML), ["</s>"])


def test_a_folder_for_ollama_has_the_ends_that_were_trained(tuned, checkout, tmp_path):
    folder = tuned("qwen3").export(tmp_path / "out", "ollama", "q8_0")
    assert is_gone(folder, "Modelfile", "model.gguf")
    assert set(re.findall('PARAMETER stop "(.*)"', (folder / "Modelfile").read_text())) == {"</s>", "<|im_end|>"}


# ---- the hub


class Hub:
    """Stands for the hub's own client, and keeps what was uploaded."""

    def __init__(self, private=None):
        self.private, self.uploaded, self.created = private, None, None

    def repo_info(self, name):
        if self.private is None:
            from huggingface_hub.errors import RepositoryNotFoundError

            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None, status_code=404))
        return SimpleNamespace(private=self.private)

    def create_repo(self, name, private, exist_ok):
        self.created = (name, private, exist_ok)

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        self.uploaded = {name: os.path.getsize(os.path.join(folder_path, name)) for name in os.listdir(folder_path)}


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


def test_an_upload_is_announced_file_by_file_and_private(tuned, hub):
    told = []
    address = tuned("llama").export("me/tuned", "hub", confirm=lambda text: told.append(text) or True)
    assert address == "https://huggingface.co/me/tuned" and hub.created == ("me/tuned", True, True)
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(hub.uploaded)
    assert "a new private repository me/tuned" in told[0] and all(name in told[0] for name in hub.uploaded)


def test_nothing_is_uploaded_that_was_not_agreed_to(tuned, hub, monkeypatch):
    with pytest.raises(ModelError, match="not agreed"):
        tuned("llama").export("me/tuned", "hub", confirm=lambda text: False)
    monkeypatch.setattr("builtins.input", lambda text: "n")
    with pytest.raises(ModelError, match="not agreed"):
        tuned("llama").export("me/tuned", "hub")
    assert hub.uploaded is None and hub.created is None


def test_where_nobody_can_be_asked_an_error_says_what_to_pass(tuned, hub, monkeypatch):
    def nobody(text):
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    with pytest.raises(ModelError, match="confirm="):
        tuned("llama").export("me/tuned", "hub")
    assert hub.uploaded is None


def test_a_public_repository_gets_nothing_unless_that_is_meant(tuned, hub):
    hub.private = False
    with pytest.raises(ModelError, match="public. Nothing was uploaded"):
        tuned("llama").export("me/tuned", "hub", confirm=lambda text: True)
    told = []
    tuned("llama").export("me/tuned", "hub", private=False, confirm=lambda text: told.append(text) or True)
    assert hub.uploaded and "an existing public repository" in told[0]


def test_a_hub_that_cannot_be_reached_or_refuses_the_name_is_told(tuned, hub, monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def failing(error):
        def repo_info(name):
            raise error

        return repo_info

    monkeypatch.setattr(hub, "repo_info", failing(HfHubHTTPError.__bases__[0]("no route")))  # as without a network
    with pytest.raises(ModelError, match="could not be uploaded: no route"):
        tuned("llama").export("me/tuned", "hub", confirm=lambda text: True)
    monkeypatch.setattr(hub, "repo_info", failing(HFValidationError("no --")))
    with pytest.raises(ConfigError, match="cannot be the name of a hub repository: no --"):
        tuned("llama").export("me/a--b", "hub", confirm=lambda text: True)
    assert hub.uploaded is None


# ---- what is refused, and the command


@pytest.mark.parametrize(
    ("where", "to", "quantization", "message"),
    [
        ("out", "gguff", None, "Did you mean 'gguf'"),
        ("out", "mlx-4bit", "q8_0", "quantization"),
        ("out", "hf", "q8_0", "quantization"),
        ("out.bin", "gguf", None, "ends with .gguf"),
        ("out.gguf", "gguf", "q4_k_n", "or 'q4_k_m'"),
        ("not a repository", "hub", None, "me/my-model"),
    ],
)
def test_what_cannot_be_is_refused_with_a_name_that_can(where, to, quantization, message, tuned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        tuned("llama").export(where, to, quantization)
    assert is_gone(tmp_path)


def test_nothing_is_overwritten(tuned, checkout, tmp_path):
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ModelError, match="exists already"):
        tuned("llama").export(tmp_path / "m.gguf", "gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_the_command_says_the_place(tuned, checkout, tmp_path, capsys):
    source = tuned("llama").save(tmp_path / "source")
    assert main([str(source), str(tmp_path / "hf")]) == 0 and json.loads((tmp_path / "hf/config.json").read_text())
    assert main([str(source), str(tmp_path / "m.gguf"), "--to", "gguf", "--quantization", "f16"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "hf"), str(tmp_path / "m.gguf")]
    assert main([str(source), str(tmp_path / "m.gguf"), "--to", "gguf"]) == 2 and "exists already" in capsys.readouterr().err
