"""Several ranks compute what one process does, bit for bit. Each set of scenarios is run once, by processes of their own."""

import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.models.embedding import EMBEDDING
from fulltune_nb.models.parameters import parameters_of
from fulltune_nb.training.rank_channel import RankChannel
from fulltune_nb.training.start_ranks import end_together, environments, kill, start_rank
from fulltune_nb.training.together import Together

ONE_BY_ONE = {"grad_accumulation_steps": 5}  # with 27 rows in 14 micro-batches, the last step of an epoch has 4
SMALL_CHUNKS = {"training.loss.CHUNK_ELEMENTS": 2**13, "training.vocabulary.RANGE_ELEMENTS": 2**12, "training.engine.CHUNK_ELEMENTS": 2**13}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
SIZES = [2, pytest.param(3, marks=pytest.mark.ci)]
SCENARIOS = {
    "whole": {"settings": {**ONE_BY_ONE, "iters": 5}},
    "whole, clipped, packed": {"settings": {**ONE_BY_ONE, "packing": True, "max_seq_length": 40, "max_grad_norm": 0.5}},
    "whole, by kernels": {"settings": ONE_BY_ONE, "constants": {"cpu.kernels.SMALLEST_MODEL": 0, **SMALL_CHUNKS}},
    "whole, shared out": {"settings": {**ONE_BY_ONE, "shard_optimizer": True}},
    "layerwise, shared out": {
        "settings": {**ONE_BY_ONE, "backward": "layerwise", "optimizer": "adafactor", "shard_optimizer": True, "max_grad_norm": 0.5},
        "constants": SMALL_CHUNKS,
    },
    "fewer micro-batches than ranks": {"settings": {"grad_accumulation_steps": 1}},
    "layerwise": {"settings": {**ONE_BY_ONE, "iters": 5, "backward": "layerwise", "optimizer": "adafactor"}, "constants": SMALL_CHUNKS},
    "layerwise, clipped, tied": {
        "settings": {**ONE_BY_ONE, "backward": "layerwise", "max_grad_norm": 0.5, "packing": True, "max_seq_length": 40},
        "model": {"tie_word_embeddings": True},
    },
    "experts": {"settings": ONE_BY_ONE, "model": EXPERTS},
    "smoothed, averaged": {"settings": {**ONE_BY_ONE, "label_smoothing": 0.1, "ema_decay": 0.8, "steps_per_eval": 2}},
    "calls within a loop": {"settings": ONE_BY_ONE, "loop": True},
    "goes back": {"settings": ONE_BY_ONE, "back": True},
    "a second trainer goes on": {"settings": {**ONE_BY_ONE, "shard_optimizer": True}, "run_dir": "again", "again": True},
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
        return end_together(ranks)
    finally:
        kill(ranks)


def results_of(folder, rank: int = 0) -> dict:
    return json.loads((folder / f"rank-{rank}.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """`results(size)`: what came out on each rank; so many are started when it is first asked for."""

    @functools.cache
    def found(size: int) -> list[dict]:
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        assert run_ranks(folder, size, SCENARIOS) == 0
        return [results_of(folder, rank) for rank in range(size)]

    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_together_compute_what_one_process_does(results, name, size):
    assert_as_one_process(results, name, size)
    assert results(1)[0][name]["optimizer"] != results(size)[1][name]["optimizer"]  # which is there on rank 0 only


def assert_as_one_process(results: Callable[[int], list], name: str, size: int) -> None:
    """Each of so many ranks has what one process alone has; the optimizer's state, where it is shared out, is on rank 0 only."""
    alone = same(results(1)[0][name])
    assert same(results(size)[0][name]) == alone
    for rank in range(1, size):
        assert same(results(size)[rank][name]) | {"optimizer": alone["optimizer"]} == alone, f"rank {rank}"


def same(result: dict) -> dict:
    """What must not depend on the number of ranks."""
    return {name: value for name, value in result.items() if not name.endswith("_bytes")}


@pytest.mark.parametrize("size", SIZES)
def test_a_shared_out_optimizer_takes_its_part_of_the_memory_on_each_rank(results, size):
    alone = results(1)[0]["whole, shared out"]["state_bytes"]
    parts = [results(size)[rank]["whole, shared out"]["state_bytes"] for rank in range(size)]
    assert sum(parts) == alone and max(parts) < 1.3 * alone / size


def test_a_run_that_stops_early_does_so_in_the_scenario(results):
    assert results(1)[0]["early stop"]["done"] and results(1)[0]["early stop"]["step"] < 20


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


# -- ranks that are lost, and runs that go on with another number of them ------------------------------------------------------------

LONG = {"settings": {"shard_optimizer": True, "grad_accumulation_steps": 4, "iters": 400, "save_every": 3, "steps_per_eval": 400}}
DEADLINE = 4.0


def end_of_ranks(tmp_path, size: int, harm, deadline: float = DEADLINE) -> tuple[int, str, float]:
    """Starts a long run and has `harm(ranks)` done when it has saved: the exit code, what was said, and the seconds it took from there."""
    (tmp_path / "scenarios.json").write_text(json.dumps({"long": {**LONG, "run_dir": str(tmp_path / "run")}}))
    command = [sys.executable, "-m", "nbs_tests.training.rank_program", str(tmp_path)]
    own = environments(["localhost"] * size)
    own = [{**one, "FULLTUNE_NB_DEADLINE": str(deadline)} for one in own]
    said = [open(tmp_path / f"said-{rank}", "w+") for rank in range(size)]  # no pipes: a killed rank's own children hold them open
    ranks = [start_rank("localhost", command, one, stdout=subprocess.DEVNULL, stderr=out) for one, out in zip(own, said, strict=True)]
    try:
        while not (tmp_path / "run" / "checkpoints" / "step-000006").is_dir():
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.02)
        harm(ranks)
        began = time.monotonic()
        code = end_together(ranks)
        return code, "".join((tmp_path / f"said-{rank}").read_text() for rank in range(size)), time.monotonic() - began
    finally:
        kill(ranks)
        for out in said:
            out.close()


def goes_on(tmp_path, size: int) -> dict:
    """Some steps more of the run that is there, with so many ranks."""
    assert run_ranks(tmp_path, size, {"on": {**LONG, "run_dir": str(tmp_path / "run"), "resume": "auto", "steps": 3}}) == 0
    return same(results_of(tmp_path)["on"])


KILLED, HANGING = pytest.param(signal.SIGKILL, marks=pytest.mark.ci, id="killed"), pytest.param(signal.SIGSTOP, id="hanging")


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.ci), 1])
@pytest.mark.parametrize("number", [KILLED, HANGING])
def test_a_lost_rank_ends_the_run_of_all(tmp_path, lost, number):
    code, said, seconds = end_of_ranks(tmp_path, 2, lambda ranks: ranks[lost].send_signal(number))
    assert code != 0 and seconds < DEADLINE + 10
    assert f"rank {lost} has" in said and "What was saved is whole" in said


def test_after_a_killed_rank_a_run_goes_on_with_another_number_of_them(tmp_path):
    code, said, _ = end_of_ranks(tmp_path, 2, lambda ranks: ranks[1].kill())
    assert code != 0 and "rank 1 has ended" in said
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    together = goes_on(tmp_path, 3)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "copy").rename(tmp_path / "run")
    assert goes_on(tmp_path, 1) == together


@pytest.mark.parametrize("told", [pytest.param(0, marks=pytest.mark.ci), 1])
def test_an_interrupt_of_any_rank_pauses_all_at_the_same_step(tmp_path, told):
    code, said, _ = end_of_ranks(tmp_path, 2, lambda ranks: ranks[told].send_signal(signal.SIGINT), deadline=60)
    first, second = (results_of(tmp_path, rank)["long"] for rank in (0, 1))
    assert code == 0 and "error" not in said.lower()
    assert first["interrupted"] and second["interrupted"] and 6 <= first["step"] == second["step"] < 400
    assert first["weights"] == second["weights"]


def test_a_notebook_that_starts_its_ranks_gets_what_it_gets_alone(tmp_path):
    for size in (1, 2):
        command = [sys.executable, "-m", "nbs_tests.training.rank_notebook", str(tmp_path), str(size)]
        assert subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=300).returncode == 0
    found = [json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 2)]
    alone, together = ([(of_fork, same(result)) for of_fork, result in results] for results in found)
    assert together == alone


def test_rows_that_another_rank_has_updated_come_in_an_array_of_their_own(make_trainer):
    trainer = make_trainer()
    held = parameters_of(trainer.lm.model)[EMBEDDING]  # as a rehearsal does
    before = np.array(held)
    together = Together(SimpleNamespace(rank=0, size=2, shared=lambda here, owner: {EMBEDDING: mx.ones((2, held.shape[1]))}))
    together.optimizers(trainer.lm.model, trainer.config.replace(shard_optimizer=True))
    together.exchange_weights(trainer.lm.model, {EMBEDDING: 1}, [EMBEDDING], slice(1, 3))
    now = np.array(parameters_of(trainer.lm.model)[EMBEDDING])
    assert np.array_equal(np.array(held), before)
    assert (now[1:3] == 1).all() and np.array_equal(now[3:], before[3:]) and np.array_equal(now[:1], before[:1])


def test_what_strangers_say_to_rank_0_changes_nothing(monkeypatch):
    monkeypatch.setenv("FULLTUNE_NB_TOKEN", "secret")
    host, _, port = environments(["localhost"] * 2)[0]["FULLTUNE_NB_RANK0"].rpartition(":")
    address, found = (host, int(port)), []

    def take_part(rank: int, value: str) -> None:
        channel = RankChannel(rank, 2, address, 5.0)
        found.append(channel.exchange(value))
        channel.close()

    first = threading.Thread(target=take_part, args=(0, "a"), daemon=True)
    first.start()
    for said in (b'{"rank": 1, "token": "\\u00e9"}', b"[" * 4000, b"[" * 10_000, b"\xff", b"[]", b'{"rank": 1, "token": "other"}'):
        while True:
            try:
                stranger = socket.create_connection(address, 5.0)
                break
            except ConnectionRefusedError:  # it does not listen yet
                assert first.is_alive()
                time.sleep(0.01)
        with stranger:
            stranger.sendall(struct.pack("!I", len(said)) + said)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""  # it is shown the door
    take_part(1, "b")
    first.join(5.0)
    assert found == [["a", "b"]] * 2


def test_ranks_that_share_no_secret_do_not_come_together(monkeypatch):
    for name in ("FULLTUNE_NB_TOKEN", "MLX_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ft.ConfigError, match="FULLTUNE_NB_TOKEN"):
        RankChannel(0, 2, ("127.0.0.1", 0), 5.0)


def test_experts_layer_by_layer_are_refused_before_other_ranks_hear_of_the_run(make_lm, make_data, monkeypatch):
    monkeypatch.setattr("fulltune_nb.training.layerwise.on_cpu", lambda: True)
    config = ft.TrainConfig(batch_size=4, iters=1, mask_prompt=True, backward="layerwise")
    told_nothing = SimpleNamespace(rank=0, size=2)
    with pytest.raises(ft.ConfigError, match="are for one process"):
        ft.Trainer(make_lm(**EXPERTS), make_data(8, config=config), config, parallel=told_nothing)


def test_a_command_that_is_not_there_is_told_in_a_line():
    with pytest.raises(ft.ConfigError, match=r"(?s)cannot be started: .*no-such-command.* Is the command there\?"):
        start_rank("localhost", ["no-such-command"], {})


def test_the_command_says_which_rank_has_ended_and_which_it_killed():
    dies = "import os, time; os.kill(os.getpid(), 9) if os.environ['MLX_RANK'] == '1' else time.sleep(60)"
    command = [sys.executable, "-m", "fulltune_nb.ranks", "-n", "2", "--", "python", "-c", dies]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 128 + signal.SIGKILL
    assert ended.stderr.splitlines() == ["Rank 1 has ended with signal 9.", "Rank 0 did not end within 3 s of that, and is killed."]
