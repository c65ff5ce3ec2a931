"""Learning-rate schedules: pure functions of the step, so that a resumed run needs only the step to go on.

Steps are counted from 0. Values are Python floats. The named schedules of mlx_lm's YAML form give the values of
`mlx.optimizers.schedulers`, joined with their warmup as mlx_lm joins them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fulltune_nb.errors import ConfigError, nearest
from fulltune_nb.settings import Check, Refused, SettingError, checked, is_finite, number, show, whole

Schedule = Callable[[int], float]

SHAPES = ("constant", "linear", "cosine", "inverse_sqrt", "wsd")
"""The schedules that take the peak from `learning_rate`; all but the constant one and "inverse_sqrt" span the whole run."""
_TIMESCALE = 10_000  # steps after which "inverse_sqrt" without a warmup has fallen to 0.71 of the peak, as in transformers


def make_schedule(
    lr_schedule: str | Mapping[str, Any] | None,
    learning_rate: float,
    warmup: int | float,
    total_steps: int,
    floor: float = 0.0,
    decay: float = 0.1,
) -> Schedule:
    """The schedule of a run: step (from 0) -> learning rate.

    With warmup W and a peak rate P, step s < W has P * (s + 1) / (W + 1), so that the first step already moves and step W is
    the first with P. "linear" and "cosine" then fall to the floor at step `total_steps`, one past the last, and stay there. "wsd" (warmup,
    stable, decay) stays at P and falls in the last steps only, by one minus the square root of how far they are done (Hägele et al. 2024).
    "inverse_sqrt" is P * sqrt(W / s), without warmup P * sqrt(T / (s + T)) with T = 10,000.

    Args:
        lr_schedule: one of `SHAPES`, or mlx_lm's form; None stays at the peak.
        learning_rate: the peak P; mlx_lm's form brings its own.
        warmup: the steps W, or the share of the run's steps that they are.
        total_steps: optimizer steps of the whole run.
        floor: where "linear", "cosine" and "wsd" end, as a share of P.
        decay: the share of the run's steps in which "wsd" falls.
    """
    warmup = warmup_steps(warmup, total_steps)
    if isinstance(lr_schedule, Mapping):
        return _named(lr_schedule, warmup)
    shape, peak = lr_schedule or "constant", learning_rate
    timescale = warmup or _TIMESCALE
    falling = min(math.ceil(decay * total_steps), max(total_steps - warmup, 0)) if shape == "wsd" else total_steps - warmup

    def schedule(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        if shape == "constant":
            return peak
        if shape == "inverse_sqrt":
            return peak * math.sqrt(timescale / (step - warmup + timescale))
        done = min(max(step - (total_steps - falling), 0) / max(falling, 1), 1.0)
        left = {"linear": 1.0 - done, "wsd": 1.0 - math.sqrt(done)}.get(shape, 0.5 * (1.0 + math.cos(math.pi * done)))
        return peak * left if floor == 0 else peak * (floor + (1.0 - floor) * left)

    return schedule


def warmup_steps(warmup: int | float, total_steps: int) -> int:
    """The steps of a warmup that may be told as a share of the run's."""
    return math.ceil(warmup * total_steps) if 0 < warmup < 1 else int(warmup)


def check_warmup(value: Any) -> int | float:
    """A whole number of steps, or a share of a run's.

    Raises:
        Refused: it is neither.
    """
    if is_finite(value) and 0 < value < 1:
        return float(value)
    try:
        return whole(0)(value)
    except Refused as refused:
        raise Refused(f"{refused}, or a share of the run's steps below 1") from None


def spans_the_run(lr_schedule: str | Mapping[str, Any] | None, warmup: int | float) -> bool:
    """Whether the rates depend on how many steps the whole run has."""
    return lr_schedule not in (None, "constant", "inverse_sqrt") or 0 < warmup < 1


def peak_of(lr_schedule: str | Mapping[str, Any] | None, learning_rate: float, schedule: Schedule, total_steps: int) -> float:
    """The rate that a schedule is scaled by: `learning_rate`, or of mlx_lm's form the highest rate of the run."""
    if not isinstance(lr_schedule, Mapping):
        return learning_rate
    return max(schedule(0), lr_schedule["arguments"][0], schedule(max(total_steps - 1, 0)))  # each part rises or falls throughout


def final_share(schedule: Schedule, total_steps: int) -> float:
    """What the rate of the last step is of the highest one: 1 where it stays, near 0 where it decays. From 0 to 1."""
    last = max(total_steps - 1, 0)
    highest = max(schedule(step) for step in (*range(0, last, max(1, last // 100)), last))
    return schedule(last) / highest if highest else 1.0


# -- mlx_lm's form {name, arguments, warmup, warmup_init}


def _constant(rate: float) -> Schedule:
    return lambda step: rate


def _exponential_decay(init: float, decay_rate: float) -> Schedule:
    return lambda step: init * decay_rate**step


def _step_decay(init: float, decay_rate: float, step_size: int) -> Schedule:
    return lambda step: init * decay_rate ** (step // step_size)


def _linear_schedule(init: float, end: float, steps: int) -> Schedule:
    return lambda step: init + (end - init) * min(step, steps) / steps


def _cosine_decay(init: float, decay_steps: int, end: float = 0.0) -> Schedule:
    return lambda step: end + 0.5 * (1.0 + math.cos(math.pi * min(step, decay_steps) / decay_steps)) * (init - end)


_RATE, _STEPS = number(low=0.0), whole(1)
_NAMED: dict[str, tuple[Callable[..., Schedule], dict[str, Check], int]] = {
    "constant": (_constant, {"rate": _RATE}, 1),
    "exponential_decay": (_exponential_decay, {"init": _RATE, "decay_rate": _RATE}, 2),
    "step_decay": (_step_decay, {"init": _RATE, "decay_rate": _RATE, "step_size": _STEPS}, 3),
    "linear_schedule": (_linear_schedule, {"init": _RATE, "end": _RATE, "steps": _STEPS}, 3),
    "cosine_decay": (_cosine_decay, {"init": _RATE, "decay_steps": _STEPS, "end": _RATE}, 2),
}
"""mlx's name -> (maker, arguments with their checks in order, how many are required)."""


def _named(form: Mapping[str, Any], warmup: int) -> Schedule:
    """A linear warmup up to and including step `warmup`, then the named schedule from its own step 0."""
    schedule = _NAMED[form["name"]][0](*form["arguments"])
    warmup = form.get("warmup", warmup)
    if not warmup:
        return schedule
    rise = _linear_schedule(form.get("warmup_init", 0.0), form["arguments"][0], warmup)
    return lambda step: rise(step) if step <= warmup else schedule(step - warmup - 1)


def check_lr_schedule(given: Any, warmup: int | float) -> str | dict[str, Any] | None:
    """A checked copy of `TrainConfig.lr_schedule`.

    Args:
        given: None, the name of a spanning schedule, or mlx_lm's form.
        warmup: the config's own warmup, which must not contradict the form's.

    Raises:
        SettingError: an unknown schedule, a wrong number of arguments, or a value of the wrong type or range.
    """
    if given is None or (isinstance(given, str) and given in SHAPES):
        return given
    if isinstance(given, str):
        if given in _NAMED:
            raise _error(f"{given} takes arguments: write it as {{name: {given}, arguments: [{', '.join(_NAMED[given][1])}]}}.")
        raise _error(f"no schedule is called {given!r}. {nearest(given, SHAPES)}")
    if not isinstance(given, Mapping):
        raise _error(f"expected one of {', '.join(SHAPES)} or mlx's form {{name: ..., arguments: [...]}}, got {show(given)}.")
    keys = ("name", "arguments", "warmup", "warmup_init")
    for key in given:
        if key not in keys:
            raise _error(f"unknown key {key!r}. {nearest(key, keys)}")
    name, arguments = given.get("name"), given.get("arguments")
    if not isinstance(name, str) or name not in _NAMED:
        raise _error(f"name: no such schedule, {show(name)}. {nearest(name, _NAMED)}")
    _, parameters, required = _NAMED[name]
    if not isinstance(arguments, (list, tuple)) or not required <= len(arguments) <= len(parameters):
        count = f"{required}" if required == len(parameters) else f"{required} to {len(parameters)}"
        raise _error(f"{name}: expected arguments [{', '.join(parameters)}] ({count} values), got {show(arguments)}.")
    named = zip(parameters.items(), arguments, strict=False)  # the last argument may be left out
    form = {"name": name, "arguments": [checked(check, "lr_schedule", value, f"{name}'s {part}") for (part, check), value in named]}
    for key, check in (("warmup", whole(0)), ("warmup_init", _RATE)):
        if key in given:
            form[key] = checked(check, "lr_schedule", given[key], key)
    if warmup and form.get("warmup", warmup) != warmup:
        raise _error(f"its warmup {form['warmup']} and the setting warmup={warmup} disagree. Leave one out.")
    return form


def _error(message: str) -> SettingError:
    return SettingError(f"lr_schedule: {message}", "lr_schedule")


NEXT, PEAK = "learning rate", "peak learning rate"
"""What can be set by hand, in the words of its event: the rate of the next step, or the peak of the schedule."""

RateSet = tuple[str, float]
"""`NEXT` or `PEAK`, and the rate."""


def read_rates(values: Any) -> dict[int, RateSet] | None:
    """Rates set by hand, by step count, from JSON values; None where they are none. A rate alone, of earlier versions, is `NEXT`."""
    if not isinstance(values, dict) or not all(step.isdecimal() for step in values):
        return None
    rates = {int(step): tuple(rate) if isinstance(rate, list) else (NEXT, rate) for step, rate in values.items()}
    for rate in rates.values():
        if len(rate) != 2 or rate[0] not in (NEXT, PEAK) or not isinstance(rate[1], float) or not 0 < rate[1] < math.inf:
            return None
    return rates


class LearningRate:
    """A schedule that can be scaled on the way.

    Attributes:
        factor: what the schedule's rate is multiplied by; 1 until `set` or `set_peak` is called.
    """

    def __init__(self, schedule: Schedule, peak: float):
        self._schedule, self._peak = schedule, peak
        self.factor = 1.0

    @property
    def peak(self) -> float:
        """The schedule's highest rate, scaled."""
        return self._peak * self.factor

    def at(self, step: int) -> float:
        """The rate of step `step`, counted from 0."""
        return self._schedule(step) * self.factor

    def set(self, step: int, learning_rate: float) -> None:
        """Makes this the rate of step `step`; the schedule goes on from there, scaled alike.

        Raises:
            ConfigError: not a finite positive number, or the schedule has come to zero, which nothing can scale.
        """
        self._scale(self._schedule(step), learning_rate, f"the schedule's rate at step {step}")

    def set_peak(self, learning_rate: float) -> None:
        """Makes this the schedule's highest rate; every step is scaled alike.

        Raises:
            ConfigError: not a finite positive number, or the schedule is zero throughout, which nothing can scale.
        """
        self._scale(self._peak, learning_rate, "the schedule's peak")

    def _scale(self, scheduled: float, learning_rate: float, what: str) -> None:
        check_rate(learning_rate)
        factor = learning_rate / scheduled if scheduled > 0 else math.inf
        if not is_finite(factor):
            raise ConfigError(f"{what} is {scheduled}: it cannot be scaled to {learning_rate}.")
        self.factor = factor


def check_rate(learning_rate: Any) -> None:
    """
    Raises:
        ConfigError: not a finite positive number.
    """
    if not is_finite(learning_rate) or learning_rate <= 0:
        raise ConfigError(f"learning_rate: expected a finite number larger than 0, got {show(learning_rate)}.")
