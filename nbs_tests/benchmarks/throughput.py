"""Training speed and memory of this package beside mlx-lm and TRL, in one run.

    python nbs_tests/benchmarks/throughput.py --data DATA --venvs VENVS --setup     # once: makes the others' environments
    python nbs_tests/benchmarks/throughput.py --data DATA --venvs VENVS             # 3 rounds, some minutes

DATA is a folder with `train.jsonl` (and `valid.jsonl`, which mlx-lm insists on) of `{"text": ...}` rows. Run it on an idle
machine, with the Python this package is installed in; making the model needs torch, transformers and tokenizers there.

All train the same 20M-parameter Llama (`wikisql_model.py`) in float32 on the same rows: batch 4, AdamW, one learning rate,
loss on every token, each in its own process, taking turns for several rounds. Counted are tokens that are a trained target
(no padding), from after the warm-up steps on; peak memory is that of the whole process. Every contender runs as it comes:
mlx-lm trains the blocks only (69% of these weights), TRL without gradient checkpointing. Ours are the first steps of a run of the
default length, which the trainer has compiled (`TrainConfig.compile`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from wikisql_model import make_model_folder

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
ENVIRONMENTS = {
    "mlx-lm": ["mlx-lm==0.32.2", "mlx[cpu]==0.32.4", "scipy-openblas32"],
    "trl": ["torch==2.13.0", "trl==1.16.0"],
}


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        name: as shown.
        script: in `contenders/`.
        environment: folder under VENVS; None is this Python's own.
        slow: gets a quarter of the steps.
        variables: added to its environment.
    """

    name: str
    script: str
    environment: str | None = None
    slow: bool = False
    variables: dict[str, str] = field(default_factory=dict)


OURS = "fulltune_nb"
CONTENDERS = (
    Contender(OURS, "ours.py"),
    Contender(f"{OURS}, not compiled", "ours.py", variables={"BENCHMARK_COMPILE": "0"}),
    Contender(f"{OURS}, layerwise", "ours.py", variables={"BENCHMARK_BACKWARD": "layerwise"}),
    Contender(f"{OURS}, layerwise, not compiled", "ours.py", variables={"BENCHMARK_BACKWARD": "layerwise", "BENCHMARK_COMPILE": "0"}),
    Contender("mlx-lm 0.32.2 full, as installed", "mlx_lm_full.py", "mlx-lm", slow=True),
    Contender(
        "mlx-lm 0.32.2 full, our BLAS preloaded", "mlx_lm_full.py", "mlx-lm",
        variables={"BENCHMARK_BLAS": "1", "PYTHONPATH": str(REPOSITORY)},
    ),
    Contender("TRL SFTTrainer, torch 2.13.0", "trl_sft.py", "trl"),
)  # fmt: skip


def main() -> None:
    args = parse_arguments()
    if args.setup:
        set_up(args.venvs)
        return
    args.scratch.mkdir(parents=True, exist_ok=True)
    model = make_model_folder(args.data, args.scratch / "model")
    chosen = [c for c in CONTENDERS if not args.only or any(word in c.name for word in args.only)]
    results: dict[str, list[dict]] = {c.name: [] for c in chosen}
    for round_number in range(args.rounds):
        for contender in chosen:
            result = run(contender, model, args)
            results[contender.name].append(result)
            print(json.dumps({"round": round_number + 1, "contender": contender.name, **result}), flush=True)
    print()
    print(table(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--venvs", type=Path, required=True, help="folder of the others' virtual environments")
    parser.add_argument("--setup", action="store_true", help="make these environments, and do nothing else")
    parser.add_argument("--steps", type=int, default=24, help="measured steps a round (24); a quarter of it for mlx-lm as installed")
    parser.add_argument("--warmup", type=int, default=6, help="steps before (6; 2 for mlx-lm as installed)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of BLAS and OpenMP; all cores when not given")
    parser.add_argument("--only", nargs="*", help="contenders whose name has one of these words")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "fulltune_throughput", help="model and outputs")
    args = parser.parse_args()
    args.data, args.venvs, args.scratch = args.data.resolve(), args.venvs.resolve(), args.scratch.resolve()
    return args


def set_up(folder: Path) -> None:
    for name, packages in ENVIRONMENTS.items():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        subprocess.run([str(folder / name / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages], check=True)


def run(contender: Contender, model: Path, args: argparse.Namespace) -> dict:
    """One contender's result of one round."""
    python = sys.executable if contender.environment is None else str(args.venvs / contender.environment / "bin" / "python")
    steps, warmup = (max(2, args.steps // 4), min(2, args.warmup)) if contender.slow else (args.steps, args.warmup)
    command = [
        python, str(HERE / "contenders" / contender.script), "--model", str(model), "--data", str(args.data),
        "--steps", str(steps), "--warmup", str(warmup), "--batch-size", "4", "--learning-rate", "1e-4",
        "--max-length", "2048", "--scratch", str(args.scratch),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **contender.variables}
    if args.threads:
        environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{contender.name} failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def table(results: dict[str, Sequence[dict]]) -> str:
    """Markdown: the median round's tokens a second, what the rounds were, ratios and peaks."""
    speeds = {name: [r["tokens"] / r["seconds"] for r in rounds] for name, rounds in results.items()}
    ours = statistics.median(speeds[OURS]) if OURS in speeds else None
    columns = ("contender", "trained tokens/s", "rounds", "ours is", "tokens per CPU second", "peak RSS, MB", "MLX peak, MB",
               "tokens a step", "of the matmul rate")  # fmt: skip
    lines = [_row(columns), "|---|---:|---|---:|---:|---:|---:|---:|---:|"]
    for name, rounds in results.items():
        speed = statistics.median(speeds[name])
        mlx_peak = f"{max(r['mlx_peak'] for r in rounds) / 1e6:,.0f}" if rounds[0]["mlx_peak"] else "-"
        per_step = sum(r["tokens"] for r in rounds) / sum(r["steps"] for r in rounds)
        per_cpu = sum(r["tokens"] for r in rounds) / sum(r["cpu_seconds"] for r in rounds)
        shares = [r["share_of_matmul_rate"] for r in rounds if "share_of_matmul_rate" in r]
        cells = (
            name, f"{speed:,.0f}", " ".join(f"{s:,.0f}" for s in speeds[name]), f"{ours / speed:.2f}x" if ours else "-",
            f"{per_cpu:,.0f}", f"{max(r['peak_rss'] for r in rounds) / 1e6:,.0f}", mlx_peak, f"{per_step:.0f}",
            f"{statistics.median(shares):.0%}" if shares else "-",
        )  # fmt: skip
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
