"""Names, defaults and ranges of each optimizer's own settings: the content of `TrainConfig.optimizer_config`.

No mlx here, so that a config can be made and checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fulltune_nb.training import checks
from fulltune_nb.training.checks import Check, SettingError, number, pair

_BETA = number(low=0.0, below=1.0)
_BETAS = pair(_BETA, _BETA)
_EPS = number(above=0.0)

_ADAM: dict[str, tuple[Any, Check]] = {
    "betas": ((0.9, 0.999), _BETAS),
    "eps": (1e-8, _EPS),
    "bias_correction": (True, checks.flag),
}

_LION: dict[str, tuple[Any, Check]] = {"betas": ((0.9, 0.99), _BETAS)}

OPTIMIZERS: dict[str, dict[str, tuple[Any, Check]]] = {
    "adamw": _ADAM,
    "adam": _ADAM,
    "adamw8bit": _ADAM,
    "sgd": {
        "momentum": (0.0, number(low=0.0, below=1.0)),
        "dampening": (0.0, number(low=0.0, high=1.0)),
        "nesterov": (False, checks.flag),
    },
    # The learning rate comes from the schedule and is reported, so it must be the one applied: no relative steps, and
    # no scaling by the parameter's own size unless asked for (mlx.optimizers has both on).
    "adafactor": {
        "eps": ((1e-30, 1e-3), pair(_EPS, _EPS)),
        "clip_threshold": (1.0, checks.optional(number(above=0.0))),
        "decay_rate": (-0.8, number(low=-1.0, below=0.0)),
        "beta_1": (None, checks.optional(_BETA)),
        "scale_parameter": (False, checks.flag),
        "relative_step": (False, checks.only(False, "the learning rate comes from learning_rate and lr_schedule")),
        "warmup_init": (False, checks.only(False, "warmup comes from warmup or lr_schedule")),
    },
    "lion": _LION,
    "lion8bit": _LION,
    # betas and eps are those of the AdamW that takes what Muon does not.
    "muon": {
        "momentum": (0.95, number(low=0.0, below=1.0)),
        "nesterov": (True, checks.flag),
        "ns_steps": (5, checks.whole(1, 100)),
        "betas": ((0.9, 0.999), _BETAS),
        "eps": (1e-8, _EPS),
    },
}
"""Optimizer -> setting -> (default, check)."""

WEIGHT_DECAY = {"adamw": 0.01, "adamw8bit": 0.01, "muon": 0.01}
"""Default weight decay; 0 for an optimizer that is not named, as in PyTorch and mlx.optimizers."""


def default_weight_decay(optimizer: str) -> float:
    """The weight decay an optimizer has when none is given."""
    return WEIGHT_DECAY.get(optimizer, 0.0)


def check_optimizer_config(optimizer: str, given: Any) -> dict[str, Any]:
    """`given` with every name and value checked; only what was given is in the result.

    Raises:
        SettingError: not a mapping, an unknown name, or a value of the wrong type or range.
    """
    table = OPTIMIZERS[optimizer]
    if not isinstance(given, Mapping):
        raise _error(f"expected settings by name, such as {{'eps': 1e-8}}, got {checks.show(given)}")
    result = {}
    for name, value in given.items():
        if name in ("weight_decay", "learning_rate"):
            raise _error(f"{name} is a setting of its own; write it beside optimizer_config, not in it")
        if name not in table:
            raise _error(f"{optimizer} has no setting {name!r}. {checks.nearest(name, table)}")
        try:
            result[name] = table[name][1](value)
        except checks.Refused as refused:
            raise _error(f"{optimizer}'s {name}: expected {refused}, got {checks.show(value)}") from None
    if optimizer == "sgd" and result.get("nesterov") and (not result.get("momentum") or result.get("dampening")):
        raise _error("sgd's nesterov needs a momentum above 0 and dampening 0")
    return result


def _error(message: str) -> SettingError:
    return SettingError(f"optimizer_config: {message}{'' if message[-1] in '.?' else '.'}", "optimizer_config")


def optimizer_settings(optimizer: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All of an optimizer's settings: its defaults, with what was given in their place."""
    return {name: given.get(name, default) for name, (default, _) in OPTIMIZERS[optimizer].items()}


def flatten_by_optimizer(optimizer: str, given: Any) -> Any:
    """mlx_lm writes `optimizer_config: {adamw: {...}, sgd: {...}}`; this takes the part that counts out of it."""
    if isinstance(given, Mapping) and given and all(k in OPTIMIZERS and isinstance(v, (Mapping, type(None))) for k, v in given.items()):
        return dict(given.get(optimizer) or {})
    return given
