"""For panels: the trainer's small models and data, panels that are closed again, async tests, and real kernels."""

import asyncio
import functools
import inspect
import signal

import pytest

from fulltune_nb.panels.chat import ChatPanel
from fulltune_nb.panels.loop import listening
from fulltune_nb.panels.train import TrainPanel
from nbs_tests.panels.kernels import SETUP, Kernel, pythons, version_of
from nbs_tests.training.conftest import make_data, make_lm, make_trainer  # noqa: F401

HOSTILE = "<img src=x onerror=alert(1)></pre><script>alert(2)</script>$$x$$\x1b[31m\u202e"


def in_loop(function):
    """Runs an async test."""

    @functools.wraps(function)
    def test(*args, **kwargs):
        asyncio.run(function(*args, **kwargs))

    test.__signature__ = inspect.signature(function)
    del test.__wrapped__  # pytest would take the test for an async one
    return test


async def until(condition, seconds=20.0):
    """Waits for something to become true, while the event loop goes on."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it never came to that"
        await asyncio.sleep(0.002)


async def settled(panel):
    """Waits for the end of a training panel's run, and for what comes after it."""
    await panel.loop.wait()
    await asyncio.sleep(0.01)


def _maker(kind, **usual):
    made = []

    def make(*args, **settings):
        made.append(kind(*args, **{**usual, **settings}))
        return made[-1]

    yield make
    for panel in made:
        panel.close()


@pytest.fixture
def panel_of():
    """`panel_of(trainer, ...)`: a training panel that is closed after the test."""
    yield from _maker(TrainPanel)


@pytest.fixture
def chat_of():
    """`chat_of(lm, ...)`: a chat panel that is closed after the test; answers of 12 tokens where nothing is said."""
    yield from _maker(ChatPanel, max_tokens=12)


@pytest.fixture(autouse=True)
def sigint_given_back():
    """A run that a test leaves behind keeps SIGINT, and the tests after it would be interrupted in vain."""
    yield
    left, still = signal.getsignal(signal.SIGINT), list(listening)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listening.clear()
    assert left is signal.default_int_handler and not still, f"SIGINT was not given back: {left}, {still}"


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
