"""Small folders as MLX quantizes them and as gpt-oss was published, for tests of what is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.folder import hf_tensors
from fulltune_nb.models.model_config import read_config
from nbs_tests.models.family_cases import plain_case
from nbs_tests.models.model_cases import SMALL

RAW = {"model_type": "llama", **SMALL, "hidden_size": 128, "intermediate_size": 64, "tie_word_embeddings": True}


def exactly(parts: list[mx.array], **way) -> mx.array:
    """What quantized parts stand for, computed in float32 and rounded once to bfloat16."""
    wide = [part if part.dtype in (mx.uint8, mx.uint32) else part.astype(mx.float32) for part in parts]
    return mx.dequantize(*wide, **way, dtype=mx.float32).astype(mx.bfloat16)


def quantized_folder(
    folder: Path, raw: dict[str, Any] = RAW, way_of=lambda name: {"bits": 4, "group_size": 64}, said: dict[str, Any] | None = None
) -> tuple[Path, dict[str, mx.array]]:
    """A folder as MLX writes it, and the tensors it stands for. Norms stay as they are."""
    mx.random.seed(0)
    stored, expected = {}, {}
    for name, array in hf_tensors(Decoder(read_config(raw))).items():
        array = array.astype(mx.bfloat16)
        way = way_of(name) if array.ndim > 1 else None
        if way is None:
            stored[name] = expected[name] = array
            continue
        parts = mx.quantize(array, **way)
        base = name.removesuffix(".weight")
        stored |= dict(zip((f"{base}.weight", f"{base}.scales", f"{base}.biases"), parts, strict=False))
        expected[name] = exactly(parts, **way)
    folder.mkdir()
    settings = said or {"bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps({**raw, "quantization": settings, "quantization_config": settings}))
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    return folder, expected


def in_groups(family: str, **changes) -> dict[str, Any]:
    """A small configuration, as transformers writes it, whose matrices have rows of 64 numbers."""
    from transformers import CONFIG_MAPPING

    raw = plain_case(family)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64)
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    return CONFIG_MAPPING[family](**{**raw, **{key: size for key, size in sizes.items() if key in raw}, **changes}).to_dict()


def published_mxfp4_folder(folder: Path, raw: dict[str, Any], tensors: Mapping[str, mx.array]) -> tuple[Path, dict[str, mx.array]]:
    """A folder of `gpt_oss` as it was published, and what is in its file: experts as random blocks, the rest in bfloat16."""
    random, stored = np.random.default_rng(0), {}
    for name, array in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):  # (E, in, out)
            experts, columns, rows = array.shape
            stored[f"{name}_blocks"] = mx.array(random.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8))
            stored[f"{name}_scales"] = mx.array(random.integers(122, 126, (experts, rows, columns // 32), dtype=np.uint8))
        else:
            stored[name] = array.astype(mx.bfloat16)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": "mxfp4"}}))
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    return folder, stored
