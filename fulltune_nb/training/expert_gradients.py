"""The backward pass through a block with a mixture of experts, one expert at a time.

Dimension letters: B rows, T tokens, M = B * T positions, D hidden_size, k experts of a token, m positions of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from fulltune_nb.models.decoder import Block, Rotation, Routing
from fulltune_nb.training.piecewise import Arrays, vjp


@dataclass
class ExpertWork:
    """One micro-batch at a block."""

    x: mx.array
    """The block's input (B, T, D)."""
    cotangent: mx.array
    """Gradient with respect to the block's output (B, T, D); with respect to its input, when the block is done."""
    rotation: Rotation
    mask: mx.array | None


@dataclass
class _Routed:
    """What the backward pass through the experts needs of one micro-batch."""

    attended: mx.array
    """(B, T, D), input of the block's second half."""
    tokens: mx.array
    """(M, D), the same after the norm."""
    routing: Routing
    to_tokens: mx.array | None
    """Gradient with respect to `tokens`, growing; None, as the next, where nobody needs it."""
    to_outputs: mx.array | None
    """Gradient with respect to the experts' outputs, one expert after the other (M * k, D)."""


def expert_gradients(block: Block, name: str, work: Sequence[ExpertWork], to_input: bool = True) -> Iterator[Arrays]:
    """The block's gradients in pieces: the router's, each expert's, then the rest; updates `cotangent` of the work.

    Args:
        block: its mlp is a `MixtureOfExperts`.
        name: the block's module path.
        work: the micro-batches; their gradients are summed.
        to_input: whether gradients with respect to the block's input are needed; where not, `cotangent` is None at the end, and
            nothing is computed that no trained parameter of the block needs.
    """
    below = to_input or _is_trained(block.input_norm, block.attention, block.post_attention_norm)
    router: Arrays = {}
    routed = [_route(block, name, one, router, below or _is_trained(*block.mlp.experts)) for one in work]
    if router:
        yield router
    for e, expert in enumerate(block.mlp.experts):
        if not (below or _is_trained(expert)):
            continue
        sums: Arrays = {}
        for one in routed:
            _through_expert(block, name, e, one, sums, below)
        if not sums:  # no token went there; the optimizer takes a step all the same
            trained = tree_flatten(expert.trainable_parameters())
            sums = {f"{name}.mlp.experts.{e}.{path}": mx.zeros(array.shape) for path, array in trained}
        if sums:
            yield sums
        del sums  # before the next expert's, or attention's, are computed
    rest: Arrays = {}
    for one, done in zip(work, routed, strict=True):
        _through_attention(block, name, one, done if below else None, rest, to_input)
    if rest:
        yield rest


def _is_trained(*modules: nn.Module) -> bool:
    return any(tree_flatten(module.trainable_parameters()) for module in modules)


def _route(block: Block, name: str, one: ExpertWork, sums: Arrays, to_experts: bool) -> _Routed:
    """The block's forward pass up to the experts' outputs, and the backward pass through their mixture."""
    moe = block.mlp
    attended = one.x + block.attention(block.input_norm(one.x), one.rotation, one.mask)
    tokens = block.post_attention_norm(attended).reshape(-1, one.x.shape[-1])  # (B, T, D) -> (M, D)
    mx.eval(attended, tokens)
    routing, outputs = moe.route(tokens), []
    for expert, rows in zip(moe.experts, routing.rows, strict=True):
        if rows.size:
            outputs.append(expert(tokens[rows]))
            mx.eval(outputs)
    cotangent = one.cotangent.reshape(tokens.shape)
    # The router is the mixture's only parameter; the experts' are not used by `combine`.
    modules = {f"{name}.mlp.router": moe.router}
    inputs = [tokens, mx.concatenate(outputs)]
    to_tokens, to_outputs = vjp(modules, lambda t, o: moe.combine(t, o, routing), inputs, cotangent, sums, to_experts)
    return _Routed(attended, tokens, routing, to_tokens, to_outputs)


def _through_expert(block: Block, name: str, e: int, one: _Routed, sums: Arrays, to_tokens: bool) -> None:
    rows = one.routing.rows[e]
    if not rows.size:
        return
    begin = [0, *accumulate(part.size for part in one.routing.rows)][e]
    expert = block.mlp.experts[e]
    cotangent = one.to_outputs[begin : begin + rows.size]
    (to_rows,) = vjp({f"{name}.mlp.experts.{e}": expert}, expert, [one.tokens[rows]], cotangent, sums, to_tokens)
    if to_tokens:
        one.to_tokens = one.to_tokens.at[rows].add(to_rows)
        mx.eval(one.to_tokens)


def _through_attention(block: Block, name: str, one: ExpertWork, done: _Routed | None, sums: Arrays, to_input: bool) -> None:
    """From the experts' input to the block's. `done`: None where nothing below the experts needs a gradient."""
    cotangent, one.cotangent = one.cotangent, None
    if done is None:
        return
    norm = {f"{name}.post_attention_norm": block.post_attention_norm}
    to_tokens = done.to_tokens.reshape(one.x.shape)
    (to_attended,) = vjp(norm, block.post_attention_norm, [done.attended], to_tokens, sums)
    half = {f"{name}.input_norm": block.input_norm, f"{name}.attention": block.attention}
    if not (to_input or _is_trained(*half.values())):
        return

    def attend(x: mx.array) -> mx.array:
        return x + block.attention(block.input_norm(x), one.rotation, one.mask)

    (one.cotangent,) = vjp(half, attend, [one.x], cotangent + to_attended, sums, to_input)
