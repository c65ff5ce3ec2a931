"""Several ranks compute what one process does, bit for bit. Each set of scenarios is run once, by processes of their own."""

import json
import os
import subprocess
import sys

import pytest

from fulltune_nb.training.start_ranks import end_together, environments, kill, start_rank

ONE_BY_ONE = {"grad_accumulation_steps": 5}  # with 27 rows in 14 micro-batches, the last step of an epoch has 4
SMALL_CHUNKS = {"training.loss.CHUNK_ELEMENTS": 2**13, "training.vocabulary.RANGE_ELEMENTS": 2**12, "training.engine.CHUNK_ELEMENTS": 2**13}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
SCENARIOS = {
    "whole": {"settings": {**ONE_BY_ONE, "iters": 5}},
    "whole, clipped, packed": {"settings": {**ONE_BY_ONE, "packing": True, "max_seq_length": 40, "max_grad_norm": 0.5}},
    "whole, by kernels": {"settings": ONE_BY_ONE, "constants": {"cpu.kernels.SMALLEST_MODEL": 0, **SMALL_CHUNKS}},
    "fewer micro-batches than ranks": {"settings": {"grad_accumulation_steps": 1}},
    "layerwise": {"settings": {**ONE_BY_ONE, "iters": 5, "backward": "layerwise", "optimizer": "adafactor"}, "constants": SMALL_CHUNKS},
    "layerwise, clipped, tied": {
        "settings": {**ONE_BY_ONE, "backward": "layerwise", "max_grad_norm": 0.5, "packing": True, "max_seq_length": 40},
        "model": {"tie_word_embeddings": True},
    },
    "experts": {"settings": ONE_BY_ONE, "model": EXPERTS},
    "early stop": {"settings": {**ONE_BY_ONE, "iters": 20, "steps_per_eval": 1, "patience": 2, "learning_rate": 0.3, "val_batches": 2}},
}


def run_ranks(folder, size: int, scenarios: dict, program: str = "nbs_tests.training.rank_program") -> int:
    """Runs a program of the tests on so many ranks; its exit code."""
    folder.mkdir(exist_ok=True)
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    command = [sys.executable, "-m", program, str(folder)]
    if size == 1:
        return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
    ranks = [start_rank("localhost", command, own, stdout=subprocess.DEVNULL) for own in environments(["localhost"] * size)]
    try:
        return end_together(ranks, patience=30)
    finally:
        kill(ranks)


def results_of(folder, rank: int = 0) -> dict:
    return json.loads((folder / f"rank-{rank}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Size -> rank -> what came out."""
    found = {}
    for size in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        assert run_ranks(folder, size, SCENARIOS) == 0
        found[size] = [results_of(folder, rank) for rank in range(size)]
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_together_compute_what_one_process_does(results, name, size):
    alone = results[1][0][name]
    for rank, found in enumerate(results[size]):
        assert found[name] == alone, f"rank {rank}"


def test_a_run_that_stops_early_does_so_in_the_scenario(results):
    assert results[1][0]["early stop"]["done"] and results[1][0]["early stop"]["step"] < 20


def test_the_command_trains_with_all_ranks_and_only_the_first_writes(tmp_path):
    from fulltune_nb import tiny

    tiny.write_text_to_sql(tmp_path / "data", train=32, valid=4, test=4)
    command = [
        sys.executable,
        "-m",
        "fulltune_nb.full",
        "--train",
        "--test",
        "--model",
        str(tiny.BASE_MODEL),
        "--data",
        str(tmp_path / "data"),
    ]
    command += "--batch-size 4 --grad-accumulation-steps 2 --iters 3 --no-export --backward whole".split()

    def start(own, folder):
        out = subprocess.PIPE
        return start_rank(
            "localhost", [*command, "--run-dir", str(tmp_path / folder), "--model-file", str(tmp_path / f"{folder}.npz")], own, stdout=out
        )

    alone = start({}, "alone")
    said_alone = alone.communicate()[0].decode().splitlines()
    ranks = [start(own, "together") for own in environments(["localhost"] * 2)]
    first, second = (rank.communicate()[0].decode() for rank in ranks)
    assert [alone.returncode, *(rank.returncode for rank in ranks)] == [0, 0, 0]
    assert second == "" and first.splitlines()[-1] == said_alone[-1]  # the test's loss
    assert os.listdir(tmp_path / "together") and json.loads((tmp_path / "together" / "result.json").read_text())["steps"] == 3
