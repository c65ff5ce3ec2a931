"""The exponential moving average of the trained weights, kept beside them (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from fulltune_nb.cpu import evaluate
from fulltune_nb.models.parameters import Arrays

PART = "average"
"""Its arrays in an optimizer's state are called by the parameter, a dot, and this."""


class MovingAverage:
    """After each step, average + (1 - decay) (weights - average); it begins with the weights before the first.

    In float32 whatever the weights' dtype: in bfloat16 an average with a decay of 0.999 would stand still, as a thousandth of a
    difference is below half its last bit.

    Args:
        parameters: module path -> the weights to be averaged.
        decay: from 0 (the last weights) to below 1.

    Attributes:
        arrays: module path -> average, float32, evaluated.
    """

    def __init__(self, parameters: Mapping[str, mx.array], decay: float):
        self.decay = decay
        self.arrays: Arrays = {name: array.astype(mx.float32) for name, array in parameters.items()}
        mx.eval(self.arrays)

    def update(self, parameters: Mapping[str, mx.array]) -> None:
        """Takes in the weights of a step, a tensor at a time; by `evaluate`."""
        for name in self.arrays:
            difference = parameters[name].astype(mx.float32) - self.arrays[name]
            self.arrays[name] = self.arrays[name] + (1.0 - self.decay) * difference
            del difference  # before the next one's
            evaluate(self.arrays[name])
