"""Kernels of a decoded token, counted as on a GPU: no more than mlx-lm 0.32.2 takes from the same folder, where that is installed."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.folder import save_folder
from fulltune_nb.models.generation import Sampler, Sampling
from fulltune_nb.models.kv_cache import make_cache
from fulltune_nb.models.model_config import read_config
from nbs_tests.kernel_counts import as_on_gpu, kernels
from nbs_tests.models.model_cases import SMALL
from nbs_tests.models.parity import need

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="under this emulation MLX compiles for the CPU, with g++")

CASES = {
    "llama": {"model_type": "llama"},
    "llama with biases, tied": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "mistral in its window": {"model_type": "mistral", "sliding_window": 10},
    "phi": {"model_type": "phi", "hidden_size": 32},  # its partial rotation is one kernel too
}
PROMPT = mx.array([list(range(5, 60))])


def decoder_of(case: str) -> Decoder:
    decoder = Decoder(read_config({**SMALL, **CASES[case]}))
    decoder.set_dtype(mx.bfloat16)
    mx.eval(decoder.parameters())
    return decoder


def of_a_token(decoder: Decoder, sampling: Sampling) -> Counter[str]:
    """The second one drawn after a prompt."""
    with as_on_gpu(fused_attention=True):
        cache, sampler = make_cache(decoder.config.windows), Sampler(sampling, [0])
        first = sampler(decoder(PROMPT, cache)[:, -1])
        mx.eval(first, [layer.arrays for layer in cache])
        return kernels(sampler(decoder(first[:, None], cache)[:, -1]))


def of_mlx_lms(folder: Path, sampling: Sampling) -> Counter[str]:
    """As its `generate_step` computes a token."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.sample_utils import make_sampler
    from mlx_lm.utils import load_model

    model, sample = load_model(folder)[0], make_sampler(sampling.temperature)
    cache = make_prompt_cache(model)
    mx.eval(model(PROMPT, cache=cache), [layer.state for layer in cache])
    with as_on_gpu(fused_attention=True):
        logits = model(mx.array([[7]]), cache=cache)[:, -1]
        return kernels(sample(logits - mx.logsumexp(logits, keepdims=True)))


@pytest.mark.parametrize("case", CASES)
def test_a_block_is_its_products_and_norms_two_rotations_attention_an_activation_and_the_cache(case):
    config = read_config({**SMALL, **CASES[case]})
    found = of_a_token(decoder_of(case), Sampling())
    gated, normed = config.mlp != "plain", config.qk_norm != ""
    block = (6 + gated) + (2 - (config.block == "parallel") + 2 * normed) + 2 + 1 + 1 + 2 + 2  # the last two: residuals
    assert found.total() <= config.num_layers * block + 4, found  # embedding, last norm, head, the likeliest


@pytest.mark.ci
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_a_token_takes_no_more_kernels_than_mlx_lms(case, temperature, tmp_path):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    decoder, sampling = decoder_of(case), Sampling(temperature=temperature)
    save_folder(tmp_path / "model", decoder, None)
    ours, theirs = of_a_token(decoder, sampling), of_mlx_lms(tmp_path / "model", sampling)
    assert ours.total() <= theirs.total(), (ours, theirs)
