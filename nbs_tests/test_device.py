"""Which kind of device computes, and what the GPU of a Mac keeps wired and cached for the length of a block."""

from __future__ import annotations

import mlx.core as mx
import pytest

from fulltune_nb.device import WIRED_SHARE, device_kind, memory_limits, recommended_working_set
from nbs_tests.gpu_like import gpu_like, mac_limits

MEMORY, CACHE = 2**34, 5 * 10**9


@pytest.fixture
def limits():
    """MLX's limits on a Mac, as they are set: "wired" and "cache"."""
    with mac_limits(MEMORY, CACHE) as found:
        yield found


def test_the_kind_of_device():
    assert device_kind() == "cpu"
    with gpu_like():
        assert device_kind() == "metal"
    with gpu_like(cuda=True):
        assert device_kind() == "cuda"


def test_what_is_needed_is_wired_and_put_back(limits):
    with memory_limits(10**9, 10**8):
        assert limits == {"wired": 10**9, "cache": 10**8}
    assert limits == {"wired": 0, "cache": CACHE}


def test_never_everything_is_wired(limits):
    with memory_limits(10**12):
        assert limits == {"wired": int(WIRED_SHARE * recommended_working_set()), "cache": CACHE}
        assert limits["wired"] < 0.65 * MEMORY


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_limits_are_put_back_after_an_error(limits, error):
    with pytest.raises(error), memory_limits(10**9, 10**8):
        raise error
    assert limits == {"wired": 0, "cache": CACHE}


def test_blocks_end_in_any_order(limits):
    run, answer, other = memory_limits(10**9, 10**8), memory_limits(3 * 10**8), memory_limits(2 * 10**9, 2 * 10**8)
    run.__enter__()
    answer.__enter__()
    assert limits == {"wired": 1_300_000_000, "cache": 10**8}
    other.__enter__()
    run.__exit__(None, None, None)
    assert limits == {"wired": 2_300_000_000, "cache": 2 * 10**8}
    other.__exit__(None, None, None)
    assert limits == {"wired": 3 * 10**8, "cache": CACHE}
    answer.__exit__(None, None, None)
    assert limits == {"wired": 0, "cache": CACHE}


def test_limits_that_a_user_set_hold(limits):
    mx.set_wired_limit(4 * 10**9), mx.set_cache_limit(10**6)
    with memory_limits(10**9, 10**8):
        assert limits == {"wired": 4 * 10**9, "cache": 10**6}
    assert limits == {"wired": 4 * 10**9, "cache": 10**6}


@pytest.mark.parametrize("cuda", [False, True])
def test_other_devices_have_no_such_limits(monkeypatch, cuda):
    for name in ("set_wired_limit", "set_cache_limit"):
        monkeypatch.setattr(mx, name, lambda limit: pytest.fail("set"))
    with gpu_like(cuda=True) if cuda else memory_limits(1), memory_limits(10**9, 10**8):
        pass
