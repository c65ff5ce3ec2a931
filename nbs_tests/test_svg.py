"""Small pictures keep proportions, say in words what they show, and leave text from outside text."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from fulltune_nb import svg
from nbs_tests.test_html import HOSTILE


def numbers(name: str, shown: str) -> list[float]:
    return [float(value) for value in re.findall(rf' {name}="([\d.]+)"', shown)]


def places(shown: str) -> list[list[tuple[float, float]]]:
    """The points of each curve."""
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in re.findall(r'points="([^"]*)"', shown)]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_is_only_text_in_every_picture(text):
    shown = [
        svg.curve([(1, 1.0), (2, 2.0)], text), svg.curves_file({text: [(1, 1.0)]}), svg.bars([1.0], [text], text),
        svg.named_bars({text: 1.0}, text), svg.stacked_bar({text: 1.0}, limit=2.0, unit=text),
        svg.heat_map(np.ones((1, 1)), text, [text], lambda row, column: text, hidden=text),
    ]  # fmt: skip
    for picture in shown:
        assert text not in picture and not set("\x1b\x00\u202e\u2028\udcff") & set(picture)
        ElementTree.fromstring(f"<div>{picture}</div>")  # well-formed: nothing broke out of its place


def test_every_picture_says_in_words_what_it_shows():
    assert 'aria-label="loss, from 2.000 (top) to 1.000 (bottom)"' in svg.curve([(1, 1.0), (2, 2.0)], "loss")
    assert 'aria-label="rows"' in svg.bars([1], ["one"], "rows")
    assert 'aria-label="a 1.00 GB, limit 2.00 GB"' in svg.stacked_bar({"a": 1.0}, limit=2.0, unit="GB")
    assert 'aria-label="norm: faint is 1, solid is 10, by its logarithm"' in svg.heat_map(np.array([[1.0, 10.0]]), "norm")


def test_a_curve_spans_its_box_and_leaves_out_what_is_not_finite():
    (line,) = places(svg.curve([(5, 3.0), (6, math.nan), (7, 1.0), (9, math.inf), (9, 2.0)], "loss", width=100, height=28))
    assert line == [(0.0, 4.0), (50.0, 24.0), (100.0, 14.0)]
    assert svg.curve([], "loss") == svg.curve([(1, math.nan), (2, 1.0)], "loss") == ""


def test_a_long_curve_is_drawn_by_means():
    (line,) = places(svg.curve([(step, float(step % 2)) for step in range(10_000)], "loss"))
    assert len(line) <= 200 and {y for _, y in line} <= {30.0, 4.0, 56.0}


def test_a_file_of_curves_stands_alone_and_has_its_range_at_the_edges():
    shown = svg.curves_file({"training": [(step, 5.0 - step) for step in range(1, 4)], "validation": [(3, 1.5)]}, width=260)
    ElementTree.fromstring(shown)
    training, validation = places(shown)
    assert training == [(116.7, 15.0), (183.3, 91.0), (250.0, 167.0)] and validation == [(250.0, 205.0)]
    for text in (">4<", ">1.5<", ">step 3<", "training (solid), validation (dashed)", 'stroke-dasharray="5 3"', 'fill="white"'):
        assert text in shown
    ElementTree.fromstring(svg.curves_file({"training": [], "validation": []}))


def test_bars_keep_proportions_and_those_below_zero_hang_from_the_middle():
    assert numbers("height", svg.bars([1, 4, 0], ["", "", ""], "rows", height=40))[1:] == [10.0, 40.0, 0.0]
    shown = svg.bars([2.0, -1.0], ["up", "down"], "difference", signed=True, height=40)
    assert numbers("height", shown)[1:] == [20.0, 10.0] and numbers("y", shown) == [0.0, 20.0]
    assert len(set(re.findall('fill="(.*?)"', shown))) == 2
    assert numbers("width", svg.stacked_bar({"a": 1.0, "b": 3.0}, width=400))[:2] == [400.0, 100.0]
    both = svg.stacked_bar({"a": 3.0}, width=400, beside={"b": 1.0})
    assert numbers("width", both)[:2] == [400.0, 300.0] and "stroke-dasharray" in both and "□</span> b 1.00" in both
    assert numbers("width", svg.named_bars({"a": 1.0, "b": 2.0, "c": math.nan}, "", width=100))[1::2] == [50.0, 100.0, 0.0]


def test_dollar_signs_of_a_legend_stand_where_mathjax_does_not_look():
    assert svg.stacked_bar({"$5 and $10": 1.0}).count('class="mathjax_ignore') == 1


def test_shades_are_shares_or_logarithms_and_what_is_not_finite_stays_blank():
    shares = svg.heat_map(np.array([[0.0, 1.0, math.nan]]), "survival", shares=True)
    assert numbers("fill-opacity", shares) == [0.06, 1.0]
    logs = svg.heat_map(np.array([[1.0, 10.0, 100.0], [0.0, math.inf, 1.0]]), "norm", ["first", "second"], lambda r, c: f"{r} {c}")
    assert numbers("fill-opacity", logs) == [0.06, 0.53, 1.0, 0.06] and "<title>1 2</title>" in logs and ">second</text>" in logs
    assert "nothing above zero" in svg.heat_map(np.zeros((2, 2)), "norm")
