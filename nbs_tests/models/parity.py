"""Our side of the parity tests: folders to load, loss gradients, greedy decoding, and the comparisons."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import to_hf
from fulltune_nb.models.file_layout import to_file
from fulltune_nb.models.folder import hf_tensors
from fulltune_nb.models.generation import Sampling, decode
from fulltune_nb.models.model_config import read_config
from fulltune_nb.models.parameters import buffers_of, parameters_of, put_parameters
from nbs_tests.models.model_cases import SMALL

LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
RAW = {"model_type": "llama", **SMALL}
TIED = {**RAW, "tie_word_embeddings": True}
EMBEDDING, HEAD, QUERY = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
NO_GRADIENT = 1e-6
"""Below this share of the largest gradient a tensor's gradient is rounding noise (a router that always picks one expert)."""


def need(package: str, install: str) -> None:
    """Skips the test where an optional package is missing; fails it in CI, which must have it."""
    if importlib.util.find_spec(package) is None:
        message = f"{package} is not installed: the comparison with it is not made live. Install with `{install}`."
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(message)
        pytest.skip(message)


def need_torch() -> None:
    """`need`, for torch."""
    need("torch", "pip install torch==2.13.0")


def write_folder(folder: Path, raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A model folder without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


def tensors_of(raw: dict[str, Any] = RAW, seed: int = 0) -> dict[str, np.ndarray]:
    """A whole checkpoint with random weights, under Hugging Face names."""
    mx.random.seed(seed)
    return {name: np.array(array) for name, array in hf_tensors(Decoder(read_config(raw))).items()}


def corrected(decoder: Decoder, seed: int = 0) -> Decoder:
    """With random corrections of its routers, as large as what they correct."""
    shapes, generator = {name: array.shape for name, array in parameters_of(decoder).items()}, np.random.default_rng(seed)
    put_parameters(decoder, {name: mx.array(generator.normal(0, 0.5, shapes[name]), mx.float32) for name in sorted(buffers_of(decoder))})
    return decoder


def dtypes(model: nn.Module) -> set[mx.Dtype]:
    """Of all weights."""
    return {array.dtype for _, array in tree_flatten(model.parameters())}


def relative_error(found: np.ndarray | mx.array, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of the reference, in float64."""
    expected = np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(np.asarray(found, dtype=np.float64) - expected) / np.linalg.norm(expected))


def gradients(decoder: Decoder, ids: np.ndarray, checkpoint: bool) -> dict[str, np.ndarray]:
    """Of the mean next-token cross-entropy, under Hugging Face names."""

    def loss(ids: mx.array) -> mx.array:
        logits = decoder.head(decoder.hidden_states(ids, grad_checkpoint=checkpoint))[:, :-1]
        return nn.losses.cross_entropy(logits, ids[:, 1:], reduction="mean")

    _, found = nn.value_and_grad(decoder, loss)(mx.array(ids))
    named = {to_hf(name, decoder.config.family): array for name, array in tree_flatten(found)}
    return {name: np.array(array) for name, array in to_file(named, decoder.config).items()}


def assert_gradients_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Every tensor within the tolerance, and none missing."""
    assert set(found) == set(expected)
    largest = max(np.linalg.norm(array) for array in expected.values())
    for name, reference in expected.items():
        if np.linalg.norm(reference) <= NO_GRADIENT * largest:
            assert np.linalg.norm(found[name]) <= NO_GRADIENT * largest, name
        else:
            assert relative_error(found[name], reference) < GRADIENT_TOLERANCE, name


def greedy(decoder: Decoder, prompt: np.ndarray, new_tokens: int) -> np.ndarray:
    """Token by token with the cache: (1, T) -> (new_tokens,)."""
    sampling = Sampling(temperature=0.0, max_tokens=new_tokens)
    return np.array([token for (token,) in decode(decoder, prompt.tolist(), sampling, [0])])
