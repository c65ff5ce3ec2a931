"""How long a data set of many short rows takes to load, beside `datasets` with the tokenizer alone, and what memory it keeps.

    python nbs_tests/benchmarks/loading_time.py                                   # 1,000,000 rows of each format; 10 minutes and more
    python nbs_tests/benchmarks/loading_time.py --rows 100000 --tokenizer FOLDER --rounds 3 --formats chat

Rows are texts of 8 to 12 words, prompts and completions of 5 and 6, or chats of one to three questions and answers of 5 to 60 words, half
of them with a system message, in a JSON Lines file; of chats the answers are trained. `datasets` reads the file with
`load_dataset("json")` and maps the tokenizer (`apply_chat_template`) over batches of 1,000 rows, with nothing else done: no masks, no
checks, its results in a file. Each measurement is a process of its own; ours, ours again from the cache, and theirs take turns. Printed
are seconds by the clock and of all processors, the resident memory of the process at its peak and what the data set keeps of it, in bytes
a token and a row, both above what was there before loading. The last line of each format is the ratio of the medians. Exit code 1 where
it is above 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ALLOWED = 1.0
FORMATS = ("text", "completions", "chat")
AGAIN = "fulltune_nb again"
MEMORY = ("peak", "kept")
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
            seconds: dict[str, list[float]] = {"fulltune_nb": [], AGAIN: [], "datasets": []}
            for _ in range(options.rounds):
                shutil.rmtree(folder / "cache", ignore_errors=True)
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
    memory = [f"{what} {found[what] / found['tokens']:.1f} bytes a token, {found[what] / found['rows']:.0f} a row" for what in MEMORY]
    return f"{times}, {', '.join(memory)}, cache {found['cache'] / found['rows']:.0f} bytes a row"


def write_rows(folder: Path, name: str, rows: int) -> None:
    draw = random.Random(0)
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        for i in range(rows):
            if name == "text":
                row = {"text": " ".join(draw.choices(WORDS, k=draw.randint(7, 11))) + f" {i}."}
            elif name == "chat":
                row = {"messages": list(chat(draw, i))}
            else:
                row = {"prompt": " ".join(draw.choices(WORDS, k=5)) + "?", "completion": " ".join(draw.choices(WORDS, k=5)) + f" {i}."}
            file.write(json.dumps(row) + "\n")


def chat(draw: random.Random, i: int) -> Iterator[dict[str, str]]:
    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    if draw.random() < 0.5:
        yield {"role": "system", "content": f"{words(4, 12)}."}
    for _ in range(draw.choice([1, 1, 2, 3])):
        yield {"role": "user", "content": f"{words(5, 30)}?"}
        yield {"role": "assistant", "content": f"{words(5, 60)} {i}."}


def in_a_process(what: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", what, str(folder), "--tokenizer", options.tokenizer, "--set", json.dumps(options.set)]
    environment = {**os.environ, "FULLTUNE_CACHE": str(folder / "cache")}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()[-1])


def measured(what: str, folder: str, tokenizer_folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    if not tokenizer_folder:
        from fulltune_nb import tiny

        tokenizer_folder = str(tiny.BASE_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if Path(folder).name != "chat" or not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    load = {"fulltune_nb": with_ours, AGAIN: with_ours, "datasets": with_datasets}[what](folder, tokenizer, settings)
    process = psutil.Process()
    before, cpu, start = process.memory_info().rss, sum(process.cpu_times()[:2]), time.monotonic()
    kept, count = load()
    seconds, cpu = time.monotonic() - start, sum(process.cpu_times()[:2]) - cpu
    after = process.memory_info().rss
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    cache = sum(file.stat().st_size for file in Path(folder, "cache").glob("*"))
    found = {"tokens": count(kept), "rows": len(getattr(kept, "train", kept)), "kept": after - before, "peak": peak - before}
    return {"seconds": seconds, "cpu": cpu, "cache": cache, **found}


def with_ours(folder: str, tokenizer: Any, settings: dict[str, Any]):
    from fulltune_nb.data import load_data

    if Path(folder).name == "chat":
        settings = {"mask_prompt": True, **settings}

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
        if name == "chat":
            return tokenizer.apply_chat_template(batch["messages"], return_dict=True)
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
