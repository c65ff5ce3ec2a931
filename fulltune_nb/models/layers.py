"""Linear maps, norms and the feed-forward part, of which blocks are made.

Dimension letters: B rows, T tokens, D hidden_size, H heads, C head_dim.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.cpu import fast_math as cpu_math
from fulltune_nb.models.activations import ACTIVATIONS, CLAMPED_GATES, GATED_ACTIVATIONS, XIELU, XIelu
from fulltune_nb.models.model_config import ModelConfig


class Linear(nn.Linear):
    """`nn.Linear`, with gradients that lie row by row."""

    def __call__(self, x: mx.array) -> mx.array:
        return cpu_math.linear(x, self.weight, self.get("bias"))


class Norm(nn.Module):
    """RMS norm (Zhang & Sennrich 2019) or layer norm, with the parameters the kind has; computed in float32.

    Args:
        kind: as `Family.norm`.
        size: (D,); or (H, C), each head's own weight for x (B, H, T, C).
        eps: added to the variance.
        scale: what the output is multiplied by.
    """

    def __init__(self, kind: str, size: int | tuple[int, int], eps: float, scale: float | None = None):
        super().__init__()
        self._kind, self._eps, self._scale = kind, eps, scale
        if kind.endswith("plus_one"):
            self.weight = mx.zeros(size)
        elif kind != "layer_no_params":
            self.weight = mx.ones(size)
        if kind in ("layer", "layer_plus_one"):
            self.bias = mx.zeros(size)

    def __call__(self, x: mx.array) -> mx.array:
        normed = self._normed(x)
        return normed if self._scale is None else normed * self._scale

    def _normed(self, x: mx.array) -> mx.array:
        function = mx.fast.rms_norm if self._kind.startswith("rms") else mx.fast.layer_norm
        weight, bias = self.get("weight"), () if self._kind.startswith("rms") else (self.get("bias"),)
        if weight is not None and weight.ndim == 2:
            plain = function(x.astype(mx.float32), None, *([None] if bias else []), self._eps)
            return (plain * weight[:, None]).astype(x.dtype)
        if self._kind.endswith("plus_one"):  # in bfloat16, 1 + weight would lose the weight's last bits
            scale = 1.0 + weight.astype(mx.float32)
            return function(x.astype(mx.float32), scale, *(part.astype(mx.float32) for part in bias), self._eps).astype(x.dtype)
        return function(x, weight, *bias, self._eps)


class HeadNorms(nn.Module):
    """A norm for each head: (B, H, T, C) -> (B, H, T, C)."""

    def __init__(self, kind: str, heads: int, size: int, eps: float):
        super().__init__()
        self.norms = [Norm(kind, size, eps) for _ in range(heads)]

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([norm(x[:, head : head + 1]) for head, norm in enumerate(self.norms)], axis=1)


class MLP(nn.Module):
    """Feed-forward: `down(act(gate(x)) * up(x))` when gated (Shazeer 2020), else `down(act(up(x)))`.

    Args:
        config: of the model.
        size: of what is between; None: the model's intermediate_size.
    """

    def __init__(self, config: ModelConfig, size: int | None = None):
        super().__init__()
        self._activation, self._numbers = config.activation, config.activation_numbers
        hidden, size = config.hidden_size, size or config.intermediate_size
        if "gate_up_proj" in config.fused:
            self.gate_up_proj = Linear(hidden, 2 * size, bias=False)
        else:
            if config.mlp != "plain":
                self.gate_proj = Linear(hidden, size, bias="gate_proj" in config.biases)
            self.up_proj = Linear(hidden, size, bias="up_proj" in config.biases)
        self.down_proj = Linear(size, hidden, bias="down_proj" in config.biases)
        if config.activation == XIELU:
            self.act_fn = XIelu()

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            return self.down_proj(self._gated(*mx.split(self.gate_up_proj(x), 2, axis=-1)))
        if "gate_proj" in self:
            return self.down_proj(self._gated(self.gate_proj(x), self.up_proj(x)))
        activation = self.act_fn if "act_fn" in self else ACTIVATIONS[self._activation]
        return self.down_proj(activation(self.up_proj(x)))

    def _gated(self, gate: mx.array, up: mx.array) -> mx.array:
        if self._activation in CLAMPED_GATES:
            return CLAMPED_GATES[self._activation][0](gate, up, *self._numbers)
        gated = GATED_ACTIVATIONS.get(self._activation)
        return gated(gate, up) if gated else ACTIVATIONS[self._activation](gate) * up
