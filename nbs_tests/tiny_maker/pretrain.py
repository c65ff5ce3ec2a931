"""Builds the tiny base model: `python -m nbs_tests.tiny_maker.pretrain OUT`, from the checkout.

Seeded from end to end: generated text, tokenizer, first weights, order of the data. On one machine with one number of threads the
same command gives the same model. Written by the package's own `Trainer`, in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import mlx.core as mx

import fulltune_nb as ft
from fulltune_nb.tiny.text import documents
from nbs_tests.tiny_maker.tokenizer import build_tokenizer

DOCUMENTS = 80000
HELD_OUT_DOCUMENTS = 500


def model_config(tokenizer) -> dict:
    """The Llama shape, as config.json holds it: 1.15M parameters, of which 0.16M are the tied embedding."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 512,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def pretraining_data(tokenizer, number: int = DOCUMENTS):
    """The generated text as a data set; its valid and test splits are documents of other seeds."""
    splits = {"train": (0, number), "valid": (1, HELD_OUT_DOCUMENTS), "test": (2, HELD_OUT_DOCUMENTS)}
    rows = {name: [{"text": text} for text in documents(seed, size)] for name, (seed, size) in splits.items()}
    return ft.load_data(rows, tokenizer, max_seq_length=128)


def pretrain(config: ft.TrainConfig, number: int = DOCUMENTS) -> ft.Trainer:
    """A trainer over the generated text, from random weights, not yet run."""
    tokenizer = build_tokenizer()
    lm = ft.LanguageModel.from_config(model_config(tokenizer), tokenizer, seed=config.seed)
    lm.generation_config = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return ft.Trainer(lm, pretraining_data(tokenizer, number), config)


SETTINGS = ft.TrainConfig(
    batch_size=32,
    iters=5000,
    learning_rate=2e-3,
    lr_schedule="cosine",
    warmup=100,
    optimizer_config={"betas": [0.9, 0.98]},
    max_grad_norm=1.0,
    max_seq_length=128,
    steps_per_report=100,
    steps_per_eval=1000,
    val_batches=-1,
)


def main() -> None:
    """Pretrains and saves the base; prints its size first and, as JSON, its test loss at the end."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny base model on generated text. Takes about a quarter of an hour.")
    parser.add_argument("out", type=Path, help="new or empty folder for the model")
    parser.add_argument("--iters", type=int, default=SETTINGS.iters)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    arguments = parser.parse_args()
    started = time.perf_counter()
    trainer = pretrain(SETTINGS.replace(iters=arguments.iters), arguments.documents)
    print(f"{trainer.lm.num_parameters} parameters, {len(trainer.data.train)} documents, {trainer.data.train.lengths.sum()} tokens")
    trainer.run()
    report = trainer.evaluate("test")
    trainer.lm.model.set_dtype(mx.bfloat16)
    trainer.lm.save(arguments.out)
    result = {"loss": round(report.loss, 4), "perplexity": round(report.perplexity, 3), "seconds": round(time.perf_counter() - started)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
