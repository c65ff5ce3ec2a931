"""A GPU computes what the CPU computes. Float32 products are float32's here: see MLX_ENABLE_TF32 in conftest.py."""

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.models.families import FAMILIES
from nbs_tests.gpu.parity import compare
from nbs_tests.gpu_like import IS_REAL
from nbs_tests.training.conftest import OWN_MECHANISMS

# Without a GPU the package believes in one: with `--device-like=gpu`, as in CI, all is tried, and else what is quick.
CASES = [(family, "float32", 20) for family in FAMILIES] + [(family, "bfloat16", 20 if IS_REAL else 3) for family in FAMILIES]
QUICK = [(family, "float32", 3) for family in OWN_MECHANISMS]


@pytest.mark.parametrize(("family", "weights", "steps"), CASES if mx.is_available(mx.gpu) else QUICK)
def test_every_family_is_trained_and_answers_as_on_the_cpu(family, weights, steps):
    for backward, found, expected, errors, limits in compare(family, weights, steps):
        assert errors.within(limits), f"{backward}: {errors}, expected at most {limits}"
        if weights == "float32":
            assert found.answer == expected.answer and np.allclose(found.attention, expected.attention, atol=1e-5), backward
