"""The settings of a training run: one frozen record, checked when it is made.

Names are those of the command line's flags. Every value is of the type it says: what comes from YAML, papermill or a form
as something else is refused with the reason, never guessed.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fulltune_nb import html
from fulltune_nb import settings as checks
from fulltune_nb.errors import ConfigError, nearest
from fulltune_nb.settings import Check, SettingError, YamlSettings, number, pair, read_yaml, write_yaml
from fulltune_nb.training.schedule import check_lr_schedule

# -- optimizer_settings: Names, defaults and ranges of each optimizer's own settings: the content of `TrainConfig.optimizer_c

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
            raise _error(f"{optimizer} has no setting {name!r}. {nearest(name, table)}")
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


# -- config: The settings of a training run: one frozen record, checked when it is made

DEFAULT_ITERS = 1000


@dataclass(frozen=True, repr=False)
class TrainConfig:
    """Settings of a training run. `TrainConfig()` has the defaults; a changed copy is `config.replace(iters=600)`.

    Raises:
        ConfigError: a setting has an unknown name, or a value of the wrong type or range.
    """

    batch_size: int = 4
    """Rows in a micro-batch; with `packing`, packed rows."""
    iters: int | None = None
    """Optimizer steps in all; 1000 when neither this nor `epochs` is given, None when `epochs` is."""
    epochs: int | None = None
    """Passes over the training split, in place of `iters`. Not both."""
    learning_rate: float = 1e-5
    """Peak learning rate. With mlx's form of `lr_schedule` the first of its arguments counts instead."""
    optimizer: str = "adamw"
    """adamw, adam, sgd, adafactor, lion or muon; adamw8bit or lion8bit, with moments of 8 bits."""
    optimizer_config: dict[str, Any] = field(default_factory=dict)
    """The optimizer's own settings by name, such as betas, eps, momentum, nesterov."""
    weight_decay: float | None = None
    """Weight decay on everything but norms and biases: decoupled (adamw, lion, adafactor) or added to the gradient (adam, sgd,
    muon). Not given, it is the optimizer's own default: 0.01 for adamw, adamw8bit and muon, else 0."""
    lr_schedule: str | dict[str, Any] | None = None
    """None or "constant", "linear" (to 0), "cosine" (to 0), or mlx_lm's form {name, arguments, warmup, warmup_init}."""
    warmup: int = 0
    """Steps with a rising learning rate before the schedule begins."""
    memory: str = "auto"
    """"fast": the whole model's gradients at once; "lean": a layer's at a time, up to twice as slow, for a fraction of the memory;
    "auto": fast where `preflight` says that it fits, else lean."""
    backward: str = "auto"
    """The backward pass itself: "whole" (graph) or "layerwise"; "auto" as `memory` says."""
    compile: bool | None = None
    """Compile the passes through the model: on the CPU a tenth to a fifth faster for small models, the same numbers. Once a machine it
    takes half a minute; None: on a Linux CPU, for runs of some five minutes and more. Not possible with experts, nor with `grad_checkpoint`
    over the whole graph; True then has no effect, and an event says so."""
    weights: str = "auto"
    """dtype of the weights while they are trained: "bfloat16", "float32", or "auto", which is the checkpoint's own (float32 for
    float16). The optimizer's moments and the arithmetic of an update are float32 either way."""
    rounding: str = "stochastic"
    """How updated weights become bfloat16: "stochastic" (up or down, exact in expectation) or "nearest" (which loses small
    updates: in 200 steps of AdamW at 3e-5 a loss of 4.080 in place of 3.440)."""
    grad_accumulation_steps: int = 1
    """Micro-batches in an optimizer step; all their trained tokens weigh the same."""
    max_grad_norm: float | None = None
    """Largest global L2 norm of the gradient; a larger one is scaled down to it. None: no limit."""
    grad_checkpoint: bool = False
    """Keep only each block's input in the forward pass and compute the rest again: less memory, about a third more time."""
    lr_factors: dict[str, float] = field(default_factory=dict)
    """Name pattern -> factor on the learning rate; the first pattern that matches a tensor's Hugging Face name counts."""
    train_only: tuple[str, ...] = ()
    """Patterns of Hugging Face tensor names; only these are trained. Empty: all."""
    freeze: tuple[str, ...] = ()
    """Patterns of Hugging Face tensor names that are not trained."""
    steps_per_report: int = 10
    """Steps between two lines of progress."""
    steps_per_eval: int = 200
    """Steps between two evaluations on the valid split."""
    val_batches: int = 25
    """Batches in an evaluation on the valid split; -1: all, 0: no evaluation during training."""
    test_batches: int = 500
    """Batches in the command line's test; -1: all."""
    save_every: int = 100
    """Steps between two checkpoints."""
    keep: int = 3
    """Latest checkpoints kept, the best one besides."""
    on_save_error: str = "stop"
    """When a checkpoint or a line of metrics cannot be written: "stop" the run with the error, or "continue" and note an event."""
    patience: int | None = None
    """Evaluations without improvement after which training stops. None: never."""
    seed: int = 0
    """Seed of the order of the data."""
    mask_prompt: bool = False
    """Train on the assistant's turns only."""
    max_seq_length: int = 2048
    """Tokens after which a row is cut."""
    packing: bool = False
    """Put several rows into one of at most `max_seq_length` tokens, kept apart in attention: less padding, the same loss."""
    prompt_feature: str = "prompt"
    """Key of the prompt in completions data."""
    completion_feature: str = "completion"
    """Key of the completion in completions data."""
    text_feature: str = "text"
    """Key of the text in text data."""
    chat_feature: str = "messages"
    """Key of the messages in chat data."""

    def __new__(cls, *args: Any, **settings: Any):
        _check_names(settings)  # before dataclass's own TypeError, which names no neighbours
        return super().__new__(cls)

    def __post_init__(self):
        if self.iters is not None and self.epochs is not None:
            raise SettingError(f"iters={self.iters} and epochs={self.epochs}: expected one of them. Leave one out.", "epochs")
        if self.iters is None and self.epochs is None:
            self._set("iters", DEFAULT_ITERS)
        for name, check in _CHECKS.items():
            self._set(name, checks.run(check, name, getattr(self, name)))
        if self.optimizer not in OPTIMIZERS:
            message = f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}. {nearest(self.optimizer, OPTIMIZERS)}"
            raise SettingError(message, "optimizer")
        self._set("optimizer_config", check_optimizer_config(self.optimizer, self.optimizer_config))
        if self.weight_decay is None:
            self._set("weight_decay", default_weight_decay(self.optimizer))
        self._set("lr_schedule", check_lr_schedule(self.lr_schedule, self.warmup))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run, from `iters` or from `epochs`."""
        return self.iters if self.epochs is None else self.epochs * steps_per_epoch

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some settings changed.

        `iters` takes the place of `epochs` and the other way round. With another `optimizer`, the settings that belonged to the
        old one (`optimizer_config`, a `weight_decay` that was its default) go back to the new one's defaults.

        Raises:
            ConfigError: as in making a config.
        """
        _check_names(changes)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for one, other in (("iters", "epochs"), ("epochs", "iters")):
            if changes.get(one) is not None:
                values[other] = None
        if changes.get("optimizer", self.optimizer) != self.optimizer:
            values["optimizer_config"] = {}
            if self.weight_decay == default_weight_decay(self.optimizer):
                values["weight_decay"] = None
        return TrainConfig(**{**values, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values that JSON and YAML can hold; `from_dict` takes them back."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A config from settings by name. Hyphens in names count as underscores.

        `optimizer_config` may have mlx_lm's form with a part for each optimizer, and a `weight_decay` in it.

        Raises:
            ConfigError: an unknown name (the nearest valid ones are named), or as in making a config.
        """
        values = {str(k).replace("-", "_"): v for k, v in values.items()}
        _check_names(values)
        optimizer = values.get("optimizer", cls.optimizer)
        if "optimizer_config" in values:
            own = flatten_by_optimizer(optimizer, values["optimizer_config"])
            if isinstance(own, Mapping) and "weight_decay" in own and "weight_decay" not in values:
                own = dict(own)
                values["weight_decay"] = own.pop("weight_decay")
            values["optimizer_config"] = own
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike, *, ignore: Collection[str] = (), **overrides: Any) -> TrainConfig:
        """A config from a YAML file, with `overrides` in place of what the file says.

        Args:
            path: the file; keys with hyphens or underscores.
            ignore: names in the file that are not training settings and belong to the caller, such as "model".
            overrides: settings that win over the file, whatever their value. `iters` wins over the file's `epochs` too, and
                the other way round.

        Raises:
            ConfigError: the file cannot be read, or as in making a config; with file and line.
        """
        settings = read_yaml(path)
        _check_names(overrides)
        skip = {name.replace("-", "_") for name in ignore}
        values = {k: v for k, v in settings.items() if k not in skip or k in overrides}
        for one, other in (("iters", "epochs"), ("epochs", "iters")):
            if overrides.get(one) is not None:
                values.pop(other, None)
        try:
            _check_names(values, also=skip)
            return cls.from_dict({**values, **overrides})
        except SettingError as error:
            raise _with_place(error, settings, overrides) from None

    def to_yaml(self, path: str | os.PathLike) -> None:
        """Write all settings to a YAML file that `from_yaml` reads back.

        Raises:
            ConfigError: the file cannot be written.
        """
        values = self.to_dict()
        write_yaml(path, {k: v for k, v in values.items() if not (k in ("iters", "epochs") and v is None)})

    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults, by name."""
        default = TrainConfig(optimizer=self.optimizer)
        names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        if self.optimizer != TrainConfig.optimizer:
            names.insert(0, "optimizer")
        if self.epochs is not None:
            names.remove("iters")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"TrainConfig({', '.join(f'{name}={value!r}' for name, value in self.changed().items())})"

    def _repr_html_(self) -> str:
        changed = self.changed()
        rows = [(name, _readable(value), "set" if name in changed else "default") for name, value in self.to_dict().items()]
        rows.sort(key=lambda row: row[2] == "default")
        return html.table(("setting", "value", ""), rows, caption="Training settings")


# `__new__` takes anything; what help and completion show is this.
_parameters = inspect.signature(TrainConfig.__init__).parameters.values()
TrainConfig.__signature__ = inspect.Signature([p for p in _parameters if p.name != "self"])

_CHECKS: dict[str, checks.Check] = {
    "batch_size": checks.whole(1),
    "iters": checks.optional(checks.whole(0)),
    "epochs": checks.optional(checks.whole(1)),
    "learning_rate": checks.number(low=0.0),
    "optimizer": checks.text,
    "weight_decay": checks.optional(checks.number(low=0.0)),
    "warmup": checks.whole(0),
    "memory": checks.choice("auto", "fast", "lean"),
    "backward": checks.choice("auto", "whole", "layerwise"),
    "compile": checks.optional(checks.flag),
    "weights": checks.choice("auto", "bfloat16", "float32"),
    "rounding": checks.choice("stochastic", "nearest"),
    "grad_accumulation_steps": checks.whole(1),
    "max_grad_norm": checks.optional(checks.number(above=0.0)),
    "grad_checkpoint": checks.flag,
    "lr_factors": checks.factors,
    "train_only": checks.patterns,
    "freeze": checks.patterns,
    "steps_per_report": checks.whole(1),
    "steps_per_eval": checks.whole(1),
    "val_batches": checks.whole(0, also=(-1,)),
    "test_batches": checks.whole(1, also=(-1,)),
    "save_every": checks.whole(1),
    "keep": checks.whole(1),
    "on_save_error": checks.choice("stop", "continue"),
    "patience": checks.optional(checks.whole(1)),
    "seed": checks.whole(0, 2**63 - 1),
    "mask_prompt": checks.flag,
    "max_seq_length": checks.whole(2),
    "packing": checks.flag,
    "prompt_feature": checks.text,
    "completion_feature": checks.text,
    "text_feature": checks.text,
    "chat_feature": checks.text,
}


def _check_names(values: Mapping[str, Any], also: Collection[str] = ()) -> None:
    valid = [f.name for f in dataclasses.fields(TrainConfig)]
    for name in values:
        if name not in valid:
            raise SettingError(f"unknown setting {name!r}. {nearest(name, [*valid, *also])}", name)


def _with_place(error: SettingError, settings: YamlSettings, overrides: Mapping[str, Any]) -> ConfigError:
    """The error with the file and line in front, unless the value came from an override."""
    if error.setting in overrides:
        return error
    return SettingError(f"{settings.where(error.setting)}: {error}", error.setting)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def _readable(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_agreement(settings: Any, config: TrainConfig) -> None:
    """Data settings stand in the config too, so that a run can be repeated from it: both must say the same.

    Args:
        settings: the `DataSettings` of the data.
        config: the training settings.

    Raises:
        ConfigError: they differ.
    """
    for name, value in vars(settings).items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{name} is {value!r} in the data but {getattr(config, name)!r} in the config. Load the data with"
                f" load_data(..., config=config), or set {name} alike in both."
            )
