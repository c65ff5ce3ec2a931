"""Ranks come together, are told apart from strangers, and part in order; what goes wrong there is told where it can be mended."""

import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import fulltune_nb as ft
from fulltune_nb.training import parallel, start_ranks
from fulltune_nb.training.rank_channel import RankChannel, deadline_of_environment, rank_of_environment

DEADLINE = 5.0


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setenv("FULLTUNE_NB_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()


def connected(address, size=2):
    """A channel for each rank."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: RankChannel(rank, size, address, DEADLINE), range(size)))


def close_all(channels):
    with ThreadPoolExecutor(len(channels)) as pool:
        list(pool.map(lambda channel: channel.close(), channels))


def failure_of(channel, seconds=3.0):
    """What a channel says of a loss, waited for."""
    end = time.monotonic() + seconds
    while channel.failure is None and time.monotonic() < end:
        time.sleep(0.01)
    return channel.failure


# -- coming together -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["import sys; sys.exit('no model here')", "import os; os.kill(os.getpid(), 9)"])
def test_a_rank_that_ends_before_it_comes_is_noticed_at_once_with_its_last_words(monkeypatch, program):
    monkeypatch.setattr(start_ranks, "WORKER", [sys.executable, "-c", program])
    monkeypatch.delenv("MLX_RANK", raising=False)
    began = time.monotonic()
    said = "exit code 1; no model here" if "exit" in program else "signal 9"
    with pytest.raises(ft.errors.TrainingError, match=f"Rank 1 has ended before all had come: {said}"):
        ft.launch(["localhost", "localhost"])
    assert time.monotonic() - began < 10 and not start_ranks._launched  # one may try again


ENDS = "import os; from fulltune_nb.training import parallel as p; p._connected_engine = lambda _: os._exit(3); p.ranks_of_environment()"
LAUNCHES = f"""
import fulltune_nb as ft
from fulltune_nb.training import parallel, start_ranks
start_ranks.WORKER, parallel.CONNECT_SECONDS = {[sys.executable, "-c", ENDS]!r}, 1.0
ft.launch(["localhost", "localhost"])
"""


def test_a_rank_that_ends_before_the_engine_connects_ends_rank_0_too():
    own = {name: value for name, value in os.environ.items() if name != "MLX_RANK"} | {"FULLTUNE_NB_DEADLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LAUNCHES], capture_output=True, text=True, env=own, timeout=60, check=False)
    assert done.returncode == 1 and ("_connected_engine" in done.stderr or "rank 1 has ended (exit code 3" in done.stderr)


def test_who_is_not_taken_as_a_rank_hears_of_it(address, monkeypatch):
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(RankChannel, 0, 2, address, DEADLINE)
        monkeypatch.setattr("fulltune_nb.training.rank_channel.token", lambda: "other")
        with pytest.raises(ft.errors.TrainingError, match=r"does not take this process as rank 1: .* It has another secret"):
            RankChannel(1, 2, address, DEADLINE)
        monkeypatch.setattr("fulltune_nb.training.rank_channel.token", lambda: "secret")
        with pytest.raises(ft.errors.TrainingError, match="does not take this process as rank 2"):
            RankChannel(2, 3, address, DEADLINE)
        close_all([RankChannel(1, 2, address, DEADLINE), first.result()])


def test_a_stranger_that_says_nothing_keeps_no_rank_out(address, monkeypatch):
    monkeypatch.setattr("fulltune_nb.training.rank_channel.HELLO_SECONDS", 0.2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(RankChannel, 0, 2, address, DEADLINE)
        while True:
            try:
                stranger = socket.create_connection(address, 5.0)
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        with stranger:
            second = RankChannel(1, 2, address, DEADLINE)
        close_all([first.result(), second])


def test_a_rank_that_comes_early_waits_for_a_late_one_longer_than_the_deadline(address):
    with ThreadPoolExecutor(2) as pool:
        early = [pool.submit(RankChannel, rank, 3, address, 0.5) for rank in (0, 1)]
        time.sleep(1.2)
        channels = [RankChannel(2, 3, address, 0.5), *(one.result() for one in early)]
    assert [channel.failure for channel in channels] == [None] * 3
    close_all(channels)


@pytest.mark.parametrize(
    "variable, said, ask, told",
    [
        ("MLX_RANK", "one", rank_of_environment, "MLX_RANK: expected a whole number of at least 0, got 'one'"),
        ("MLX_RANK", "-1", rank_of_environment, "MLX_RANK: expected a whole number of at least 0, got '-1'"),
        ("FULLTUNE_NB_DEADLINE", "soon", deadline_of_environment, "FULLTUNE_NB_DEADLINE: expected seconds.* got 'soon'"),
        ("FULLTUNE_NB_DEADLINE", "nan", deadline_of_environment, "FULLTUNE_NB_DEADLINE: expected seconds.* got 'nan'"),
        ("MLX_WORLD_SIZE", "many", parallel.size_of_environment, "MLX_WORLD_SIZE: expected a whole number of at least 1, got 'many'"),
        ("FULLTUNE_NB_RANK0", "mac:http", parallel.address_of_environment, r"FULLTUNE_NB_RANK0 \(host:port\): expected .* got 'http'"),
        ("MLX_JACCL_COORDINATOR", "mac:x", parallel.address_of_environment, "MLX_JACCL_COORDINATOR: expected .* got 'x'"),
    ],
)
def test_a_variable_that_is_no_number_is_named(monkeypatch, variable, said, ask, told):
    for name in ("FULLTUNE_NB_RANK0", "MLX_HOSTFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv(variable, said)
    with pytest.raises(ft.ConfigError, match=told):
        ask()


def test_the_command_names_such_a_variable_too(tmp_path):
    command = [sys.executable, "-m", "fulltune_nb.full", "--train", "--model", str(tmp_path), "--data", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "MLX_RANK": "x"}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: The environment variable MLX_RANK") and "Traceback" not in done.stderr


# -- parting -------------------------------------------------------------------------------------------------------------------------


def test_ranks_whose_programs_are_through_wait_for_each_other_and_none_is_lost(address):
    first, second, third = connected(address, size=3)
    first.command({"do": "leave"}, needed=False)
    ends = []
    threads = [threading.Thread(target=lambda one=one: ends.append((one.rank, one.close()))) for one in (first, second)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)  # what the third still reads of the others' would be lost
    assert not ends and third.failure is None
    third.check()
    assert third.next_command()["do"] == "leave"
    third.close()
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(rank for rank, _ in ends) == [0, 1]
    assert {one.failure for one in (first, second, third)} == {"they were ended"}


def test_a_rank_that_waits_for_one_that_is_through_is_told(address):
    first, second = connected(address)
    closing = threading.Thread(target=first.close)
    closing.start()
    with pytest.raises(ft.errors.TrainingError, match="rank 0 has ended"):
        second.next_command()
    second.close()
    closing.join(DEADLINE)
    assert not closing.is_alive()


def test_rank_0_that_needs_one_that_is_through_is_told(address):
    first, second = connected(address)
    closing = threading.Thread(target=second.close)
    closing.start()
    while not first._through:
        time.sleep(0.01)
    first.command({"do": "leave"}, needed=False)  # nobody is missed
    assert first.failure is None
    with pytest.raises(ft.errors.TrainingError, match="rank 1 has ended"):
        first.command({"do": "step"})
    first.close()
    closing.join(DEADLINE)
    assert not closing.is_alive()


def test_a_rank_that_goes_before_it_took_a_command_is_lost(address):
    first, second = connected(address)
    first.command({"do": "step"})
    threading.Thread(target=second.close).start()
    assert failure_of(first) == "rank 1 has ended"
    first.close()
