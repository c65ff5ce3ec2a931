"""The element-wise functions and the attention product the decoder is built of, each in its fastest form for the device.

Dimension letters: B rows, T tokens, S keys, H heads, K key/value heads, G = H / K, C head_dim.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.cpu import fast_math as cpu_math
from fulltune_nb.errors import ModelError

ACTIVATIONS = {
    "silu": cpu_math.silu,
    "swish": cpu_math.silu,
    "gelu": nn.gelu,
    "gelu_new": cpu_math.gelu_tanh,
    "gelu_pytorch_tanh": cpu_math.gelu_tanh,
    "relu": nn.relu,
}
_GATED = {"silu": cpu_math.swiglu, "swish": cpu_math.swiglu, "gelu_new": cpu_math.geglu, "gelu_pytorch_tanh": cpu_math.geglu}


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """What training computes in: on the CPU float32, whose products alone have a fast BLAS there, else the weights' own dtype."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else stored


@mx.custom_function
def _rows_in_float32(weight: mx.array, ids: mx.array) -> mx.array:
    return weight[ids].astype(mx.float32)


@_rows_in_float32.vjp
def _rows_in_float32_vjp(primals, cotangent, _output):
    # Summed up in float32: in half precision a frequent token's gradient would lose what its later places add.
    weight, ids = primals
    return mx.zeros(weight.shape, dtype=mx.float32).at[ids].add(cotangent), mx.zeros_like(ids)


def lookup(weight: mx.array, ids: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
    """Rows of an embedding (V, D) for ids (B, T), in `dtype` or the weight's own: (B, T, D)."""
    if dtype is None or dtype == weight.dtype:
        return weight[ids]
    return _rows_in_float32(weight, ids) if dtype == mx.float32 else weight[ids].astype(dtype)


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
    return _GATED[name](gate, up) if name in _GATED else activation(name, gate) * up


def attend(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    """Softmax attention: queries (B, H, T, C), keys and values (B, K, S, C) -> (B, H, T, C).

    The mask is (T, S) bool, True where a token may look, or (B, 1, T, S) where that differs by row; None: everywhere.
    """
    scale = 1.0 / math.sqrt(queries.shape[-1])
    if cpu_math.applies(queries, keys, values):
        return _attend_on_cpu(queries * scale, keys, values, mask)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def attention_shares(queries: mx.array, keys: mx.array, mask: mx.array | None) -> mx.array:
    """How much each token attends to each, which `attend` never writes down: (B, H, T, C), (B, K, S, C) -> (B, H, T, S) float32."""
    groups = queries.shape[1] // keys.shape[1]
    scores = queries.astype(mx.float32) @ mx.repeat(keys, groups, axis=1).astype(mx.float32).swapaxes(-1, -2)
    scores = scores * (1.0 / math.sqrt(queries.shape[-1]))
    return cpu_math.softmax(scores if mask is None else mx.where(mask, scores, -math.inf))


def _attend_on_cpu(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None) -> mx.array:
    """The heads of a group share their keys, so they are one larger product instead of G small ones."""
    rows, heads, length, head_dim = queries.shape
    kv_heads, num_keys = keys.shape[1:3]
    grouped = queries.reshape(rows, kv_heads, -1, head_dim)  # (B, H, T, C) -> (B, K, G*T, C)
    scores = (grouped @ keys.swapaxes(-1, -2)).reshape(rows, heads, length, num_keys)  # (B, K, G*T, S) -> (B, H, T, S)
    if mask is not None:
        scores = mx.where(mask, scores, -math.inf)
    shares = cpu_math.softmax(scores).reshape(rows, kv_heads, -1, num_keys)
    return (shares @ values).reshape(rows, heads, length, head_dim)
