"""Runs that began from a quantized folder: resumed bit for bit, and every file of them says where the weights came from."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest

import fulltune_nb as ft
from fulltune_nb.full import main
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.folder import hf_tensors
from fulltune_nb.models.model_config import read_config
from fulltune_nb.training.run import read_result
from nbs_tests.models.quantized_folders import RAW, in_groups, published_mxfp4_folder, quantized_folder
from nbs_tests.training.conftest import make_rows

LLAMA = {**RAW, "vocab_size": 512, "torch_dtype": "bfloat16"}
MIXED = {"bits": 3, "group_size": 32, "model.layers.0.self_attn.v_proj": {"bits": 6, "group_size": 64}}


def affine(folder):
    return quantized_folder(folder, LLAMA)[0]


def mixed(folder):
    ways = {"v_proj": {"bits": 6, "group_size": 64}, "o_proj": None, "down_proj": {"mode": "mxfp4"}}
    return quantized_folder(folder, LLAMA, lambda name: next((ways[part] for part in ways if part in name), MIXED_WAY), MIXED)[0]


MIXED_WAY = {"bits": 3, "group_size": 32}


def mxfp4_of_mlx(folder):
    way = {"mode": "mxfp4", "bits": 4, "group_size": 32}
    return quantized_folder(folder, LLAMA, lambda name: way, way)[0]


def mxfp4_as_published(folder):
    raw = in_groups("gpt_oss", num_hidden_layers=2, vocab_size=512)
    return published_mxfp4_folder(folder, raw, hf_tensors(Decoder(read_config(raw))))[0]


BASES = {
    affine: "MLX, affine, 4 bits, groups of 64",
    mixed: "MLX, affine, 3 bits, groups of 32, mixed",
    mxfp4_of_mlx: "MLX, mxfp4, 4 bits, groups of 32",
    mxfp4_as_published: "MXFP4",
}
SETTINGS = {"batch_size": 2, "iters": 4, "save_every": 2, "learning_rate": 1e-3}


@pytest.fixture
def base_of(tokenizer, tmp_path):
    """`base_of(make)`: a quantized folder with a tokenizer."""

    def make_base(make):
        folder = make(tmp_path / "base")
        tokenizer.save_pretrained(folder)
        return folder

    return make_base


def begin(base, data, run_dir, **settings) -> ft.Trainer:
    config = ft.TrainConfig(**{**SETTINGS, **settings})
    lm = ft.load_model(base, dequantize=True)
    return ft.Trainer(lm, ft.load_data(data, lm.tokenizer, config=config), config, run_dir)


def same_weights(lm: ft.LanguageModel, other: ft.LanguageModel) -> bool:
    """Bit for bit, in the same dtypes."""
    one, two = hf_tensors(lm.model), hf_tensors(other.model)
    return one.keys() == two.keys() and all(
        array.dtype == two[name].dtype and mx.array_equal(array, two[name]).item() for name, array in one.items()
    )


@pytest.fixture
def data(tmp_path):
    """A folder of data."""
    (tmp_path / "data").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in make_rows(9))
    for split in ("train", "valid", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(text)
    return tmp_path / "data"


@pytest.mark.parametrize(("make", "said"), BASES.items(), ids=[make.__name__ for make in BASES])
def test_a_run_that_was_killed_goes_on_bit_for_bit_and_says_what_it_began_from(make, said, base_of, data, tmp_path):
    base = base_of(make)
    whole = begin(base, data, None)
    whole.run()
    for place in ("run", "auto"):
        begin(base, data, tmp_path / place).run(3)  # what came after the checkpoint of step 2 is lost
        shutil.rmtree(tmp_path / place / "checkpoints" / "step-000003", ignore_errors=True)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "trainer.json").read_text())
    assert (state["model_source"], state["dequantized"]) == (str(base), said)

    lm, config = ft.load_model(base, dequantize=True), ft.TrainConfig(**SETTINGS)
    auto = ft.Trainer(lm, ft.load_data(data, lm.tokenizer, config=config), config, tmp_path / "auto", resume="auto")
    shutil.rmtree(base)  # a run that goes on by itself does not need it
    alone = ft.Trainer.resume(tmp_path / "run")
    for trainer in (auto, alone):
        assert trainer.step_count == 2
        trainer.run()
        assert same_weights(trainer.lm, whole.lm) and trainer.lm.dequantized == said and said in repr(trainer.lm)
    assert read_result(tmp_path / "run" / "result.json")["dequantized"] == said
    assert same_weights(alone.fork().lm, whole.lm) and alone.fork().lm.dequantized == said

    saved = alone.lm.save(tmp_path / "saved")
    written, card = json.loads((saved / "config.json").read_text()), (saved / "README.md").read_text()
    assert not {"quantization", "quantization_config"} & written.keys()
    assert f"| quantization of the base | {said}; made ordinary weights before training |" in card
    assert "| quantization of this model | none |" in card
    assert same_weights(ft.load_model(saved), whole.lm) and ft.load_model(saved).dequantized is None


def test_a_run_from_an_ordinary_folder_says_that_nothing_was_quantized(make_trainer, tmp_path):
    trainer = make_trainer(iters=1)
    trainer.run()
    assert trainer.lm.dequantized is None and "quantization" not in (trainer.lm.save(tmp_path / "saved") / "README.md").read_text()


def test_the_command_trains_a_quantized_base_by_its_yaml_and_resumes_without_it(base_of, data, tmp_path, monkeypatch, capsys):
    base = base_of(affine)
    monkeypatch.chdir(tmp_path)
    settings = {"model": str(base), "data": str(data), "train": True, "batch_size": 2, "iters": 4, "learning_rate": 1e-3, "save_every": 2}
    (tmp_path / "run.yaml").write_text(json.dumps({**settings, "dequantize": True}))
    assert main(["-c", "run.yaml", "--model-file", "whole.npz", "--export-dir", "whole"]) == 0
    assert "The base is quantized (MLX, affine, 4 bits, groups of 64)" in capsys.readouterr().out
    begin(base, data, "run", **{name: settings[name] for name in ("iters", "save_every", "batch_size")}).run(2)
    shutil.rmtree(base)
    assert main(["--train", "--run-dir", "run", "--resume", "--model-file", "resumed.npz", "--export-dir", "resumed"]) == 0
    assert "dequantized: 'MLX, affine, 4 bits, groups of 64'" in capsys.readouterr().out
    assert same_weights(ft.load_model("resumed"), ft.load_model("whole"))
    assert "MLX, affine, 4 bits" in (tmp_path / "resumed" / "README.md").read_text()
