"""Quantized folders: what `mx.dequantize` and transformers make of them is loaded, a tensor at a time, and saved unquantized."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.errors import ModelError, WeightsError
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.dequantize import dequantized
from fulltune_nb.models.folder import hf_tensors, load_decoder, save_folder
from fulltune_nb.models.model_config import read_config
from nbs_tests.memory_held import memory_held
from nbs_tests.models.parity import corrected, need, need_torch
from nbs_tests.models.quantized_folders import RAW, in_groups, published_mxfp4_folder, quantized_folder

WAYS = [
    *({"bits": bits, "group_size": group} for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)),
    {"mode": "mxfp4"}, {"mode": "mxfp8"}, {"mode": "nvfp4"},
]  # fmt: skip


def assert_loaded(decoder: Decoder, expected: dict[str, mx.array]) -> None:
    """The decoder's tensors are those, bit for bit, in bfloat16."""
    found = hf_tensors(decoder)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == mx.bfloat16 and mx.array_equal(found[name], array).item(), name


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_each_way_of_mlx_becomes_the_numbers_it_stands_for(way, tmp_path):
    folder, expected = quantized_folder(tmp_path / "q", way_of=lambda name: way, said={"bits": 4, "group_size": 64, **way})
    assert_loaded(load_decoder(folder, dequantize=True), expected)


def test_bits_and_groups_may_differ_from_tensor_to_tensor_and_from_what_the_config_says(tmp_path):
    ways = {
        "embed_tokens": {"bits": 8, "group_size": 32},
        "v_proj": {"bits": 6, "group_size": 64},
        "o_proj": None,
        "down_proj": {"mode": "mxfp4"},
    }
    folder, expected = quantized_folder(
        tmp_path / "q", way_of=lambda name: next((way for part, way in ways.items() if part in name), {"bits": 3, "group_size": 64})
    )
    assert_loaded(load_decoder(folder, dequantize=True), expected)


def test_a_dequantized_model_is_saved_as_one_that_never_was_quantized(tmp_path):
    folder, expected = quantized_folder(tmp_path / "q")
    save_folder(tmp_path / "saved", load_decoder(folder, dequantize=True), None)
    assert_loaded(load_decoder(tmp_path / "saved"), expected)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & written.keys() and written["torch_dtype"] == "bfloat16"


def test_the_text_part_of_a_quantized_multimodal_folder_is_loaded(tmp_path):
    folder, expected = quantized_folder(tmp_path / "text", in_groups("gemma3_text"))
    arrays = {f"language_model.{name}": array for name, array in mx.load(str(folder / "model.safetensors")).items()}
    arrays |= dict(zip((f"vision_tower.{part}" for part in ("weight", "scales", "biases")), mx.quantize(mx.ones((4, 64))), strict=True))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    text = json.loads((folder / "config.json").read_text())
    settings = text.pop("quantization")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "quantization": settings}))
    with pytest.warns(UserWarning, match=r"Left aside: vision_tower \(3 tensors\)"):
        assert_loaded(load_decoder(folder, dequantize=True), expected)


def test_the_commands_take_a_quantized_model(tmp_path, tokenizer, capsys, monkeypatch):
    from fulltune_nb.full import main as full
    from fulltune_nb.generate import main as generate

    folder, _ = quantized_folder(tmp_path / "q", {**RAW, "vocab_size": 512})
    tokenizer.save_pretrained(folder)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text('{"text": "the quick brown fox"}\n')
    monkeypatch.chdir(tmp_path)
    told = ["--model", str(folder), "--dequantize"]
    assert full([*told, "--test", "--data", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    assert "Test loss" in printed and "saved as such: --dequantize" in printed
    assert generate([*told, "--prompt", "fox", "--max-tokens", "2"]) == 0
    assert generate([*told[:2], "--prompt", "fox"]) == 2 and "--dequantize" in capsys.readouterr().err


def test_another_dtype_may_be_asked_for(tmp_path):
    folder, _ = quantized_folder(tmp_path / "q")
    assert {array.dtype for array in hf_tensors(load_decoder(folder, "float32", dequantize=True)).values()} == {mx.float32}


def test_an_unquantized_folder_loads_as_without_it(model_folder):
    assert load_decoder(model_folder(), dequantize=True).embed_tokens.weight.dtype == mx.float32


def test_not_more_than_one_tensor_is_in_memory_twice(tmp_path):
    stored, shape, size = {}, (8192, 1024), 8192 * 1024 * 2
    for number in range(3):
        parts = mx.quantize(mx.random.normal(shape, key=mx.random.key(number)).astype(mx.bfloat16), bits=8)
        stored |= dict(zip((f"{number}.weight", f"{number}.scales", f"{number}.biases"), parts, strict=True))
    mx.save_safetensors(str(tmp_path / "q.safetensors"), stored)
    del stored, parts
    lazy = dict(mx.load(str(tmp_path / "q.safetensors")))
    before = memory_held()
    result = dequantized(lazy, {f"{number}.weight": shape for number in range(3)}, mx.bfloat16, "the test")
    assert sum(array.nbytes for array in result.values()) == 3 * size
    assert mx.get_peak_memory() - before < (3 + 1) * size


# ---- against mlx-lm and transformers ------------------------------------------------------------------------------------------------


OF_MLX_LM = ["llama", "mixtral", "qwen2_moe", "olmoe", "granitemoe", "phi3", "gemma3_text", "stablelm", "glm4_moe", "dots1"]


@pytest.mark.parametrize("family", OF_MLX_LM)
def test_folders_that_mlx_lm_converts_are_loaded_as_it_computes_them(family, tmp_path):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    from mlx_lm.utils import dequantize_model, load_model, quantize_model, save_config, save_model

    mx.random.seed(0)
    raw = {**in_groups(family), "rope_scaling": None}  # mlx-lm's glm4_moe asks for the key
    save_folder(tmp_path / "plain", corrected(Decoder(read_config(raw))), None)
    model, config = load_model(tmp_path / "plain")
    mixed = {"bits": 8, "group_size": 64}
    model, config = quantize_model(model, config, 32, 4, quant_predicate=lambda path, _: mixed if "o_proj" in path else True)
    (tmp_path / "q").mkdir()
    save_model(tmp_path / "q", model)
    save_config(config, tmp_path / "q" / "config.json")
    decoder = load_decoder(tmp_path / "q", "float32", dequantize=True)
    ids = mx.array([[5, 3, 9, 9, 1, 44, 12]])
    np.testing.assert_allclose(np.array(decoder(ids)), np.array(dequantize_model(model)(ids)), atol=2e-5)


def test_mxfp4_folders_as_published_and_as_mlx_lm_writes_them_compute_what_transformers_does(tmp_path):
    need_torch()
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    from mlx_lm.utils import load_model, save_config, save_model

    from nbs_tests.models import torch_reference as reference

    raw = in_groups("gpt_oss", num_hidden_layers=2)
    model = reference.build(raw, 0)
    whole = {name: mx.array(array) for name, array in reference.checkpoint(model).items()}
    (published, tensors), of_mlx = published_mxfp4_folder(tmp_path / "published", raw, whole), tmp_path / "mlx"
    theirs, config = load_model(published)
    of_mlx.mkdir()
    save_model(of_mlx, theirs)
    save_config(config, of_mlx / "config.json")
    ours, again = (hf_tensors(load_decoder(folder, dequantize=True)) for folder in (published, of_mlx))
    assert ours.keys() == again.keys() and all(mx.array_equal(array, again[name]).item() for name, array in ours.items())

    save_folder(tmp_path / "saved", load_decoder(published, "float32", dequantize=True), None)
    ids = np.array([[5, 3, 9, 9, 1, 44, 12]])
    found = load_decoder(tmp_path / "saved")(mx.array(ids))
    expected = reference.logits(reference.load(tmp_path / "saved"), ids)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-4)
    blocks = (np.array(tensors[f"model.layers.1.mlp.experts.down_proj_{part}"]) for part in ("blocks", "scales"))
    unpacked = reference.dequantized(*blocks)
    np.testing.assert_array_equal(np.array(ours["model.layers.1.mlp.experts.down_proj"].astype(mx.float32)), unpacked)


# ---- what is refused ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4, "group_size": 64}, r"quantized \(MLX, affine, 4 bits, groups of 64\).*dequantize=True.*--dequantize"),
        ({"quant_method": "mxfp4"}, r"quantized \(MXFP4\).*dequantize=True"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "quantized.*gptq.*Use the original, unquantized checkpoint"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes.*original"),
        ("int4", "int4"),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "in text_config"])
def test_a_quantized_folder_is_refused_by_name_where_it_is_not_asked_to_turn_it_back(settings, message, inside, tmp_path):
    raw = {**RAW, "text_config": {"quantization_config": settings}} if inside else {**RAW, "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=message):
        ft.load_model(tmp_path)
    if "dequantize" not in message:
        with pytest.raises(ModelError, match=message):
            ft.load_model(tmp_path, dequantize=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts | {"weight": parts["weight"][:, :-1]},
        lambda parts: parts | {"scales": parts["scales"][:-1]},
        lambda parts: parts | {"biases": parts["biases"][:, :1]},
        lambda parts: parts | {"weight": parts["weight"].astype(mx.int32)},
        lambda parts: {"weight": parts["weight"], "scales": parts["scales"]},
        lambda parts: parts | {"scales": mx.array(1.0)},
        lambda parts: parts | {"scales": parts["scales"][:, :0], "biases": parts["biases"][:, :0]},
    ],
    ids=["a column less", "a row of scales less", "biases of another shape", "signed", "no biases", "one scale", "no scales"],
)
def test_parts_that_fit_no_quantization_are_refused_with_their_shapes(change):
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(mx.ones((4, 128)), bits=4), strict=True))
    with pytest.raises(WeightsError, match=r"there: a.weight should be of shape \(4, 128\), and its parts \(\("):
        dequantized({f"a.{name}": part for name, part in change(parts).items()}, {"a.weight": (4, 128)}, mx.bfloat16, "there")


@pytest.mark.parametrize("shape", [(2, 64, 4, 16), (2, 64, 64), (2, 64, 4, 0), ()], ids=str)
def test_blocks_of_another_shape_are_refused(shape):
    arrays = {"x_blocks": mx.zeros(shape, mx.uint8), "x_scales": mx.zeros((2, 64, 4), mx.uint8)}
    with pytest.raises(WeightsError, match="x should be of shape"):
        dequantized(arrays, {"x": (2, 96, 64)}, mx.bfloat16, "there")


def test_a_quantized_tensor_that_the_model_does_not_have_is_refused():
    parts = dict(zip(("x.weight", "x.scales", "x.biases"), mx.quantize(mx.ones((4, 128))), strict=True))
    with pytest.raises(WeightsError, match=r"x.weight is quantized, and the model .* has no such tensor"):
        dequantized(parts, {}, mx.bfloat16, "there")
