"""Memory and shapes over many steps on rows of many lengths; `benchmarks/many_lengths.py` does it at full size."""

import numpy as np
import pytest

from nbs_tests.benchmarks.many_lengths import ALLOWED_GROWTH, ALLOWED_SHAPES, measure

SETTINGS = [{}, {"packing": True, "batch_size": 2}, {"memory": "lean"}]


@pytest.mark.ci
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(settings) or "plain")
def test_memory_stays_flat_and_shapes_few_over_many_lengths(settings):
    result = measure(300, range(4, 404, 8), of_a_shape=np.median, **settings)
    assert result.lengths == 50 and len(result.shapes) <= ALLOWED_SHAPES
    assert result.growth("active") <= ALLOWED_GROWTH and result.growth("peak") <= ALLOWED_GROWTH
