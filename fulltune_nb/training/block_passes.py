"""The passes through one block of the decoder by itself, which the layerwise engine is made of; compiled if wanted.

Dimension letters: B rows, T tokens, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from fulltune_nb.models.decoder import Block, Rotation
from fulltune_nb.training.piecewise import Arrays, gradients

Context = tuple[Rotation, mx.array | None]
"""A block's rotation table and mask."""


class BlockPasses:
    """A block's forward pass, and its backward pass, which computes the forward pass again.

    Args:
        block: without experts if compiled: how many tokens an expert gets is known only when the batch is there.
        compiled: once for each shape of batch. All blocks of a model share what g++ makes of it on the CPU (see `compiled`).
    """

    def __init__(self, block: Block, compiled: bool = False):
        self.block = block
        self._forward = mx.compile(self._output) if compiled else self._output
        self._backward = mx.compile(self._gradients) if compiled else self._gradients

    def forward(self, x: mx.array, context: Context) -> mx.array:
        """The block's output (B, T, D); lazy."""
        return self._run(self._forward, x, context)

    def backward(self, x: mx.array, cotangent: mx.array, context: Context) -> tuple[mx.array, Arrays]:
        """Gradients with respect to x (B, T, D), and to the trainable parameters by their names in the block; lazy."""
        return self._run(self._backward, x, cotangent, context)

    def _run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        parameters = self.block.parameters()
        try:
            return function(parameters, *inputs)
        finally:
            self.block.update(parameters)  # tracing leaves stand-ins in the block

    def _output(self, parameters: dict[str, Any], x: mx.array, context: Context) -> mx.array:
        self.block.update(parameters)  # frozen ones too: what is not an input would be a constant of the program
        return self.block(x, *context)

    def _gradients(self, parameters: dict[str, Any], x: mx.array, cotangent: mx.array, context: Context) -> tuple[mx.array, Arrays]:
        self.block.update(parameters)
        (to_x,), own = gradients({"": self.block}, lambda x: self.block(x, *context), [x], cotangent)
        return to_x, own
