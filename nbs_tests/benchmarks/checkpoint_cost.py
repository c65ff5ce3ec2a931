"""What a checkpoint costs, against writing the same bytes into one file and flushing it to the disk.

    python -m nbs_tests.benchmarks.checkpoint_cost --hidden 512 --layers 8 --rounds 7

The two are measured in turn, on the same disk, and the medians compared. Target: at most 1.2 times. Each checkpoint is of a new step,
and none is removed meanwhile; what it takes to remove one, as rotation does, stands beside.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import fulltune_nb as ft  # before mlx: it gives it its BLAS
from fulltune_nb.files import remove_folder
from nbs_tests.benchmarks.small_run import CONFIG, WORDS, prepare


def trainer_of(folder: Path, hidden: int, layers: int, keep: int) -> ft.Trainer:
    """One with AdamW, after a step; its rotation leaves `keep` checkpoints."""
    prepare(folder)
    tokenizer = ft.load_model(folder / "base").tokenizer
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "vocab_size": 8192}
    lm = ft.LanguageModel.from_config({**CONFIG, **sizes}, tokenizer)
    data = ft.load_data({"train": [{"text": " ".join(WORDS)}]}, tokenizer)
    trainer = ft.Trainer(lm, data, ft.TrainConfig(batch_size=1, keep=keep), folder / "run")
    trainer.step()
    return trainer


def plain_write(path: Path, size: int) -> float:
    """Seconds to write `size` bytes into a new file, flushed."""
    block = memoryview(os.urandom(2**23))
    started = time.perf_counter()
    with path.open("wb") as file:
        for begin in range(0, size, len(block)):
            file.write(block[: size - begin])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def main(hidden: int, layers: int, rounds: int, place: str | None) -> float:
    """Prints the figures; returns the ratio of the medians."""
    folder = Path(tempfile.mkdtemp(prefix="fulltune-cost-", dir=place))
    try:
        trainer = trainer_of(folder, hidden, layers, keep=rounds + 1)  # and the one of step 0
        saves, writes, removals = [], [], []
        for _ in range(rounds):
            trainer.step()
            started = time.perf_counter()
            path = trainer.save()
            saves.append(time.perf_counter() - started)
            size = sum(file.stat().st_size for file in path.iterdir())
            writes.append(plain_write(folder / "plain", size))
        for path in sorted((folder / "run" / "checkpoints").iterdir()):
            started = time.perf_counter()
            remove_folder(path)
            removals.append(time.perf_counter() - started)
        save, write = statistics.median(saves), statistics.median(writes)
        print(f"{trainer.lm.num_parameters:,} parameters, {size / 2**20:.0f} MiB: checkpoint {save:.3f} s, plain write {write:.3f} s")
        print(f"ratio {save / write:.3f} (saves {min(saves):.3f} to {max(saves):.3f}, writes {min(writes):.3f} to {max(writes):.3f})")
        print(f"removing one: {statistics.median(removals):.3f} s")
        return save / write
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--place", help="folder on the disk to be measured; left out, the temporary one")
    arguments = parser.parse_args()
    main(arguments.hidden, arguments.layers, arguments.rounds, arguments.place)
