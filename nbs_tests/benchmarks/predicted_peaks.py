"""What `preflight` counts and measures beside what a run takes at its peak: fixed configurations, and random ones.

    python nbs_tests/benchmarks/predicted_peaks.py                        # the fixed ones
    python nbs_tests/benchmarks/predicted_peaks.py --only layerwise       # those with this in their name
    python nbs_tests/benchmarks/predicted_peaks.py --random 40 --seed 1   # drawn ones, of all the same kinds
    python nbs_tests/benchmarks/predicted_peaks.py --gpu --half           # as on a Mac's GPU (MLX computes on the CPU), in bfloat16

Each takes three steps on random tokens in a process of its own; the run's peak is the largest `StepReport.peak_memory`. Exit code 1 where
less is counted than 90% of it, or more than `MARGIN` (on a GPU 10%) above it, or what `preflight(..., measure=True)` says is 10% off.
Nothing is left out for being small: below a peak of about 10 MB a few arrays of a fixed size (tables of rotations, masks) make up more.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import fulltune_nb as ft  # before mlx: it gives MLX its BLAS

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from fulltune_nb import tiny
from fulltune_nb.data import DataSet, DataSettings, Example, Split
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.model_config import read_config
from fulltune_nb.training.memory import MARGIN
from nbs_tests.gpu_like import gpu_like

TOO_LITTLE, MEASURED_ERROR = 0.10, 0.10
STEPS = 3
Configuration = dict[str, Any]
"""`model`: config.json; `dtype`; `length`: tokens of a row; `share`: part of them that is trained on; the rest are settings."""


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def model(family: str, *sizes: int, **more: Any) -> dict:
    """What a `config.json` holds; sizes in the order of `SIZES`."""
    return {"model_type": family, **dict(zip(SIZES, sizes, strict=True)), "tie_word_embeddings": True, **more}


UNTIED = {"tie_word_embeddings": False}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LEAN, HALF = {"backward": "layerwise"}, {"dtype": "bfloat16"}

FIXED: dict[str, Configuration] = {
    "llama, whole": dict(model=model("llama", 8192, 384, 1024, 6, 6, 6), length=257, batch_size=4),
    "llama, whole, untied, clipped": dict(
        model=model("llama", 4096, 256, 688, 8, 8, 2, **UNTIED), length=513, batch_size=2, max_grad_norm=1.0),
    "llama, whole, long row": dict(model=model("llama", 2048, 256, 704, 4, 4, 4), length=1025, batch_size=1),
    "llama, whole, checkpoint": dict(model=model("llama", 8192, 512, 1408, 8, 8, 8), length=257, batch_size=4, grad_checkpoint=True),
    "llama, whole, large": dict(model=model("llama", 32000, 1024, 2816, 12, 16, 16, **UNTIED), length=65, batch_size=1),
    "llama, whole, tiny": dict(model=model("llama", 1280, 192, 512, 4, 4, 4), length=65, batch_size=4),
    "llama, whole, packed": dict(model=model("llama", 4096, 256, 688, 6, 4, 4), length=512, batch_size=2, packing=True),
    "llama, layerwise": dict(model=model("llama", 8192, 384, 1024, 6, 6, 6), length=257, batch_size=4, **LEAN),
    "llama, layerwise, bfloat16, adafactor": dict(
        model=model("llama", 32000, 768, 2048, 12, 12, 4), length=129, batch_size=2, optimizer="adafactor", **LEAN, **HALF),
    "llama, layerwise, bfloat16, adamw8bit": dict(
        model=model("llama", 65536, 1024, 4096, 10, 16, 4), length=129, batch_size=1, optimizer="adamw8bit", **LEAN, **HALF),
    "llama, layerwise, clipped, lion": dict(
        model=model("llama", 4096, 512, 1408, 6, 8, 8), length=129, batch_size=4, optimizer="lion", max_grad_norm=1.0, **LEAN),
    "mistral, whole, adafactor": dict(
        model=model("mistral", 8192, 512, 1792, 6, 8, 2, **UNTIED), length=257, batch_size=2, optimizer="adafactor"),
    "mistral, whole, window, checkpoint": dict(
        model=model("mistral", 4096, 256, 896, 6, 4, 2, sliding_window=128), length=513, batch_size=2, grad_checkpoint=True),
    "mistral, layerwise, packed, lion8bit": dict(
        model=model("mistral", 8192, 384, 1344, 6, 6, 2), length=257, batch_size=2, packing=True, optimizer="lion8bit", **LEAN),
    "mixtral, whole": dict(model=model("mixtral", 4096, 256, 512, 4, 4, 2, **UNTIED, **EXPERTS), length=129, batch_size=4),
    "mixtral, whole, checkpoint": dict(
        model=model("mixtral", 4096, 256, 512, 4, 4, 2, **UNTIED, **EXPERTS), length=257, batch_size=2, grad_checkpoint=True),
    "gemma2, whole": dict(model=model("gemma2", 4096, 256, 896, 6, 4, 2, head_dim=64), length=257, batch_size=2),
    "gemma2, layerwise": dict(model=model("gemma2", 4096, 256, 896, 6, 4, 2, head_dim=64), length=257, batch_size=2, **LEAN),
    "phi3, whole": dict(model=model("phi3", 4096, 256, 704, 6, 4, 2), length=257, batch_size=2),
    "qwen2_moe, whole": dict(
        model=model("qwen2_moe", 4096, 256, 512, 4, 4, 2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256,
                    shared_expert_intermediate_size=512), length=129, batch_size=4),
    "qwen2_moe, layerwise": dict(
        model=model("qwen2_moe", 4096, 256, 512, 4, 4, 2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256,
                    shared_expert_intermediate_size=512), length=129, batch_size=4, **LEAN),
    "gpt_oss, layerwise": dict(model=model("gpt_oss", 4096, 256, 512, 4, 4, 2, **UNTIED, **EXPERTS), length=129, batch_size=4, **LEAN),
    "mixtral, layerwise, bfloat16": dict(
        model=model("mixtral", 8192, 384, 896, 6, 6, 2, **UNTIED, **EXPERTS),
        length=257, batch_size=2, optimizer="adafactor", **LEAN, **HALF),
    "qwen2, whole, accumulated": dict(
        model=model("qwen2", 16384, 448, 1216, 6, 7, 1), length=129, batch_size=4, grad_accumulation_steps=2),
    "qwen2, layerwise, accumulated": dict(
        model=model("qwen2", 16384, 448, 1216, 6, 7, 1), length=129, batch_size=4, grad_accumulation_steps=3, **LEAN),
    "gemma, whole, sgd": dict(model=model("gemma", 16384, 256, 1024, 4, 4, 1, head_dim=128), length=257, batch_size=2, optimizer="sgd"),
    "gemma, layerwise, bfloat16": dict(
        model=model("gemma", 32768, 384, 1536, 6, 4, 1, head_dim=128), length=129, batch_size=4, optimizer="adamw8bit", **LEAN, **HALF),
    "phi, whole": dict(model=model("phi", 8192, 384, 1536, 6, 6, 6, **UNTIED), length=257, batch_size=2),
    "phi, whole, checkpoint, bfloat16": dict(
        model=model("phi", 8192, 512, 2048, 6, 8, 8, **UNTIED), length=257, batch_size=4, grad_checkpoint=True, **HALF),
    "phi, layerwise": dict(model=model("phi", 8192, 512, 2048, 6, 8, 8, **UNTIED), length=257, batch_size=4, **LEAN),
    "olmo, whole, adamw8bit": dict(model=model("olmo", 8192, 384, 1024, 6, 6, 6), length=257, batch_size=4, optimizer="adamw8bit"),
    "olmo, whole, bfloat16": dict(model=model("olmo", 8192, 512, 1408, 8, 8, 8, **UNTIED), length=129, batch_size=4, **HALF),
    "olmo, layerwise, many rows": dict(model=model("olmo", 4096, 256, 704, 6, 4, 4, **UNTIED), length=129, batch_size=8, **LEAN),
    "llama, whole, prompts masked": dict(model=model("llama", 8192, 384, 1024, 6, 6, 6), length=257, batch_size=4, share=0.3),
}  # fmt: skip


def drawn(count: int, seed: int) -> Iterator[tuple[str, Configuration]]:
    """Random configurations of about 1 to 200 million parameters, of at most some seconds each."""
    chance = random.Random(seed)
    families = ("llama", "mistral", "mixtral", "qwen2", "gemma", "phi", "olmo")
    done = 0
    while done < count:
        family, head_dim = chance.choice(families), chance.choice((32, 64, 64, 128))
        heads = chance.choice((2, 3, 4, 6, 8, 12, 16))
        hidden = head_dim * heads
        kv = chance.choice([k for k in range(1, heads + 1) if heads % k == 0]) if family not in ("phi", "olmo") else heads
        intermediate = 32 * round(hidden * chance.uniform(1.5, 5) / 32)
        vocab = chance.choice((1024, 2048, 4096, 8192, 16384, 32768, 65536))
        shape = model(family, vocab, hidden, intermediate, chance.randint(2, 12), heads, kv)
        shape["tie_word_embeddings"] = chance.random() < 0.5
        if family == "gemma":
            shape["head_dim"] = head_dim * chance.choice((1, 2))
        if family == "mixtral":
            shape |= {"num_local_experts": chance.choice((2, 4, 8)), "num_experts_per_tok": chance.choice((1, 2))}
        configuration: Configuration = {
            "model": shape, "batch_size": chance.randint(1, 8),
            "length": 1 + chance.choice((32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)),
            "optimizer": chance.choice(("adamw", "adamw", "adamw8bit", "adafactor", "lion", "lion8bit", "sgd")),
            "dtype": chance.choice(("float32", "float32", "bfloat16")), "backward": chance.choice(("whole", "layerwise")),
            "share": chance.choice((1.0, 1.0, 0.5, 0.2)),
        }  # fmt: skip
        for setting, value in {"max_grad_norm": 1.0, "grad_accumulation_steps": 2, "packing": True}.items():
            if chance.random() < 0.2:
                configuration[setting] = value
        if configuration["backward"] == "whole" and chance.random() < 0.35:
            configuration["grad_checkpoint"] = True
        if _cheap(configuration):
            done += 1
            yield f"{seed}-{done} {words(configuration)}", configuration


def _cheap(configuration: Configuration) -> bool:
    """At most 200 million parameters, about 4e11 operations a step."""
    size, layers = _parameters(configuration["model"]), configuration["model"]["num_hidden_layers"]
    positions = configuration["batch_size"] * (configuration["length"] - 1)
    operations = 6 * size * positions * configuration.get("grad_accumulation_steps", 1)
    scores = layers * configuration["model"]["num_attention_heads"] * positions * configuration["length"]
    return 10**6 < size < 2e8 and operations < 4e11 and scores < 2e8


def _parameters(shape: dict) -> int:
    return sum(np.prod(array.shape, dtype=int) for array in _arrays(Decoder(read_config(shape))))


def _arrays(model: Decoder) -> list[mx.array]:
    return [array for _, array in tree_flatten(model.parameters())]


def words(configuration: Configuration) -> str:
    """A configuration in words."""
    shape = configuration["model"]
    sizes = f"V{shape['vocab_size']} D{shape['hidden_size']} I{shape['intermediate_size']} L{shape['num_hidden_layers']}"
    sizes += f" H{shape['num_attention_heads']}/{shape['num_key_value_heads']} {configuration['batch_size']}x{configuration['length'] - 1}"
    settings = [str(value) if isinstance(value, str) else key for key, value in configuration.items() if key in _SHOWN and value]
    return f"{shape['model_type']} {sizes} {' '.join(settings)}"


_SHOWN = ("optimizer", "dtype", "backward", "packing", "grad_checkpoint", "max_grad_norm", "grad_accumulation_steps")


def measure(configuration: Configuration) -> tuple[int, int, int, int, str]:
    """Parameters; the peak as counted, as measured by `preflight` and of a run, in bytes; and the moment that was counted to be largest."""
    given = dict(configuration)
    shape, dtype, length, share = given.pop("model"), given.pop("dtype", "float32"), given.pop("length"), given.pop("share", 1.0)
    config = ft.TrainConfig(**{"batch_size": 4, "iters": STEPS, "val_batches": 0, "max_seq_length": length, **given})
    data = DataSet({"train": random_split(config, shape["vocab_size"], share)}, DataSettings(max_seq_length=length), None, [], None)
    mx.random.seed(0)
    decoder = Decoder(read_config(shape))
    decoder.set_dtype(getattr(mx, dtype))
    mx.eval(decoder.parameters())
    lm = ft.LanguageModel(decoder, ft.load_model(tiny.BASE_MODEL).tokenizer)
    outside = mx.get_active_memory() - sum(array.nbytes for array in _arrays(decoder))
    counted, measured = ft.preflight(lm, data, config), ft.preflight(lm, data, config, measure=True)
    reports = list(ft.Trainer(lm, data, config, force=True).steps())
    return lm.num_parameters, counted.peak, measured.peak, max(report.peak_memory for report in reports) - outside, counted.moment


def random_split(config: ft.TrainConfig, vocab: int, share: float) -> Split:
    """Rows of random tokens, of one length, or with packing of many; the last part of each is trained on."""
    chance = np.random.RandomState(0)
    rows = config.batch_size * config.grad_accumulation_steps * STEPS
    lengths = [config.max_seq_length] * rows
    if config.packing:
        lengths = chance.randint(8, config.max_seq_length, 4 * rows).tolist()
    examples = []
    for i, length in enumerate(lengths, 1):
        mask = np.arange(length) >= length - max(1, round(share * (length - 1)))
        examples.append(Example(chance.randint(3, vocab, length).astype(np.int32), mask, "", f"train.jsonl:{i}", 0, {}))
    return Split("train", "text", examples)


def in_own_process(configuration: Configuration, gpu: bool) -> tuple[int, int, int, int, str]:
    command = [sys.executable, __file__, "--one", json.dumps(configuration), *["--gpu"] * gpu]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{configuration} failed:\n{done.stderr[-2000:]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="fixed configurations with this in their name")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="so many drawn configurations instead")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn ones")
    parser.add_argument("--gpu", action="store_true", help="the package believes in a Mac's GPU")
    parser.add_argument("--half", action="store_true", help="weights in bfloat16")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        with gpu_like(2**40) if args.gpu else nullcontext():
            print(json.dumps(measure(args.one)))
        return 0
    chosen = drawn(args.random, args.seed) if args.random else ((name, c) for name, c in FIXED.items() if args.only in name)
    counted_errors, measured_errors, far = [], [], 0
    print("| configuration | parameters, M | counted, MB | error | measured, MB | error | of the run, MB | moment |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for name, configuration in chosen:
        configuration |= HALF if args.half else {}
        size, counted, measured, peak, moment = in_own_process(configuration, args.gpu)
        error, other = counted / peak - 1, measured / peak - 1
        counted_errors.append(error)
        measured_errors.append(other)
        beyond = not -TOO_LITTLE <= error <= (TOO_LITTLE if args.gpu else MARGIN) or abs(other) > MEASURED_ERROR
        far += beyond
        size, counted, measured, peak = (f"{figure / 1e6:.1f}" for figure in (size, counted, measured, peak))
        marked = " **" * beyond
        print(f"| {name} | {size} | {counted} | {error:+.1%} | {measured} | {other:+.1%} | {peak}{marked} | {moment} |", flush=True)
    for what, errors in (("counted", counted_errors), ("measured", measured_errors)):
        print(f"\n{what}: from {min(errors):+.1%} to {max(errors):+.1%}, {np.mean(errors):+.1%} in the mean of {len(errors)}")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
