"""Small models and data for the trainer's tests."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.data.batches import Batch
from fulltune_nb.models.model_config import read_config

TINY_LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
}
MECHANISMS = {
    "head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2, "use_sliding_window": True, "max_window_layers": 1, "pad_token_id": 0,
    "num_experts": 3, "num_local_experts": 3, "moe_num_experts": 3, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 2, "moe_k": 2, "n_shared_experts": 1, "moe_num_shared_experts": 1, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "decoder_sparse_step": 2, "residual_multiplier": 0.5, "clip_qkv": 0.5,
}  # fmt: skip
"""Of all families, small: a family reads some."""
OWN_MECHANISMS = "llama mistral gemma2 gemma3_text phi3 olmo3 qwen2_moe glm4_moe ernie4_5_moe granitemoe cohere2 apertus gpt_oss".split()
"""Families that differ most: these are always tried, all the others in CI."""
WORDS = "the quick brown fox jumps over lazy dog rows table city most people answer fine thank you".split()


def make_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Prompt and completion rows of varied lengths."""
    return [
        {
            "prompt": " ".join(WORDS[(i + j) % len(WORDS)] for j in range(2 + i % 7)),
            "completion": " ".join(WORDS[(2 * i + j) % len(WORDS)] for j in range(1 + i % 5)),
        }
        for i in range(start, start + count)
    ]


def family_shape(family: str) -> dict[str, Any]:
    """The `config.json` of a small model with all that the family has and may leave out: two layers, the second one with experts."""
    raw = {**TINY_LLAMA, **MECHANISMS, "model_type": family}
    read = read_config(raw).keys_read
    return {key: value for key, value in raw.items() if key in read or key in TINY_LLAMA}


@pytest.fixture
def make_lm(tokenizer):
    """`make_lm(**changes of config.json)`: a model with the same random weights each time."""
    return lambda **changes: ft.LanguageModel.from_config({**TINY_LLAMA, **changes}, tokenizer, seed=1)


@pytest.fixture
def make_data(tokenizer):
    """`make_data(rows, **load_data settings)`: train, valid and test of completions."""

    def make(rows: int = 10, **settings):
        splits = {"train": make_rows(rows), "valid": make_rows(5, start=100), "test": make_rows(7, start=200)}
        return ft.load_data(splits, tokenizer, **settings)

    return make


@pytest.fixture
def make_trainer(make_lm, make_data):
    """`make_trainer(rows=10, run_dir=None, **TrainConfig settings)`."""

    def make(rows: int = 10, run_dir=None, **settings):
        config = ft.TrainConfig(**{"batch_size": 4, "iters": 8, "learning_rate": 1e-3, "mask_prompt": True, **settings})
        return ft.Trainer(make_lm(), make_data(rows, config=config), config, run_dir)

    return make


def loss_and_gradients(engine, *batches: Batch) -> tuple[float, dict[str, mx.array]]:
    """What an engine of the whole graph computes for a step: its loss, and all gradients by module path."""
    gradients = engine.gradients(1, batches)
    (piece,) = gradients.pieces()
    return gradients.loss, piece.gradients


def random_batch(vocab_size: int, rows: int, length: int, seed: int):
    """Rows of random tokens, about 70% of them with a trained target; (rows, length)."""
    random = np.random.RandomState(seed)
    positions = np.flatnonzero(random.rand(rows * length) < 0.7).astype(np.int32)
    count = len(positions)
    return Batch(
        inputs=random.randint(0, vocab_size, (rows, length)).astype(np.int32),
        target_positions=np.pad(positions, (0, 3)),
        targets=np.pad(random.randint(0, vocab_size, count).astype(np.int32), (0, 3)),
        weights=np.pad(np.ones(count, np.float32), (0, 3)),
        num_tokens=count,
        rows=tuple(range(rows)),
        sources=("",) * rows,
        padded_tokens=rows * length,
        real_tokens=rows * length,
    )
