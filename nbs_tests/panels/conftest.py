"""For panels: the trainer's small models and data, and real kernels."""

import pytest

from nbs_tests.panels.kernels import SETUP, Kernel, pythons, version_of
from nbs_tests.training.conftest import make_data, make_lm, make_trainer  # noqa: F401


@pytest.fixture(scope="session", params=pythons(), ids=lambda python: f"ipykernel {version_of(python)}")
def kernel(request, tmp_path_factory):
    """One kernel for each of the Pythons, with `SETUP` run in it."""
    made = Kernel(request.param, tmp_path_factory.mktemp("kernel"))
    made.version = tuple(int(part) for part in version_of(request.param).split(".")[:2])
    made.run(SETUP, timeout=120)
    yield made
    made.close()


@pytest.fixture(params=["main shell", "subshell"])
def way(request, kernel):
    """How the front end's messages come."""
    if request.param == "subshell":
        if kernel.version < (7, 0):
            pytest.skip("this ipykernel has no subshells")
        kernel.use_subshell()
    yield request.param
    kernel.subshell = None
