"""Whether the test perplexity that the command prints is the one `transformers` computes from the exported folder.

    python nbs_tests/benchmarks/wikisql_perplexity.py --data DATA [--iters 60]

DATA is a folder with `train.jsonl`, `valid.jsonl` and `test.jsonl` of `{"text": ...}` rows. The 20M-parameter Llama of
`wikisql_model.py` is trained with `python -m fulltune_nb.full --train --test`; then its exported folder is loaded by
`transformers` on torch and every test row's loss computed there, one row at a time, with no code of this package. Prints both
and their relative difference; exit code 1 when it is above 0.5%.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from wikisql_model import make_model_folder

ALLOWED = 0.005
LINE = re.compile(r"^Test loss (\d+\.\d{3}), Test ppl (\d+\.\d{3})\.$", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--iters", type=int, default=60)
    args = parser.parse_args()
    data = args.data.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_model_folder(data, folder / "model")
        printed = train_and_test(model, data, folder, args.iters)
        exported = folder / "exported"
        loss, tokens = reference_loss(exported, data / "test.jsonl")
    reference = math.exp(loss)
    difference = abs(printed - reference) / reference
    print(f"printed by fulltune_nb.full:  {printed:.3f}")
    print(f"transformers + torch:         {reference:.3f}  (loss {loss:.6f} over {tokens:,} tokens)")
    print(f"relative difference:          {difference:.2e}  (allowed {ALLOWED:g})")
    return int(difference > ALLOWED)


def train_and_test(model: Path, data: Path, folder: Path, iters: int) -> float:
    """Run the command in `folder`; the perplexity it prints."""
    command = [
        sys.executable, "-m", "fulltune_nb.full", "--model", str(model), "--data", str(data), "--train", "--test",
        "--iters", str(iters), "--learning-rate", "3e-4", "--model-file", str(folder / "model.npz"),
        "--export-dir", str(folder / "exported"), "--test-batches", "-1",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    found = LINE.findall(done.stdout)
    if done.returncode or not found:
        sys.exit(f"the command ended with {done.returncode} and printed:\n{done.stdout[-3000:]}")
    return float(found[-1][1])


def reference_loss(folder: Path, rows: Path) -> tuple[float, int]:
    """Mean loss over all target tokens of all rows, and their number."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for line in rows.read_text(encoding="utf-8").splitlines():
            ids = tokenizer.encode(json.loads(line)["text"])
            ids += [] if ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
            tokens += len(ids) - 1
    return total / tokens, tokens


if __name__ == "__main__":
    sys.exit(main())
