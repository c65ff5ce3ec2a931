"""Draws the README's picture from a run of the demo: `python docs/make_images.py DEMO_FOLDER`."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import fulltune_nb as ft


def main(demo_folder: Path) -> None:
    """Loss and memory of the run in `demo_folder`, side by side, as docs/images/quickstart.png; the legends cover nothing."""
    metrics = (demo_folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    history = ft.History.from_jsonable(json.loads(line) for line in metrics)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained", facecolor="white")
    ft.plot_loss(history, left, log=True)
    ft.plot_memory(history, right)
    figure.savefig(Path(__file__).parent / "images" / "quickstart.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
