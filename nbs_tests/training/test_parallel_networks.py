"""As `test_parallel`, with ranks whose messages cross network interfaces: one namespace each, joined by cables and a switch."""

import functools
import json
import sys

import pytest

from fulltune_nb.training.start_ranks import end_together, kill
from nbs_tests.training.rank_network import Network, start_ranks, why_no_network
from nbs_tests.training.test_parallel import SCENARIOS, assert_as_one_process, results_of, run_ranks

pytestmark = pytest.mark.ci
NAMES = ["whole, clipped, packed", "layerwise, shared out", "early stop"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """`results(size)`: what came out on each rank, one process being alone, more in a network."""
    if (reason := why_no_network()) is not None:
        pytest.skip(reason)

    @functools.cache
    def found(size: int) -> list[dict]:
        folder, scenarios = tmp_path_factory.mktemp(f"ranks{size}"), {name: SCENARIOS[name] for name in NAMES}
        if size == 1:
            assert run_ranks(folder, 1, scenarios) == 0
            return [results_of(folder)]
        (folder / "scenarios.json").write_text(json.dumps(scenarios))
        with Network(size) as network:
            command = [sys.executable, "-m", "nbs_tests.training.rank_program", str(folder)]
            ranks = start_ranks(command, folder, size, network)
            try:
                assert end_together(ranks) == 0
            finally:
                kill(ranks)
        return [results_of(folder, rank) for rank in range(size)]

    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_in_a_network_compute_what_one_process_does(results, name, size):
    assert_as_one_process(results, name, size)


@pytest.mark.parametrize("size", [2, 3])
def test_what_ranks_in_a_network_send_crosses_their_interfaces(results, size):
    for rank in range(size):
        last = results(size)[rank][NAMES[-1]]
        assert 0 < last["engine_bytes"] < last["interface_bytes"]
