"""Kernels that a compiled step's loss and gradients take on a GPU, beside mlx-lm's: counted in the graphs, `nbs_tests/kernel_counts.py`."""

import importlib
import shutil
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.layers import Scoring, added_to_scores, attend
from fulltune_nb.models.model_config import read_config
from fulltune_nb.training import engine
from fulltune_nb.training.gradients import norm_of
from nbs_tests.gpu_like import gpu_like
from nbs_tests.graph_traffic import traffic
from nbs_tests.kernel_counts import as_on_gpu, kernels
from nbs_tests.memory_held import memory_held
from nbs_tests.models.parity import need
from nbs_tests.training.conftest import random_batch

ROWS, TOKENS = 4, 64
SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
}  # fmt: skip
GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
CASES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", **GELU},
    "mixtral": {
        "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip


def of_ours(model: Decoder) -> int:
    with mock.patch.object(engine, "evaluate") as evaluate, mock.patch.object(engine, "WholeGradients"):
        engine.WholeGraph(model, compiled=True).gradients(1, [random_batch(SHAPE["vocab_size"], ROWS, TOKENS, 1)])
    loss, gradients = evaluate.call_args.args
    return kernels(loss, *gradients.values()).total()


def of_mlx_lm(case: dict, dtype: mx.Dtype) -> int:
    from mlx_lm.tuner.trainer import default_loss

    module = importlib.import_module(f"mlx_lm.models.{case['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(SHAPE | case))
    model.set_dtype(dtype)
    own = dict(tree_flatten(model.parameters()))
    mx.eval(own)
    ids = mx.array(np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (ROWS, TOKENS + 1)))

    def step(parameters: dict[str, mx.array], ids: mx.array, lengths: mx.array) -> tuple:
        model.update(tree_unflatten(list(parameters.items())))
        return nn.value_and_grad(model, default_loss)(model, ids, lengths)

    found = mx.compile(step)(own, ids, mx.array([[0, TOKENS]] * ROWS))
    return kernels(*(array for _, array in tree_flatten(found))).total()


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_take_no_more_than_in_mlx_lm(case, dtype):
    need("mlx_lm", "pip install mlx-lm==0.32.2")
    with as_on_gpu():
        model = Decoder(read_config(SHAPE | CASES[case]))
        model.set_dtype(dtype)
        mx.eval(model.parameters())
        ours, theirs = of_ours(model), of_mlx_lm(CASES[case], dtype)
        assert ours <= theirs


def test_norm_takes_few_a_tensor():
    gradients = {str(size): mx.zeros((size, 8), dtype=mx.bfloat16) for size in range(1, 61)}
    mx.eval(gradients)
    with as_on_gpu():
        assert kernels(norm_of(gradients)).total() <= 3 * len(gradients) + 7  # squares, their sums by row and of the rows


@pytest.mark.parametrize("shape", [(512, 256), (65_537, 64), (151_936, 16), (3, 5, 7), (40,)], ids=str)
def test_norm_on_a_gpu_is_exact_but_for_rounding(shape):
    exact = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for dtype, most in ((mx.float32, 3e-6), (mx.bfloat16, 1e-4)):
        gradient = mx.array(exact).astype(dtype)
        reference = np.linalg.norm(np.array(gradient.astype(mx.float32)).astype(np.float64))
        with gpu_like():
            assert norm_of({"": gradient}).item() == pytest.approx(reference, rel=most)


@pytest.mark.skipif(shutil.which("g++") is None, reason="under this emulation MLX compiles for the CPU, with g++")
def test_norm_needs_no_float32_copy_of_all_gradients():
    gradients = {str(i): mx.ones((1024, 1024), dtype=mx.bfloat16) for i in range(64)}
    mx.eval(gradients)
    with gpu_like():
        for _ in range(2):  # the first time it is traced
            before = memory_held()
            assert norm_of(gradients).item() == 2**13
    assert mx.get_peak_memory() - before < 2**20  # squares of all would take 256 MiB


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX shows a graph's shapes to C++ only")
def test_attention_moves_its_scores_fewer_times_than_mlx_does():
    shape, scores = (1, 4, 512, 16), 2 * 4 * 512 * 512  # bytes, in bfloat16
    given = [mx.zeros(shape, dtype=mx.bfloat16) for _ in range(3)]
    slope, causal = mx.zeros((1, 512, 64), dtype=mx.bfloat16), mx.tri(512, dtype=mx.bool_)

    def moved(mask: mx.array) -> float:
        def step(*heads: mx.array) -> tuple:
            return mx.vjp(lambda *heads: attend(*heads, mask, Scoring(0.25)), heads, [slope])

        return sum(size for _, size in traffic(mx.compile(step)(*given), [*given, slope, mask]).values()) / scores

    with as_on_gpu():
        assert moved(added_to_scores(causal, 512, mx.bfloat16)) < 12.5 < 17 < moved(causal)  # 4 times forward, 7 backward, and small ones
