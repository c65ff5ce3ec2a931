"""Memory and shapes over many steps on rows of many lengths; `benchmarks/many_lengths.py` does it at full size."""

import pytest

from nbs_tests.benchmarks.many_lengths import ALLOWED_GROWTH, ALLOWED_SHAPES, measure

SETTINGS = [{}, {"share": 0.3, "batch_size": 3}, {"packing": True, "batch_size": 2}, {"grad_checkpoint": True}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(settings) or "plain")
def test_memory_stays_flat_and_shapes_few_over_many_lengths(settings):
    result = measure(200, range(2, 52), **settings)
    assert result.lengths == 50 and len(result.shapes) <= ALLOWED_SHAPES
    assert result.growth("active") <= ALLOWED_GROWTH and result.growth("peak") <= ALLOWED_GROWTH
