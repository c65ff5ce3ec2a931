"""Loss and gradients of the whole graph, compiled: the same numbers with fewer passes over memory. (Layer by layer: `block_passes`.)

Element-wise operations that follow each other become one. On the CPU, MLX has each such group compiled by g++ when it first meets
it, some 35 of them in half a minute, and keeps them in the temporary folder, where later processes find them. Each shape of batch
is then only traced anew (a fraction of a second), and of shapes there are few (`data.shapes`).
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from fulltune_nb.data.batching import Batch
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.training.backward import Gradients, batch_arrays, share_of_loss
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.native import kernels_for

PAYS_FROM = 3e13
"""Operations of a run, 6 a weight and token, from which on half a minute of compiling pays: some five minutes on two cores."""


def choose_compile(model: Decoder, config: TrainConfig, backward: str, tokens: float) -> tuple[bool, str | None]:
    """Whether a run is compiled, and what the user should hear about it.

    Args:
        model: the run's.
        config: the run's; `compile=None` means on a CPU where our own kernels could be compiled, if the run is long enough.
        backward: "whole" or "layerwise".
        tokens: of the whole run.
    """
    if config.compile is False:
        return False, None
    reason = why_not_compiled(model, config, backward)
    if config.compile:
        return reason is None, reason
    weights = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    if reason or kernels_for(weights) is None or 6 * weights * tokens < PAYS_FROM:
        return False, None
    return True, "a long run, so it is compiled: once a machine, the first steps take half a minute more (compile=False leaves that out)"


def why_not_compiled(model: Decoder, config: TrainConfig, backward: str) -> str | None:
    """Why a run cannot be compiled; None: it can.

    Args:
        model: the run's.
        config: the run's.
        backward: "whole" or "layerwise".
    """
    if config.grad_checkpoint and backward == "whole":
        return "compile=True has no effect: compiled, what grad_checkpoint computes again would be found to be there already, and kept"
    if model.config.num_experts:
        return "compile=True has no effect: how many tokens an expert gets is known only when the batch is there"
    if mx.default_device().type == mx.DeviceType.cpu and sys.platform != "darwin" and shutil.which("g++") is None:
        return "compile=True has no effect: MLX compiles with g++ here, and there is none. On Debian or Ubuntu: apt-get install g++"
    return None


class CompiledGradients:
    """`backward.loss_and_gradients` of one model without experts, compiled once for each shape of batch."""

    def __init__(self, model: Decoder):
        self._compiled = mx.compile(lambda parameters, arrays: _loss_and_gradients(model, parameters, arrays))

    def __call__(self, model: Decoder, batch: Batch, step_tokens: int) -> tuple[mx.array, Gradients]:
        """As `backward.loss_and_gradients`; nothing is evaluated yet."""
        parameters = model.parameters()
        try:
            return self._compiled(parameters, batch_arrays(batch, step_tokens))
        finally:
            model.update(parameters)  # tracing leaves stand-ins in the model


def _loss_and_gradients(model: Decoder, parameters: dict[str, Any], arrays: dict[str, mx.array]) -> tuple[mx.array, Gradients]:
    model.update(parameters)  # frozen ones too: what is not an input would be a constant of the program
    return nn.value_and_grad(model, lambda model: share_of_loss(model, arrays))(model)
