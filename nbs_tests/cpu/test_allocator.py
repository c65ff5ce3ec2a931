"""Freed arrays' memory is used again. Each case runs in a Python of its own, as the setting holds for a whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Page faults of 20 rounds of allocating, filling and freeing arrays of ever other sizes, in pages of 4 KiB.
COUNT_FAULTS = """
import resource
import fulltune_nb
import mlx.core as mx
from fulltune_nb.cpu import cap_cache
mx.set_default_device(mx.cpu)
{setup}
def work():
    for i in range(20):
        x = mx.ones((1024, 6000 + 37 * (i % 7)))
        mx.eval((x + 1.0) * 2.0)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def output(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux page faults, of glibc's malloc")
def test_arrays_of_changing_sizes_are_not_paged_in_afresh():
    without = int(output(COUNT_FAULTS.format(setup="")))
    with_it = int(output(COUNT_FAULTS.format(setup="cap_cache()")))
    assert without > 20_000, "the case no longer shows the problem"
    assert with_it < without / 20


def test_the_cache_limit_is_what_is_set():
    code = (
        "import fulltune_nb, mlx.core as mx\n"
        "from fulltune_nb.cpu import cap_cache, cache_limit\n"
        "mx.set_default_device(mx.cpu); cap_cache(); limit = cache_limit(); print(limit > 0 and mx.set_cache_limit(0) == limit)"
    )
    assert output(code) == "True\n"
