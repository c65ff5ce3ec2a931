"""The live plot: what it shows, how seldom and how fast it draws."""

from __future__ import annotations

import dataclasses
import gc
import io
import math

import matplotlib
import matplotlib.style
import numpy as np
import pytest

from fulltune_nb.panels import live_plot as module
from fulltune_nb.panels.curves import MOST_POINTS, envelope, thinned
from fulltune_nb.panels.lettering import Lettering
from fulltune_nb.panels.live_plot import HEIGHT, WIDTH, LivePlot
from fulltune_nb.training.history import EvalReport, Event, History, StepReport


def history(n: int, start: int = 1) -> History:
    made = History()
    for step in range(start, start + n):
        loss = 3 * math.exp(-step / 50) + 0.1 * math.sin(step * 7.0)
        made.append(StepReport(step, step / 100, loss, 100, 1e-3, 1.0, 0.05, 2000.0, 52_000_000, 40_000_000, 10_000_000))
        if step % 10 == 0:
            made.append(EvalReport("valid", step, loss + 0.1, math.exp(loss + 0.1), 100, 0.1))
    return made


def pixels(png: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def has_colour(picture: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(picture - wanted).max(axis=-1) < 12).any())


@pytest.mark.parametrize("n", [0, 1, 2, 19, 20, 700])
def test_a_picture_has_its_fixed_size_however_much_there_is(n):
    assert pixels(LivePlot().draw(history(n))).shape == (HEIGHT, WIDTH, 3)


def test_loss_is_on_the_left_and_memory_on_the_right():
    plot = LivePlot()
    plot.draw(History())
    empty = pixels(plot.png)
    full = pixels(plot.draw(history(100)))
    middle = int(WIDTH * 0.6)
    assert not has_colour(empty, module._BLUE)
    assert has_colour(full[:, :middle], module._BLUE) and has_colour(full[:, middle:], module._VERMILLION)


def test_growing_histories_give_the_picture_of_the_whole():
    whole, pieces = history(60), History()
    plot = LivePlot()
    for report in whole:
        pieces.append(report)
        if len(pieces) % 7 == 0:
            plot.draw(pieces)
    plot._background = None  # limits leave another room, but the curves must hold the same
    plot.draw(pieces)
    fresh = LivePlot()
    fresh.draw(whole)
    for part, other in zip(plot._parts, fresh._parts, strict=True):
        for line, expected in zip(part._curves, other._curves, strict=True):
            np.testing.assert_array_equal(line.get_xydata(), expected.get_xydata())


def test_every_curve_is_within_the_axes_after_jumps():
    plot, made = LivePlot(limit=10**9), history(5)
    plot.draw(made)
    made += [StepReport(step, 1.0, 500.0, 1, 1e-3, 1.0, 0.1, 10.0, 9 * 10**8, 8 * 10**8, 10**8) for step in range(6, 400)]
    plot.draw(made)
    for part in plot._parts:
        (left, right), (bottom, top) = part.axes.get_xlim(), part.axes.get_ylim()
        for line in part._curves:
            if line.get_visible() and line.get_transform() == part.axes.transData:
                x, y = line.get_xydata().T
                assert left <= np.nanmin(x) and np.nanmax(x) <= right and bottom <= np.nanmin(y) and np.nanmax(y) <= top


@pytest.mark.parametrize("loss", [2.86, 3.0, 4.0, 4.14])
def test_no_marker_is_cut_at_the_edge_of_the_axes(loss):
    plot, made = LivePlot(), History([StepReport(step, 1.0, 3.0 + step % 2, 1, 1e-3, 1.0, 0.1, 10.0) for step in range(1, 9)])
    plot.draw(made)
    made.append(EvalReport("valid", 8, loss, math.exp(loss), 100, 0.1))
    plot.draw(made)
    axes = plot._parts[0].axes
    left, bottom, right, top = axes.bbox.extents
    x, y = axes.transData.transform((8, loss))
    assert left <= x <= right and bottom + 4 <= y <= top - 4  # pixels


def test_the_limit_is_a_line_when_near_and_a_note_when_far():
    (near, far) = LivePlot(limit=100_000_000), LivePlot(limit=10**12)
    near.draw(history(3))
    far.draw(history(3))
    assert near._parts[1]._at_limit.get_visible() and not near._parts[1]._note
    assert not far._parts[1]._at_limit.get_visible() and "1000.0 GB" in far._parts[1]._note


def test_a_shorter_history_is_another_one():
    plot = LivePlot()
    plot.draw(history(50))
    plot.draw(history(3))
    assert len(plot._columns["step"]) == 3


def test_nan_and_inf_are_marked_and_break_the_curves():
    made = history(10) + [StepReport(11, 0.1, math.nan, 1, 1.0, 1.0, 0.1, 10.0), StepReport(12, 0.1, math.inf, 1, 1.0, 1.0, 0.1, 10.0)]
    made += history(20, start=13)
    plot = LivePlot()
    plot.draw(History(made))
    loss = plot._parts[0]
    np.testing.assert_array_equal(loss._broken.get_xdata(), [11, 12])
    assert np.isnan(loss._raw.get_ydata()[10:12]).all() and np.isnan(loss._smooth.get_ydata()[10:12]).all()


def test_events_are_dotted_lines_but_not_at_step_0():
    made = history(5) + [Event(0, "dtype", "at the start", 0.0), Event(4, "learning_rate", "changed", 0.0)]
    plot = LivePlot()
    plot.draw(History(made))
    np.testing.assert_array_equal(plot._parts[0]._events.get_xdata(), [4, 4, 4])


def test_an_envelope_keeps_spikes_and_breaks():
    x, y = np.arange(10_000.0), np.sin(np.arange(10_000.0) / 1000)
    y[1234], y[5555], y[7000:7100] = 50.0, -50.0, np.nan
    few_x, few_y = envelope(x, y, 300)
    assert len(few_x) == len(few_y) <= 900
    assert np.nanmax(few_y) == 50.0 and np.nanmin(few_y) == -50.0
    inside = (few_x > 7000) & (few_x < 7060)
    assert np.isnan(few_y[inside]).all() and inside.any()
    few_x, few_y = envelope(x[:300], y[:300], 300)
    assert np.array_equal(few_x, x[:300]) and np.array_equal(few_y, y[:300])


@pytest.mark.parametrize("n", [0, 1, 5, 399, 400, 401, 1799, 20_000])
def test_thinned_and_enveloped_curves_are_short_at_any_length(n):
    values = np.arange(float(n))
    for function in (envelope, thinned):
        x, y = function(values, values)
        assert len(x) == len(y) <= 3 * MOST_POINTS
        assert (n == 0) == (len(x) == 0)


def test_drawing_waits_a_second_and_never_takes_more_than_two_percent_of_the_time(monkeypatch):
    now = [100.0]

    class Clock:
        @staticmethod
        def monotonic():
            return now[0]

    monkeypatch.setattr(module, "time", Clock)
    plot = LivePlot()
    assert plot.seconds_to_wait() == 0
    plot.draw(History())  # takes no time by this clock
    assert plot.seconds_to_wait() == pytest.approx(1.0)
    encode = module._encode

    def slow(picture):
        now[0] += 0.2
        return encode(picture)

    monkeypatch.setattr(module, "_encode", slow)
    plot.draw(History())
    assert plot.seconds_to_wait() == pytest.approx(0.2 / 0.02 - 0.2)
    assert plot.seconds_to_wait(training=False) == pytest.approx(0.8)


@pytest.mark.parametrize("is_on", [True, False])
def test_no_garbage_is_collected_in_the_middle_of_a_picture_and_the_collector_is_left_as_it_was(is_on, monkeypatch):
    plot, reports, collected, counts = LivePlot(), history(30), [], []
    thresholds = gc.get_threshold()

    def collecting(phase, info):
        if phase == "start":
            collected.append(phase)

    def counted(function):
        def first(argument):
            counts.append(len(collected))
            return function(argument)

        return first

    gc.callbacks.append(collecting)
    try:
        gc.enable() if is_on else gc.disable()
        gc.set_threshold(1)  # at nearly every new object
        monkeypatch.setattr(plot._columns, "take", counted(plot._columns.take))
        monkeypatch.setattr(module, "_encode", counted(module._encode))
        plot.draw(reports)
        assert gc.isenabled() == is_on
        monkeypatch.setattr(module, "_encode", lambda pixels: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plot.draw(reports)
        assert gc.isenabled() == is_on
    finally:
        gc.callbacks.remove(collecting)
        gc.set_threshold(*thresholds)
        gc.enable()
    assert counts[1] == counts[0]
    assert not is_on or collected  # they would have been, otherwise


@pytest.mark.parametrize("n", [30, 20_000])
def test_while_axes_stay_neither_they_nor_their_texts_are_drawn_again(n, monkeypatch):
    made, plot = history(n), LivePlot(limit=10**9)
    plot.draw(made)
    later = [dataclasses.replace(made.steps[-1], step=step) for step in range(n + 1, n + 4)]
    pasted = []
    monkeypatch.setattr(module, "paste", lambda *arguments, **more: pasted.append(arguments))
    for report in later:
        made.append(report)
        plot.draw(made)
    assert not pasted
    points = [len(line.get_xdata()) for part in plot._parts for line in part._curves]
    assert max(points) <= 3 * module.MOST_POINTS  # how long a picture takes: nbs_tests/benchmarks/panel_cost.py
    assert len(plot.png) < 150_000


def test_a_picture_with_its_background_kept_is_the_one_drawn_anew():
    plot, made = LivePlot(limit=10**8), History()
    for report in history(300):
        made.append(report)
        if len(made) % 20 == 0:
            plot.draw(made)
    made += [EvalReport("test", 300, 0.5, 1.6, 10, 0.1), StepReport(301, 1.0, math.nan, 1, 1e-3, 1.0, 0.1, 10.0, 9 * 10**7, 10**7, 10**6)]
    kept = pixels(plot.draw(made))
    plot._background = None
    np.testing.assert_array_equal(kept, pixels(plot.draw(made)))


def test_no_text_is_laid_out_after_the_first_step_however_the_numbers_change(monkeypatch):
    plot, made = LivePlot(limit=10**8), history(30)
    made += [EvalReport(split, 30, 0.5, 1.6, 10, 0.1) for split in ("test", "train")]
    plot.draw(made)
    laid_out, drawn = [], Lettering._drawn
    monkeypatch.setattr(Lettering, "_drawn", lambda letters, text: (laid_out.append(text), drawn(letters, text))[1])
    for step, loss, peak in ((31, math.nan, 9 * 10**7), (123_456, 1e-7, 9 * 10**7), (3_000_000, -250.0, 9 * 10**9)):
        made.append(StepReport(step, 1.0, loss, 1, 1e-3, 1.0, 0.1, 10.0, peak, 10**7, 10**6))
        plot.draw(made)
    assert not laid_out


def test_texts_stand_within_the_picture_and_not_on_each_other(monkeypatch):
    pasted, paste = [], module.paste
    monkeypatch.setattr(module, "paste", lambda *given, **more: (pasted.append((*given[1:], more.get("align"))), paste(*given, **more)))
    plot, made = LivePlot(limit=10**8), history(30)
    made += [EvalReport(split, 30, 0.5, 1.6, 10, 0.1) for split in ("test", "train")]
    made += [StepReport(90_000, 1.0, math.nan, 1, 1e-3, 1.0, 0.1, 10.0, 9 * 10**7, 10**7, 10**6)]
    plot.draw(made)
    boxes = [box_of(*given) for given in pasted]
    assert len(boxes) >= 2 * (4 + 6)  # legends and axes
    for left, bottom, right, top in boxes:
        assert -1 <= left and right <= WIDTH + 1 and -1 <= bottom and top <= HEIGHT + 1
    for i, (left, bottom, right, top) in enumerate(boxes):
        for other in boxes[:i]:
            assert right <= other[0] or other[2] <= left or top <= other[1] or other[3] <= bottom


def box_of(stamp: np.ndarray, x: float, y: float, align: tuple[float, float] | None) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of a text, without the empty rows above and below its letters."""
    across, up = align or (0.0, 0.5)
    height, width = stamp.shape[:2]
    left, bottom = x - across * width, y - up * height
    inked = np.flatnonzero((stamp[..., :3] < 255).any(axis=(1, 2)))
    return left, bottom + height - 1 - inked[-1], left + width, bottom + height - inked[0]


def test_small_memory_is_shown_in_mb():
    plot = LivePlot()
    plot.draw(history(5))
    memory = plot._parts[1]
    assert memory.label == "memory (MB)" and memory._peak.get_ydata()[-1] == 52.0
    plot.draw(history(5) + [StepReport(6, 1.0, 1.0, 1, 1e-3, 1.0, 0.1, 10.0, 2 * 10**9, 10**9, 0)])
    assert memory.label == "memory (GB)" and memory._peak.get_ydata()[-1] == 2.0


def test_a_user_s_matplotlib_style_does_not_change_the_picture():
    plain = LivePlot().draw(history(30))
    with matplotlib.style.context("dark_background"):
        assert LivePlot().draw(history(30)) == plain
