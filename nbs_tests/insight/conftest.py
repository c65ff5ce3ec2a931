"""The trainer's small models and data; figures are closed after each test."""

import matplotlib.pyplot as plt
import pytest

from nbs_tests.training.conftest import make_data, make_lm, make_trainer  # noqa: F401

HOSTILE = "</pre></span><img src=x onerror=\"alert('one')\"><script>alert(2)</script> $5 and $10 \u202eabc\x1b[31m"


def assert_harmless(html: str) -> None:
    """Nothing of `HOSTILE` got into the page as more than text."""
    assert "<img" not in html and "<script" not in html and "\u202e" not in html and "\x1b" not in html


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")
