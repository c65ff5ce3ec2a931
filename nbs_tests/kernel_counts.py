"""Counts the kernels that a graph takes on a GPU, where there is none: the nodes of the graph that are no views.

    with as_on_gpu():
        found = kernels(*mx.compile(step)(arrays))
    found.total()

What MLX computes on a GPU in one kernel and on a CPU in several has a stand-in of as many nodes there, none of which `mx.compile`
joins with others: `as_on_gpu`.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import mlx.core as mx

from nbs_tests.gpu_like import gpu_like

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "CustomTransforms", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
"""Nodes that compute nothing; a reshaped array that has to be copied is counted as none too."""


def kernels(*outputs: mx.array) -> Counter[str]:
    """What `outputs`, which must not be evaluated, are computed by: kind of node -> kernels."""
    written = io.StringIO()
    mx.export_to_dot(written, *outputs)
    graph = written.getvalue()
    nodes = re.findall(r'(\d+) \[label ?= ?"([A-Za-z]+)[^"]*", shape=rectangle', graph)
    inputs = Counter(re.findall(r"-> (\d+)$", graph, re.MULTILINE))
    found: Counter[str] = Counter()
    for node, kind in nodes:
        if kind not in VIEWS:
            found[kind] += inputs[node] if kind == "Concatenate" else 1  # each part is copied
    return found


def _node(x: mx.array, *others: mx.array | None) -> mx.array:
    """One kernel that makes of `x` and others an array like `x`; its values mean nothing."""
    return mx.sort(mx.depends([x], [other for other in others if isinstance(other, mx.array)])[0])


def _normed(x: mx.array, *parameters: mx.array | None) -> mx.array:
    """As `mx.fast.rms_norm` and `layer_norm`: one kernel, and backward one for each of `x`, weight and bias."""
    given = [array for array in parameters if array is not None]
    dtype = mx.result_type(x, *given)

    @mx.custom_function
    def norm(x: mx.array, *given: mx.array) -> mx.array:
        return _node(x, *given)

    @norm.vjp
    def backward(primals: tuple[mx.array, ...] | mx.array, gradient: mx.array, _output: mx.array) -> tuple[mx.array, ...]:
        primals = primals if isinstance(primals, tuple) else (primals,)
        return tuple(_node(primal, gradient, primals[0]) for primal in primals)

    return norm(x.astype(dtype), *(array.astype(dtype) for array in given))


@mx.custom_function
def _turned(x: mx.array) -> mx.array:
    return _node(x)


@_turned.vjp
def _turned_vjp(_x: mx.array, gradient: mx.array, _output: mx.array) -> mx.array:
    return _node(gradient)


def _rope(x: mx.array, *_dims: int, freqs: mx.array | None = None, offset: int | mx.array = 0, **_settings: object) -> mx.array:
    return _turned(x)


def _attention(q: mx.array, k: mx.array, v: mx.array, *, mask: mx.array | str | None = None, **_settings: object) -> mx.array:
    """Only forward."""
    out = _node(q, k, v, mask)
    return out if v.shape[-1] == q.shape[-1] else out[..., : v.shape[-1]]


@contextmanager
def as_on_gpu(fused_attention: bool = False) -> Iterator[None]:
    """Within the block the package chooses as on a GPU, and graphs have the nodes that they have there.

    Args:
        fused_attention: one kernel, as where nothing is trained; else its products, as on Metal in training.
    """
    with ExitStack() as stack:
        stack.enter_context(gpu_like())
        stands_in = {
            "rms_norm": lambda x, weight, eps, **_: _normed(x, weight),
            "layer_norm": lambda x, weight, bias, eps, **_: _normed(x, weight, bias),
            "rope": _rope,
            **({"scaled_dot_product_attention": _attention} if fused_attention else {}),
        }
        for name, function in stands_in.items():
            stack.enter_context(mock.patch.object(mx.fast, name, function))
        yield
