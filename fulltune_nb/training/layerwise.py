"""The gradients of a step piece by piece, from the last block to the first, none living longer than its piece.

The forward pass keeps only each block's input (Chen et al. 2016). The backward pass computes one block again at a time and hands
out its gradients; whoever takes them, adds them up or updates the weights with them, before the next block's are computed (Lv et
al. 2023, "Full Parameter Fine-tuning for Large Language Models with Limited Resources"). Micro-batches of a step go through each
block one after the other, so that their gradients are summed block by block.

Dimension letters: B rows, T tokens, M = B * T positions, D hidden_size, N trained positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from fulltune_nb.cpu import Kernels, evaluate, on_cpu
from fulltune_nb.data.batches import Batch
from fulltune_nb.errors import ConfigError, NonFiniteError
from fulltune_nb.models.decoder import Block, Context, Decoder
from fulltune_nb.models.embedding import EMBEDDING
from fulltune_nb.models.experts import RouterBalance, lay_together, stacks_of
from fulltune_nb.models.model_config import ModelConfig
from fulltune_nb.models.parameters import (
    Arrays,
    apart,
    backward_through,
    lowest_trained_block,
    parameters_of,
    swapped_in,
    together,
    trainable_of,
    under,
)
from fulltune_nb.training import vocabulary
from fulltune_nb.training.expert_gradients import ExpertWork, expert_gradients, vjp
from fulltune_nb.training.gradients import GradientPiece, add, check_finite, global_norm, read
from fulltune_nb.training.loss import target_log_probs
from fulltune_nb.training.objective import PLAIN, Objective, StepSize
from fulltune_nb.training.optimizers import Optimizers
from fulltune_nb.training.parallel import Ranks
from fulltune_nb.training.vocabulary import HeadInput


class BlockPasses:
    """A block's forward pass, and its backward pass, which computes the forward pass again.

    Args:
        block: on a CPU without experts if compiled: how many tokens an expert gets is known only when the batch is there.
        compiled: once for each shape of batch; not with a balance loss. All blocks of a model share what g++ makes of it on the CPU.
    """

    def __init__(self, block: Block, compiled: bool = False):
        self.block = block
        self._forward = mx.compile(self._output_of) if compiled else None
        self._backward = mx.compile(self._gradients_of) if compiled else None

    def forward(self, x: mx.array, context: Context, balance: RouterBalance | None = None) -> mx.array:
        """The block's output (B, T, D); lazy. `balance` notes where tokens go, if the block has experts."""
        if self._forward is None or self._balances(balance):
            return self.block(x, *context, balance=balance)
        return self._forward(self._read(), x, context)

    def backward(
        self, x: mx.array, cotangent: mx.array, context: Context, balance: RouterBalance | None = None
    ) -> tuple[mx.array, Arrays]:
        """Gradients with respect to x (B, T, D), and to the trainable parameters by their names in the block; lazy."""
        if self._backward is None or self._balances(balance):
            return self._gradients(x, cotangent, context, balance)
        return self._backward(self._read(), x, cotangent, context)

    def _balances(self, balance: RouterBalance | None) -> bool:
        return balance is not None and "experts" in self.block.mlp

    def _gradients(
        self, x: mx.array, cotangent: mx.array, context: Context, balance: RouterBalance | None = None
    ) -> tuple[mx.array, Arrays]:
        (to_x,), own = backward_through({"": self.block}, lambda x: self.block(x, *context, balance=balance), [x], cotangent)[1:]
        return to_x, own

    # Compiled, frozen parameters are inputs too: what is not an input would be a constant of the program.

    def _read(self) -> Arrays:
        return together(parameters_of(self.block))

    def _output_of(self, parameters: Arrays, x: mx.array, context: Context) -> mx.array:
        with swapped_in(self.block, apart(parameters)):
            return self.block(x, *context)

    def _gradients_of(self, parameters: Arrays, x: mx.array, cotangent: mx.array, context: Context) -> tuple[mx.array, Arrays]:
        with swapped_in(self.block, apart(parameters)):
            return self._gradients(x, cotangent, context)


# -- a step -----------------------------------------------------------------------------------------------------------------------

@dataclass
class _Stream:
    """One micro-batch on its way through the blocks."""

    number: int
    """Of the micro-batch in the step."""
    ids: np.ndarray
    """(M,)"""
    contexts: list[Context]
    """Each block's rotation and mask."""
    inputs: list[mx.array]
    """Each block's input (B, T, D), and last the final norm's; taken away as the backward pass comes down."""
    positions: mx.array
    """(N,) trained ones among the M."""
    head: HeadInput | None = None
    balance: RouterBalance | None = None
    cotangent: mx.array | None = None
    """Gradient with respect to the output of the block that is next (B, T, D)."""


def check_for_ranks(config: ModelConfig) -> None:
    """
    Raises:
        ConfigError: several ranks cannot train such a model layer by layer.
    """
    if config.num_experts and on_cpu():
        raise ConfigError('Experts one by one, layer by layer, are for one process. Set backward="whole", or train with one rank.')


class Layerwise:
    """Computes the gradients of optimizer steps one block after the other, each handed out before the next is computed.

    Args:
        model: its trainable parameters get gradients.
        compiled: each block's passes, once for each shape of batch; on a CPU not with experts.
        kernels: for norm and loss; None: MLX computes them.
        balance: coefficient of the router's balance loss, which the gradients then contain, but not the loss that is told.
        in_stacks, ranks, objective: as in `WholeGraph`.
    """

    def __init__(
        self,
        model: Decoder,
        compiled: bool = False,
        kernels: Kernels | None = None,
        balance: float = 0.0,
        in_stacks: bool = True,
        ranks: Ranks | None = None,
        objective: Objective = PLAIN,
    ):
        self._model, self._kernels, self._balance, self._stacks = model, kernels, balance, stacks_of(model) if in_stacks else []
        self._ranks, self._objective = ranks, objective
        self._passes = [BlockPasses(block, compiled) for block in model.layers]

    def __repr__(self) -> str:
        return "Layerwise()"

    def gradients(self, number: int, batches: Sequence[Batch]) -> LayerwiseGradients:
        """The step's loss, and its gradients as they are asked for; see `gradients.Engine`."""
        lay_together(self._stacks)
        return LayerwiseGradients(self._model, self._passes, self._kernels, number, batches, self._balance, self._ranks, self._objective)


class LayerwiseGradients:
    """Loss and gradients of a step, in pieces; see `gradients.StepGradients`.

    The forward pass is done when this is made. `norm` and `pieces` each use it up; the second one asked begins with another.

    Attributes:
        loss: mean over all trained tokens of the step.
    """

    def __init__(
        self,
        model: Decoder,
        passes: Sequence[BlockPasses],
        kernels: Kernels | None,
        number: int,
        batches: Sequence[Batch],
        balance: float = 0.0,
        ranks: Ranks | None = None,
        objective: Objective = PLAIN,
    ):
        self._objective = objective
        self._model, self._passes, self._kernels, self._balance, self._ranks = model, passes, kernels, balance, ranks
        self._number, self._batches = number, batches
        self._own_batches = list(enumerate(batches) if ranks is None else ranks.own(batches))
        self._trained = set(trainable_of(model))  # names only: who holds an array keeps its memory
        self._ranges = vocabulary.ranges(model.config.vocab_size, model.config.hidden_size)
        self._losses: list[float | mx.array] = []
        self._norm: float | None = None
        self._streams: list[_Stream] | None = None
        self._forward_all()

    @property
    def loss(self) -> float:
        """See above."""
        self._losses = read(self._losses)
        return sum(self._losses)

    def norm(self) -> float:
        """Of all gradients."""
        if self._norm is None:
            # A loop's variable would hold a piece while the next is computed.
            self._norm = math.sqrt(sum(map(self._sum_of_squares, self._pieces(None))))
        return self._norm

    def check_finite(self) -> None:
        """Raises `NonFiniteError` where the loss is not finite, or the norm; where that is not known yet, that of the gradient with
        respect to the last block's output."""
        norm = self._norm
        if norm is None:
            norm = mx.sqrt(sum(mx.square(stream.cotangent.astype(mx.float32)).sum() for stream in self._streams))
        *self._losses, norm = read([*self._losses, norm])
        if self._ranks is not None:
            numbers = (number for number, _ in self._own_batches)
            self._losses = self._ranks.merged(dict(zip(numbers, self._losses, strict=True)))
        check_finite(self._number, self.loss, norm, self._batches)

    def pieces(self, optimizers: Optimizers | None = None) -> Iterator[GradientPiece]:
        """The final norm's gradients, the blocks' from the last to the first, then the vocabulary's."""
        squares = 0.0
        for piece in self._pieces(optimizers):
            squares += self._sum_of_squares(piece)
            if not math.isfinite(squares):
                raise NonFiniteError(
                    f"step {self._number}: a gradient of {', '.join(piece.gradients)} is NaN or inf. Lower the learning rate, or set"
                    " max_grad_norm: then all gradients are looked at before the first update."
                )
            yield piece
            del piece  # before the next one is computed
        self._norm = math.sqrt(squares)

    def _sum_of_squares(self, piece: GradientPiece) -> float:
        # The one time that a GPU is waited for: of two blocks' gradients only one block's exist.
        return global_norm(together(piece.gradients), self._kernels) ** 2

    def _forward_all(self) -> None:
        """All micro-batches up to the loss, and back to the last block's output."""
        size = StepSize.of(self._batches)
        how = size.tokens, self._balance, self._objective
        self._streams = [_forward_one(self._model, self._passes, self._number, *numbered, *how) for numbered in self._own_batches]
        values = [] if self._objective.loss is None else self._weigh(size)
        inputs = [stream.head for stream in self._streams]
        losses, gradients = vocabulary.head_loss(self._model.head_weights(), inputs, self._kernels)
        self._losses = self._losses or values or losses  # a second pass has the same
        self._norm_gradients = self._through_final_norm(gradients)

    def _weigh(self, size: StepSize) -> list[mx.array]:
        """The values of a loss of the user's for each stream, whose trained positions then have its weights."""
        head, values = self._model.head_weights(), []
        for stream, (_, batch) in zip(self._streams, self._own_batches, strict=True):
            one = stream.head
            value, one.weights = self._objective.weighed(batch, size, target_log_probs(one.hidden, head, mx.array(one.targets), one.cap))
            evaluate(value, one.weights)
            values.append(value)
        return values

    # Of several ranks each has the sums over its own micro-batches first: what it adds to the running sum when that has come.

    def _begun(self, sums: Arrays) -> Arrays:
        """What a micro-batch's gradients are added to: those of the micro-batches before, or nothing."""
        return sums if self._ranks is None else {}

    def _joined(self, stream: _Stream, sums: Arrays, own: Arrays) -> Arrays:
        """The sums with a micro-batch's gradients."""
        return own if self._ranks is None else self._ranks.added(stream.number, len(self._batches), sums, own)

    def _total(self, sums: Arrays) -> Arrays:
        """The sums over the micro-batches of all ranks."""
        return sums if self._ranks is None else self._ranks.total(len(self._batches), sums)

    def _pieces(self, optimizers: Optimizers | None) -> Iterator[GradientPiece]:
        if self._streams is None:
            self._forward_all()
        if self._norm_gradients:
            yield GradientPiece(self._norm_gradients)
        self._norm_gradients = None
        lowest = lowest_trained_block(self._trained, len(self._model.layers))
        for i in reversed(range(lowest, len(self._model.layers))):
            yield from self._block_pieces(i, to_input=i > lowest or EMBEDDING in self._trained)
        bias = self._head_bias_gradient()  # computed from the head's old weight, handed out after the weight's own
        for name in ("lm_head.weight", EMBEDDING):
            if name in self._trained:
                if optimizers is not None and len(self._ranges) > 1:
                    self._show_rows(name, optimizers)
                yield from self._row_pieces(name)
        if bias is not None:
            yield GradientPiece({"lm_head.bias": bias})
        self._streams = None

    def _show_rows(self, name: str, optimizers: Optimizers) -> None:
        """All rows of a matrix, for a rule that has to see them before it updates some of them."""
        for _ in range(optimizers.passes(name)):
            for piece in self._row_pieces(name):
                optimizers.observe(self._model, piece.gradients, piece.rows)

    def _through_final_norm(self, head_gradients: list[mx.array]) -> Arrays:
        """Takes each stream's cotangent from the head's input to the last block's output; the norm's own gradients."""
        norm, sums = self._model.norm, {}
        for stream, gradient in zip(self._streams, head_gradients, strict=True):
            x = stream.inputs.pop()

            def trained_positions(x: mx.array, positions: mx.array = stream.positions) -> mx.array:
                return norm(x).reshape(-1, x.shape[-1])[positions]

            own = self._begun(sums)
            (stream.cotangent,) = vjp({"norm": norm}, trained_positions, [x], gradient, own)
            sums = self._joined(stream, sums, own)
        return self._total(sums)

    def _block_pieces(self, index: int, to_input: bool) -> Iterator[GradientPiece]:
        passes, name = self._passes[index], f"layers.{index}"
        if self._model.config.with_experts[index] and on_cpu():
            work = [
                ExpertWork(stream.inputs.pop(), stream.cotangent, stream.contexts[index], stream.balance) for stream in self._streams
            ]
            yield from map(GradientPiece, expert_gradients(passes.block, name, work, to_input))
            for stream, done in zip(self._streams, work, strict=True):
                stream.cotangent = done.cotangent
            return
        sums: Arrays = {}
        for stream in self._streams:
            x, context = stream.inputs.pop(), stream.contexts[index]
            stream.cotangent, gradients = passes.backward(x, stream.cotangent, context, stream.balance)
            if not to_input:
                stream.cotangent = None  # it would keep what it is computed from
            own = self._begun(sums)
            add(own, {under(name, path): gradient for path, gradient in gradients.items()})
            del x, gradients
            evaluate(own, stream.cotangent)
            sums = self._joined(stream, sums, own)
            del own
        if sums := self._total(sums):
            yield GradientPiece(apart(sums))

    def _row_pieces(self, name: str) -> Iterator[GradientPiece]:
        """The gradient of the head's or the embedding's matrix, which may be one and the same."""
        embedding = name == EMBEDDING
        head = not embedding or self._model.config.tie_word_embeddings
        for rows in self._ranges:
            gradient = self._head_gradient(rows, "weight") if head else 0.0
            if embedding:  # no name for the summands: the sum is written over one of them
                gradient = self._embedding_gradient(rows) + gradient
            evaluate(gradient)
            yield GradientPiece({name: gradient}, rows if len(self._ranges) > 1 else None)
            del gradient

    def _head_bias_gradient(self) -> mx.array | None:
        if "lm_head.bias" not in self._trained:
            return None
        gradient = mx.concatenate([self._head_gradient(rows, "bias") for rows in self._ranges])
        evaluate(gradient)
        return gradient

    def _head_gradient(self, rows: slice, of: str) -> mx.array:
        head = self._model.head_weights()
        if self._ranks is None:
            return vocabulary.head_gradient(head, [stream.head for stream in self._streams], rows, of)
        sums: Arrays = {}
        for stream in self._streams:
            # Chunk after chunk is added, whichever micro-batch it is of: the sum must have come before.
            sums = self._ranks.received(stream.number, sums)
            sums = {of: vocabulary.head_gradient(head, [stream.head], rows, of, sums.pop(of, None))}
            sums = self._ranks.passed_on(stream.number, len(self._batches), sums)
        return self._total(sums)[of]

    def _embedding_gradient(self, rows: slice) -> mx.array:
        config = self._model.config
        scale = 1.0 if config.embed_scale is None else config.embed_scale
        sums: Arrays = {}
        for stream in self._streams:
            ids = stream.ids if config.padding_id is None else np.where(stream.ids == config.padding_id, -1, stream.ids)
            gradient = vocabulary.embedding_gradient(ids, stream.cotangent.reshape(ids.size, -1) * scale, rows)
            own = self._begun(sums)
            own[""] = own[""] + gradient if own else gradient
            del gradient
            evaluate(own)  # one stream's at a time
            sums = self._joined(stream, sums, own)
            del own
        return self._total(sums)[""]


def balance_of(model: Decoder, batch: Batch, coefficient: float) -> tuple[float, np.ndarray] | tuple[mx.array, mx.array] | None:
    """What the `RouterBalance` of a micro-batch is made of, on a GPU arrays; None without one, or without experts."""
    if not coefficient or not model.config.num_experts:
        return None
    rows, length = batch.inputs.shape
    used = np.full(rows, length) if batch.row_lengths is None else batch.row_lengths
    real = (np.arange(length) < used[:, None]).reshape(-1)
    tokens = sum(model.config.with_experts) * max(int(real.sum()), 1)
    scale = float(coefficient) * model.config.num_experts / tokens**2
    return (scale, real) if on_cpu() else (mx.array(scale), mx.array(real))


def _forward_one(
    model: Decoder,
    passes: Sequence[BlockPasses],
    step: int,
    number: int,
    batch: Batch,
    step_tokens: int,
    balance_coefficient: float,
    objective: Objective,
) -> _Stream:
    """Micro-batch `number` of a step, from its tokens to the hidden states of its trained positions, with each block's input; by
    `evaluate`."""
    dtype = model.compute_dtype
    ids = mx.array(batch.inputs)
    segments = None if batch.segments is None else mx.array(batch.segments)
    lengths = None if batch.row_lengths is None else mx.array(batch.row_lengths)
    contexts = model.context(ids.shape[1], segments=segments, lengths=lengths)
    of_balance = balance_of(model, batch, balance_coefficient * batch.num_tokens / step_tokens)
    balance = RouterBalance(*of_balance) if of_balance else None
    x, inputs = model.embed(ids, dtype, noise=objective.noise(batch, step, number, model.config.hidden_size)), []
    for block, context in zip(passes, contexts, strict=True):
        evaluate(x)
        inputs.append(x)
        x = block.forward(x, context, balance)
    inputs.append(x)
    positions = mx.array(batch.target_positions)
    hidden = model.norm(x).reshape(-1, x.shape[-1])[positions]  # (B, T, D) -> (N, D)
    evaluate(x, hidden)
    weights = mx.array(batch.weights / step_tokens)
    head = HeadInput(hidden, batch.targets, weights, model.config.logit_cap, objective.smoothing)
    contexts = model.for_gradients(contexts, ids.shape[1])
    return _Stream(number, batch.inputs.reshape(-1), contexts, inputs, positions, head, balance)
