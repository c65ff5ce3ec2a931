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

from fulltune_nb.cpu.fast_math import FEWEST_ELEMENTS
from fulltune_nb.models.families import ModelConfig
from fulltune_nb.models.parameters import lowest_trained_block
from fulltune_nb.training import engine as staged
from fulltune_nb.training import vocabulary
from fulltune_nb.training.loss import chunk_size

# -- memory_model_block: What one block holds while it is computed and differentiated, from shapes alone, and the loss; `memo

@dataclass(frozen=True)
class Counts:
    """How many arrays of a size exist at once. Fitted to `mx.get_peak_memory`, but for what is kept, which is counted."""

    kept_gated: float
    """(M, I) kept by a gated feed-forward layer: gate, up, the gate's sigmoid, their product."""
    kept_plain: float
    """(M, I) kept by a plain one."""
    kept_gelu: float
    """Further (M, I) kept where the activation is not SiLU."""
    kept_scores: float
    """(B, H, T, T) kept: shares of attention."""
    kept_queries: float
    """(M, Q) kept: scaled queries, mixed values."""
    kept_keys: float
    """(M, K) kept: keys, values."""
    kept_norm: float
    """(M, D) kept by a norm: input or centred input, normalised, scaled."""
    softmax: float
    """(B, H, T, T) at the softmax."""
    softmax_heads: float
    """(M, Q) and (M, K) there."""
    softmax_hidden: float
    """(M, D) there."""
    parallel_scores: float
    """Further (B, H, T, T) where attention and feed-forward layer are computed side by side."""
    parallel_width: float
    """(M, I) at the softmax there."""
    gated: float
    """(M, I) at the activation of a gated layer."""
    plain: float
    """The same of a plain one."""
    gelu: float
    """Further ones where it is not SiLU."""
    activation_hidden: float
    """(M, D) at the activation."""
    backward_width: float
    """(M, I) made by the backward pass of the feed-forward layer."""
    backward_hidden: float
    """(M, D) made by it."""
    backward_scores: float
    """(B, H, T, T) made by the backward pass of attention."""
    backward_heads: float
    """(M, Q) and (M, K) made by it."""
    end_hidden: float
    """(M, D) at the end of the block's backward pass."""
    traced_scores: float
    """With experts, over the whole graph: (B, H, T, T) of every block. The counts of rows that each expert gets are read during
    the forward pass, and what MLX has computed by then inside `mx.grad` it neither lets go nor writes over."""
    traced_heads: float
    """(M, Q) and (M, K) of every block, for the same reason; so are the next two."""
    traced_hidden: float
    """(M, D), and (M * k, D)."""
    traced_width: float
    """(M * k, I)."""
    traced_again: float
    """With `grad_checkpoint` attention leaves as much behind once more, and the experts of all blocks but one this share."""
    logits: float
    """(n, V): arrays of the size of a chunk of logits."""
    logits_ahead: float
    """Of these, begun before the chunk before is done."""
    head_ahead: float
    """(V, D) besides the head's gradient, where there are several chunks."""


CPU = Counts(
    kept_gated=4, kept_plain=3, kept_gelu=0, kept_scores=1, kept_queries=2, kept_keys=2, kept_norm=3,
    softmax=12, softmax_heads=4.3, softmax_hidden=3.9, parallel_scores=1.4, parallel_width=3.4,
    gated=17.4, plain=9, gelu=0.9, activation_hidden=10.7, backward_width=3, backward_hidden=12.3, backward_scores=3,
    backward_heads=4, end_hidden=25,
    traced_scores=24, traced_heads=8, traced_hidden=8, traced_width=24, traced_again=0.37,
    logits=13.2, logits_ahead=4.9, head_ahead=1,
)  # fmt: skip
"""Exponentials made of many operations."""
PLAIN = Counts(
    kept_gated=4.9, kept_plain=0.3, kept_gelu=4.7, kept_scores=1.1, kept_queries=3.6, kept_keys=1.4, kept_norm=3,
    softmax=1.4, softmax_heads=4, softmax_hidden=6, parallel_scores=0, parallel_width=0,
    gated=8, plain=8, gelu=0, activation_hidden=12, backward_width=8, backward_hidden=12, backward_scores=1.4,
    backward_heads=12.5, end_hidden=12,
    traced_scores=4, traced_heads=8, traced_hidden=12, traced_width=11, traced_again=0.37,
    logits=3.2, logits_ahead=5, head_ahead=2.5,
)  # fmt: skip
"""The plain operations that other devices get. No GPU was at hand, and of the counts only some were tried with these on the CPU."""


@dataclass(frozen=True)
class BlockSizes:
    """One block at one micro-batch.

    Args:
        model: the model's sizes.
        rows: B.
        tokens: T.
        on_cpu: whether large arrays take the operations of `cpu_math`.
    """

    model: ModelConfig
    rows: int
    tokens: int
    on_cpu: bool

    @property
    def counts(self) -> Counts:
        """Of the device."""
        return CPU if self.on_cpu else PLAIN

    @property
    def hidden(self) -> int:
        """(M, D)"""
        return self.rows * self.tokens * self.model.hidden_size

    @property
    def scores(self) -> int:
        """(B, H, T, T)"""
        return self.rows * self.tokens * self.model.num_heads * self.tokens

    @property
    def queries(self) -> int:
        """(M, Q)"""
        return self.rows * self.tokens * self.model.num_heads * self.model.head_dim

    @property
    def keys(self) -> int:
        """(M, K)"""
        return self.rows * self.tokens * self.model.num_kv_heads * self.model.head_dim

    @property
    def width(self) -> int:
        """(M, I), or of all experts together (M * k, I)."""
        return self.rows * self.tokens * self.model.intermediate_size * max(self.model.num_experts_per_token, 1)

    # -- what is kept for the backward pass -----------------------------------------------------------------------------------

    @cached_property
    def kept_by_attention(self) -> float:
        """Without the norms."""
        counts = self.counts
        return counts.kept_scores * self.scores + counts.kept_queries * self.queries + counts.kept_keys * self.keys

    @cached_property
    def kept(self) -> float:
        """By the whole block, its input included where the norm needs that."""
        counts, model = self.counts, self.model
        norms = 1 if model.block == "parallel" else 2
        scaled = 0 if model.norm == "layer_no_params" else 1
        hidden = norms * (counts.kept_norm - 1 + scaled) * self.hidden
        width = (counts.kept_plain if model.mlp == "plain" else counts.kept_gated) + self._is_gelu * counts.kept_gelu
        mixed = 2 * model.num_experts_per_token * self.hidden  # rows dealt out to the experts, and their outputs
        return self.kept_by_attention + hidden + width * self.width + mixed

    # -- where it is largest --------------------------------------------------------------------------------------------------

    def at_softmax(self) -> float:
        """In the forward pass."""
        counts = self._attention_counts
        total = counts.softmax * self.scores + counts.softmax_heads * (self.queries + self.keys) + counts.softmax_hidden * self.hidden
        if self.model.block == "parallel":
            total += counts.parallel_scores * self.scores + counts.parallel_width * self.width
        return total

    def at_activation(self, copies: float = 0) -> float:
        """In the forward pass. `copies`: of weights, in float32."""
        return self.kept_by_attention + self.activation() + copies

    def activation(self, share: float = 1.0) -> float:
        """A feed-forward layer being computed, for a share of the positions."""
        counts = self._width_counts
        width = (counts.plain if self.model.mlp == "plain" else counts.gated) + self._is_gelu * counts.gelu
        return share * (width * self.width + counts.activation_hidden * self.hidden)

    def forward(self, copies: float = 0) -> float:
        """The largest of the forward pass."""
        return max(self.at_softmax(), self.at_activation(copies))

    def backward_feed_forward(self) -> float:
        """Without gradients of weights; so are the next two."""
        return self.kept + self.counts.backward_width * self.width + self.counts.backward_hidden * self.hidden

    def backward_attention(self) -> float:
        counts = self._attention_counts
        made = counts.backward_scores * self.scores + counts.backward_heads * (self.queries + self.keys)
        return self.kept_by_attention + made + counts.softmax_hidden * self.hidden

    def at_end(self) -> float:
        return self.counts.end_hidden * self.hidden

    def attention_alone(self) -> float:
        """Attention forward and at once backward: as MLX works ahead, the one is still there when the other begins."""
        counts = self._attention_counts
        return self.at_softmax() + 2 * counts.kept_scores * self.scores + counts.backward_hidden * self.hidden

    def traced(self) -> tuple[float, float]:
        """With experts, over the whole graph: what attention and what the experts leave behind."""
        counts, experts = self.counts, self.model.num_experts_per_token
        attention = self._attention_counts.traced_scores * self.scores + counts.traced_heads * (self.queries + self.keys)
        hidden = counts.traced_hidden * self.hidden
        return attention + hidden, self._width_counts.traced_width * self.width + experts * hidden

    @property
    def _attention_counts(self) -> Counts:
        """Attention of few keys takes the plain operations."""
        return self.counts if self.keys >= FEWEST_ELEMENTS else PLAIN

    @property
    def _width_counts(self) -> Counts:
        """So do experts that get few rows."""
        return self.counts if self.width >= FEWEST_ELEMENTS * max(self.model.num_experts, 1) else PLAIN

    @property
    def _is_gelu(self) -> bool:
        return self.model.activation not in ("silu", "swish")


# -- memory_model: What a training step will need, from shapes alone: a model of the whole-graph step, its counts fitte

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


# -- memory_model_layerwise: What a layerwise step will need, from shapes alone; see `memory_model` for the whole-graph step

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
