"""Text for the live plot, laid out once: what stands on a plot again and again is kept as pixels and pasted.

Laying out and drawing text takes most of the time of a matplotlib picture, and much of it is the same in every picture.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties

_FONT = "DejaVu Sans"  # comes with matplotlib; its digits are all of one width


class Lettering:
    """One size of text, in one colour on white.

    Attributes:
        height: pixels of a line.
    """

    def __init__(self, points: float, dpi: float, colour: str = "#222222"):
        pixels = points * dpi / 72
        self.height = math.ceil(1.3 * pixels)
        self._baseline = math.ceil(pixels)  # pixels from the line's top
        self._font = FontProperties(family=_FONT, size=points)
        self._dpi = dpi
        self._ink = 255.0 * np.array(to_rgb(colour))
        self._words: dict[str, np.ndarray] = {}

    def word(self, text: str) -> np.ndarray:
        """The pixels of a text, laid out as a whole: uint8 (height, width, 4), RGBA. Kept for the next time."""
        if text not in self._words:
            self._words[text] = self._drawn(text)
        return self._words[text]

    def number(self, text: str) -> np.ndarray:
        """As `word`, put together from its characters: no number is laid out anew, however many there come."""
        return np.concatenate([self.word(character) for character in text] or [self.word(" ")], axis=1)

    def _drawn(self, text: str) -> np.ndarray:
        measure = RendererAgg(1, 1, self._dpi)
        single, double = (measure.get_text_width_height_descent(text * n, self._font, False)[0] for n in (1, 2))
        renderer = RendererAgg(max(1, round(double - single)), self.height, self._dpi)  # one more of it takes as much room
        renderer.draw_text(renderer.new_gc(), 0, self._baseline, text, self._font, 0)  # black
        coverage = np.asarray(renderer.buffer_rgba())[..., 3:] / 255.0
        drawn = np.full((*coverage.shape[:2], 4), 255, np.uint8)
        drawn[..., :3] = np.rint(255.0 - coverage * (255.0 - self._ink))
        return drawn


def paste(pixels: np.ndarray, stamp: np.ndarray, x: float, y: float, align: tuple[float, float] = (0.0, 0.5)) -> None:
    """Puts a text into a picture; what would stand outside is cut.

    Args:
        pixels: the picture, uint8 (H, W, 4), first row on top; changed in place.
        stamp: the text, uint8 (h, w, 4).
        x: pixels from the left, to the point of the text that `align` names.
        y: pixels from below, likewise.
        align: which point of the text: (0, 0) its lower left corner, (1, 1) its upper right one.
    """
    height, width = stamp.shape[:2]
    left = round(x - align[0] * width)
    top = round(pixels.shape[0] - y - (1 - align[1]) * height)
    rows = slice(max(0, top), max(0, min(pixels.shape[0], top + height)))
    columns = slice(max(0, left), max(0, min(pixels.shape[1], left + width)))
    pixels[rows, columns] = stamp[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
