"""For panels: the trainer's small models and data, and real kernels."""

import signal

import pytest

from fulltune_nb.panels import loop as interrupts
from nbs_tests.panels.kernels import SETUP, Kernel, pythons, version_of
from nbs_tests.training.conftest import make_data, make_lm, make_trainer  # noqa: F401


@pytest.fixture(autouse=True)
def sigint_given_back():
    """A run that a test leaves behind keeps SIGINT, and the tests after it would be interrupted in vain."""
    yield
    left, watches = signal.getsignal(signal.SIGINT), list(interrupts._watches)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts._watches.clear()
    assert left is signal.default_int_handler and not watches, f"SIGINT was not given back: {left}, {watches}"


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
