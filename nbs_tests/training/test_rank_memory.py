"""What is counted of a rank beforehand, beside what a rank measures: memory, and the bytes that it sends in a step."""

import json

import pytest

import fulltune_nb as ft
from fulltune_nb.training.parallel import owner_of, passed_to, sendings
from nbs_tests.training.rank_memory import SETTINGS, config_of, lm_and_data
from nbs_tests.training.test_parallel import run_ranks

SIZE = 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Setting -> what each rank measured: the peak of its steps, and the bytes that it sent in one."""
    folder = tmp_path_factory.mktemp("memory")
    assert run_ranks(folder, SIZE, SETTINGS, "nbs_tests.training.rank_memory") == 0
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(SIZE)]


def planned(name: str, ranks: int = SIZE):
    return ft.preflight(*lm_and_data(name), config_of(name), ranks=ranks)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_rank_needs_is_counted(measured, name):
    plan, most = planned(name), {what: max(rank[name][what] for rank in measured) for what in ("peak", "sent", "state")}
    assert plan.parts["optimizer state"] == most["state"]
    assert 0.98 * most["peak"] <= plan.peak <= 1.3 * most["peak"], f"{plan!r}, measured {most['peak']:,}"
    assert plan.sent <= most["sent"] <= 1.01 * plan.sent + 2**15  # names and shapes travel too


def test_a_shared_out_optimizer_is_counted_as_a_share():
    alone, rank = planned("shared out", ranks=1), planned("shared out")
    assert rank.parts["optimizer state"] < 0.55 * alone.parts["optimizer state"] and alone.sent == 0
    assert "one of 2 ranks, optimizer shared out" in rank.workload and "A rank sends" in rank._repr_html_()
    assert planned("whole").parts["optimizer state"] == alone.parts["optimizer state"]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_sendings_are_counted_as_they_are_made(size, count):
    sent = [0] * size
    for number in range(count - 1):
        sent[owner_of(number, size)] += owner_of(number, size) != owner_of(number + 1, size)
    reached = {owner_of(count - 1, size)}
    while len(reached) < size:
        for here in sorted(reached):
            for rank in passed_to(here, owner_of(count - 1, size), size):
                sent[here] += rank not in reached
                reached.add(rank)
    assert sendings(size, count) == sent and sum(sent) >= size - 1


def test_what_does_not_fit_is_told_to_share_the_optimizer_out(monkeypatch):
    from fulltune_nb.training import memory

    limit = int(0.9 * planned("whole").peak)
    monkeypatch.setattr(memory, "machine_limit", lambda: limit)
    monkeypatch.setattr(memory, "kept_freed", lambda parts, limit: 0)
    assert any(sentence.startswith("Set shard_optimizer=True (more traffic between ranks)") for sentence in planned("whole").advice)
    assert not any("shard_optimizer" in sentence for sentence in planned("whole", ranks=1).advice)


