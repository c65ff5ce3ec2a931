"""What a training step will need, from shapes alone: a model of the whole-graph step, its counts fitted to measured peaks.

A step (forward, loss, backward over the whole graph, then the update in place) has several moments at which memory can be at its
largest; each holds the weights and the optimizer state besides:

- *forward*: what all blocks but the last keep, and the last one being computed;
- *loss*: what all blocks keep, and a chunk of logits with what is computed from it;
- *last block*: the same without the logits, the head's gradient, and what the backward pass of one block makes;
- *first block*: all gradients, what one block keeps, and what its backward pass makes;
- *update*: all gradients, and their squares for the norm or the update's temporaries, whichever is more.

With `grad_checkpoint` a block keeps its input only, and the backward pass of one block computes it again. What a block holds is in
`memory_model_block`.

Errors on the CPU (MLX 0.32.4): `nbs_tests/benchmarks/predicted_peaks.py`, table in docs/benchmarks.md. The random small models that the
counts were fitted to: 3% in the mean without `grad_checkpoint` (92% of them within 10%), 5% with experts. With `grad_checkpoint`, which
has no counts of its own: 4% in the mean of 52 drawn ones, 49 of them within 10%, the largest 14%.
On other devices, tried with their operations on the CPU: 13% in the mean, the largest 49%, mostly too high.

Dimension letters as there. Sizes here are numbers of float32 elements until `BYTES`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from fulltune_nb.models.families import ModelConfig
from fulltune_nb.training import staged
from fulltune_nb.training.loss import chunk_size
from fulltune_nb.training.memory_model_block import BlockSizes
from fulltune_nb.training.selection import lowest_trained_block

BYTES = 4  # activations and gradients are float32 on the CPU
_LATE = 5
"""Block inputs that are freed late when blocks are computed again, in stages."""
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
    targets: int
    """N, trained positions of a micro-batch."""
    micro_batches: int
    """Of a step."""
    checkpoint: bool
    """`grad_checkpoint`."""
    on_cpu: bool
    half: bool = False
    """Weights stored in 16 bits."""
    native: bool = False
    """Loss, norm and AdamW are computed by kernels of our own (`native`)."""

    @property
    def in_stages(self) -> bool:
        """Whether the whole graph is computed by `staged`."""
        return self.native and not self.model.num_experts

    @cached_property
    def block(self) -> BlockSizes:
        """A block's sizes."""
        return BlockSizes(self.model, self.rows, self.tokens, self.on_cpu)

    @property
    def depth(self) -> int:
        """Blocks that the backward pass goes through: down to the lowest one with a trained parameter, all for the embedding."""
        return self.model.num_layers - lowest_trained_block(self.trained, self.model.num_layers)

    def weights(self, part: str = "", trained: bool = True) -> int:
        """Elements of a block's weights, of the block that has most.

        Args:
            part: of these only whose path inside the block begins so, such as "attention".
            trained: only what is trained.
        """
        sizes: dict[str, int] = {}
        for name in self.trained if trained else self.parameters:
            if name.startswith("layers."):
                _, index, path = name.split(".", 2)
                if path.startswith(part):
                    sizes[index] = sizes.get(index, 0) + count(self.parameters[name])
        return max(sizes.values(), default=0)


def count(shape: Shape) -> int:
    """Elements of an array of this shape."""
    size = 1
    for length in shape:
        size *= length
    return size


def total(work: Workload, names: Collection[str]) -> int:
    """Elements of the parameters of these names."""
    return sum(count(work.parameters[name]) for name in names)


def moments(work: Workload, update: int) -> dict[str, dict[str, int]]:
    """Moment -> part -> bytes, without weights and optimizer state.

    Args:
        work: the step's.
        update: bytes that the update needs.
    """
    block, hidden, depth = work.block, work.block.hidden, work.depth
    gradients = total(work, work.trained)
    head = min(work.model.vocab_size * work.model.hidden_size, gradients)
    copies = work.half * work.weights(trained=False)
    kept = hidden if work.checkpoint else block.kept
    ends = 2 * hidden  # the last block's output, before and after the norm
    above = max(depth - 1, 0)
    backward = _backward(work, copies)
    tied = work.model.tie_word_embeddings and "embed_tokens.weight" in work.trained
    if work.in_stages:  # the head's gradient is there from the loss to the end, beside the embedding's own
        late = _LATE * hidden if work.checkpoint and work.model.block != "parallel" else 0
        first = gradients + tied * head + backward - work.weights() + late
    else:
        first = gradients + max(backward - work.weights(), tied * head)
    sums = gradients if work.micro_batches > 1 else 0  # of the micro-batches before
    found = {
        "forward": {"gradients": sums, "activations": above * kept + block.forward(copies)},
        "loss": {"gradients": sums, "activations": depth * kept + ends, "logits": logits(work)},
        "last block": {"gradients": sums + head, "activations": above * kept + ends + backward},
        "first block": {"gradients": sums + gradients, "activations": first - gradients},
    }
    if work.model.num_experts:
        found["forward"]["activations"] = _traced(work, copies)
    sized = {moment: {part: int(BYTES * size) for part, size in parts.items()} for moment, parts in found.items()}
    norm = 0 if work.native else BYTES * squares(work)
    sized["update"] = {"gradients": BYTES * gradients, "update": max(update, norm)}
    return sized


def _backward(work: Workload, copies: float) -> float:
    """A block's backward pass, its weights' gradients included; with `grad_checkpoint` its forward pass before it."""
    block = work.block
    own, feed_forward = work.weights(), work.weights("mlp")
    half = work.half * work.weights("attention", trained=False)
    back = block.backward_feed_forward() + feed_forward + 0.3 * work.half * work.weights("mlp", trained=False)
    attention, end = block.backward_attention() + feed_forward + half, block.at_end() + own + half
    if not work.checkpoint:
        return max(back, attention, end)
    shares = 0 if work.model.block == "parallel" else block.counts.kept_scores * block.scores  # kept while the softmax goes on
    again = max(block.at_softmax() + shares, block.at_activation(copies)) + 2 * block.hidden
    return max(again, back, attention, end)


def _traced(work: Workload, copies: float) -> float:
    """With experts: all that was computed of the forward pass up to the last block's experts, and with `grad_checkpoint` again."""
    attention, experts = work.block.traced()
    attention_weights = work.half * work.weights("attention", trained=False)
    attention, experts = attention + attention_weights, experts + copies - attention_weights
    before = max(work.depth - 1, 0)
    if not work.checkpoint:
        return work.depth * attention + before * experts
    return 2 * work.depth * attention + (before * (1 + work.block.counts.traced_again) + 1) * experts


def logits(work: Workload) -> float:
    """Elements at the loss: a chunk of logits and what is computed from it, and the head's gradient being summed up."""
    counts, vocab = work.block.counts, work.model.vocab_size
    head = vocab * work.model.hidden_size
    if work.in_stages:
        rows = min(chunk_size(vocab, staged.CHUNK_ELEMENTS), work.targets)
        return rows * vocab + (1 + (rows < work.targets) + work.half) * head + 2 * work.targets * work.model.hidden_size
    rows = chunk_size(vocab)
    first = min(rows, work.targets)
    second = min(rows, work.targets - first)
    chunk = max(counts.logits * first, counts.logits * second + counts.logits_ahead * first) * vocab
    heads = 1 + (counts.head_ahead if second else 0) + work.half  # a copy in float32
    return chunk + heads * head + 2 * work.targets * work.model.hidden_size


def squares(work: Workload) -> int:
    """Elements of the squared gradients that exist at once for the norm: the largest matrix's, and about a block's."""
    largest = max((count(work.parameters[name]) for name in work.trained), default=0)
    return min(largest + work.weights(), total(work, work.trained))
