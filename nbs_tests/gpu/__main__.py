"""`python -m nbs_tests.gpu`: the parity tests and the benchmark on this machine's GPU, in one go."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx

from fulltune_nb.models.families import FAMILIES
from nbs_tests.gpu import parity
from nbs_tests.gpu.benchmark import table
from nbs_tests.gpu_like import gpu_like

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> int:
    """Prints what was found; 0 if all tests pass."""
    parser = argparse.ArgumentParser(prog="python -m nbs_tests.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny models, as on a GPU where there is none, no tests: to try the benchmark")
    families = "20 steps of these families (all where none is named) beside the CPU's, as on a GPU where there is none, and nothing else"
    parser.add_argument("--families", nargs="*", metavar="NAME", choices=[*FAMILIES], help=families)
    parser.add_argument("--tflops", type=float, help="what the device's data sheet promises in bfloat16; default: measured with a product")
    parser.add_argument("--out", type=Path, help="a file for the table, besides the terminal")
    options = parser.parse_args(arguments)
    if options.families is not None:
        return print_families(options.families)
    failed = 0
    if not options.dry:
        if not mx.is_available(mx.gpu):
            print("MLX finds no GPU here: nothing was tested or measured. --dry tries the benchmark itself, at tiny sizes.")
            return 0
        failed = subprocess.run([sys.executable, "-m", "pytest", "-q", str(HERE)], check=False).returncode
    lines = []
    with nullcontext() if mx.is_available(mx.gpu) else gpu_like():
        for line in table(options.dry, options.tflops):
            print(line, flush=True)
            lines.append(line)
            if options.out:
                options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return failed


def print_families(families: list[str]) -> int:
    """0 if all are within the limits."""
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # MLX reads it at its first product
    missed = 0
    for line, within in parity.table(families):
        print(line, flush=True)
        missed += not within
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
