"""What a run will do, derived once from model, data and settings: batches, steps, stored dtype, engine, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from fulltune_nb.cpu import Kernels, kernels_for, lacks_compiler
from fulltune_nb.data.batches import StepBatches
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import ModelConfig
from fulltune_nb.models.parameters import parameters_of, trained_names
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.engine import WholeGraph
from fulltune_nb.training.gradients import Engine
from fulltune_nb.training.layerwise import Layerwise
from fulltune_nb.training.memory import choose_backward, memory_is_short
from fulltune_nb.training.rounding import NEAREST_WARNING, stored_dtype

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
    backward: str
    """How gradients are computed: "whole" graph or "layerwise"."""
    compiles: bool
    """Whether `mx.compile` is used."""
    checkpoint: bool
    """Whether only the blocks' inputs are kept for the backward pass of the whole graph."""
    gives_back: bool
    """Whether freed memory is given back to the system at once, which takes time."""
    kernels: Kernels | None
    """Of our own, on a Linux CPU."""
    notes: tuple[tuple[str, str], ...]
    """What the user should hear of: kind and message of an event each."""

    def make_engine(self, model: Decoder) -> Engine:
        """What computes the gradients; the model's trainable parameters are those of the run by now."""
        if self.backward == "layerwise":
            return Layerwise(model, self.compiles, self.kernels)
        return WholeGraph(model, self.checkpoint, self.compiles, self.kernels)


def make_plan(lm: Any, data: Any, config: TrainConfig, force: bool = False, backward: str | None = None) -> Plan:
    """The plan of a run.

    Args:
        lm: the language model; names, shapes and dtype of its parameters are looked at.
        data: the data set, with a train split.
        config: the settings.
        force: plan what does not fit into this machine's memory too.
        backward: "whole" or "layerwise", decided before; None: as the settings and the memory say.

    Raises:
        ConfigError: a pattern in `train_only` or `freeze` matches nothing.
        MemoryLimitError: the run does not fit; the message says what would make it fit.
    """
    notes = []
    batches = StepBatches(
        data.train,
        batch_size=config.batch_size,
        seed=config.seed,
        grad_accumulation_steps=config.grad_accumulation_steps,
        packing=config.packing,
        max_seq_length=config.max_seq_length,
    )
    if config.packing:
        notes.append(("packing", batches.packing_note))
    total_steps = config.total_steps(batches.steps_per_epoch)
    dtype = stored_dtype(config.weights, lm.dtype)
    if (name := str(dtype).removeprefix("mlx.core.")) != lm.dtype:
        notes.append(("dtype", f"weights were {lm.dtype} and are trained in {name}"))
    if name == "bfloat16" and config.rounding == "nearest":
        notes.append(("rounding", NEAREST_WARNING))
    shapes = {name: array.shape for name, array in parameters_of(lm.model).items()}
    trained = sum(math.prod(shapes[name]) for name in trained_names(lm.model, config.train_only, config.freeze))
    backward = backward or choose_backward(lm, data, config, force)
    operations = 6 * trained * total_steps * batches.tokens_per_step
    compiles, note = _choose_compile(lm.config, config, backward, trained, operations)
    if note:
        notes.append(("compile", note))
    gives_back = backward == "layerwise" and memory_is_short(lm, data, config)
    checkpoint = config.grad_checkpoint and backward == "whole"
    return Plan(batches, total_steps, dtype, backward, compiles, checkpoint, gives_back, kernels_for(trained), tuple(notes))


def _choose_compile(
    model: ModelConfig, config: TrainConfig, backward: str, trained: int, operations: float
) -> tuple[bool, str | None]:
    """Whether a run is compiled, and what the user should hear about it; left open, only a long one is, where our own kernels are."""
    if config.compile is False:
        return False, None
    reason = _why_not_compiled(model, config, backward)
    if config.compile:
        return reason is None, reason
    if reason or kernels_for(trained) is None or operations < COMPILING_PAYS_FROM:
        return False, None
    return True, "a long run, so it is compiled: once a machine, the first steps take half a minute more (compile=False leaves that out)"


def _why_not_compiled(model: ModelConfig, config: TrainConfig, backward: str) -> str | None:
    if config.grad_checkpoint and backward == "whole":
        return "compile=True has no effect: compiled, what grad_checkpoint computes again would be found to be there already, and kept"
    if model.num_experts:
        return "compile=True has no effect: how many tokens an expert gets is known only when the batch is there"
    if lacks_compiler():
        return "compile=True has no effect: MLX compiles with g++ here, and there is none. On Debian or Ubuntu: apt-get install g++"
    return None
