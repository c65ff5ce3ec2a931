"""Exported folders in mlx-lm 0.32.2, which is no dependency: where it is installed, it must compute the same from them.

What mlx-lm itself gets wrong (transformers computes what we do) or does not know is left out: `olmo` (its module ends the process),
sliding windows past the window, clipped or normalised queries and keys, rope scaling for Mixtral, biases of a tied head, and Gemma's
and StarCoder 2's activation (the exact GELU instead of the tanh one that the checkpoints were trained with; hence the wider tolerance
there), the short factors of longrope, GLM's partial rotation, EXAONE 4's pattern of windows as a number, and the correction that
ERNIE 4.5's experts are chosen by.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import FAMILIES
from fulltune_nb.models.folder import save_folder
from fulltune_nb.models.model_config import read_config
from nbs_tests.models.family_parity import mlx_lm_error
from nbs_tests.models.model_cases import LLAMA3, SMALL, random_ids
from nbs_tests.models.parity import need, need_torch, relative_error

OTHER_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}  # in the dialect that mlx-lm does not read
CASES = {
    "llama llama3": {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    "llama linear, biases, tied": {
        "model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6},
    },
    "llama old dialect": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama untied by default": {"model_type": "llama", "head_dim": 10},
    "mistral": {"model_type": "mistral", "sliding_window": 50, **OTHER_THETA},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **OTHER_THETA},
    "mixtral tied": {"model_type": "mixtral", "num_local_experts": 3, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **OTHER_THETA},
    "qwen2 tied, default theta": {"model_type": "qwen2", "tie_word_embeddings": True},
    "phi": {"model_type": "phi", "hidden_size": 32, **OTHER_THETA},
    "phi quarter rotated": {
        "model_type": "phi", "hidden_size": 32, "num_key_value_heads": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    },
    "gemma": {"model_type": "gemma", "head_dim": 12, **OTHER_THETA},
}  # fmt: skip


IS_WRONG = {"olmo", "gemma", "starcoder2", "glm", "exaone4", "ernie4_5_moe"}
"""Families that mlx-lm does not compute as transformers does even where a configuration gives nothing but sizes."""


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in IS_WRONG])
def test_mlx_lm_computes_from_a_saved_folder_what_transformers_does(family):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    need_torch()
    assert (mlx_lm_error(family) or 0.0) < 1e-4


# MLX's CPU backend has the product that mlx-lm's experts use in float32 only.
RUNS = [(case, dtype) for case in CASES for dtype in (mx.float32, mx.bfloat16) if dtype == mx.float32 or "mixtral" not in case]


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_mlx_lm_loads_the_folder_and_computes_the_same(case, dtype, tmp_path):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    from mlx_lm.utils import load_model

    raw = {**SMALL, **CASES[case]}
    mx.random.seed(0)
    decoder = Decoder(read_config(raw))
    decoder.set_dtype(dtype)
    save_folder(tmp_path / "out", decoder, None)
    theirs, _ = load_model(tmp_path / "out")
    ids = mx.array(random_ids(raw, (2, 27), 0))
    ours = np.array(decoder(ids).astype(mx.float32))
    tolerance = {("gemma", mx.float32): 5e-3}.get((raw["model_type"], dtype), 1e-4 if dtype == mx.float32 else 3e-2)
    assert relative_error(theirs(ids).astype(mx.float32), ours) < tolerance
