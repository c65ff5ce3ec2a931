"""A block with a mixture of experts, one expert at a time: its gradients for the layerwise engine on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from fulltune_nb.cpu import evaluate
from fulltune_nb.models.decoder import Block, Context
from fulltune_nb.models.experts import RouterBalance, Routing
from fulltune_nb.models.parameters import Arrays, backward_through, trainable_of
from fulltune_nb.training.gradients import add


def vjp(
    modules: Mapping[str, nn.Module],
    function: Callable[..., mx.array],
    inputs: Sequence[mx.array],
    cotangent: mx.array,
    sums: Arrays,
    to_inputs: bool = True,
) -> list[mx.array | None]:
    """`backward_through`, with the parameters' gradients added to `sums`; returns those of the inputs, if needed. By `evaluate`."""
    found, of_parameters = backward_through(modules, function, inputs, cotangent)[1:]
    found = found if to_inputs else [None] * len(inputs)
    add(sums, of_parameters)
    evaluate(sums, found)
    return found


@dataclass
class ExpertWork:
    """One micro-batch at a block."""

    x: mx.array
    """The block's input (B, T, D)."""
    cotangent: mx.array
    """Gradient with respect to the block's output (B, T, D); with respect to its input, when the block is done."""
    context: Context
    balance: RouterBalance | None = None


@dataclass
class _Routed:
    """What the backward pass through the experts needs of one micro-batch."""

    attended: mx.array
    """(B, T, D), input of the block's second half."""
    tokens: mx.array
    """(M, D), what the experts read."""
    routing: Routing
    to_tokens: mx.array | None
    """Gradient with respect to `tokens`, growing; None, as the next, where nobody needs it."""
    to_outputs: mx.array | None
    """Gradient with respect to the experts' outputs, one expert after the other (M * k, D)."""


def expert_gradients(block: Block, name: str, work: Sequence[ExpertWork], to_input: bool = True) -> Iterator[Arrays]:
    """The block's gradients in pieces: the router's (and a shared expert's), each expert's, then the rest; updates `cotangent` of the work.

    Args:
        block: its mlp is a `MixtureOfExperts`.
        name: the block's module path.
        work: the micro-batches; their gradients are summed.
        to_input: whether gradients with respect to the block's input are needed; where not, `cotangent` is None at the end, and
            nothing is computed that no trained parameter of the block needs.
    """
    below = to_input or _is_trained(*_first_half(block, name).values(), *_before_mlp(block, name).values())
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
            sums = {f"{name}.mlp.experts.{e}.{path}": mx.zeros(array.shape) for path, array in trainable_of(expert).items()}
        if sums:
            yield sums
        del sums  # before the next expert's, or attention's, are computed
    rest: Arrays = {}
    for one, done in zip(work, routed, strict=True):
        _through_attention(block, name, one, done if below else None, rest, to_input)
    if rest:
        yield rest


def _is_trained(*modules: nn.Module) -> bool:
    return any(trainable_of(module) for module in modules)


def _first_half(block: Block, name: str) -> dict[str, nn.Module]:
    """The modules of a block's first half, by path."""
    return {f"{name}.{part}": block[part] for part in ("input_norm", "attention", "attention_output_norm") if part in block}


def _before_mlp(block: Block, name: str) -> dict[str, nn.Module]:
    return {f"{name}.post_attention_norm": block.post_attention_norm} if "post_attention_norm" in block else {}


def _route(block: Block, name: str, one: ExpertWork, sums: Arrays, to_experts: bool) -> _Routed:
    """The block's forward pass up to the experts' outputs, and the backward pass through their mixture."""
    moe = block.mlp
    attended = block.attend(one.x, *one.context)
    tokens = block.mlp_input(attended).reshape(-1, one.x.shape[-1])  # (B, T, D) -> (M, D)
    mx.eval(attended, tokens)
    routing, outputs = moe.route(tokens), []
    for expert, rows in zip(moe.experts, routing.rows, strict=True):
        if rows.size:
            outputs.append(expert(tokens[rows]))
            mx.eval(outputs)
    # The experts' parameters are not used by `combine`, nor is anything of the block's first half by `add` but its output.
    modules = {f"{name}.mlp.{part}": module for part, module in moe.besides_experts().items()}
    if "mlp_output_norm" in block:
        modules[f"{name}.mlp_output_norm"] = block.mlp_output_norm

    def combined(tokens: mx.array, outputs: mx.array) -> mx.array:
        return moe.combine(tokens, outputs[routing.places], routing.chosen, one.balance)

    def added(tokens: mx.array, outputs: mx.array) -> mx.array:
        return block.add(mx.zeros_like(attended), combined(tokens, outputs).reshape(attended.shape))

    to_tokens, to_outputs = vjp(modules, added, [tokens, mx.concatenate(outputs)], one.cotangent, sums, to_experts)
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
    to_tokens = done.to_tokens.reshape(one.x.shape)
    (to_attended,) = vjp(_before_mlp(block, name), block.mlp_input, [done.attended], to_tokens, sums)
    half = _first_half(block, name)
    if not (to_input or _is_trained(*half.values())):
        return
    (one.cotangent,) = vjp(half, lambda x: block.attend(x, *one.context), [one.x], cotangent + to_attended, sums, to_input)
