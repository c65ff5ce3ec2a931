"""The plots: what they draw of a history, and what they leave alone."""

from __future__ import annotations

import io
import math
import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.training.history import moving_mean


@pytest.fixture(autouse=True)
def no_figures_left():
    plt.close("all")
    yield
    plt.close("all")


def step(number: int, loss: float = 1.0, **values) -> ft.StepReport:
    values = {"learning_rate": 1e-5, "peak_memory": 3 * 10**9, "active_memory": 2 * 10**9, "cache_memory": 5 * 10**8, **values}
    fixed = {"tokens": 10, "grad_norm": 1.0, "seconds": 0.1, "tokens_per_second": 100.0}
    return ft.StepReport(step=number, epoch=number / 10, loss=loss, **fixed, **values)


def valid(number: int, loss: float, split: str = "valid") -> ft.EvalReport:
    return ft.EvalReport(split, number, loss, math.exp(loss), 10, 0.1)


def lines(ax) -> dict[str, tuple[list, list]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}


def test_every_loss_is_drawn_as_it_was():
    losses = [3.0, 2.5, 2.75]
    ax = ft.plot_loss(ft.History(step(i + 1, loss) for i, loss in enumerate(losses)))
    assert lines(ax)["training"] == ([1, 2, 3], losses)


def test_losses_lie_on_a_logarithmic_scale_when_asked():
    assert ft.plot_loss([step(1)]).get_yscale() == "linear" and ft.plot_loss([step(1)], log=True).get_yscale() == "log"


def test_a_moving_mean_stands_beside_the_losses_of_long_runs_never_instead():
    losses = list(np.random.default_rng(0).normal(size=200))
    drawn = lines(ft.plot_loss([step(i + 1, loss) for i, loss in enumerate(losses)]))
    assert drawn["training"][1] == losses
    x, mean = drawn["training, mean of 5 steps"]
    assert x == list(range(1, 201))
    np.testing.assert_allclose(mean[100], np.mean(losses[98:103]))
    np.testing.assert_allclose(mean[0], np.mean(losses[:3]))


def test_the_moving_mean_stops_at_nan_and_begins_anew_behind_it():
    losses = [1.0] * 30 + [math.nan, math.inf] + [5.0] * 30
    ax = ft.plot_loss([step(i + 1, loss) for i, loss in enumerate(losses)])
    mean = lines(ax)["training, mean of 5 steps"][1]
    assert mean[:30] == [1.0] * 30 and mean[32:] == [5.0] * 30 and all(math.isnan(v) for v in mean[30:32])
    assert lines(ax)["not finite (2)"][0] == [31, 32]


@pytest.mark.parametrize("values", [[], [math.nan], [math.nan] * 3, [1.0], [1.0, math.nan, 2.0]])
def test_the_moving_mean_is_the_plain_mean_of_each_window(values):
    expected = [v if math.isnan(v) else np.mean([v]) for v in values]
    np.testing.assert_equal(moving_mean(np.array(values), 3), np.array(expected))


def test_evaluations_are_points_that_differ_by_marker_too():
    history = [valid(0, 4.0, "test"), step(1), valid(1, 3.0), step(2), valid(2, 2.0), valid(2, 2.5, "test")]
    ax = ft.plot_loss(history)
    assert lines(ax)["valid"] == ([1, 2], [3.0, 2.0]) and lines(ax)["test"] == ([0, 2], [4.0, 2.5])
    looks = {line.get_label(): (line.get_marker(), line.get_linestyle()) for line in ax.get_lines()}
    assert len({looks["valid"], looks["test"], looks["training"]}) == 3
    assert looks["test"][1] == "None"  # two points before and after are no curve


def test_a_change_of_the_learning_rate_is_marked_with_the_new_rate():
    history = [step(1), ft.Event(1, "learning_rate", "changed", 0.0), step(2, learning_rate=3e-5), ft.Event(0, "dtype", "", 0.0)]
    for plot in (ft.plot_loss, ft.plot_memory):
        ax = plot(history)
        assert [text.get_text() for text in ax.texts] == ["learning rate 3e-05"]
        assert any(list(line.get_xdata()) == [1, 1] for line in ax.get_lines())


def test_many_events_are_counted_and_not_written_over_each_other():
    ax = ft.plot_loss([step(i) for i in range(1, 60)] + [ft.Event(i, "pause", "", 0.0) for i in range(1, 40)])
    assert not ax.texts and "39 events" in lines(ax)


def test_memory_of_a_tiny_model_is_drawn_in_megabytes():
    ax = ft.plot_memory([step(1, peak_memory=21 * 10**6, active_memory=10**6, cache_memory=33 * 10**6)])
    assert lines(ax)["peak within the step"] == ([1], [21.0]) and lines(ax)["after it, with MLX's cache"][1] == [34.0]
    assert ax.get_ylabel() == "memory (MB)"


def test_memory_is_drawn_in_gigabytes_from_zero():
    ax = ft.plot_memory([step(1), step(2, peak_memory=4 * 10**9)])
    drawn = lines(ax)
    assert drawn["peak within the step"] == ([1, 2], [3.0, 4.0])
    assert drawn["after it, in use"][1] == [2.0, 2.0] and drawn["after it, with MLX's cache"][1] == [2.5, 2.5]
    assert ax.get_ylim()[0] == 0 and "GB" in ax.get_ylabel()
    assert len({line.get_linestyle() for line in ax.get_lines()}) == 3


def test_axes_name_their_units():
    ax = ft.plot_loss([step(1)])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "loss (nats per token)")


@pytest.mark.parametrize("plot", [ft.plot_loss, ft.plot_memory])
@pytest.mark.parametrize("history", [[], ft.History(), (r for r in ())])
def test_an_empty_history_gives_a_plot_that_says_so(plot, history):
    ax = plot(history)
    assert [text.get_text() for text in ax.texts] == ["nothing recorded yet"] and ax.get_xlabel() and ax.get_legend() is None
    ax.figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("history", [[step(1)], [valid(0, 4.0)], [step(1, math.nan)], [ft.Event(3, "pause", "", 0.0)]])
@pytest.mark.parametrize("plot", [ft.plot_loss, ft.plot_memory])
def test_the_smallest_histories_can_be_drawn(plot, history):
    plot(history).figure.canvas.draw()


def test_the_callers_axes_are_used_and_keep_their_style():
    figure, (left, right) = plt.subplots(1, 2)
    left.set_facecolor("black")
    assert ft.plot_loss([step(1)], ax=left) is left and ft.plot_memory([step(1)], right) is right
    assert plt.get_fignums() == [figure.number] and matplotlib.colors.to_hex(left.get_facecolor()) == "#000000"


def test_own_figures_are_dark_on_white_in_any_theme_and_settings_stay_as_they_were():
    with plt.style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        ax = ft.plot_loss([step(i) for i in range(1, 40)])
        assert dict(matplotlib.rcParams) == before
    colours = [ax.get_facecolor(), ax.figure.get_facecolor(), ax.get_legend().get_frame().get_facecolor()[:3]]
    assert {matplotlib.colors.to_hex(c) for c in colours} == {"#ffffff"}
    assert {matplotlib.colors.to_hex(t.get_color()) for t in (ax.xaxis.label, *ax.get_legend().get_texts())} == {"#222222"}


def test_figures_do_not_pile_up_and_the_users_own_stay():
    own = plt.figure()
    first = ft.plot_loss([step(1)])
    for _ in range(30):
        ft.plot_loss([step(1)])
    assert len(plt.get_fignums()) <= 11 and plt.fignum_exists(own.number)
    first.figure.canvas.draw()  # who holds an old one can go on using it


def test_a_figure_is_one_that_pyplot_shows():
    assert ft.plot_loss([step(1)]).figure.number in plt.get_fignums()


def test_twenty_thousand_steps_are_drawn_with_a_handful_of_lines_and_marks():
    history = [step(i, math.sin(i)) for i in range(1, 20001)]
    for plot in (ft.plot_loss, ft.plot_memory):  # how long it takes: nbs_tests/benchmarks/drawing_time.py
        ax = plot(history)
        ax.figure.canvas.draw()
        marked = [line for line in ax.get_lines() if line.get_marker() not in ("", "None", "none", None)]
        assert len(ax.get_lines()) <= 4 and all(len(line.get_xdata()) / line.get_markevery() <= 20 for line in marked)


@pytest.mark.parametrize("wrong", [None, 3, [1.0, 2.0], {"loss": [1.0]}])
def test_what_is_no_history_is_refused(wrong):
    with pytest.raises(ft.ConfigError, match="plot_loss: expected"):
        ft.plot_loss(wrong)


def test_a_trainer_given_in_place_of_its_history_is_pointed_to_it():
    trainer = type("Trainer", (), {"history": []})()
    with pytest.raises(ft.ConfigError, match="got Trainer. Pass its .history."):
        ft.plot_memory(trainer)


@pytest.mark.parametrize("text", ["$\\frac$ and $10", "$$", "<b>_{", "\u202eevil \x1b[31m"])
def test_kinds_of_events_and_names_of_splits_are_drawn_as_they_are(text):
    history = [step(1), step(2), valid(2, 1.0, text), ft.Event(1, text, text, 0.0)]
    axes = ft.plot_loss(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signs that the font lacks
        axes.figure.savefig(io.BytesIO())  # mathematics with an error in it would be one here
    assert text in [entry.get_text() for entry in axes.get_legend().get_texts()]


def test_runs_are_drawn_side_by_side_and_those_past_the_first_twelve_are_counted():
    from fulltune_nb.plots import plot_runs

    evaluated = ft.History([ft.EvalReport("valid", step, 2.0 / (step + 1), 1.0, 9, 0.1) for step in range(3)])
    axes = plot_runs({f"$x$={number}": evaluated for number in range(14)} | {"nothing": ft.History()})
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(names) == 13 and names[-1] == "2 more" and names[0] == "$x$=0"  # as it is: no mathematics is read into a legend
    axes.figure.canvas.draw()
    assert [text.get_text() for text in plot_runs({}).texts] == ["nothing recorded yet"]


def test_the_training_losses_of_runs_stand_beside_the_validation_losses_when_asked():
    from fulltune_nb.plots import plot_runs

    runs = {"_a": [*(step(n) for n in range(1, 5001)), valid(5000, 1.0)], "b": [step(1), step(2)]}
    names = [text.get_text() for text in plot_runs(runs).get_legend().get_texts()]
    assert names == ["a", "b"]
    axes = plot_runs(runs, training=True)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a, training", "a, valid", "b"]
    assert len({line.get_color() for line in axes.lines}) == 2  # one a run
    drawn = axes.lines[0].get_xdata()
    assert len(drawn) <= 2500 and drawn[-1] == 5000
