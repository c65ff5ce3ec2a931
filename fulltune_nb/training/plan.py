"""What a run will do, derived once from model, data and settings: batches, steps, stored dtype, engine, memory; and what to change
where it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from fulltune_nb import html
from fulltune_nb.cpu import Kernels, ensure_kernel_folder, kernels_for, lacks_compiler, on_cpu
from fulltune_nb.data.batches import StepBatches
from fulltune_nb.data.dataset import Split
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.device import length_multiple
from fulltune_nb.errors import IN_TRAINING, ConfigError, DataError, MemoryLimitError, tells_device_errors
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.parameters import in_dtype, put_trainable, swapped_in, trainable_of
from fulltune_nb.settings import whole_number
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.engine import make_engine
from fulltune_nb.training.gradients import Engine
from fulltune_nb.training.memory import MemoryPlan, Workload, kept_freed
from fulltune_nb.training.objective import PLAIN, Loss, Objective
from fulltune_nb.training.optimizers import check_patterns, update_bytes
from fulltune_nb.training.parallel import Ranks
from fulltune_nb.training.rounding import NEAREST_WARNING, stored_dtype
from fulltune_nb.training.schedule import warmup_steps

COMPILING_PAYS_FROM = 3e13
"""Operations of a run, 6 a weight and token, from which on half a minute of compiling pays: some five minutes on two cores."""


@dataclass(frozen=True)
class Plan:
    """What a run will do. Nothing of model or data has been changed when it is made."""

    batches: StepBatches
    """The micro-batches of every step."""
    total_steps: int
    dtype: mx.Dtype
    """In which weights are stored while they are trained."""
    memory: MemoryPlan
    """What a step needs."""
    compiles: bool
    """Whether `mx.compile` is used."""
    grad_checkpoint: bool
    """Whether the whole graph keeps only the blocks' inputs for the backward pass."""
    gives_back: bool
    """Whether freed memory is given back to the system at once, which takes time."""
    kernels: Kernels | None
    """Of our own, on a Linux CPU."""
    notes: tuple[tuple[str, str], ...]
    """What the user should hear of: kind and message of an event each."""
    balance: float = 0.0
    """Weight of the router's balance loss."""
    objective: Objective = PLAIN
    """What is minimized."""

    @property
    def backward(self) -> str:
        """How gradients are computed: over the "whole" graph or "layerwise"."""
        return self.memory.backward

    def make_engine(self, model: Decoder, in_stacks: bool, ranks: Ranks | None = None) -> Engine:
        """What computes the gradients; the model's trainable parameters are those of the run by now. See `WholeGraph`."""
        how = self.grad_checkpoint, self.compiles, self.kernels, self.balance
        return make_engine(model, self.backward, *how, in_stacks, ranks, self.objective)


def make_plan(
    lm: Any,
    data: Any,
    config: TrainConfig,
    force: bool = False,
    backward: str | None = None,
    loss: Loss | None = None,
    ranks: int = 1,
) -> Plan:
    """The plan of a run.

    Args:
        lm: the language model; names, shapes and dtype of its parameters are looked at. Near this machine's limit a step is measured.
        data: the data set, with a train split.
        config: the settings, those of the data too.
        force: plan what does not fit into this machine's memory too.
        backward: "whole" or "layerwise", decided before; None: as the settings and the memory say.
        loss: in place of the cross-entropy.
        ranks: how many processes train together.

    Raises:
        ConfigError: a pattern in `train_only`, `freeze` or `lr_factors` matches nothing, or settings go against each other.
        MemoryLimitError: the run does not fit; the message says what would make it fit.
    """
    check_patterns(lm.model, config)
    _check_rows_together(config)
    objective = Objective(config.label_smoothing, loss, config.neftune_alpha, config.seed)
    notes, batches = [], step_batches(data.train, config)
    if config.packing:
        notes.append(("packing", batches.packing_note))
    total_steps = config.total_steps(batches.steps_per_epoch)
    work = Workload.of(lm, data, config, ranks)
    if (name := str(work.stored).removeprefix("mlx.core.")) != lm.dtype:
        notes.append(("dtype", f"weights were {lm.dtype} and are trained in {name}"))
    if name == "bfloat16" and config.rounding == "nearest":
        notes.append(("rounding", NEAREST_WARNING))
    decided = force or backward is not None
    memory = plan_memory(work, backward, None if decided or name != lm.dtype else partial(measured, lm=lm, batches=batches))
    if not memory.fits and not decided:
        raise MemoryLimitError(
            f"This run needs {html.human_bytes(memory.peak + memory.cache)} ({memory.workload}), this machine has "
            f"{html.human_bytes(memory.limit)}. What would make it fit (force=True tries it all the same):"
            + "".join(f"\n  {sentence}" for sentence in _advice(lm, data, config, ranks))
        )
    kernels = kernels_for(work.num_trained)
    compiles, note = _choose_compile(work, memory.backward, 6 * work.num_trained * total_steps * batches.tokens_per_step)
    if compiles and loss is not None and memory.backward == "whole" and (kernels is None or lm.config.num_experts):
        compiles, note = False, config.compile and "compile=True has no effect: with loss= the whole graph is not compiled"
    if note:
        notes.append(("compile", note))
    notes += _without_effect(config, data, total_steps) + _beyond_positions(lm, data)
    short = config.memory == "lean" or (config.memory == "auto" and not work.count("whole").fits)
    gives_back = memory.backward == "layerwise" and short
    balance = config.router_aux_loss_coef
    if balance and lm.config.scores == "sigmoid":
        raise ConfigError(
            f"router_aux_loss_coef={balance:g}: the balance loss is of a softmax over the experts. Those of {lm.config.family} are scored"
            " by a sigmoid each, and transformers has no such loss for them: a correction, which stays as it is, balances them. Set 0."
        )
    if balance and not lm.config.num_experts:
        notes.append(("router_aux_loss_coef", f"router_aux_loss_coef={balance:g} has no effect: the model has no experts"))
    if config.ema_decay is not None:
        what = "validations during the run, best/ and load_best are of the moving average of the weights"
        notes.append(("average", f"ema_decay={config.ema_decay:g}: {what}; trainer.averaged() has the model have it"))
    if objective.note:
        notes.append(("loss", objective.note))
    how = config.grad_checkpoint, gives_back, kernels
    return Plan(batches, total_steps, work.stored, memory, compiles, *how, tuple(notes), balance, objective)


def _check_rows_together(config: TrainConfig) -> None:
    """
    Raises:
        ConfigError: loading may have left out or split some of the rows that are to stay together.
    """
    given = {"bad_rows": config.bad_rows == "skip", "long_rows": config.long_rows in ("drop", "split")}
    given["valid_fraction"] = bool(config.valid_fraction)
    if config.rows_together > 1 and (wrong := [name for name, is_wrong in given.items() if is_wrong]):
        what = ", ".join(f"{name}={getattr(config, name)!r}" for name in wrong)
        raise ConfigError(f"rows_together={config.rows_together}: with {what} rows move up to where others stood. Leave that out.")


def _without_effect(config: TrainConfig, data: Any, total_steps: int) -> list[tuple[str, str]]:
    """Settings that do nothing in this run: kind and message of an event each."""
    notes, form = [], config.lr_schedule
    if config.patience is not None and (data.valid is None or not config.val_batches):
        why = "the data has no valid split" if data.valid is None else "val_batches=0 leaves evaluations out"
        notes.append(("patience", f"patience={config.patience} has no effect: {why}, so nothing is evaluated during training"))
    if config.load_best and (data.valid is None or not config.val_batches):
        notes.append(("load_best", "load_best=True has no effect: nothing is evaluated during training, so the last weights stay"))
    warmup = warmup_steps(form.get("warmup", config.warmup) if isinstance(form, Mapping) else config.warmup, total_steps)
    if 0 < total_steps <= warmup:
        notes.append(("warmup", f"warmup={warmup:,} is as long as the run of {total_steps:,} steps or longer: it ends below the peak rate"))
    return notes


def _beyond_positions(lm: Any, data: Any) -> list[tuple[str, str]]:
    """A note for each split with rows longer than what the model was made for: kind and message of an event."""
    if (limit := lm.config.positions) is None:
        return []
    notes = []
    for name, split in data.splits.items():
        if longer := int(np.count_nonzero(split.lengths > limit)):
            first = split[int(np.argmax(split.lengths > limit))].source
            message = f"{name}: {longer:,} of {len(split):,} rows are longer than the {limit:,} positions that the model was made for"
            notes.append(("positions", f"{message} (max_position_embeddings; first: {first}). max_seq_length={limit} cuts or splits them"))
    return notes


def step_batches(split: Split, config: TrainConfig) -> StepBatches:
    """The micro-batches that a config asks for."""
    return StepBatches(
        split,
        batch_size=config.batch_size,
        seed=config.seed,
        grad_accumulation_steps=config.grad_accumulation_steps,
        packing=config.packing,
        max_seq_length=config.max_seq_length,
        multiple_of=length_multiple(),
        rows_together=config.rows_together,
    )


def _choose_compile(work: Workload, backward: str, operations: float) -> tuple[bool, str | None]:
    """Whether a run of so many operations is compiled, and what the user should hear about it. Left open, it is where that pays."""
    config, reason = work.config, None
    if on_cpu():  # runs that began when grad_checkpoint could not be compiled go on as they began
        fast = kernels_for(work.num_trained) is not None and not (config.grad_checkpoint and backward == "whole")
        pays = fast and operations >= COMPILING_PAYS_FROM
    else:
        pays = True
    if work.model.num_experts and on_cpu():
        reason = "how many tokens an expert gets is known only when the batch is there"
    elif lacks_compiler():
        reason = "MLX compiles with g++ here, and there is none. On Debian or Ubuntu: apt-get install g++"
    elif on_cpu():
        reason = ensure_kernel_folder().problem
    if config.compile:
        return reason is None, reason and f"compile=True has no effect: {reason}"
    if config.compile is False or reason or not pays:
        return False, None
    note = "a long run, so it is compiled: once a machine, the first steps take half a minute more (compile=False leaves that out)"
    return True, note if on_cpu() else None


# -- memory: which engine, does it fit, what to change --------------------------------------------------------------------------------


def preflight(lm: Any, data: Any, config: TrainConfig | None = None, measure: bool = False, ranks: int = 1) -> MemoryPlan:
    """A run's peak memory, and what to change where it is more than this machine has.

    Counting allocates nothing, and errs on the safe side. Measuring is as exact as the machine is.

    Args:
        lm: the language model; only names and shapes of its parameters are looked at, unless measured.
        data: the data set; only lengths are looked at, unless measured. None: rows of `max_seq_length`.
        config: the settings; the defaults where left out.
        measure: run forward and backward pass of the step with the widest rows. No weight is updated: weights, optimizer, random state
            and history stay as they are. It takes the time of a step, and as much memory, without the optimizer's state.
        ranks: how many processes are to train together; the plan is of one of them. Those of one machine share its memory, which is
            not looked at here.

    Raises:
        DataError: the data has no train split, or there is no data to measure with.
        ConfigError: a pattern in `train_only` or `freeze` matches nothing.
    """
    if (measure and data is None) or (data is not None and data.train is None):
        raise DataError("preflight needs a train split; this data has none. Add train.jsonl (or the key 'train').")
    config = (config or TrainConfig()).fill_from(DataSettings() if data is None else data.settings)
    work = Workload.of(lm, data, config, whole_number("preflight: ranks", ranks, 1))
    plan = plan_memory(work)
    if measure:
        plan = measured(plan, work, lm, step_batches(data.train, config))
    return plan if plan.fits else dataclasses.replace(plan, advice=tuple(_advice(lm, data, config, ranks)))


Measure = Callable[[MemoryPlan, Workload], MemoryPlan]


def plan_memory(work: Workload, backward: str | None = None, measure: Measure | None = None) -> MemoryPlan:
    """What a run needs as `backward` or else its settings say; where these leave it open, over the whole graph if that fits.

    Args:
        work: what a step works on.
        backward: "whole" or "layerwise".
        measure: `measured`, for what is counted to be near the limit.
    """
    config = work.config
    if backward is None:
        backward = config.backward if config.backward != "auto" else {"fast": "whole", "lean": "layerwise"}.get(config.memory, "auto")

    def plan(way: str) -> MemoryPlan:
        counted = work.count(way)
        return measure(counted, work) if measure and counted.near_limit else counted

    if backward == "auto":
        return whole if (whole := plan("whole")).fits else plan("layerwise")
    return plan(backward)


@tells_device_errors(IN_TRAINING)
def measured(plan: MemoryPlan, work: Workload, lm: Any, batches: StepBatches) -> MemoryPlan:
    """The plan with the peak of a real forward and backward pass. Each update's own bytes are counted still: none is made."""
    model, stored = lm.model, stored_dtype(work.config.weights, lm.dtype)
    trainable = set(trainable_of(model))  # names only: who holds an array keeps its memory
    put_trainable(model, work.trained)
    try:
        with swapped_in(model, in_dtype(model, stored)):
            mx.eval(model.parameters())
            before, updating = mx.get_active_memory(), 0
            mx.reset_peak_memory()
            compiled = not on_cpu() and _choose_compile(work, plan.backward, 0)[0]
            how = work.config.grad_checkpoint, compiled, kernels_for(work.num_trained)
            engine = make_engine(model, plan.backward, *how, in_stacks=False)  # stacks would be of arrays that are there for now only
            gradients = engine.gradients(1, batches.of_step(batches.widest_step()))
            for piece in gradients.pieces():
                shapes = {name: array.shape for name, array in piece.gradients.items()}
                updating = max(updating, mx.get_active_memory() + update_bytes(shapes, work.config, stored))
                del piece  # before the next one is computed
            found = max(mx.get_peak_memory(), updating) - before
    finally:
        put_trainable(model, trainable)
    parts = {**work.always, "gradients and activations": found}
    cache, moment = kept_freed(parts, plan.limit), "forward or backward pass"
    return dataclasses.replace(plan, parts=parts, peak=sum(parts.values()), cache=cache, moment=moment, measured=True)


def _advice(lm: Any, data: Any, config: TrainConfig, ranks: int) -> Iterator[str]:
    """Single changes that make it fit; where none does, all of them together."""

    def plan(changes: dict[str, Any]) -> MemoryPlan:
        return plan_memory(Workload.of(lm, data, config.replace(**changes), ranks))

    def named(changes: dict[str, Any], separator: str) -> str:
        return separator.join(f"{name}={value!r}" for name, value in changes.items() if value != getattr(config, name))

    def size(count: int) -> str:
        return html.in_one_unit([count, changed.limit])[0]  # in the unit of what there is

    enough = False
    for costs, candidates in _changes(Workload.of(lm, data, config, ranks)):
        for changes in candidates:
            if (changed := plan(changes)).fits:
                enough = True
                yield f"Set {named(changes, ' and ')} ({costs}): {size(changed.peak)}."
                break
    if enough:
        return
    for changes in _combinations(Workload.of(lm, data, config, ranks)):
        changed = plan(changes)
        if changed.fits:
            together = named(changes, ", ")
            yield f"No single change is enough; these together are: {together}: {size(changed.peak)}."
            return
    yield (
        f"The weights alone are {size(changed.parts['weights'])} in bfloat16, and even layer by layer, with small batches, "
        f"short rows and adafactor, a step needs {size(changed.peak)}: take a smaller model, train a part of it (train_only), "
        "or a machine with more memory."
    )


def _changes(work: Workload) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What a single change costs, and its settings, those that change least first."""
    config = work.config
    if work.ranks > 1 and not config.shard_optimizer:
        yield "more traffic between ranks", [{"shard_optimizer": True}]
    if plan_memory(work).backward == "whole":
        if not config.grad_checkpoint:
            yield "about a third more time", [{"grad_checkpoint": True}]
        yield "gradients layer by layer, up to twice the time", [{"memory": "lean", "backward": "auto"}]
    if work.stored == mx.float32:
        yield "rounded stochastically", [{"weights": "bfloat16", "rounding": "stochastic"}]
    if config.optimizer in ("adamw", "lion"):
        yield "moments of 8 bits", [{"optimizer": f"{config.optimizer}8bit"}]
    steps = config.grad_accumulation_steps
    fewer = [{"batch_size": rows, "grad_accumulation_steps": -(-config.batch_size // rows) * steps} for rows in _halves(work.rows, 1)]
    yield "as many rows in a step", fewer
    yield "longer rows are cut", [{"max_seq_length": length} for length in _halves(work.tokens)]
    if config.optimizer in ("adamw", "adam", "lion", "muon"):
        yield "needs another learning rate", [{"optimizer": "adafactor"}]


def _combinations(work: Workload) -> Iterator[dict[str, Any]]:
    """Changes together, one more each time."""
    config = work.config
    changes: dict[str, Any] = {"memory": "lean", "backward": "auto"}
    yield changes | {"optimizer": "adamw8bit"}
    yield changes | {"optimizer": "adamw8bit", "weights": "bfloat16"}
    changes |= {"optimizer": "adafactor", "weights": "bfloat16"}
    yield changes
    if work.rows > 1:
        changes = changes | {"batch_size": 1, "grad_accumulation_steps": config.batch_size * config.grad_accumulation_steps}
        yield changes
    for length in _halves(work.tokens):
        yield changes | {"max_seq_length": length}


def _halves(size: int, low: int = 64) -> Iterator[int]:
    """Powers of two below `size`, the largest first, down to `low`."""
    power = 1 << max(size - 1, 1).bit_length() - 1
    while power >= low:
        if power < size:
            yield power
        power //= 2
