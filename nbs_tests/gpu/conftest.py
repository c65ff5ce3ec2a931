"""The small models and data of the trainer's tests, on a GPU and on the CPU beside it."""

from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import pytest

from nbs_tests.training.conftest import make_data, make_lm, make_trainer

__all__ = ["make_data", "make_lm", "make_trainer", "on_the_cpu"]


def pytest_collection_modifyitems(items):
    if not mx.is_available(mx.gpu):
        for item in items:
            if item.path.parent.name == "gpu" and "dry" not in item.name:
                item.add_marker(pytest.mark.skip(reason="MLX finds no GPU here"))


@pytest.fixture
def on_the_cpu():
    """`with on_the_cpu():` the package and MLX compute on the CPU."""

    @contextmanager
    def block():
        with mx.stream(mx.cpu), mock.patch.object(mx, "default_device", lambda: mx.Device(mx.cpu)):
            yield

    return block
