"""The memory a step needs at its largest moment, counted from shapes.

Counted are the arrays that have to exist: weights, the optimizer's moments, gradients, what blocks keep for the backward pass, a chunk of
logits, what an update needs. Beside these MLX holds arrays that it has allocated ahead of time; of them a number is assumed, rather too
many than too few. `plan.measured` runs a step's forward and backward pass instead.

Dimension letters: B rows, T tokens, M = B * T positions, N trained positions, D hidden_size, I intermediate_size, V vocab_size, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from fulltune_nb import html, svg
from fulltune_nb.cpu import cache_limit, kernels_for, on_cpu
from fulltune_nb.data.batches import padded_to, row_widths
from fulltune_nb.data.split import check_ids
from fulltune_nb.device import device_kind, length_multiple, machine_limit
from fulltune_nb.models.decoder import BLOCK_NORMS
from fulltune_nb.models.embedding import EMBEDDING
from fulltune_nb.models.experts import stacks_in
from fulltune_nb.models.model_config import ModelConfig
from fulltune_nb.models.parameters import lowest_trained_block, parameters_of, trained_names
from fulltune_nb.training import vocabulary
from fulltune_nb.training.config import TrainConfig
from fulltune_nb.training.engine import CHUNK_ELEMENTS
from fulltune_nb.training.loss import chunk_elements, chunk_size
from fulltune_nb.training.optimizers import (
    passes_of,
    predict_state_bytes,
    random_bits_bytes,
    shared_out,
    update_bytes,
    updated_in_stacks,
)
from fulltune_nb.training.parallel import passed_to, sendings
from fulltune_nb.training.rounding import stored_dtype

MARGIN = 0.3
"""What is counted is seldom more than the peak that is measured by a larger part of it, and hardly ever less."""
NEAR = 0.8
"""Of a GPU's limit: from here on what is counted is measured before a run begins."""
AHEAD = {True: 16, False: 8}
"""Arrays of a size that MLX holds while it computes one of it, on a CPU, where exponentials are made of many operations, and elsewhere:
it allocates ahead of what it computes."""

LOGIT_BYTES = {"whole": 11, "layerwise": 14}
"""Of a chunk on a GPU: a logit and what is computed from it, in either dtype, as the way of the backward pass has it."""


@dataclass(frozen=True)
class MemoryReading:
    """MLX's counters at one moment."""

    active: int
    """Bytes of arrays in use."""
    peak: int
    """Most bytes in use since the counter was reset; the cache is not in it."""
    cache: int
    """Bytes of freed arrays kept for reuse."""

    def __repr__(self) -> str:
        return f"MemoryReading({', '.join(f'{name} {html.human_bytes(size)}' for name, size in vars(self).items())})"

    def _repr_html_(self) -> str:
        return html.facts("Memory in use by MLX", zip(vars(self), html.in_one_unit(list(vars(self).values())), strict=True))


def read_memory() -> MemoryReading:
    """MLX's memory counters now. They count on the CPU too."""
    return MemoryReading(mx.get_active_memory(), mx.get_peak_memory(), mx.get_cache_memory())


# -- what a run needs --------------------------------------------------------------------------------------------------------------


_PARTS = ("weights", "optimizer state", "gradients", "activations", "logits", "random bits", "gradients and activations")
"""Of a plan's peak, in the order in which they are drawn: each has its colour in every plan."""


@dataclass(frozen=True)
class MemoryPlan:
    """The memory a run needs at its largest moment."""

    parts: dict[str, int]
    """Part -> bytes at that moment; together they are the peak."""
    peak: int
    """Bytes in use at the largest moment, as `StepReport.peak_memory` will show it."""
    limit: int
    """Bytes that arrays may take on this machine."""
    cache: int
    """Bytes of freed arrays that MLX may keep besides."""
    moment: str
    """When: over the whole graph "forward", "loss", "last block" or "first block" (of the backward pass), "exchange" (between ranks) or
    "update"; layerwise "loss", "block again" (its forward pass within the backward pass), "block", "vocabulary" or "update"; "forward or
    backward pass" where these were measured."""
    workload: str
    """What was assumed, in words."""
    advice: tuple[str, ...] = field(default=())
    """What would make it fit, a sentence each; empty where it fits."""
    backward: str = "whole"
    """How gradients are computed: "whole" graph or "layerwise"."""
    measured: bool = False
    """Whether forward and backward pass were measured on this machine, not counted."""
    sent: int = 0
    """Bytes that a rank sends in a step, the one that sends most; 0 where one process trains alone."""

    @property
    def fits(self) -> bool:
        """Whether peak and cache together stay within the limit."""
        return self.peak + self.cache <= self.limit

    @property
    def near_limit(self) -> bool:
        """Whether measuring is to tell if it fits, and itself, without an optimizer's state, does fit: where it is counted not to, but may,
        and on a GPU, where memory that is short ends the process, also where it is counted to be near the limit."""
        may_fit = self.peak / (1 + MARGIN) + self.cache <= self.limit
        near = not self.fits or (not on_cpu() and self.peak > NEAR * self.limit)
        return not self.measured and near and may_fit and self.peak - self.parts["optimizer state"] <= self.limit

    def __repr__(self) -> str:
        verdict = "fits" if self.fits else "does not fit"
        return f"MemoryPlan(peak {html.human_bytes(self.peak)} of {html.human_bytes(self.limit)}, {verdict}, {self._how})"

    @property
    def _how(self) -> str:
        return "measured" if self.measured else f"counted, most often up to {MARGIN:.0%} too much"

    def _repr_html_(self) -> str:
        scale, unit = html.one_unit([self.peak])
        parts = {name: size / scale for name, size in {**dict.fromkeys(_PARTS, 0), **self.parts}.items()}
        verdict = f"{'fits' if self.fits else 'does not fit'} in {html.human_bytes(self.limit)}"
        title = f"<div><b>Memory: {self.peak / scale:,.2f} {unit} at the peak {verdict}</b>, {self._how}</div>"
        near = self.peak + self.cache > self.limit / 20  # a limit far above would leave nothing of the parts to see
        sent = f" A rank sends {html.human_bytes(self.sent)} in a step." if self.sent else ""
        assumed = f"<div>{html.esc(self.workload)}. Largest at: {html.esc(self.moment)}.{html.esc(sent)}</div>"
        advice = "".join(f"<li>{html.esc(sentence)}</li>" for sentence in self.advice)
        cache = {"beside the peak: cache": self.cache / scale}
        bar = svg.stacked_bar(parts, self.limit / scale if near else None, unit=unit, beside=cache)
        return title + bar + assumed + (f"<ul>{advice}</ul>" if advice else "")


def kept_freed(parts: dict[str, int], limit: int) -> int:
    """Bytes of freed arrays that MLX keeps beside these parts of a run: on Metal those of a step, where there is room for them."""
    if device_kind() != "metal":
        return cache_limit()
    peak = sum(parts.values())
    return max(0, min(peak - parts["weights"] - parts["optimizer state"], limit - peak))


# -- counting ----------------------------------------------------------------------------------------------------------------------

Shape = tuple[int, ...]
Moments = dict[str, dict[str, int]]
"""Moment -> part -> bytes, without what is always there."""


@dataclass(frozen=True)
class Workload:
    """What a step works on: a micro-batch of the widest rows."""

    parameters: Mapping[str, Shape]
    """Shapes of all parameters, by module path."""
    trained: frozenset[str]
    """Names of the trained ones."""
    model: ModelConfig
    config: TrainConfig
    rows: int
    """B, rows of the largest micro-batch."""
    tokens: int
    """T, input positions of the longest row, padded."""
    targets: int
    """N, trained positions of a micro-batch."""
    stored: mx.Dtype
    """Of the weights."""
    ranks: int = 1
    """Processes that train together; this is one of them."""

    @classmethod
    def of(cls, lm: Any, data: Any, config: TrainConfig, ranks: int = 1) -> Workload:
        """From a language model's shapes, and a data set's lengths or, without one, rows of `max_seq_length`.

        Raises:
            ConfigError: a pattern in `train_only` or `freeze` matches nothing.
            DataError: token ids in any split that the model has no row for.
        """
        rows, tokens = config.batch_size, config.max_seq_length - 1
        targets = rows * tokens
        if data is not None:
            for split in data.splits.values():
                check_ids(split, lm.config.vocab_size, lm.tokenizer)
            split = data.train
            widths = np.maximum(row_widths(split, config.max_seq_length, config.packing), 1)
            tokens, rows = int(widths.max()), min(rows, len(widths))
            targets = min(rows * tokens, _most_targets(split, rows, config))
        tokens = padded_to(tokens, length_multiple())
        parameters = {name: array.shape for name, array in parameters_of(lm.model).items()}
        trained = frozenset(trained_names(lm.model, config.train_only, config.freeze))
        return cls(parameters, trained, lm.config, config, rows, tokens, targets, stored_dtype(config.weights, lm.dtype), ranks)

    def count(self, backward: str) -> MemoryPlan:
        """The largest moment of a step, over the "whole" graph or "layerwise"."""
        moments = self._layerwise() if backward == "layerwise" else self._whole()
        moment = max(moments, key=lambda name: sum(moments[name].values()))
        parts = {name: int(size) for name, size in {**self.always, **moments[moment]}.items()}
        config = self.config
        words = f"{self.rows} {'packed ' * config.packing}row{'s' * (self.rows > 1)} of {self.tokens:,} tokens in a micro-batch"
        way = ", layerwise" if backward == "layerwise" else ", grad_checkpoint" if config.grad_checkpoint else ""
        of_ranks = f", one of {self.ranks} ranks{', optimizer shared out' * config.shard_optimizer}" if self.ranks > 1 else ""
        words = f"{words}, {config.optimizer}{way}{of_ranks}"
        limit, sent = machine_limit(), self._sent(backward)
        return MemoryPlan(parts, sum(parts.values()), limit, kept_freed(parts, limit), moment, words, backward=backward, sent=sent)

    # Shapes and what is always there.

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Of the trained parameters."""
        return {name: self.parameters[name] for name in self.trained}

    @cached_property
    def num_trained(self) -> int:
        """Elements of all trained parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def always(self) -> dict[str, int]:
        """Part -> bytes."""
        return {
            "weights": self.stored.size * sum(math.prod(shape) for shape in self.parameters.values()),
            "optimizer state": max(predict_state_bytes(own, self.config) for own in self._shares),
            "random bits": random_bits_bytes(self.shapes, self.config, self.stored),
        }

    @cached_property
    def _shares(self) -> list[dict[str, Shape]]:
        """The trained parameters whose optimizer state each rank has."""
        if self.ranks == 1 or not self.config.shard_optimizer:
            return [self.shapes]
        owners = shared_out(self.shapes, self.ranks)
        return [{name: shape for name, shape in self.shapes.items() if owners[name] == rank} for rank in range(self.ranks)]

    @property
    def _own_batches(self) -> int:
        """Micro-batches of a rank, the one that has most."""
        return -(-self.config.grad_accumulation_steps // self.ranks)

    @property
    def _holds_sums(self) -> bool:
        """Whether a rank holds sums of gradients while it computes a micro-batch's."""
        return self.config.grad_accumulation_steps > self.ranks

    def _sent(self, backward: str) -> int:
        """See `MemoryPlan.sent`."""
        if self.ranks == 1:
            return 0
        elements, vocabulary_size = self.num_trained, self.model.vocab_size * self.model.hidden_size
        if backward == "layerwise":
            elements += self._tied * vocabulary_size  # the head's gradient and the embedding's, one after the other
            if len(vocabulary.ranges(self.model.vocab_size, self.model.hidden_size)) > 1:
                ends = {name: self.shapes[name] for name in (EMBEDDING, "lm_head.weight") if name in self.shapes}
                of_pass = (1 + self._tied) * vocabulary_size
                elements += sum(passes_of(name, shape, self.config) * of_pass for name, shape in ends.items())
            elements *= 1 + (self.config.max_grad_norm is not None)
        of_gradients = [4 * elements * times for times in sendings(self.ranks, self.config.grad_accumulation_steps)]
        of_weights = [0] * self.ranks
        for owner, own in enumerate(self._shares if len(self._shares) > 1 else ()):
            for rank in range(self.ranks):
                size = self.stored.size * sum(math.prod(shape) for shape in own.values())
                of_weights[rank] += size * len(passed_to(rank, owner, self.ranks))
        return max(map(sum, zip(of_gradients, of_weights, strict=True)))

    @cached_property
    def _largest(self) -> int:
        """Elements of the largest trained parameter."""
        return max(math.prod(shape) for shape in self.shapes.values())

    @property
    def _others_weights(self) -> int:
        """Bytes of new weights that come from another rank before the old ones are let go."""
        if len(self._shares) == 1:
            return 0
        return self.stored.size * max(sum(math.prod(shape) for shape in own.values()) for own in self._shares)

    @cached_property
    def _kernels(self) -> bool:
        return kernels_for(self.num_trained) is not None

    @property
    def _tied(self) -> bool:
        """Whether a trained embedding gets a second gradient, from the head."""
        return self.model.tie_word_embeddings and EMBEDDING in self.trained

    @property
    def _half_on_cpu(self) -> bool:
        """Whether products take float32 copies of weights that are stored in 16 bits."""
        return on_cpu() and self.stored != mx.float32

    def _copied(self, experts_apart: bool) -> int:
        """Elements of a block's parameters that exist twice: in float32 on a CPU; experts that lie in no stack, together, on a GPU."""
        if on_cpu():
            return self._half_on_cpu * self._largest_group(self.parameters, experts_apart)
        laid = updated_in_stacks(self.trained, self.config) + stacks_in(self.parameters.keys() - self.trained)
        return self._largest_group([name for names in stacks_in(self.parameters) if names not in laid for name in names])

    def _largest_group(self, names: Collection[str], experts_apart: bool = False) -> int:
        """Elements of the block that has most of these parameters; or of the expert, if each counts by itself."""
        groups = _by_block(names, experts_apart).items()
        return max((sum(math.prod(self.parameters[name]) for name in own) for group, own in groups if "." in group), default=0)

    def _in_bytes(self, moments: Moments) -> Moments:
        """From elements of activations and gradients: float32 on a CPU, else as the weights."""
        size = 4 if on_cpu() else self.stored.size
        return {name: {part: size * elements for part, elements in parts.items()} for name, parts in moments.items()}

    # A block, in elements.

    @cached_property
    def _hidden(self) -> int:
        """(M, D)"""
        return self.rows * self.tokens * self.model.hidden_size

    @cached_property
    def _scores(self) -> int:
        """(B, H, T, T)"""
        return self.rows * self.tokens * self.model.num_heads * self.tokens

    @cached_property
    def _width(self) -> int:
        """(M, I), or of all experts that a token goes to, where that is more."""
        model = self.model
        of_experts = model.expert_size * model.num_experts_per_token + model.shared_expert_size
        dense = 0 if all(model.with_experts) else model.intermediate_size
        return self.rows * self.tokens * max(of_experts, dense)

    def _kept(self, width: int) -> int:
        """For the backward pass: shares of attention; queries, keys, values and their mixture; gate, up, their activation and product, of
        this width; what norms need; rows dealt out to experts, and their outputs."""
        model = self.model
        heads = self.rows * self.tokens * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
        norms = len(BLOCK_NORMS[model.block]) * (2 if model.norm == "layer_no_params" else 3)
        of_cap = (2 if on_cpu() else 3) * (model.score_cap is not None)
        widths = 4 if (model.mlp != "plain") == on_cpu() else 3  # a GPU computes a gate's activation again, and keeps one more of another
        scores = self._scores * (1 + of_cap + 2 * model.sinks)  # tanh's, and what is beside the sinks
        return scores + heads + (norms + 2 * model.num_experts_per_token) * self._hidden + widths * width

    def _back(self, width: int) -> int:
        """The largest moment of a block's backward pass: what it keeps, and a gradient of each of these arrays; on a GPU also of the
        scores, beside that of their shares, and what is held of the residual stream's size."""
        return 2 * self._kept(width) + (not on_cpu()) * (self._scores + AHEAD[False] * self._hidden)

    def _ahead(self, width: int) -> int:
        """A block's forward pass: on a CPU what MLX holds beyond need while arrays of these sizes are computed."""
        return AHEAD[True] * (max(self._scores, width) + self._hidden) if on_cpu() else self._kept(width)

    def _chunk(self, logits: int, backward: str) -> int:
        """A chunk of so many logits, and what MLX holds of what is computed from them."""
        return AHEAD[True] * logits if on_cpu() else LOGIT_BYTES[backward] * logits // self.stored.size

    # The moments of a step.

    def _whole(self) -> Moments:
        depth = self.model.num_layers - lowest_trained_block(self.trained, self.model.num_layers)
        gradients = self.num_trained
        head = min(self.model.vocab_size * self.model.hidden_size, gradients)
        before = gradients if self._holds_sums else 0  # sums of the micro-batches before
        copies = self._copied(experts_apart=False)
        kept, ahead, back = self._kept(self._width), self._ahead(self._width), self._back(self._width)
        below = self._hidden if self.config.grad_checkpoint else kept  # of each block below the one that is computed
        if self.config.grad_checkpoint and on_cpu():
            back = max(back, ahead + self._scores)
        stack, ends = max(depth - 1, 0) * below, 2 * self._hidden
        forward = stack + ahead + copies
        if self.model.num_experts and on_cpu():  # read while the graph is made: of what was computed by then, MLX lets nothing go
            forward = depth * (kept + AHEAD[True] * (self._scores + self._width + 2 * self._hidden) + copies)
            forward *= 1 + self.config.grad_checkpoint
        found = self._in_bytes({
            "forward": {"gradients": before, "activations": forward},
            "loss": {"gradients": before, "activations": depth * below + ends, "logits": self._logits()},
            "last block": {"gradients": before + head, "activations": stack + ends + back + copies},
            "first block": {"gradients": before + gradients + self._tied * head, "activations": back + copies},
            "exchange": {"gradients": gradients + before + (self.ranks > 1) * 2 * self._largest},  # what came, and the sum
            "update": {"gradients": gradients},
        })  # fmt: skip
        squares = 0 if self._kernels or not on_cpu() else 4 * min(2 * self._largest, gradients)
        update = max(update_bytes(own, self.config, self.stored) for own in self._shares)
        found["update"]["update"] = max(update, squares, self._others_weights)
        return found

    def _logits(self) -> int:
        """A chunk of logits and what is computed from it, hidden states, the head's gradient and what is added to it."""
        vocab, hidden = self.model.vocab_size, self.model.hidden_size
        by_kernel = self._kernels and not self.model.num_experts
        rows = min(chunk_size(vocab, CHUNK_ELEMENTS if by_kernel else chunk_elements(vocab, hidden)), self.targets)
        heads = 1 + (rows < self.targets) + self._half_on_cpu
        return (rows * vocab if by_kernel else self._chunk(rows * vocab, "whole")) + heads * vocab * hidden + 2 * self.targets * hidden

    def _layerwise(self) -> Moments:
        model, several = self.model, self._own_batches
        hidden, targets = several * self._hidden, several * self.targets * model.hidden_size
        inputs = (model.num_layers + 1) * hidden + targets
        piece, copies = self._largest_group(self.trained, experts_apart=on_cpu()), self._copied(experts_apart=True)
        apart = max(model.num_experts, 1) if on_cpu() else 1  # on a CPU it is one expert at a time
        width = max(self._width // apart, self.rows * self.tokens * model.shared_expert_size)
        again, sums = self._ahead(width) + copies, (self.config.grad_accumulation_steps > 1) * piece

        range_rows = vocabulary.ranges(model.vocab_size, model.hidden_size)[0].stop
        range_weights = range_rows * model.hidden_size
        logits = self.targets * model.vocab_size
        kept = logits if logits <= vocabulary.KEPT_ELEMENTS else 0
        if self._kernels and kept and range_rows == model.vocab_size:
            chunk = logits  # they become their gradients in place
        else:
            chunk = self._chunk(min(chunk_size(range_rows), self.targets) * range_rows, "layerwise")
        chunk += self._half_on_cpu * range_weights
        ranges = 2 + (self._tied and self.config.grad_accumulation_steps > 1)  # what is summed, and what is added to it
        found = self._in_bytes({
            "loss": {"activations": inputs + targets, "logits": (several - (not on_cpu())) * kept + chunk},
            "block again": {"activations": inputs + again, "logits": several * kept, "gradients": sums},
            "block": {"activations": inputs + self._back(width), "logits": several * kept, "gradients": sums + piece},
            "vocabulary": {"activations": targets + 3 * hidden, "logits": several * kept or chunk, "gradients": ranges * range_weights},
            "update": {"activations": inputs, "logits": several * kept, "gradients": max(piece, range_weights)},
        })  # fmt: skip
        squares = 0 if self._kernels or not on_cpu() else found["update"]["gradients"]
        pieces = _by_block(self.trained, experts_apart=on_cpu()).values()
        updates = sorted(update_bytes({name: self.shapes[name] for name in own}, self.config, self.stored) for own in pieces)
        # A GPU may still have one block's under way when the next one's is sent.
        found["update"]["update"] = max(squares, sum(updates[-1 if on_cpu() else -2 :]))
        return found


def _by_block(names: Collection[str], experts_apart: bool) -> dict[str, list[str]]:
    """Block "layers.N", or expert of one, if each counts by itself -> its parameters among these; "" -> those outside of blocks."""
    groups: dict[str, list[str]] = {}
    for name in names:
        path = name.split(".")
        of_expert = experts_apart and "experts" in path
        groups.setdefault(".".join(path[: 5 if of_expert else 2]) if path[0] == "layers" else "", []).append(name)
    return groups


def _most_targets(split: Any, rows: int, config: TrainConfig) -> int:
    """Trained positions of a micro-batch: those of the rows that have most; with packing, a row's part that is trained on."""
    if not config.packing:
        return max(1, int(np.sort(split.trained_lengths[split.trainable])[-rows:].sum()))
    share = split.trained_tokens / max(int((split.lengths[split.trainable] - 1).sum()), 1)
    return math.ceil(min(share, 1.0) * rows * (config.max_seq_length - 1))
