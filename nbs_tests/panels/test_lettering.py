"""Text kept as pixels: it is what matplotlib draws, and is put where it is told."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fulltune_nb.panels.lettering import Lettering, paste


def ink(pixels: np.ndarray) -> np.ndarray:
    """Darkness of the box that holds all ink, 0 to 255, (h, w)."""
    dark = 255 - pixels[..., 0].astype(int)
    rows, columns = np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))
    return dark[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@pytest.mark.parametrize("text", ["optimizer step", "loss (nats per token)", "gypq|"])
def test_a_word_is_the_text_matplotlib_draws(text):
    figure = Figure(figsize=(3, 1), dpi=100)
    canvas = FigureCanvasAgg(figure)
    figure.text(0.1, 0.5, text, fontsize=9, color="black", family="DejaVu Sans")
    canvas.draw()
    expected, found = ink(np.asarray(canvas.buffer_rgba())), ink(Lettering(9, 100, "black").word(text))
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 40  # whole pixels differ by a shift of less than one


def test_a_number_is_as_wide_as_its_digits_and_lies_on_one_line():
    letters = Lettering(9, 100)
    digits = [letters.word(digit).shape for digit in "0123456789"]
    assert len(set(digits)) == 1
    assert letters.number("3,141.59").shape[0] == letters.height
    assert letters.number("777").shape[1] == 3 * digits[0][1]


def test_nothing_gives_something_to_paste():
    letters = Lettering(9, 100)
    for stamp in (letters.word(""), letters.number("")):
        assert stamp.shape[0] == letters.height and (stamp == 255).all()


@pytest.mark.parametrize(
    ("align", "rows", "columns"),
    [((0.0, 0.0), (4, 6), (5, 8)), ((1.0, 1.0), (6, 8), (2, 5)), ((0.0, 1.0), (6, 8), (5, 8))],
)
def test_a_text_is_put_where_its_named_point_says(align, rows, columns):
    picture = np.full((10, 12, 4), 255, np.uint8)
    paste(picture, np.zeros((2, 3, 4), np.uint8), 5, 4, align)  # 4 pixels from below are row 6
    filled = np.zeros((10, 12), bool)
    filled[slice(*rows), slice(*columns)] = True
    np.testing.assert_array_equal((picture == 0).all(axis=2), filled)


@pytest.mark.parametrize(("x", "y"), [(-2, 5), (11, 5), (5, -1), (5, 11), (-50, 5), (5, 90)])
def test_what_would_stand_outside_is_cut(x, y):
    picture = np.full((10, 12, 4), 255, np.uint8)
    paste(picture, np.zeros((4, 4, 4), np.uint8), x, y)
    assert (picture == 0).sum() < 4 * 4 * 4
