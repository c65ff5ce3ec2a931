"""What one block holds while it is computed and differentiated, from shapes alone, and the loss; `memory_model` puts them together.

Why so many arrays exist at once: on the CPU, MLX hands out memory for up to a hundred operations before the first of them is done,
and gives an array back only when the operations that read it are. An exponential is twenty operations there (`cpu_math`), so at a
softmax or a gate a dozen or more arrays of the same size exist. What is *kept* for the backward pass, on the other hand, follows
from the formulas of the gradients and was found to be as counted to 1%.

A block's memory is largest at one of these places:

- forward, at the softmax: the shares of attention being computed;
- forward, at the activation: what attention keeps, and the gates being computed;
- backward, at the feed-forward layer: everything the block keeps, and the gradients of gates and norm;
- backward, at attention: what attention keeps, and the scores' gradients;
- at its end: the gradients of all its weights, and those of its norm, which is made of a dozen operations.

Weights of 16 bits are turned into float32 matrix by matrix, and as MLX works ahead the copies of a whole block exist at the activation.

Arrays of fewer than `cpu_math.FEWEST_ELEMENTS` elements take the plain operations, which are few. Where operations are over in some
microseconds, MLX does not come to work ahead as far: peaks below about 10 MB are up to a third smaller than predicted.

Dimension letters: M = B * T positions, D hidden_size, I intermediate_size, H heads, Q = H * head_dim, K key/value heads * head_dim,
V vocab_size, N trained positions, k experts of a token. Sizes are numbers of elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from fulltune_nb.models.cpu_math import FEWEST_ELEMENTS
from fulltune_nb.models.families import ModelConfig


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
