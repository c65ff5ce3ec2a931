"""What the notebooks say in words is what their own numbers show; with three seeds where `NOTEBOOK_SEEDS=3` says so (18 runs, half an
hour on two cores)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import nbformat
import pytest

from fulltune_nb import demo
from nbs_tests.test_notebooks import NOTEBOOKS, read

PLACES = {path.name: path for path in NOTEBOOKS}


def numbers_of(name: str, expression: str, folder, **parameters: object) -> Any:
    """What an expression gives at the notebook's end, after all of its cells were run as they are."""
    notebook = read(PLACES[name])
    code = f"import json, pathlib\n_ = pathlib.Path({str(folder / 'numbers.json')!r}).write_text(json.dumps({expression}))"
    notebook.cells.append(nbformat.v4.new_code_cell(code))
    nbformat.write(notebook, folder / name)
    demo.execute(folder / name, folder / "executed.ipynb", parameters)
    return json.loads((folder / "numbers.json").read_text("utf-8"))


def ends_are_cut(numbers) -> None:
    """02: as many rows lack their end as are cut, a quarter; each fault of the four is found by a row's name."""
    assert numbers["without_end"] == numbers["cut"] > 0.2 * numbers["rows"]
    assert numbers["only_ends"] == [2] and numbers["untrainable"] == [3]


def memory_is_planned(numbers) -> None:
    """04: no plan is more than a fifth too low, and what is said to fit with a fifth to spare does."""
    assert all(predicted > 4 / 5 * peak for predicted, peak in numbers["measured"])
    assert all(predicted < 1.4 * peak for predicted, peak in numbers["measured"])
    assert numbers["fitted"] <= numbers["limit"]


def norms_move_least(numbers) -> None:
    """05: by their size, norms move a tenth as much as matrices in blocks, the embeddings lie between; the base knows the general text."""
    norms, embeddings, matrices = numbers["ratios"]
    assert norms < matrices / 5 and norms < embeddings < matrices
    assert numbers["general"][0] < 5 < numbers["general"][-1]  # perplexity before and after


def everything_wins_and_most_at_first(numbers) -> None:
    """06: on the answers, training on everything is better at first, by a tenth and more, and the two come near each other."""
    (first, all_first), *_, (last, all_last) = numbers
    assert all_first < 0.9 * first
    assert abs(last - all_last) < 0.5 * (first - all_first)


def decay_halves_the_loss(numbers) -> None:
    """07: at a high rate with two rows a step; and of the four rates the third is the best."""
    assert numbers["decay"] < 0.65 * numbers["constant"]
    assert min(numbers["rates"]) == numbers["rates"][2]


def replay_is_what_helps(numbers) -> None:
    """08: half the steps keep hardly more and learn less, a lower rate keeps more and learns less, old rows keep most at hardly a cost."""
    (_, before), (task, old) = numbers["before training"], numbers["no remedy"]
    assert old > before + 1.0
    assert numbers["half the steps"][1] > before + 0.7 * (old - before) and numbers["half the steps"][0] > 2 * task
    assert numbers["a quarter of the rate"][1] < old and numbers["a quarter of the rate"][0] > 2 * task
    assert numbers["10% old rows"][1] < numbers["2% old rows"][1] < before + 0.75 * (old - before)
    assert numbers["10% old rows"][1] < before + 0.3 * (old - before) and numbers["10% old rows"][0] < 1.25 * task


RATIO = """{
    "ratios": [float(np.median([r.update_ratio for r in meter.records if r.step <= iters // 2 and wanted(r.name)])) for wanted in (
        lambda name: "norm" in name, lambda name: "embed" in name, lambda name: "layers" in name and "norm" not in name)],
    "general": [seen.perplexity for seen in forgetting.snapshots],
}"""
CLAIMS: dict[str, tuple[str, dict, Callable]] = {
    "02_look_at_your_data.ipynb": (
        '{"without_end": without_end, "cut": dataset.train.truncated, "rows": len(dataset.train), "only_ends": only_ends,'
        ' "untrainable": broken.train.untrainable.tolist()}',
        {},
        ends_are_cut,
    ),
    "04_memory.ipynb": (
        '{"measured": [(plan.peak, peak) for plan, peak in measured.values()], "fitted": peak, "limit": limit}',
        {},
        memory_is_planned,
    ),
    "05_look_inside.ipynb": (RATIO, {"iters": 60}, norms_move_least),
    "06_loss_and_mask.ipynb": (
        "[(measured[True, step], measured[False, step]) for step in measured_at]",
        {},
        everything_wins_and_most_at_first,
    ),
    "07_learning_rate.ipynb": (
        '{"constant": last(with_schedule["constant"]).loss, "decay": last(with_schedule["warm-up, cosine decay"]).loss,'
        ' "rates": [last(trainer).loss for trainer in runs.values()]}',
        {},
        decay_halves_the_loss,
    ),
    "08_evaluation_and_forgetting.ipynb": ("outcome", {"questions": 6}, replay_is_what_helps),
}


@pytest.mark.ci
@pytest.mark.parametrize("seed", range(int(os.environ.get("NOTEBOOK_SEEDS", 1))))
@pytest.mark.parametrize("name", CLAIMS)
def test_what_a_notebook_says_is_what_its_numbers_show(name, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expression, parameters, holds = CLAIMS[name]
    holds(numbers_of(name, expression, tmp_path, seed=seed, **parameters))
