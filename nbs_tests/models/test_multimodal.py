"""Multimodal folders: the text part is loaded, what is left aside is told, and a text model is saved."""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.errors import ModelError
from fulltune_nb.models.folder import load_decoder, load_folder_weights, save_folder
from fulltune_nb.models.model_config import read_config
from nbs_tests.models.model_cases import SMALL, random_ids
from nbs_tests.models.parity import need_torch, relative_error, tensors_of, write_folder

TEXT = {**SMALL, "model_type": "llama", "hidden_size": 32}
IDS = random_ids(SMALL, (2, 12), 0)
PREFIXES = {
    "of transformers 4": lambda name: f"language_model.{name}",
    "of transformers 5": lambda name: name if name.startswith("lm_head.") else name.replace("model.", "model.language_model.", 1),
    "of SmolVLM": lambda name: name if name.startswith("lm_head.") else name.replace("model.", "model.text_model.", 1),
}
VISION = {"vision_tower.layer.weight": np.ones((2, 2), np.float32), "vision_tower.bias": np.ones(2, np.float32)}


def folder_of(path, prefix=PREFIXES["of transformers 4"], tensors=None, **changes):
    tensors = tensors_of(TEXT) if tensors is None else tensors
    raw = {"model_type": "llava", "text_config": TEXT, "vision_config": {"model_type": "clip"}, "eos_token_id": 2, **changes}
    return write_folder(path, raw, {**{prefix(name): array for name, array in tensors.items()}, **VISION})


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_the_text_part_is_loaded_and_the_rest_is_told(prefix, tmp_path):
    plain = load_decoder(write_folder(tmp_path / "plain", TEXT, tensors_of(TEXT)))
    with pytest.warns(UserWarning, match=r"multimodal model, llava. Its text part is loaded, as llama.* vision_tower \(2 tensors\)"):
        decoder = load_decoder(folder_of(tmp_path / "whole", prefix))
    assert np.array_equal(decoder(mx.array(IDS)), plain(mx.array(IDS))) and decoder.config.part_of == "llava"


def test_it_is_saved_as_a_text_model_whose_checkpoints_are_read_again(tmp_path):
    with pytest.warns(UserWarning, match="Left aside"):
        decoder = load_decoder(folder_of(tmp_path / "whole"))
    save_folder(tmp_path / "saved", decoder, None)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["eos_token_id"]) == ("llama", ["LlamaForCausalLM"], 2)
    before = np.array(decoder(mx.array(IDS)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_folder_weights(decoder, tmp_path / "saved")
        again = load_decoder(tmp_path / "saved")
    assert np.array_equal(decoder(mx.array(IDS)), before) and np.array_equal(again(mx.array(IDS)), before)


def test_the_tensors_say_whether_the_head_is_tied(tmp_path):
    tensors = {name: array for name, array in tensors_of(TEXT).items() if not name.startswith("lm_head.")}
    with pytest.warns(UserWarning, match="Left aside"):
        assert load_decoder(folder_of(tmp_path, tensors=tensors)).config.tie_word_embeddings


def test_what_the_text_config_leaves_out_is_as_in_transformers():
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}}  # fmt: skip
    config = read_config({"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16"})  # google/gemma-3-4b-it
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert config.tie_word_embeddings and config.raw["torch_dtype"] == "bfloat16" and config.windows[:6] == (1024,) * 5 + (None,)
    assert (config.ropes[0].theta, config.ropes[0].scaling, config.rope.theta, config.rope.scaling) == (1e4, "default", 1e6, "linear")


def test_a_text_part_of_another_family_is_refused():
    with pytest.raises(ModelError, match="model_type is 'qwen2_vl', which is not supported"):
        read_config({"model_type": "qwen2_vl", "text_config": {**TEXT, "model_type": "qwen2_vl_text"}})


@pytest.mark.parametrize(
    ("whole", "text"), [("gemma3", "gemma3_text"), ("mistral3", "mistral"), ("mistral3", "ministral3"), ("llava", "llama")]
)
def test_logits_are_those_of_the_multimodal_model_of_transformers(whole, text, tmp_path):
    need_torch()
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from nbs_tests.models import torch_reference

    kind = {"gemma3": "siglip_vision_model", "mistral3": "pixtral", "llava": "clip_vision_model"}[whole]
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 16) | dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2)
    parts = {
        "text_config": {**TEXT, "model_type": text, "head_dim": 8, "sliding_window": 5},
        "vision_config": {"model_type": kind, **sizes, "image_size": 28, "patch_size": 14},
    }
    config = AutoConfig.for_model(whole, **parts, image_token_index=60, mm_tokens_per_image=4)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "whole")
    ids = IDS % 59  # without the token that stands for an image
    expected = torch_reference.logits(model, ids)
    with pytest.warns(UserWarning, match=f"multimodal model, {whole}"):
        decoder = load_decoder(tmp_path / "whole")
    assert relative_error(decoder(mx.array(ids)), expected) < 1e-5
    save_folder(tmp_path / "saved", decoder, None)
    assert relative_error(torch_reference.logits(torch_reference.load(tmp_path / "saved"), ids), expected) < 1e-5
