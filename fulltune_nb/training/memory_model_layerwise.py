"""What a layerwise step will need, from shapes alone; see `memory_model` for the whole-graph step.

Three moments, each beside the weights and the optimizer state:

- *loss*: every block's input, and a chunk of logits with what is computed from it;
- *block*: every block's input, and one block's forward and backward pass, its gradients, then their squares or the update;
- *vocabulary*: some rows of the embedding's or the head's gradient, with the logits computed again where they were not kept, or
  the update's temporaries.
"""

from __future__ import annotations

from dataclasses import dataclass

from fulltune_nb.training import vocabulary
from fulltune_nb.training.loss import chunk_size
from fulltune_nb.training.memory_model import BYTES, Workload, count


def layerwise_moments(work: Workload, update: int) -> dict[str, dict[str, int]]:
    """Moment -> part -> bytes, without weights and optimizer state.

    Args:
        work: the step's.
        update: bytes that an update of a piece needs.
    """
    hidden = work.block.hidden * work.micro_batches
    targets = work.targets * work.micro_batches * work.model.hidden_size  # their hidden states, kept to the end
    head = _Head.of(work)
    kept = head.kept * work.micro_batches
    inputs = (work.model.num_layers + 1) * hidden + targets  # the blocks' inputs and the gradient on its way down
    passing, gradients = _block(work)
    found = {
        "loss": {"activations": inputs + targets, "logits": kept - head.kept + head.at_loss()},
        "block": {"activations": inputs + passing, "logits": kept, "gradients": gradients},
        "vocabulary": {"activations": targets + 3 * hidden, "logits": kept + head.again(), "gradients": head.gradients()},
    }
    sized = {moment: {part: int(BYTES * size) for part, size in parts.items()} for moment, parts in found.items()}
    # The update comes when what was computed on the way is gone.
    piece = _largest_piece(work)
    after = {
        "block": {"activations": inputs, "logits": kept, "gradients": piece},
        "vocabulary": {"activations": targets + hidden, "logits": kept, "gradients": head.range_weights},
    }
    for moment, parts in after.items():
        parts = {part: int(BYTES * size) for part, size in parts.items()}
        parts["update"] = max(update, 0 if work.native else parts["gradients"])  # squares, for the norm
        if sum(parts.values()) > sum(sized[moment].values()):
            sized[moment] = parts
    return sized


@dataclass(frozen=True)
class _Head:
    """The loss and the vocabulary's gradients for one micro-batch, a range of rows at a time."""

    chunk: int
    """Logits of a chunk."""
    chunks: float
    """Chunks of a range; a part of one where there is less."""
    range_weights: int
    """Weights of a range."""
    kept: int
    """Logits that are kept."""
    copy: int
    """The range's weights in float32, where they are stored in 16 bits."""
    on_cpu: bool
    tied: bool
    """Head and embedding, both trained."""
    micro_batches: int
    native: bool
    """Logits become their gradients in place."""

    @classmethod
    def of(cls, work: Workload) -> _Head:
        model = work.model
        rows = vocabulary.ranges(model.vocab_size, model.hidden_size)[0].stop
        size = min(chunk_size(rows), work.targets)
        kept = work.targets * model.vocab_size
        range_weights = rows * model.hidden_size
        return cls(
            size * rows,
            work.targets / size,
            range_weights,
            kept if kept <= vocabulary.KEPT_ELEMENTS else 0,
            work.half * range_weights,
            work.on_cpu,
            model.tie_word_embeddings and "embed_tokens.weight" in work.trained,
            work.micro_batches,
            work.native and kept <= vocabulary.KEPT_ELEMENTS and rows == model.vocab_size,
        )

    def at_loss(self) -> float:
        """The first pass; of the chunks before, exponentials are kept, if anything is."""
        before = (int(self.chunks) - 1) * self.chunk if self.kept else 0
        if self.native:
            return self.kept + self.copy
        return _FIRST[self.on_cpu] * self.chunk + before + self.copy

    def again(self) -> float:
        """Logits computed once more for the weights' gradient."""
        return 0 if self.kept else _AGAIN[self.on_cpu] * self.chunk + self.copy

    def gradients(self) -> float:
        """A range's gradient: the sum so far and what is added, from chunk to chunk, micro-batch to micro-batch, head to embedding."""
        several = self.micro_batches > 1
        return max(2 if self.chunks > 1 or several else 1, 2 + several if self.tied else 1) * self.range_weights


_FIRST, _AGAIN = {True: 12, False: 6}, {True: 11, False: 6}
"""Arrays of the size of a chunk of logits, on the CPU and elsewhere."""


def _block(work: Workload) -> tuple[float, float]:
    """Activations and gradients at the largest place of one block's passes."""
    if work.model.num_experts:
        return _block_with_experts(work)
    block, own, feed_forward = work.block, work.weights(), work.weights("mlp")
    copies, half = (work.half * work.weights(part, trained=False) for part in ("", "attention"))
    places = [
        (block.forward(copies), 0),
        (block.backward_feed_forward() + 0.3 * work.half * work.weights("mlp", trained=False), feed_forward),
        (block.backward_attention() + half, feed_forward),
        (block.at_end() + half, own),
    ]
    return _summed(places, own, work)


def _block_with_experts(work: Workload) -> tuple[float, float]:
    """The router and all experts forward, one expert backward, then attention."""
    block, model = work.block, work.model
    expert = _largest_piece(work)
    half = work.half * work.weights("attention", trained=False)
    outputs = model.num_experts_per_token * block.hidden
    share = 1 / model.num_experts  # of the rows, for one expert
    places = [
        (block.at_softmax() + half, 0),
        (4 * block.hidden + 2 * outputs + block.activation(share) + work.half * expert, expert),
        (3 * block.hidden + block.attention_alone() + half, work.weights("attention")),
    ]
    return _summed(places, expert, work)


def _summed(places: list[tuple[float, float]], piece: float, work: Workload) -> tuple[float, float]:
    """The largest place; from the second micro-batch on, the piece's gradients so far exist besides."""
    activations, gradients = max(places, key=sum)
    return activations, gradients + (piece if work.micro_batches > 1 else 0)


def _largest_piece(work: Workload) -> int:
    """Elements of the largest group of gradients inside the blocks: a block's, or an expert's."""
    sizes: dict[str, int] = {}
    for name in work.trained:
        parts = name.split(".")
        if parts[0] == "layers":
            group = ".".join(parts[:5] if "experts" in parts else parts[:2])
            sizes[group] = sizes.get(group, 0) + count(work.parameters[name])
    return max(sizes.values(), default=0)
