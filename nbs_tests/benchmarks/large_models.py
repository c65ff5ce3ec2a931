"""Peak memory of a full fine-tuning step of large models with random weights, one process each.

    python nbs_tests/benchmarks/large_models.py llama-1b --optimizer adafactor
    python nbs_tests/benchmarks/large_models.py llama-1b --optimizer adamw8bit
    python nbs_tests/benchmarks/large_models.py mistral-7b --optimizer adafactor --tokens 64      # needs 17 GB of free memory
    python nbs_tests/benchmarks/large_models.py llama-1b --optimizer adafactor adamw8bit --beside VENVS      # 12 GB

Weights are bfloat16, the step is layerwise and updates every weight. Printed as JSON: MLX's peak, the process's peak resident
set, what `preflight` had predicted, seconds a step, and the bytes the usual way needs for the same shape (bfloat16 weights,
gradients and two moments, logits and their gradient in float32).

With `--beside`, PyTorch and mlx-lm train a model of the same shape in the same run, each in a process of its own, in the
environments that `throughput.py --setup` makes in VENVS; then a table of the peaks and their ratios is printed. mlx-lm gets
fewer tokens (`--mlx-lm-tokens`), as MLX computes bfloat16 products at 7 GFLOP/s on a CPU; with all of them its peak would be higher.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fulltune_nb as ft  # isort: skip  # before mlx: it gives it its BLAS
import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from transformers import AutoTokenizer

from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.model_config import read_config

HERE = Path(__file__).resolve().parent
SHAPES = {
    "llama-1b": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        rms_norm_eps=1e-5, num_key_value_heads=8, head_dim=64, rope_theta=500000.0, tie_word_embeddings=True,
        max_position_embeddings=131072,
        rope_scaling=dict(
            rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
        ),
    ),
    "mistral-7b": dict(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        rms_norm_eps=1e-5, num_key_value_heads=8, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False,
        max_position_embeddings=32768,
    ),
    "small": dict(
        model_type="llama", vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        rms_norm_eps=1e-5, num_key_value_heads=2, rope_theta=10000.0, tie_word_embeddings=True, max_position_embeddings=2048,
    ),
}  # fmt: skip
TOKENIZER = Path(ft.__file__).parent / "tiny" / "base"


CONTENDERS = {
    "torch 2.13.0, AdamW": ("trl", "torch_large.py", []),
    "mlx-lm 0.32.2 full (blocks only), AdamW": ("mlx-lm", "mlx_lm_large.py", []),
    "mlx-lm 0.32.2, all weights, AdamW": ("mlx-lm", "mlx_lm_large.py", ["--all"]),
}
"""Name -> environment, script, its options."""
OTHERS_STEPS = 2  # in the second the moments exist from the start; ours are made before the first


def main() -> None:
    args = parse_arguments()
    if args.beside:
        run_beside(args)
    else:
        print(json.dumps(measure(args.shape, args.optimizer[0], args.tokens, args.steps)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--optimizer", nargs="+", default=["adafactor"], help="several with --beside only")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--beside", type=Path, metavar="VENVS", help="folder of the others' virtual environments")
    parser.add_argument("--mlx-lm-tokens", type=int, default=64)
    parser.add_argument("--only", nargs="*", help="of the others, those whose name has one of these words")
    args = parser.parse_args()
    if len(args.optimizer) > 1 and not args.beside:
        parser.error("one optimizer a process; several with --beside")
    return args


def measure(shape: str, optimizer: str, tokens: int, steps: int) -> dict:
    """Some steps in this process."""
    lm = ft.LanguageModel(random_model(SHAPES[shape]), AutoTokenizer.from_pretrained(TOKENIZER))
    config = ft.TrainConfig(
        batch_size=1, iters=steps, optimizer=optimizer, memory="lean", learning_rate=1e-5, val_batches=0, max_seq_length=tokens + 1,
    )  # fmt: skip
    rows = [{"text": f"a row of many words, number {i}: " + "word " * tokens} for i in range(4)]
    data = ft.load_data({"train": rows}, lm.tokenizer, config=config)
    before = fingerprints(lm)
    plan = ft.preflight(lm, data, config)
    trainer = ft.Trainer(lm, data, config)
    started = time.perf_counter()
    reports = list(trainer.steps())
    seconds = (time.perf_counter() - started) / steps
    unchanged = [name for name, value in fingerprints(lm).items() if value == before[name]]
    usual = 8 * lm.num_parameters + 2 * 4 * tokens * lm.config.vocab_size
    peak = max(report.peak_memory for report in reports)
    return {
        "shape": shape, "parameters": lm.num_parameters, "optimizer": optimizer, "tokens": reports[0].tokens,
        "losses": [round(report.loss, 4) for report in reports], "tensors not changed": unchanged,
        "mlx_peak": peak, "peak_rss": peak_rss(), "predicted": plan.peak, "usual": usual, "ratio": round(peak / usual, 3),
        "seconds_a_step": round(seconds, 1),
    }  # fmt: skip


def run_beside(args: argparse.Namespace) -> None:
    """The others and ours, one process after the other; each result as JSON, then the table."""
    ours, others = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (environment, script, options) in CONTENDERS.items():
            if args.only and not any(word in name for word in args.only):
                continue
            python, tokens = args.beside.resolve() / environment / "bin" / "python", args.tokens
            if environment == "mlx-lm":
                tokens = min(tokens, args.mlx_lm_tokens)
            command = [str(python), str(HERE / "contenders" / script), "--shape", json.dumps(SHAPES[args.shape]), "--tokens", str(tokens)]
            command += ["--steps", str(OTHERS_STEPS), "--scratch", scratch, *options]
            result = last_json(name, command)
            others[name] = result | {"tokens": tokens, "seconds_a_step": round(result["seconds"] / OTHERS_STEPS, 1)}
    for optimizer in args.optimizer:
        command = [sys.executable, __file__, args.shape, "--optimizer", optimizer, "--tokens", str(args.tokens)]
        command += ["--steps", str(args.steps)]
        ours[f"fulltune_nb, {optimizer}"] = last_json(f"fulltune_nb, {optimizer}", command, USE_TORCH="0")
    print("\n" + table(ours, others))


def last_json(name: str, command: list[str], **variables: str) -> dict:
    """The JSON object in the last line of what a process prints; the process's failure is this one's."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        sys.exit(f"{name} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    print(json.dumps({"contender": name, **result}), flush=True)
    return result


def table(ours: dict[str, dict], others: dict[str, dict]) -> str:
    """Markdown. Ratios are MLX's peaks where both have one, else ours of MLX to the other's resident set; in brackets RSS to RSS."""
    lines = [
        "| contender | tokens | MLX peak, GB | peak RSS, GB | seconds a step | " + " | ".join(f"{name} is" for name in ours) + " |",
        "|---|---:|---:|---:|---:|" + "---:|" * len(ours),
    ]
    for name, result in {**ours, **others}.items():
        peak = f"{result['mlx_peak'] / 1e9:.2f}" if result["mlx_peak"] else "-"
        theirs = result["mlx_peak"] or result["peak_rss"]
        ratios = [f"{own['mlx_peak'] / theirs:.2f} ({own['peak_rss'] / result['peak_rss']:.2f})" for own in ours.values()]
        if name in ours:
            ratios = [""] * len(ours)
        cells = [name, str(result["tokens"]), peak, f"{result['peak_rss'] / 1e9:.2f}", f"{result['seconds_a_step']}", *ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def random_model(values: dict) -> Decoder:
    """bfloat16 weights, made one tensor at a time so that no float32 copy of the model ever exists."""
    config = read_config(values)
    model = Decoder(config)  # lazy: nothing is allocated yet
    mx.random.seed(0)

    def fill(array: mx.array) -> mx.array:
        made = mx.ones(array.shape, dtype=mx.bfloat16) if array.ndim < 2 else draw(array.shape)
        mx.eval(made)
        return made

    model.update(tree_map(fill, model.parameters()))
    return model


def draw(shape: tuple[int, int]) -> mx.array:
    """Random rows, the same ones again and again: drawing billions of numbers would take minutes and show nothing more."""
    block = (0.02 * mx.random.normal((min(256, shape[0]), shape[1]))).astype(mx.bfloat16)
    return mx.concatenate([block[: min(256, shape[0] - i)] for i in range(0, shape[0], 256)])


def fingerprints(lm: ft.LanguageModel) -> dict[str, int]:
    """A number for each matrix, from its first 2,048 rows (the ids of all tokens seen), that nearly any change changes."""
    matrices = [(name, array) for name, array in tree_flatten(lm.model.parameters()) if array.ndim > 1]
    return {name: mx.view(array[:2048], mx.uint16).astype(mx.uint32).sum().item() for name, array in matrices}


def peak_rss() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
