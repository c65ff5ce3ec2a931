"""How long a data set of many short rows takes to load, beside `datasets` with the tokenizer alone, and what memory it keeps.

    python nbs_tests/benchmarks/loading_time.py                                   # 1,000,000 rows of either format; 10 minutes and more
    python nbs_tests/benchmarks/loading_time.py --rows 100000 --tokenizer FOLDER --rounds 3

Rows are texts of 8 to 12 words, or prompts and completions of 5 and 6, in a JSON Lines file. `datasets` reads the file with
`load_dataset("json")` and maps the tokenizer (completions: `apply_chat_template`) over batches of 1,000 rows, with nothing else done:
no masks, no checks, its results in a file. Each measurement is a process of its own; ours and theirs take turns. Printed are seconds
by the clock and of all processors, the resident memory of the process at its peak and what the data set keeps of it, in bytes a token,
both above what was there before loading. The last line of each format is the ratio of the medians. Exit code 1 where it is above 1.2.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ALLOWED = 1.2
FORMATS = ("text", "completions")
WORDS = "the of river stone green walk seven house and in a light paper question answer north blue water time people small great".split()
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", default="", help="folder; by default that of the demo's model")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--set", type=json.loads, default={}, help="settings of load_data, as JSON")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # what to measure, and the folder
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one, options.tokenizer, options.set)))
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as place:
        for name in options.formats:
            folder = Path(place, name)
            write_rows(folder, name, options.rows)
            seconds: dict[str, list[float]] = {"fulltune_nb": [], "datasets": []}
            for _ in range(options.rounds):
                for what, times in seconds.items():
                    found = in_a_process(what, folder, options)
                    times.append(found["seconds"])
                    print(f"{name}, {what}: {describe(found)}", flush=True)
            ratio = statistics.median(seconds["fulltune_nb"]) / statistics.median(seconds["datasets"])
            print(f"{name}: {ratio:.2f} times the time of datasets and the tokenizer", flush=True)
            worst = max(worst, ratio)
    return int(worst > ALLOWED)


def describe(found: dict[str, Any]) -> str:
    times = f"{found['seconds']:.1f} s, {found['cpu']:.1f} s of processors, {found['tokens']:,} tokens"
    return f"{times}, peak {found['peak'] / found['tokens']:.1f} bytes a token, kept {found['kept'] / found['tokens']:.1f}"


def write_rows(folder: Path, name: str, rows: int) -> None:
    draw = random.Random(0)
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        for i in range(rows):
            if name == "text":
                row = {"text": " ".join(draw.choices(WORDS, k=draw.randint(7, 11))) + f" {i}."}
            else:
                row = {"prompt": " ".join(draw.choices(WORDS, k=5)) + "?", "completion": " ".join(draw.choices(WORDS, k=5)) + f" {i}."}
            file.write(json.dumps(row) + "\n")


def in_a_process(what: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", what, str(folder), "--tokenizer", options.tokenizer, "--set", json.dumps(options.set)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measured(what: str, folder: str, tokenizer_folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    if not tokenizer_folder:
        from fulltune_nb import tiny

        tokenizer_folder = str(tiny.BASE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = CHATML
    load = {"fulltune_nb": with_ours, "datasets": with_datasets}[what](folder, tokenizer, settings)
    process = psutil.Process()
    before, cpu, start = process.memory_info().rss, sum(process.cpu_times()[:2]), time.monotonic()
    kept, count = load()
    seconds, cpu = time.monotonic() - start, sum(process.cpu_times()[:2]) - cpu
    after = process.memory_info().rss
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return {"seconds": seconds, "cpu": cpu, "tokens": count(kept), "kept": after - before, "peak": peak - before}


def with_ours(folder: str, tokenizer: Any, settings: dict[str, Any]):
    from fulltune_nb.data import load_data

    def load() -> tuple[Any, Callable[[Any], int]]:
        return load_data(folder, tokenizer, **settings), lambda data: data.train.tokens

    return load


def with_datasets(folder: str, tokenizer: Any, settings: dict[str, Any]):
    import datasets

    datasets.disable_progress_bars()
    name = Path(folder).name

    def encode(batch: dict[str, list[Any]]) -> Any:
        if name == "text":
            return tokenizer(batch["text"])
        pairs = zip(batch["prompt"], batch["completion"], strict=True)
        chats = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}] for prompt, answer in pairs]
        return tokenizer.apply_chat_template(chats, return_dict=True)

    def load() -> tuple[Any, Callable[[Any], int]]:
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.load_dataset("json", data_files=f"{folder}/train.jsonl", split="train", cache_dir=cache)
            return rows.map(encode, batched=True), lambda rows: sum(len(ids) for ids in rows.data["input_ids"].to_numpy())

    return load


if __name__ == "__main__":
    sys.exit(main())
