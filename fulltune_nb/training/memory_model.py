"""What a training step will need, from shapes alone: a model of the whole-graph step, fitted to measured peaks.

A step (forward, loss, backward over the whole graph, then the update in place) has three moments at which memory can be at its
largest; each holds the weights and the optimizer state besides:

- *loss*: every block's activations, and a chunk of logits with what is computed from it;
- *last block*: every block's activations, the head's gradient, and what the backward pass of one block makes;
- *first block*: all gradients, one block's activations, and what its backward pass makes.

With `grad_checkpoint` a block keeps its input only, and the backward pass of one block computes its activations again.

The counts of arrays below were fitted to `mx.get_peak_memory` on random small models of all families (MLX 0.32.4 on a CPU) and
then tried on 119 others, with AdamW: mean error 3% without `grad_checkpoint` and 7% with it, nine of ten within 12%, the largest
32%; models with experts 10 to 20%. `_CPU` is for the CPU, where exponentials are made of many operations that hold their results
at once. `_ELSEWHERE` is for the plain operations that other devices get, but run on the CPU too (mean error 5 and 8%, largest 21%):
no GPU was at hand.

Dimension letters: M = B * T positions, D hidden_size, I intermediate_size, H heads, Q = H * head_dim, K key/value heads *
head_dim, V vocab_size, N trained positions. Sizes here are numbers of float32 elements until `BYTES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fulltune_nb.models.families import ModelConfig
from fulltune_nb.training.loss import chunk_size
from fulltune_nb.training.selection import lowest_trained_block

BYTES = 4  # activations and gradients are float32 on the CPU
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """What a step works on."""

    parameters: Mapping[str, Shape]
    """Shapes of all parameters, by module path."""
    trained: frozenset[str]
    """Names of the trained ones."""
    model: ModelConfig
    rows: int
    """B, rows of the largest micro-batch."""
    tokens: int
    """T, input positions of the longest row."""
    trained_share: float
    """Part of the positions that have a trained target."""
    micro_batches: int
    """Of a step."""
    checkpoint: bool
    """`grad_checkpoint`."""
    on_cpu: bool
    half: bool = False
    """Weights stored in 16 bits."""


@dataclass(frozen=True)
class _Counts:
    """Arrays of a size that exist at once, per kind."""

    gated: float
    """(M, I) kept for the backward pass by a gated feed-forward layer."""
    plain: float
    """(M, I) kept by a plain one."""
    gelu: float
    """Further (M, I) kept where the activation is not SiLU."""
    scores: float
    """(B, H, T, T) kept: shares of attention."""
    queries: float
    """(M, Q) kept."""
    keys: float
    """(M, K) kept."""
    hidden: float
    """(M, D) kept."""
    feed_forward: float
    """(M, I) made by the backward pass of a feed-forward layer."""
    feed_forward_hidden: float
    """(M, D) made by it."""
    attention: float
    """(B, H, T, T) made by the backward pass of attention."""
    attention_heads: float
    """(M, Q) and (M, K) made by it."""
    again: float
    """Activations of a block with `grad_checkpoint`, as multiples of those it would keep."""
    logits: float
    """Arrays of the size of a chunk of logits, if there is one chunk."""
    logits_many: float
    """The same, if there are several."""
    head: float
    """(V, D) at the loss, if there are several chunks."""
    experts: float
    """With experts, activations of a block as multiples of `_kept`: the counts of rows that each expert gets are read during the
    forward pass, and what MLX has computed by then inside `mx.grad` it does not let go."""
    experts_again: float
    """The same with `grad_checkpoint`."""


_CPU = _Counts(
    gated=4, plain=2.3, gelu=0.3, scores=1.1, queries=2, keys=1.2, hidden=6.2, feed_forward=8.5, feed_forward_hidden=4, attention=10,
    attention_heads=1, again=1.9, logits=13.2, logits_many=18.1, head=2, experts=10, experts_again=20,
)
_ELSEWHERE = _Counts(
    gated=4.9, plain=0.3, gelu=4.7, scores=1.1, queries=3.6, keys=1.4, hidden=6, feed_forward=8, feed_forward_hidden=12, attention=1.4,
    attention_heads=12.5, again=1.3, logits=3.2, logits_many=8.2, head=3.5, experts=2.2, experts_again=3.8,
)


def count(shape: Shape) -> int:
    """Elements of an array of this shape."""
    size = 1
    for length in shape:
        size *= length
    return size


def moments(work: Workload) -> dict[str, dict[str, int]]:
    """Moment -> part -> bytes, without weights and optimizer state."""
    counts = _CPU if work.on_cpu else _ELSEWHERE
    model = work.model
    positions = work.rows * work.tokens
    block = _kept(work, counts)
    if model.num_experts:
        kept = _blocks(work) * block * (counts.experts_again if work.checkpoint else counts.experts)
    else:
        kept = _blocks(work) * (positions * model.hidden_size if work.checkpoint else block)
    made = _made(work, counts) + (counts.again * block if work.checkpoint else 0)
    gradients = sum(count(work.parameters[name]) for name in work.trained)
    head = model.vocab_size * model.hidden_size
    head_gradient = min(head, gradients)
    sums = gradients if work.micro_batches > 1 else 0  # of the micro-batches before
    found = {
        "loss": {"gradients": sums, "activations": kept, "logits": _logits(work, counts)},
        "last block": {"gradients": sums + head_gradient, "activations": kept + made},
        "first block": {"gradients": sums + gradients, "activations": made + (0 if work.checkpoint else block)},
    }
    return {moment: {part: int(BYTES * size) for part, size in parts.items()} for moment, parts in found.items()}


def activations_of_block(work: Workload) -> float:
    """Elements that the backward pass of one block holds at most, its own forward pass included."""
    counts = _CPU if work.on_cpu else _ELSEWHERE
    return _made(work, counts) + counts.again * _kept(work, counts)


def _blocks(work: Workload) -> int:
    """Blocks that the backward pass goes through: down to the lowest one with a trained parameter, all for the embedding."""
    return work.model.num_layers - lowest_trained_block(work.trained, work.model.num_layers)


def _width(model: ModelConfig) -> int:
    """I, of all experts that a token goes to."""
    return model.intermediate_size * max(model.num_experts_per_token, 1)


def _kept(work: Workload, counts: _Counts) -> float:
    """Elements that one block keeps for its backward pass."""
    model = work.model
    per_width = (counts.plain if model.mlp == "plain" else counts.gated) + (counts.gelu if model.activation not in ("silu", "swish") else 0)
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    per_position = per_width * _width(model) + counts.scores * model.num_heads * work.tokens
    per_position += counts.queries * queries + counts.keys * keys + counts.hidden * model.hidden_size
    return work.rows * work.tokens * per_position


def _made(work: Workload, counts: _Counts) -> float:
    """Elements that the backward pass of one block makes: the larger of its two halves."""
    model = work.model
    feed_forward = counts.feed_forward * _width(model) + counts.feed_forward_hidden * model.hidden_size
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim
    attention = counts.attention * model.num_heads * work.tokens + counts.attention_heads * heads
    return work.rows * work.tokens * max(feed_forward, attention)


def _logits(work: Workload, counts: _Counts) -> float:
    """Elements at the loss: a chunk of logits and what is computed from it, and the head's gradient being summed up."""
    vocab, positions = work.model.vocab_size, max(1, round(work.rows * work.tokens * work.trained_share))
    rows = chunk_size(vocab)
    head = vocab * work.model.hidden_size
    chunks = -(-positions // rows)
    ahead = 1.0 - 0.4 ** (chunks - 1)  # the more chunks, the more are begun before the first is done
    copies = counts.logits + ahead * (counts.logits_many - counts.logits)
    return copies * min(rows, positions) * vocab + (1.0 + ahead * (counts.head - 1.0)) * head
