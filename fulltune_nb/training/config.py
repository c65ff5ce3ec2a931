"""The settings of a training run: one frozen record, checked when it is made.

Names are those of the command line's flags. Every value is of the type it says: what comes from YAML, papermill or a form
as something else is refused with the reason, never guessed.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from fulltune_nb import html
from fulltune_nb import settings as checks
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.errors import ConfigError, nearest
from fulltune_nb.settings import Check, SettingError, check_fields, check_names, checked, names_of, read_yaml, setting, write_yaml
from fulltune_nb.training.schedule import Schedule, check_lr_schedule, check_warmup, make_schedule

# -- the optimizers' own settings: the content of `TrainConfig.optimizer_config`

_BETA = checks.number(low=0.0, below=1.0)
_BETAS = checks.pair(_BETA, _BETA)
_EPS = checks.number(above=0.0)
_ADAM: dict[str, tuple[Any, Check]] = {"betas": ((0.9, 0.999), _BETAS), "eps": (1e-8, _EPS), "bias_correction": (True, checks.flag)}
_LION: dict[str, tuple[Any, Check]] = {"betas": ((0.9, 0.99), _BETAS)}

OPTIMIZERS: dict[str, dict[str, tuple[Any, Check]]] = {
    "adamw": _ADAM,
    "adam": _ADAM,
    "adamw8bit": _ADAM,
    "sgd": {"momentum": (0.0, _BETA), "dampening": (0.0, checks.number(low=0.0, high=1.0)), "nesterov": (False, checks.flag)},
    # The learning rate comes from the schedule and is reported, so it must be the one applied: no relative steps, and
    # no scaling by the parameter's own size unless asked for (mlx.optimizers has both on).
    "adafactor": {
        "eps": ((1e-30, 1e-3), checks.pair(_EPS, _EPS)),
        "clip_threshold": (1.0, checks.optional(checks.number(above=0.0))),
        "decay_rate": (-0.8, checks.number(low=-1.0, below=0.0)),
        "beta_1": (None, checks.optional(_BETA)),
        "scale_parameter": (False, checks.flag),
        "relative_step": (False, checks.only(False, "the learning rate comes from learning_rate and lr_schedule")),
        "warmup_init": (False, checks.only(False, "warmup comes from warmup or lr_schedule")),
    },
    "lion": _LION,
    "lion8bit": _LION,
    # betas and eps are those of the AdamW that takes what Muon does not.
    "muon": {
        "momentum": (0.95, _BETA),
        "nesterov": (True, checks.flag),
        "ns_steps": (5, checks.whole(1, 100)),
        "betas": ((0.9, 0.999), _BETAS),
        "eps": (1e-8, _EPS),
    },
}
"""Optimizer -> setting -> (default, check)."""


def default_weight_decay(optimizer: str) -> float:
    """The weight decay an optimizer has when none is given, as in PyTorch and mlx.optimizers."""
    return 0.01 if optimizer in ("adamw", "adamw8bit", "muon") else 0.0


def check_optimizer_config(optimizer: str, given: Any) -> dict[str, Any]:
    """`given` with every name and value checked; only what was given is in the result.

    Raises:
        SettingError: not a mapping, an unknown name, or a value of the wrong type or range.
    """

    def error(message: str) -> SettingError:
        return SettingError(f"optimizer_config: {message}", "optimizer_config")

    table = OPTIMIZERS[optimizer]
    if not isinstance(given, Mapping):
        raise error(f"expected settings by name, such as {{'eps': 1e-8}}, got {checks.show(given)}.")
    result = {}
    for name, value in given.items():
        if name in ("weight_decay", "learning_rate"):
            raise error(f"{name} is a setting of its own; write it beside optimizer_config, not in it.")
        if name not in table:
            raise error(f"{optimizer} has no setting {name!r}. {nearest(name, table)}")
        result[name] = checked(table[name][1], "optimizer_config", value, f"{optimizer}'s {name}")
    if optimizer == "sgd" and result.get("nesterov") and (not result.get("momentum") or result.get("dampening")):
        raise error("sgd's nesterov needs a momentum above 0 and dampening 0.")
    return result


def optimizer_settings(optimizer: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All of an optimizer's settings: its defaults, with what was given in their place."""
    return {name: given.get(name, default) for name, (default, _) in OPTIMIZERS[optimizer].items()}


# -- the settings of a run


def _data_setting(name: str) -> Any:
    """A field of `DataSettings` that may be left out: None, until the data is known."""
    field = DataSettings.__dataclass_fields__[name]
    if field.default is None:
        return setting(None, field.metadata["check"], field.metadata["help"])
    help = f"{field.metadata['help']} Left out: as the data was loaded, by default {field.default}."
    return setting(None, checks.optional(field.metadata["check"]), help)


@checks.described
@dataclass(frozen=True, repr=False)
class TrainConfig:
    """Settings of a training run. `TrainConfig()` has the defaults; a changed copy is `config.replace(iters=600)`.

    Raises:
        ConfigError: a setting has an unknown name, or a value of the wrong type or range.
    """

    batch_size: int = setting(4, checks.whole(1), "Rows in a micro-batch; with `packing`, packed rows.")
    iters: int | None = setting(
        None, checks.optional(checks.whole(0)),
        "Optimizer steps in all; 1000 when neither this nor `epochs` is given, None when `epochs` is.",
    )  # fmt: skip
    epochs: int | None = setting(None, checks.optional(checks.whole(1)), "Passes over the training split, in place of `iters`. Not both.")
    learning_rate: float = setting(
        1e-5, checks.number(low=0.0), "Peak learning rate. With mlx's form of `lr_schedule` the first of its arguments counts instead."
    )
    optimizer: str = setting(
        "adamw", checks.text, "adamw, adam, sgd, adafactor, lion or muon; adamw8bit or lion8bit, with moments of 8 bits."
    )
    optimizer_config: dict[str, Any] = setting(
        {}, checks.anything, "The optimizer's own settings by name, such as betas, eps, momentum, nesterov."
    )
    weight_decay: float | None = setting(
        None, checks.optional(checks.number(low=0.0)),
        "Weight decay on everything but norms and biases: decoupled (adamw, lion, adafactor) or added to the gradient (adam, sgd, muon). "
        "Not given, it is the optimizer's own default: 0.01 for adamw, adamw8bit and muon, else 0.",
    )  # fmt: skip
    lr_schedule: str | dict[str, Any] | None = setting(
        None, checks.anything,
        'None or "constant", "linear", "cosine", "wsd" (stays, and falls at the end), "inverse_sqrt", or mlx_lm\'s form '
        "{name, arguments, warmup, warmup_init}.",
    )  # fmt: skip
    warmup: int | float = setting(
        0, check_warmup, "Steps with a rising learning rate before the schedule begins; below 1: the share of the run's steps."
    )
    lr_floor: float = setting(0.0, checks.number(0, 1), "Where the linear, cosine and wsd schedules end, as a share of the peak.")
    lr_decay: float = setting(0.1, checks.number(above=0, high=1), "The share of the run's steps in which the wsd schedule falls.")
    memory: str = setting(
        "auto", checks.choice("auto", "fast", "lean"),
        '"fast": the whole model\'s gradients at once; "lean": a layer\'s at a time, up to twice as slow, for a fraction of the memory; '
        '"auto": fast where `preflight` says that it fits, else lean.',
    )  # fmt: skip
    backward: str = setting(
        "auto", checks.choice("auto", "whole", "layerwise"),
        'The backward pass itself: "whole" (graph) or "layerwise"; "auto" as `memory` says.',
    )  # fmt: skip
    compile: bool | None = setting(
        None, checks.optional(checks.flag),
        "Compile the passes through the model: on the CPU a tenth to a fifth faster for small models, the same numbers. Once a machine it "
        "takes half a minute. None: on a GPU; on a Linux CPU for runs of some five minutes and more. On a CPU not "
        "possible with experts: True then has no effect, and an event says so.",
    )  # fmt: skip
    weights: str = setting(
        "auto", checks.choice("auto", "bfloat16", "float32"),
        'dtype of the weights while they are trained: "bfloat16", "float32", or "auto", which is the checkpoint\'s own (float32 for '
        "float16). The optimizer's moments and the arithmetic of an update are float32 either way.",
    )  # fmt: skip
    rounding: str = setting(
        "stochastic", checks.choice("stochastic", "nearest"),
        'How updated weights become bfloat16: "stochastic" (up or down, exact in expectation) or "nearest" (which loses small updates: in '
        "200 steps of AdamW at 3e-5 a loss of 4.080 in place of 3.440).",
    )  # fmt: skip
    grad_accumulation_steps: int = setting(
        1, checks.whole(1), "Micro-batches in an optimizer step; all their trained tokens weigh the same."
    )
    max_grad_norm: float | None = setting(
        None, checks.optional(checks.number(above=0.0)),
        "Largest global L2 norm of the gradient; a larger one is scaled down to it. None: no limit.",
    )  # fmt: skip
    grad_checkpoint: bool = setting(
        False, checks.flag,
        "Keep only each block's input in the forward pass and compute the rest again: less memory, about a third more time.",
    )  # fmt: skip
    shard_optimizer: bool = setting(
        False, checks.flag,
        "Where several ranks train together, each keeps the optimizer's state of its share of the tensors, updates these, and sends them"
        " to the others (ZeRO-1): less memory, more traffic, the same numbers.",
    )  # fmt: skip
    router_aux_loss_coef: float = setting(
        0.0, checks.number(low=0.0),
        "Weight of the router's balance loss in the gradients of a model with experts, such as the 0.001 of its `config.json`; 0: none. "
        "The losses that are reported are without it.",
    )  # fmt: skip
    label_smoothing: float = setting(
        0.0, checks.number(low=0.0, below=1.0),
        "The share of a target's probability that is spread evenly over the vocabulary while training, as torch's "
        "CrossEntropyLoss(label_smoothing=) does it. Losses of steps are of these targets, evaluations of the plain ones.",
    )  # fmt: skip
    neftune_alpha: float | None = setting(
        None, checks.optional(checks.number(above=0.0)),
        "Noise on the embeddings while training (NEFTune), uniform within this / sqrt(tokens of the row x hidden size), such as 5; drawn "
        "anew in each step, as a function of the seed. None: no noise.",
    )  # fmt: skip
    lr_factors: dict[str, float] = setting(
        {}, checks.factors,
        "Name pattern -> factor on the learning rate; the first pattern that matches a tensor's Hugging Face name counts.",
    )  # fmt: skip
    train_only: tuple[str, ...] = setting((), checks.patterns, "Patterns of Hugging Face tensor names; only these are trained. Empty: all.")
    freeze: tuple[str, ...] = setting((), checks.patterns, "Patterns of Hugging Face tensor names that are not trained.")
    steps_per_report: int = setting(10, checks.whole(1), "Steps between two lines of progress.")
    steps_per_eval: int = setting(200, checks.whole(1), "Steps between two evaluations on the valid split.")
    val_batches: int = setting(
        25, checks.whole(0, also=(-1,)), "Batches in an evaluation on the valid split; -1: all, 0: no evaluation during training."
    )
    test_batches: int = setting(500, checks.whole(1, also=(-1,)), "Batches in the command line's test; -1: all.")
    save_every: int = setting(100, checks.whole(1), "Steps between two checkpoints.")
    keep: int = setting(3, checks.whole(1), "Latest checkpoints kept, the best one besides.")
    on_save_error: str = setting(
        "stop", checks.choice("stop", "continue"),
        'When a checkpoint or a line of metrics cannot be written: "stop" the run with the error, or "continue" and note an event.',
    )  # fmt: skip
    patience: int | None = setting(
        None, checks.optional(checks.whole(1)), "Evaluations without improvement after which training stops. None: never."
    )
    ema_decay: float | None = setting(
        None, checks.optional(checks.number(low=0.0, below=1.0)),
        "Keep an exponential moving average of the weights, in float32, such as 0.999: 4 bytes a weight. Validations during the run, "
        "`best/` and `load_best` are then of the average. None: no average.",
    )  # fmt: skip
    load_best: bool = setting(
        False, checks.flag,
        "When the run is done, give the model the weights of the best validation; the last ones are in the last checkpoint. Without a "
        "run's folder the best are kept in memory meanwhile.",
    )  # fmt: skip
    seed: int = setting(0, checks.whole(0, 2**63 - 1), "Seed of the order of the data.")
    mask_prompt: bool | str | None = _data_setting("mask_prompt")
    max_seq_length: int | None = _data_setting("max_seq_length")
    packing: bool = setting(
        False, checks.flag,
        "Put several rows into one of at most `max_seq_length` tokens, kept apart in attention: less padding, the same loss.",
    )  # fmt: skip
    rows_together: int = setting(
        1, checks.whole(1),
        "So many rows that follow each other in the data come in one micro-batch, in their order, such as the two of a pair for a loss "
        "that compares them.",
    )  # fmt: skip
    prompt_feature: str | None = _data_setting("prompt_feature")
    completion_feature: str | None = _data_setting("completion_feature")
    text_feature: str | None = _data_setting("text_feature")
    chat_feature: str | None = _data_setting("chat_feature")
    bad_rows: str | None = _data_setting("bad_rows")
    long_rows: str | None = _data_setting("long_rows")
    mask_until: str | None = _data_setting("mask_until")
    valid_fraction: float | None = _data_setting("valid_fraction")
    template_date: str | None = _data_setting("template_date")

    def __new__(cls, *args: Any, **settings: Any):
        check_names(settings, cls)  # before dataclass's own TypeError, which names no neighbours
        return super().__new__(cls)

    def __post_init__(self):
        if self.iters is not None and self.epochs is not None:
            raise SettingError(f"iters={self.iters} and epochs={self.epochs}: expected one of them. Leave one out.", "epochs")
        if self.iters is None and self.epochs is None:
            self._set("iters", 1000)
        check_fields(self)
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
        check_names(changes, TrainConfig)
        values = without_rival(vars(self), changes)
        if changes.get("optimizer", self.optimizer) != self.optimizer:
            values["optimizer_config"] = {}
            if self.weight_decay == default_weight_decay(self.optimizer):
                values["weight_decay"] = None
        return TrainConfig(**{**values, **changes})

    def fill_from(self, settings: Any) -> TrainConfig:
        """A copy in which the data settings that were left out (None) have the values of `settings`.

        Args:
            settings: `data.settings`, or the config of the run that this one goes on with.
        """
        return self.replace(**{name: getattr(settings, name) for name in names_of(DataSettings) if getattr(self, name) is None})

    def for_data(self, settings: DataSettings) -> TrainConfig:
        """`fill_from(settings)`, where what was given must agree with them.

        Raises:
            ConfigError: a data setting differs from the data's.
        """
        for name in names_of(DataSettings):
            given, found = getattr(self, name), getattr(settings, name)
            if given is not None and given != found:
                raise ConfigError(
                    f"{name} is {found!r} in the data but {given!r} in the config. Leave it out of the config, or load the data with"
                    " load_data(..., config=config)."
                )
        return self.fill_from(settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values that JSON and YAML can hold; `from_dict` takes them back."""
        return {name: _plain(getattr(self, name)) for name in names_of(TrainConfig)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A config from settings by name. Hyphens in names count as underscores.

        `optimizer_config` may have mlx_lm's form with a part for each optimizer, and a `weight_decay` in it.

        Raises:
            ConfigError: an unknown name (the nearest valid ones are named), or as in making a config.
        """
        values = {str(k).replace("-", "_"): v for k, v in values.items()}
        check_names(values, cls)
        own = values.get("optimizer_config")
        if isinstance(own, Mapping) and own:
            if all(k in OPTIMIZERS and isinstance(v, (Mapping, type(None))) for k, v in own.items()):
                own = own.get(values.get("optimizer", cls.optimizer)) or {}
            own = dict(own)
            if "weight_decay" in own and "weight_decay" not in values:
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
        stored = read_yaml(path)
        check_names(overrides, cls)
        skip = {name.replace("-", "_") for name in ignore}
        values = without_rival({k: v for k, v in stored.items() if k not in skip or k in overrides}, overrides)
        try:
            check_names(values, cls, also=skip)
            return cls.from_dict({**values, **overrides})
        except SettingError as error:
            raise (error if error.setting in overrides else stored.placed(error)) from None

    def to_yaml(self, path: str | os.PathLike, heading: str = "") -> None:
        """Write all settings to a YAML file that `from_yaml` reads back, below a comment where one is given.

        Raises:
            ConfigError: the file cannot be written.
        """
        values = self.to_dict()
        write_yaml(path, {k: v for k, v in values.items() if not (k in ("iters", "epochs") and v is None)}, heading)

    def schedule(self, total_steps: int) -> Schedule:
        """The learning rate of each step of a run with so many, as in `make_schedule`."""
        return make_schedule(self.lr_schedule, self.learning_rate, self.warmup, total_steps, self.lr_floor, self.lr_decay)

    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults, by name; a data setting's default is what `load_data` has without it."""
        usual = vars(DataSettings())
        return {name: value for name, value in self._given().items() if name not in usual or value != usual[name]}

    def _given(self) -> dict[str, Any]:
        """The settings that have to be given to make this config."""
        default = TrainConfig(optimizer=self.optimizer)
        names = [name for name in names_of(TrainConfig) if getattr(self, name) != getattr(default, name)]
        if self.optimizer != TrainConfig.optimizer:
            names.insert(0, "optimizer")
        if self.epochs is not None:
            names.remove("iters")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"TrainConfig({', '.join(f'{name}={value!r}' for name, value in self._given().items())})"

    def _repr_html_(self) -> str:
        """What was set, with its meaning; the defaults folded below it."""
        changed, values = self.changed(), self.to_dict()
        shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
        shown |= {name: "not set" for name, value in values.items() if value is None}
        shown |= {name: "as the data" for name in names_of(DataSettings) if getattr(self, name) is None}
        meanings = {field.name: field.metadata["help"].replace("`", "") for field in fields(self)}
        rows = {name: (name, value, meanings[name]) for name, value in shown.items()}
        own = [rows.pop(name) for name in changed]
        headers, title = ("setting", "value", "meaning"), "Training settings"
        first = html.table(headers, own, f"{title}: what was set") if own else f"<b>{title}: nothing was set</b>"
        folded = f"<summary>{html.counted(len(rows), 'setting')} with the default</summary>{html.table(headers, rows.values())}"
        return f"<div>{first}<details>{folded}</details></div>"


# `__new__` takes anything; what help and completion show is this.
_parameters = inspect.signature(TrainConfig.__init__).parameters.values()
TrainConfig.__signature__ = inspect.Signature([p for p in _parameters if p.name != "self"])


def without_rival(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without `epochs` where `changes` has `iters`, and the other way round."""
    rivals = {rival for name, rival in (("iters", "epochs"), ("epochs", "iters")) if changes.get(name) is not None}
    return {name: value for name, value in values.items() if name not in rivals}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value
