"""Fuzzing of what reads files from outside, led by coverage: rows, settings, headers of weights. Needs `pip install atheris`.

    python -m nbs_tests.benchmarks.fuzz_readers rows -max_total_time=100         # or: settings, safetensors, npz

What follows the name goes to libFuzzer. Anything but a result or an error of this package is a finding: libFuzzer prints it and keeps the
input as `crash-...` in the present folder. `test_fuzz.py` has the same readers under hypothesis.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fulltune_nb", "yaml", "zipfile"]):  # by themselves: public names load later, and uncounted
    from fulltune_nb.data.read import read_file
    from fulltune_nb.data.rows import row_problem
    from fulltune_nb.data.settings import DataSettings
    from fulltune_nb.errors import FulltuneError
    from fulltune_nb.tensor_files import open_npz, open_safetensors, read_tensors
    from fulltune_nb.training.config import TrainConfig

from nbs_tests.test_fuzz import _good

ROWS = (
    b'{"text": "a"}\n{"prompt": "a", "completion": "b", "tools": []}\n',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null, "tool_calls": [{"function": {}}]}]}\n',
    "\ufeff{}\r\n[1e999, -0.0, \"\\ud800\"]\n".encode(),
)
SETTINGS = (
    b"batch_size: 4\nlr_schedule: {name: cosine_decay, arguments: [1e-5, 100]}\n",
    b"optimizer: adafactor\noptimizer_config: {beta_1: 0.9}\nfreeze: ['*.bias', &a x, *a]\nlr_factors:\n  lm_head: .5\n<<: {iters: 0x10}\n",
    b"--- !!map\n? iters\n: !!int '3'\nepochs: null\nseed: 2001-01-01\n",
)


def rows(path: Path) -> None:
    split = read_file("train", path)
    for _, row in split.rows:
        for format in ("chat", "completions", "text"):
            row_problem(row, format, DataSettings())


def settings(path: Path) -> None:
    config = TrainConfig.from_yaml(path)
    assert TrainConfig.from_dict(config.to_dict()) == config


def safetensors(path: Path) -> None:
    _weights(path, open_safetensors)


def npz(path: Path) -> None:
    _weights(path, open_npz)


def _weights(path: Path, opened: Callable) -> None:
    """What the header promises is never more than the file has, unpacked by at most zip's factor of about 1,000."""
    size = path.stat().st_size
    total = sum(len(chunk) for tensor in opened(path) for chunk in tensor.chunks())
    assert total <= 1100 * size
    assert sum(array.nbytes for array in read_tensors(path).values()) <= 1100 * size


TARGETS = {
    "rows": (rows, "train.jsonl", ROWS),
    "settings": (settings, "config.yaml", SETTINGS),
    "safetensors": (safetensors, "model.safetensors", (_good(".safetensors"),)),
    "npz": (npz, "model.npz", (_good(".npz"),)),
}


def main(name: str, options: list[str]) -> None:
    """Does not return: libFuzzer ends the process."""
    read, file, seeds = TARGETS[name]
    folder = Path(tempfile.mkdtemp(prefix="fulltune-fuzz-"))
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds):
        (corpus / str(number)).write_bytes(seed)

    def one(data: bytes) -> None:
        (folder / file).write_bytes(data)
        try:
            read(folder / file)
        except FulltuneError as error:
            assert file in str(error), error

    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"{__doc__}\nExpected one of {', '.join(TARGETS)}.")
    main(sys.argv[1], sys.argv[2:])
