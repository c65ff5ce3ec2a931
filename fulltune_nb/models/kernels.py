"""The element-wise functions and the attention product the decoder is built of, each with its fastest form per device.

Dimension letters: B rows, T tokens, S keys, H heads, K key/value heads, G = H / K, C head_dim.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.errors import ModelError


def _gelu_tanh(x: mx.array) -> mx.array:
    """`0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: `gelu_new` and `gelu_pytorch_tanh` of Hugging Face."""
    return 0.5 * x * (1.0 + mx.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "gelu": nn.gelu,
    "gelu_new": mx.compile(_gelu_tanh),
    "gelu_pytorch_tanh": mx.compile(_gelu_tanh),
    "relu": nn.relu,
}


def activation(name: str, x: mx.array) -> mx.array:
    """The named activation of `x`, element by element.

    Raises:
        ModelError: a name no supported checkpoint should have.
    """
    if name not in ACTIVATIONS:
        raise ModelError(f"config.json: hidden_act is {name!r}; supported are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name](x)


def gated_activation(name: str, gate: mx.array, up: mx.array) -> mx.array:
    """`act(gate) * up` (Shazeer 2020)."""
    return activation(name, gate) * up


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    """Softmax attention: queries (B, H, T, C), keys and values (B, K, S, C), mask (T, S) bool -> (B, H, T, C)."""
    scale = 1.0 / math.sqrt(queries.shape[-1])
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
