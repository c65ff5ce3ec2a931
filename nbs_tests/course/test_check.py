"""Checks of students' functions: solutions pass, however they are written; typical wrong answers fail with a hint that helps."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.training.schedule import make_schedule


def own_loss(logits, targets, counted):
    """As a student writes it with MLX."""
    logits = mx.array(logits)
    losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, mx.array(targets)[:, None], axis=-1)[:, 0]
    return (losses * mx.array(counted)).sum() / counted.sum()


def own_adamw(weight, gradient, m, v, step, rate, betas, eps, decay):
    m += (1 - betas[0]) * (gradient - m)
    v += (1 - betas[1]) * (gradient * gradient - v)
    weight *= 1 - rate * decay
    weight -= rate * m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)
    return weight, m, v


def of_the_trainer(steps, warmup, peak):
    schedule = make_schedule("cosine", peak, warmup, steps)
    return [schedule(step) for step in range(steps)]


@pytest.mark.parametrize(("name", "solution"), [("01.loss", own_loss), ("03.adamw", own_adamw), ("05.schedule", of_the_trainer)])
def test_a_solution_passes_however_it_is_written(name, solution):
    verdict = ft.course.check(name, solution)
    assert verdict and verdict.hint == "" and repr(verdict).startswith(f"✓ {name}: right in all of 3 cases")


def softmax(logits):
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def over_all_places(logits, targets, counted):
    return np.mean([-np.log(row[target] + 0.0) for row, target in zip(softmax(logits.astype(np.float64)), targets, strict=True)])


def in_bits(logits, targets, counted):
    return own_loss(logits, targets, counted).item() / math.log(2)


def naive(logits, targets, counted):
    p = [np.exp(row[t]) / np.exp(row).sum() for row, t in zip(logits, targets, strict=True)]
    return -np.log(p)[counted].mean()


def adam(weight, gradient, m, v, step, rate, betas, eps, decay):
    return own_adamw(weight, gradient + decay * weight, m, v, step, rate, betas, eps, 0.0)


def without_correction(weight, gradient, m, v, step, rate, betas, eps, decay):
    m, v = betas[0] * m + (1 - betas[0]) * gradient, betas[1] * v + (1 - betas[1]) * gradient**2
    return weight - rate * m / (np.sqrt(v) + eps) - rate * decay * weight, m, v


def without_decay(weight, gradient, m, v, step, rate, betas, eps, decay):
    return own_adamw(weight, gradient, m, v, step, rate, betas, eps, 0.0)


def begins_at_nothing(steps, warmup, peak):
    rates = np.array(of_the_trainer(steps, warmup, peak))
    rates[:warmup] = [peak * step / warmup for step in range(warmup)]
    return rates


def stays(steps, warmup, peak):
    return [peak * min(1, (step + 1) / (warmup + 1)) for step in range(steps)]


def cosine_of_the_whole_run(steps, warmup, peak):
    return [peak * (s + 1) / (warmup + 1) if s < warmup else peak / 2 * (1 + math.cos(math.pi * s / steps)) for s in range(steps)]


@pytest.mark.parametrize(
    ("name", "wrong", "hint"),
    [
        ("01.loss", over_all_places, "Which places count"),
        ("01.loss", in_bits, "in bits"),
        ("01.loss", naive, "exp of some hundreds is infinite"),
        ("03.adamw", adam, "In AdamW it stands beside that"),
        ("03.adamw", without_correction, "m and v begin at 0"),
        ("03.adamw", without_decay, "Where is the decay"),
        ("05.schedule", begins_at_nothing, "the first step moves nothing"),
        ("05.schedule", stays, "Where does it fall"),
        ("05.schedule", cosine_of_the_whole_run, "begins where the warm-up ends"),
    ],
)
def test_typical_wrong_answers_get_a_hint_about_their_mistake(name, wrong, hint):
    verdict = ft.course.check(name, wrong)
    assert not verdict and hint in verdict.hint and "expected" in verdict.message


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda *_: None, "returned nothing"),
        (lambda *_: 1 / 0, "raised ZeroDivisionError"),
        (lambda one: one, "raised TypeError"),
        (lambda *_: "<b>much</b>", "expected numbers"),
        (lambda logits, *_: logits, "expected shape ()"),
        (lambda *_: float("nan"), "got nan"),
    ],
)
def test_what_is_no_result_is_told_and_never_raised(wrong, message):
    verdict = ft.course.check("01.loss", wrong)
    assert not verdict and message in verdict.message and verdict.hint and "<b>much" not in verdict._repr_html_()


def test_what_cannot_be_checked_is_an_error_that_says_what_can():
    with pytest.raises(ft.ConfigError, match="Did you mean '03.adamw'"):
        ft.course.check("03.adam", own_adamw)
    with pytest.raises(ft.ConfigError, match="Pass it without calling it"):
        ft.course.check("01.loss", 3.0)
    assert all(exercise.asks in exercise._repr_html_() for exercise in ft.course.exercises().values() if "'" not in exercise.asks)


@pytest.mark.parametrize("name", ["01.loss", "03.adamw", "05.schedule"])
def test_every_mistake_of_an_exercise_is_told_from_the_solution_and_from_the_others(name):
    exercise = ft.course.exercises()[name]
    hints = [ft.course.check(name, mistake.solution).hint for mistake in exercise.mistakes]
    assert hints == [mistake.hint for mistake in exercise.mistakes] and len(set(hints)) == len(hints) >= 3
