"""What a checkpoint costs, against writing the same bytes into one file and flushing it to the disk.

    python -m nbs_tests.benchmarks.checkpoint_cost --hidden 512 --layers 8 --rounds 7

The two are measured in turn, which comes first changing from round to round, on the same disk, and the medians compared. Both write
the same bytes from memory. Before each the bytes are written once unmeasured and the file removed, so that both find as much memory
for the system's cache at hand: a virtual machine gives memory that was free for seconds back to its host, and fetching it again took
four times as long as the writing. Each checkpoint is of a new step, and the one before is removed after it, as rotation does. Target:
at most 1.2 times.
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
from fulltune_nb.files import wait_for_removals
from nbs_tests.benchmarks.small_run import CONFIG, WORDS, prepare


def trainer_of(folder: Path, hidden: int, layers: int) -> ft.Trainer:
    """One with AdamW, after a step; its rotation leaves one checkpoint."""
    prepare(folder)
    tokenizer = ft.load_model(folder / "base").tokenizer
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "vocab_size": 8192}
    lm = ft.LanguageModel.from_config({**CONFIG, **sizes}, tokenizer)
    data = ft.load_data({"train": [{"text": " ".join(WORDS)}]}, tokenizer)
    trainer = ft.Trainer(lm, data, ft.TrainConfig(batch_size=1, keep=1), folder / "run")
    trainer.step()
    return trainer


def plain_write(path: Path, files: list[bytes]) -> float:
    """Seconds to write some files' bytes into one new file, flushed."""
    started = time.perf_counter()
    with path.open("wb") as file:
        for content in files:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def checkpoint(trainer: ft.Trainer) -> float:
    """Seconds to save."""
    started = time.perf_counter()
    trainer.save()
    return time.perf_counter() - started


def main(hidden: int, layers: int, rounds: int, place: str | None) -> float:
    """Prints the figures; returns the ratio of the medians."""
    folder = Path(tempfile.mkdtemp(prefix="fulltune-cost-", dir=place))
    try:
        trainer = trainer_of(folder, hidden, layers)
        files = [file.read_bytes() for file in trainer.save().iterdir()]
        size = sum(map(len, files))
        saves, writes = [], []
        for number in range(rounds):
            trainer.step()
            both = [lambda: saves.append(checkpoint(trainer)), lambda: writes.append(plain_write(folder / "plain", files))]
            for measure in both if number % 2 else reversed(both):
                wait_for_removals()
                plain_write(folder / "plain", files)
                measure()
        save, write = statistics.median(saves), statistics.median(writes)
        print(f"{trainer.lm.num_parameters:,} parameters, {size / 2**20:.0f} MiB: checkpoint {save:.3f} s, plain write {write:.3f} s")
        print(f"ratio {save / write:.3f} (saves {min(saves):.3f} to {max(saves):.3f}, writes {min(writes):.3f} to {max(writes):.3f})")
        print(f"rounds: saves {_list(saves)}; writes {_list(writes)}")
        return save / write
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _list(seconds: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--place", help="folder on the disk to be measured; left out, the temporary one")
    arguments = parser.parse_args()
    main(arguments.hidden, arguments.layers, arguments.rounds, arguments.place)
