"""Will it fit? The memory a run will need, part by part, against this machine's limit, before anything is computed.

`preflight` works from shapes, the data's lengths and the config; it allocates nothing. All sizes are bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
from mlx.utils import tree_flatten

from fulltune_nb import html, svg
from fulltune_nb.cpu import cache_limit, kernels_for, on_cpu
from fulltune_nb.data.batches import row_widths
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.errors import DataError, MemoryLimitError
from fulltune_nb.models.parameters import trained_names
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.memory_model import Workload, count, layerwise_moments, moments
from fulltune_nb.training.optimizers import predict_state_bytes, random_bits_bytes, update_bytes
from fulltune_nb.training.rounding import stored_dtype

# -- machine: How much memory this machine has for training, and how much is in use. All in bytes

_DEVICE_KEYS = ("max_recommended_working_set_size", "total_memory", "memory_size")  # Metal's, then CUDA's
_UNLIMITED = 2**60  # cgroup v1 writes a number near 2**63 where there is no limit


@dataclass(frozen=True)
class MemoryReading:
    """MLX's counters at one moment."""

    active: int
    """Bytes of arrays in use."""
    peak: int
    """Most bytes in use since the counter was reset; the cache is not in it."""
    cache: int
    """Bytes of freed arrays kept for reuse."""

    def __repr__(self) -> str:
        return f"MemoryReading({', '.join(f'{name} {html.human_bytes(size)}' for name, size in vars(self).items())})"

    def _repr_html_(self) -> str:
        return html.facts("Memory in use by MLX", [(name, html.human_bytes(size)) for name, size in vars(self).items()])


def read_memory() -> MemoryReading:
    """MLX's memory counters now. They count on the CPU too."""
    return MemoryReading(mx.get_active_memory(), mx.get_peak_memory(), mx.get_cache_memory())


def machine_limit() -> int:
    """Bytes that arrays may take on MLX's default device.

    Metal: what the system recommends as the largest working set (most of the memory, which the GPU shares). CUDA: the device's
    memory. CPU: main memory, or the limit of the control group (a container's) where that is smaller.
    """
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info(mx.default_device())
        for key in _DEVICE_KEYS:
            if info.get(key):
                return int(info[key])
    return min([psutil.virtual_memory().total, *_cgroup_limits()])


def _cgroup_limits(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Every memory limit that holds for this process: of its own control group and of those above, version 1 and 2."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        path = PurePosixPath(group)
        for parent in (path, *path.parents):
            limit = _read_number(top / str(parent).lstrip("/") / name)
            if limit is not None and limit < _UNLIMITED:
                yield limit


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:  # a group seen from within its container has another path
        return None
    return int(text) if text.isdigit() else None


# -- memory: Will it fit? The memory a run will need, part by part, against this machine's limit, before anything

_MB, _GB = 1e6, 1e9


@dataclass(frozen=True)
class MemoryPlan:
    """The memory a run is predicted to need at its largest moment."""

    parts: dict[str, int]
    """Part -> bytes at that moment; together they are the peak."""
    peak: int
    """Bytes in use at the largest moment, as `StepReport.peak_memory` will show it."""
    limit: int
    """Bytes that arrays may take on this machine."""
    cache: int
    """Bytes of freed arrays that MLX may keep besides."""
    moment: str
    """When: "forward", "loss", "last block", "first block" (of the backward pass) or "update"; layerwise: "loss", "block" or
    "vocabulary"."""
    workload: str
    """What was assumed, in words."""
    advice: tuple[str, ...] = field(default=())
    """What would make it fit, a sentence each; empty where it fits."""
    backward: str = "whole"
    """How gradients are computed: "whole" graph or "layerwise"."""

    @property
    def fits(self) -> bool:
        """Whether peak and cache together stay within the limit."""
        return self.peak + self.cache <= self.limit

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return f"MemoryPlan(peak {html.human_bytes(self.peak)} of {html.human_bytes(self.limit)}, {verdict})"

    def _repr_html_(self) -> str:
        scale, unit = (_GB, "GB") if self.peak >= _GB else (_MB, "MB")
        parts = [(name, size / scale) for name, size in {**self.parts, "cache": self.cache}.items() if size]
        verdict = "fits" if self.fits else "does not fit"
        title = f"<div><b>Memory: {html.human_bytes(self.peak)} at the peak {verdict} in {html.human_bytes(self.limit)}</b></div>"
        near = self.peak + self.cache > self.limit / 20  # a limit far above would leave nothing of the parts to see
        assumed = f"<div>{html.esc(self.workload)}. Largest at: {html.esc(self.moment)}.</div>"
        advice = "".join(f"<li>{html.esc(sentence)}</li>" for sentence in self.advice)
        bar = svg.stacked_bar(parts, self.limit / scale if near else None, unit=unit)
        return title + bar + assumed + (f"<ul>{advice}</ul>" if advice else "")


def preflight(lm: Any, data: Any, config: TrainConfig | None = None) -> MemoryPlan:
    """Predict a run's peak memory and say what to change where it is more than this machine has.

    Args:
        lm: the language model; only names and shapes of its parameters are looked at.
        data: the data set; only lengths are looked at. None: rows of `max_seq_length`.
        config: the settings; the defaults where left out.

    Raises:
        DataError: the data has no train split.
        ConfigError: a pattern in `train_only` or `freeze` matches nothing.
    """
    config = (config or TrainConfig()).fill_from(DataSettings() if data is None else data.settings)
    if data is not None and data.train is None:
        raise DataError("preflight needs a train split; this data has none. Add train.jsonl (or the key 'train').")
    plan = _plan(lm, data, config)
    return plan if plan.fits else dataclasses.replace(plan, advice=tuple(_advice(lm, data, config)))


def choose_backward(lm: Any, data: Any, config: TrainConfig, force: bool = False) -> str:
    """How a run computes its gradients: "whole" or "layerwise", as `config.backward` and `config.memory` say.

    Raises:
        MemoryLimitError: it does not fit into this machine's memory, and `force` is False.
    """
    plan = _plan(lm, data, config)
    if plan.fits or force:
        return plan.backward
    advice = "".join(f"\n  {sentence}" for sentence in _advice(lm, data, config))
    raise MemoryLimitError(
        f"This run needs {html.human_bytes(plan.peak + plan.cache)} ({plan.workload}), this machine has {html.human_bytes(plan.limit)}. "
        f"What would make it fit (force=True tries it all the same):{advice}"
    )


def memory_is_short(lm: Any, data: Any, config: TrainConfig) -> bool:
    """Whether a layerwise run should give freed memory back to the system at once, which takes time: with memory="lean", or with
    "auto" where the whole graph would not fit."""
    if config.memory != "auto":
        return config.memory == "lean"
    return not _plan_of("whole", lm, data, config).fits


def _plan(lm: Any, data: Any, config: TrainConfig) -> MemoryPlan:
    """The plan of the config's own way, or where that is open, of the fast one if it fits and the lean one if not."""
    backward = config.backward
    if backward == "auto":
        backward = {"fast": "whole", "lean": "layerwise"}.get(config.memory, "auto")
    if backward != "auto":
        return _plan_of(backward, lm, data, config)
    fast = _plan_of("whole", lm, data, config)
    return fast if fast.fits else _plan_of("layerwise", lm, data, config)


def _plan_of(backward: str, lm: Any, data: Any, config: TrainConfig) -> MemoryPlan:
    work = _workload(lm, data, config)
    trained = {name: work.parameters[name] for name in work.trained}
    stored = stored_dtype(config.weights, lm.dtype)
    always = {
        "weights": stored.size * sum(count(shape) for shape in work.parameters.values()),
        "optimizer state": predict_state_bytes(trained, config),
    }
    always["random bits"] = random_bits_bytes(trained, config, stored)
    find = layerwise_moments if backward == "layerwise" else moments
    found = find(work, update_bytes(trained, config, stored))
    moment = max(found, key=lambda name: sum(found[name].values()))
    parts = {**always, **found[moment]}
    rows, tokens = work.rows, work.tokens
    words = f"{rows} {'packed ' * config.packing}row{'s' * (rows > 1)} of {tokens:,} tokens in a micro-batch, {config.optimizer}"
    words += ", layerwise" if backward == "layerwise" else ", grad_checkpoint" if work.checkpoint else ""
    return MemoryPlan(parts, sum(parts.values()), machine_limit(), cache_limit(), moment, words, backward=backward)


def _workload(lm: Any, data: Any, config: TrainConfig) -> Workload:
    rows, tokens = config.batch_size, config.max_seq_length - 1
    targets = rows * tokens
    if data is not None:
        split = data.train
        lengths = split.lengths[split.trainable]
        widths = np.maximum(row_widths(lengths, config.max_seq_length, config.packing), 1)
        tokens, rows = int(widths.max()), min(rows, len(widths))
        targets = min(rows * tokens, _most_targets(split, rows, config))
    parameters = {name: array.shape for name, array in tree_flatten(lm.model.parameters())}
    trained = frozenset(trained_names(lm.model, config.train_only, config.freeze))
    return Workload(
        parameters=parameters,
        trained=trained,
        model=lm.config,
        rows=rows,
        tokens=tokens,
        targets=targets,
        micro_batches=config.grad_accumulation_steps,
        checkpoint=config.grad_checkpoint,
        on_cpu=on_cpu(),
        half=stored_dtype(config.weights, lm.dtype) != mx.float32,
        native=kernels_for(sum(count(parameters[name]) for name in trained)) is not None,
    )


def _most_targets(split: Any, rows: int, config: TrainConfig) -> int:
    """Trained positions of a micro-batch: those of the rows that have most; with packing, a row's part that is trained on."""
    if not config.packing:
        return max(1, int(np.sort(split.trained_lengths[split.trainable])[-rows:].sum()))
    share = split.trained_tokens / max(int((split.lengths[split.trainable] - 1).sum()), 1)
    return math.ceil(min(share, 1.0) * rows * (config.max_seq_length - 1))


def _advice(lm: Any, data: Any, config: TrainConfig) -> Iterator[str]:
    """Single changes that make it fit; where none does, all of them together."""
    fitting = []
    for words, changed in _changes(lm, data, config):
        plan = _plan(lm, data, changed)
        if plan.fits:
            fitting.append(f"{words}: {html.human_bytes(plan.peak)}.")
    if fitting:
        yield from fitting
        return
    plan = None
    for changes in _combinations(lm, data, config):
        plan = _plan(lm, data, config.replace(**changes))
        if plan.fits:
            words = ", ".join(f"{name}={value!r}" for name, value in changes.items())
            yield f"No single change is enough; these together are: {words}: {html.human_bytes(plan.peak)}."
            return
    yield (
        f"The weights alone are {html.human_bytes(plan.parts['weights'])} in bfloat16, and even layer by layer, with small batches, short "
        f"rows and adafactor, a step needs {html.human_bytes(plan.peak)}: take a smaller model, train a part of it (train_only), or a "
        "machine with more memory."
    )


def _combinations(lm: Any, data: Any, config: TrainConfig) -> Iterator[dict[str, Any]]:
    """Changes together, one more each time."""
    changes: dict[str, Any] = {"memory": "lean", "backward": "auto"}
    yield changes | {"optimizer": "adamw8bit"}
    yield changes | {"optimizer": "adamw8bit", "weights": "bfloat16"}
    changes |= {"optimizer": "adafactor", "weights": "bfloat16"}
    yield changes
    work = _workload(lm, data, config)
    if work.rows > 1:
        changes = changes | {"batch_size": 1, "grad_accumulation_steps": config.batch_size * config.grad_accumulation_steps}
        yield changes
    for length in _halves(work.tokens):
        yield changes | {"max_seq_length": length}


def _changes(lm: Any, data: Any, config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    if _plan(lm, data, config).backward == "whole":
        if not config.grad_checkpoint:
            yield "Set grad_checkpoint=True (about a third more time)", config.replace(grad_checkpoint=True)
        yield "Set memory='lean' (gradients layer by layer, up to twice the time)", config.replace(memory="lean", backward="auto")
    if stored_dtype(config.weights, lm.dtype) == mx.float32:
        yield "Set weights='bfloat16' (rounded stochastically)", config.replace(weights="bfloat16", rounding="stochastic")
    if config.optimizer in ("adamw", "lion"):
        name = f"{config.optimizer}8bit"
        yield f"Set optimizer={name!r} (moments of 8 bits)", config.replace(optimizer=name)
    for rows in _halves(_workload(lm, data, config).rows, 1):
        steps = -(-config.batch_size // rows) * config.grad_accumulation_steps
        changed = config.replace(batch_size=rows, grad_accumulation_steps=steps)
        if _plan(lm, data, changed).fits:
            yield f"Set batch_size={rows} and grad_accumulation_steps={steps} (as many rows in a step)", changed
            break
    for length in _halves(_workload(lm, data, config).tokens):
        changed = config.replace(max_seq_length=length)
        if _plan(lm, data, changed).fits:
            yield f"Set max_seq_length={length} (longer rows are cut)", changed
            break
    if config.optimizer in ("adamw", "adam", "lion", "muon"):
        yield "Set optimizer='adafactor' (needs another learning rate)", config.replace(optimizer="adafactor")


def _halves(size: int, low: int = 64) -> Iterator[int]:
    """Powers of two below `size`, the largest first, down to `low`."""
    power = 1 << max(size - 1, 1).bit_length() - 1
    while power >= low:
        if power < size:
            yield power
        power //= 2
