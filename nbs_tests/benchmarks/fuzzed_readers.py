"""Fuzzing of all that reads files from outside: good files are changed at random and read, until the time is over.

    python -m nbs_tests.benchmarks.fuzzed_readers --seconds 120            # each reader so long; or name some: rows config run
    python -m nbs_tests.benchmarks.fuzzed_readers --seconds 600 --seed 7

A finding is anything but a result or an error of this package: another exception, a text that a terminal would act on, more than
`MOST_SECONDS`, or the end of the process, whose address space may grow by `MOST_MEMORY`. The files that led to it are kept and named.
Exit code 1 if there is any.
`test_fuzz.py` has the same readers under hypothesis.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_SECONDS = 30
MOST_MEMORY = 3 * 2**30
ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), 10**9, 2**31, 2**63, 10**30, 10**400, "",
    "x", "1", "true",
    "\x1b[2J\u202e\x00", "\ud800", "é" * 5000, [], {}, [0], [[[]]], {"a": {"b": [1]}}, [True, 1.5, "a", None], ["a"] * 300,
)  # fmt: skip
TEXTS = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"{" * 5000, b"[" * 100_000, b'"', b"9" * 5000, b"\r\n", "\u202e\x1b[2J".encode(),
    b"&a [*a, *a]", b"!!python/name:os",
)  # fmt: skip


# ---- changing


def changed(content: bytes, chance: random.Random) -> bytes:
    """A few changes of what the file says where it is JSON, or of its bytes."""
    for _ in range(chance.choice((1, 1, 2, 4))):
        if chance.random() < 0.7:
            try:
                content = _changed_json(content, chance)
                continue
            except (ValueError, RecursionError):
                pass
        content = _changed_bytes(content, chance)
    return content


def _changed_json(content: bytes, chance: random.Random) -> bytes:
    """One value replaced, taken out or given another name, in the whole or in one of the lines."""
    lines = content.decode("utf-8").split("\n")
    number = None
    try:
        value = json.loads(content)
    except ValueError:
        number = chance.choice([n for n, line in enumerate(lines) if line.strip()] or [0])
        value = json.loads(lines[number])
    places = list(_places(value))
    if not places:
        value = chance.choice(ODD)
    else:
        holder, key = chance.choice(places)
        what = chance.random()
        if what < 0.7:
            holder[key] = chance.choice(ODD)
        elif what < 0.8 and isinstance(holder, dict):
            holder[f"{key}{chance.choice(['_', 's', chr(27)])}"] = holder.pop(key)
        else:
            del holder[key]
    text = json.dumps(value)
    if chance.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + ", " + text[1:]  # every key twice
    lines = [text] if number is None else [*lines[:number], text, *lines[number + 1 :]]
    return "\n".join(lines).encode("utf-8")


def _places(value: Any):
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _changed_bytes(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content) + 1)
    end = min(len(content), place + chance.choice((0, 1, 1, 4, 40, 4000)))
    some = bytes(chance.randrange(256) for _ in range(end - place or 1))
    new = chance.choice((b"", b"", some, some, content[place:end] * 2, *TEXTS))
    if chance.random() < 0.02:
        return content.decode("utf-8", "replace").encode("utf-16")
    return content[:place] + new + content[end:]


# ---- readers: a folder with good files, which of them are changed, and what reads them


def _tokenizer() -> Any:
    from fulltune_nb import tiny
    from fulltune_nb.tokenizer import load_tokenizer

    return load_tokenizer(Path(tiny.BASE_MODEL))


def rows(folder: Path) -> Callable[[Path], None]:
    import fulltune_nb as ft
    from fulltune_nb import tiny

    tokenizer = _tokenizer()
    tiny.write_text_to_sql(folder, train=4, valid=2, test=2)
    (folder / "valid.jsonl").unlink()
    (folder / "valid.csv").write_text('prompt,completion\n"a ""b""\nc",d\ne,f\n')
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, call, {"role": "tool", "content": "1"}]
    row = {"messages": [*turns, {"role": "assistant", "content": "c"}], "tools": [{"type": "function", "function": {"name": "f"}}]}
    (folder / "test.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
    return lambda place: print(ft.load_data(place, tokenizer, mask_prompt=True).show(1), file=_Nowhere())


def settings(folder: Path) -> Callable[[Path], None]:
    import fulltune_nb as ft

    ft.TrainConfig(iters=3, optimizer="adafactor", lr_factors={"*embed*": 0.5}, freeze=("*.bias",)).to_yaml(folder / "config.yaml")
    (folder / "config.json.yaml").write_text(json.dumps(ft.TrainConfig(epochs=2).to_dict()))
    return lambda place: [ft.TrainConfig.from_yaml(path) for path in sorted(place.iterdir())] and None


def weights(folder: Path) -> Callable[[Path], None]:
    import mlx.core as mx

    from fulltune_nb.tensor_files import read_tensors

    arrays = {"a": mx.arange(600, dtype=mx.float32).reshape(20, 30), "b.c": mx.zeros((7,), mx.bfloat16)}
    arrays["d"] = mx.ones((2, 3, 4), mx.float16)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    mx.savez(str(folder / "model.npz"), **{name: array.astype(mx.float32) for name, array in arrays.items()})
    return lambda place: [mx.eval(read_tensors(path)) for path in sorted(place.iterdir())] and None


def model(folder: Path) -> Callable[[Path], None]:
    """The JSON files of a model folder; each model that is loaded answers."""
    import fulltune_nb as ft
    from fulltune_nb.models.language_model import LanguageModel
    from nbs_tests.models.parity import RAW

    tokenizer = _tokenizer()
    chance = random.Random(0)
    raw = {**RAW, "vocab_size": 1280, "num_hidden_layers": 1, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, "head_dim": 8}  # fmt: skip
    lm = LanguageModel.from_config(raw, tokenizer)
    lm.generation_config = {"eos_token_id": [1, 2], "stop_strings": ["x"], "temperature": 0.5}
    lm.save(folder / "x")
    shutil.copytree(folder / "x", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "x")

    def read(place: Path) -> None:
        found = ft.load_model(place)
        print(found, file=_Nowhere())
        (found.chat([{"role": "user", "content": "a"}], max_tokens=2) if chance.random() < 0.5 else found.generate("a b", max_tokens=2))

    return read


def run(folder: Path) -> Callable[[Path], None]:
    """The files of a run: a changed state in a checkpoint has a true checksum half of the time."""
    import fulltune_nb as ft
    from fulltune_nb.files import sha256_of
    from fulltune_nb.models.language_model import LanguageModel
    from nbs_tests.models.parity import RAW

    tokenizer, chance = _tokenizer(), random.Random(0)
    config = ft.TrainConfig(iters=4, batch_size=1, save_every=2, steps_per_eval=2)
    data = ft.load_data({"train": [{"text": "a b c"}] * 3, "valid": [{"text": "d"}]}, tokenizer, config=config)
    lm = LanguageModel.from_config({**RAW, "vocab_size": 1280, "num_hidden_layers": 1}, tokenizer)
    trainer = ft.Trainer(lm, data, config, folder / "run")
    trainer.run(2)
    del trainer
    for path in (folder / "run").iterdir():
        shutil.move(path, folder / path.name)

    def read(place: Path) -> None:
        for manifest in place.glob("checkpoints/*/manifest.json") if chance.random() < 0.5 else ():
            try:
                sums = json.loads(manifest.read_bytes())
                inner = sums.get("files", sums)
                inner.update({name: sha256_of(manifest.parent / name) for name in inner if name.endswith(".json")})
                manifest.write_text(json.dumps(sums))
            except (ValueError, AttributeError, TypeError, OSError):
                pass
        found = ft.Trainer.resume(place, data=data)
        print(found, *found.history.events, file=_Nowhere())

    return read


READERS: dict[str, tuple[Callable[[Path], Callable[[Path], None]], tuple[str, ...]]] = {
    "rows": (rows, ("train.jsonl", "valid.csv", "test.jsonl")),
    "settings": (settings, ("config.yaml", "config.json.yaml")),
    "weights": (weights, ("model.safetensors", "model.npz")),
    "config": (model, ("config.json",)),
    "tokenizer_config": (model, ("tokenizer_config.json",)),
    "generation_config": (model, ("generation_config.json",)),
    "tokenizer": (model, ("tokenizer.json", "chat_template.jinja")),
    "run": (run, ("config.yaml", "*.jsonl", "checkpoints/*/trainer.json", "checkpoints/*/manifest.json")),
}


class _Nowhere:
    """A terminal of which nothing comes but what it is shown: text that it would act on is a finding."""

    def write(self, text: str) -> None:
        assert not ACTS.search(text), f"a terminal would act on {text!r:.300}"


# ---- in a child


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> int:
    """Reads changed files until the time is over; the counts stand on standard output, findings in `folder`."""
    from fulltune_nb.errors import FulltuneError

    make, patterns = READERS[name]
    good, place = folder / "good", folder / "now"
    good.mkdir()
    read = make(good)
    files = [path.relative_to(good) for pattern in patterns for path in sorted(good.glob(pattern))]
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_MEMORY, resource.RLIM_INFINITY))

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"more than {MOST_SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    chance, counts, until, findings = random.Random(seed), Counter(), time.monotonic() + seconds, set()
    while time.monotonic() < until:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place)
        file = chance.choice(files)
        (place / file).write_bytes(changed((good / file).read_bytes(), chance))
        signal.alarm(MOST_SECONDS)
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                read(place)
            assert not any(ACTS.search(str(one.message)) for one in told), [str(one.message) for one in told]
            outcome = "read"
        except FulltuneError as error:
            outcome = "refused"
            if ACTS.search("".join(traceback.format_exception(error))):
                outcome = f"FOUND a terminal would act on {error!r:.200}"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in where if "fulltune_nb" in frame.filename]
            outcome = f"FOUND {type(error).__name__} at {Path(ours[-1].filename).name if ours else '?'}:{ours[-1].lineno if ours else 0}"
            outcome += f", {Path(where[-1].filename).name}:{where[-1].lineno}: {str(error)[:150]!r}"
        finally:
            signal.alarm(0)
        counts[outcome.split(" ")[0]] += 1
        if outcome.startswith("FOUND") and (key := outcome.split(": ")[0]) not in findings:
            findings.add(key)
            kept = folder / f"finding-{len(findings)}"
            shutil.copytree(place, kept)
            print(f"  {outcome}; {file}, kept in {kept}", flush=True)
    print(f"{name}: {sum(counts.values()):,} files in {seconds:g} s: {dict(counts)}", flush=True)
    return 1 if findings else 0


def main() -> int:
    """Each reader in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", choices=[*READERS, []], help="those to fuzz; all by default")
    parser.add_argument("--seconds", type=float, default=120, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_folder:
        return fuzz(options.readers[0], options.seconds, options.seed, options.in_folder)
    failed = []
    for name in options.readers or READERS:
        folder = Path(tempfile.mkdtemp(prefix=f"fuzzed-{name}-"))
        command = [sys.executable, "-m", "nbs_tests.benchmarks.fuzzed_readers", name, "--seconds", str(options.seconds)]
        code = subprocess.run([*command, "--seed", str(options.seed), "--in-folder", str(folder)]).returncode
        if code not in (0, 1):
            print(f"  FOUND the process ended with exit code {code}; what it read last is in {folder / 'now'}")
        if code:
            failed.append(name)
        else:
            shutil.rmtree(folder)
    print(f"{len(failed)} readers with findings: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
