"""What an installed package does alone, away from its checkout. A program, as pytest is not part of the core:

    python nbs_tests/installed.py core       trains, tests, answers and takes a model home, and counts what was installed
    python nbs_tests/installed.py notebook   the same, and the demo
    python nbs_tests/installed.py found      only that the package and its notebooks are found: after --user or --target
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MOST = 40
"""Distributions of the core at most, pip and setuptools aside."""


def fulltune(*words: str, cwd: Path) -> str:
    """What a command prints; ends the program where it fails."""
    done = subprocess.run([sys.executable, "-m", "fulltune_nb", *words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"fulltune {' '.join(words)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check_found() -> None:
    """The package is not that of a checkout, and has its notebooks."""
    import fulltune_nb
    from fulltune_nb.experiments.execution import find_notebook

    folder = Path(fulltune_nb.__file__).resolve().parent
    if (folder.parent / "pyproject.toml").exists():
        raise SystemExit(f"{folder} belongs to a checkout. Start this program from elsewhere, with what is installed.")
    assert find_notebook("00_quickstart.ipynb").parent == folder / "notebooks"
    assert (folder / "py.typed").is_file()


def check_core(work: Path) -> None:
    """The commands, on rows made here and the tiny model that the package has."""
    import fulltune_nb as ft

    rows = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(1, n + 1)))} for n in range(1, 25)]
    for split in ("train", "valid", "test"):
        (work / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--model", str(ft.tiny.BASE_MODEL), "--data", str(work), "--iters", "20", "--learning-rate", "1e-3", "--mask-prompt"]
    last = [fulltune("test", *settings, cwd=work).splitlines()[-1], fulltune("train", "--test", *settings, cwd=work).splitlines()[-1]]
    before, after = (float(line.split()[2].rstrip(",")) for line in last)
    assert after < before, last
    assert fulltune("generate", "--model", "model_hf", "--prompt", "Count to 3.", "--max-tokens", "8", cwd=work).strip()
    fulltune("convert", "model.npz", "model.safetensors", cwd=work)
    fulltune("export", "model_hf", "again", "--to", "hf", cwd=work)
    assert json.loads(fulltune("doctor", "--json", cwd=work))["version"] == ft.__version__
    print(f"test loss {before:.3f} before, {after:.3f} after 20 steps")


def main() -> int:
    """Runs the checks that the argument names."""
    what, started = sys.argv[1], time.monotonic()
    check_found()
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()} - {"pip", "setuptools"}
    if what == "core":
        assert len(installed) <= MOST, sorted(installed)
        assert not installed & {"jupyterlab", "ipykernel", "ipywidgets", "matplotlib", "pandas"}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        if what != "found":
            check_core(work)
        if what == "notebook":
            print(fulltune("demo", "--out", str(work / "demo"), cwd=work))
    print(f"Python {sys.version.split()[0]}, {what}: {len(installed)} distributions, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
