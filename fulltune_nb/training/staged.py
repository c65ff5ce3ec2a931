"""Loss and gradients of the whole graph in three stages: the hidden states, the head by a kernel of our own, the blocks' gradients.

MLX is asked for hidden states and blocks' gradients at once, so that it keeps for the second what the first has computed. The hidden
states' own gradient is needed for that, but not known yet: it is an array that is written into between the two evaluations.

On a CPU the softmax of the logits, about twenty passes of one core over (N, V) numbers, becomes one pass of all cores, in place.

Dimension letters: N trained positions, n of a chunk, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from fulltune_nb.data.batching import Batch
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.training.backward import Gradients, batch_arrays, trained_hidden_states
from fulltune_nb.training.loss import Head, chunk_logits, chunks
from fulltune_nb.training.native import Kernels

CHUNK_ELEMENTS = 2**23
"""Logits of a chunk: 32 MiB."""

Flat = dict[str, mx.array]  # module path -> array


class StagedGradients:
    """`backward.loss_and_gradients` of one model without experts (which read their routing while the graph is made).

    Args:
        model: whose trainable parameters get gradients.
        kernels: for the head.
        checkpoint: keep only block inputs for the backward pass.
        compiled: the blocks' passes, for each shape of batch once.
    """

    def __init__(self, model: Decoder, kernels: Kernels, checkpoint: bool = False, compiled: bool = False):
        def in_graph(parameters: dict[str, Any], arrays: Flat, hidden_gradient: mx.array) -> tuple[mx.array, Flat]:
            return _hidden_states_and_gradients(model, parameters, arrays, hidden_gradient, checkpoint)

        self._in_graph = mx.compile(in_graph) if compiled else in_graph
        self._kernels = kernels

    def __call__(self, model: Decoder, batch: Batch, step_tokens: int) -> tuple[mx.array, Gradients]:
        """As `backward.loss_and_gradients`; evaluated."""
        parameters = model.parameters()
        # NaN: whatever would be computed from it too early could not go unnoticed.
        awaited = mx.full((len(batch.targets), model.config.hidden_size), math.nan)
        mx.eval(awaited)
        try:
            hidden, gradients = self._in_graph(parameters, batch_arrays(batch, step_tokens), awaited)
        finally:
            model.update(parameters)  # tracing leaves stand-ins in the model
        mx.eval(hidden)
        trained = dict(tree_flatten(model.trainable_parameters()))
        loss, of_head = self._head(model, hidden, batch.targets, batch.weights / step_tokens, trained, np.asarray(awaited))
        del hidden
        mx.eval(gradients)
        for name, gradient in of_head.items():  # a tied one has both
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
        del of_head
        mx.eval(gradients)
        return mx.array(loss), tree_unflatten(list(gradients.items()))

    def _head(
        self, model: Decoder, hidden: mx.array, targets: np.ndarray, weights: np.ndarray, trained: Flat, hidden_gradient: np.ndarray
    ) -> tuple[float, Flat]:
        """The loss, and the gradients of the head's trained arrays by module path; that of `hidden` (N, D) is written into
        `hidden_gradient`. Evaluated."""
        head: Head = {name: array.astype(mx.float32) for name, array in model.head_weights().items()}
        tied = "embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
        paths = {path: name for name, path in (("weight", tied), ("bias", "lm_head.bias")) if name in head and path in trained}
        loss, found = 0.0, {}
        for rows in chunks(len(targets), model.config.vocab_size, CHUNK_ELEMENTS):
            part = hidden[rows]
            logits = chunk_logits(part, head)
            mx.eval(logits)
            loss += self._kernels.cross_entropy(logits, targets[rows], weights[rows])
            back = logits @ head["weight"]
            for path, name in paths.items():
                more = logits.T @ part if name == "weight" else logits.sum(axis=0)
                found[path] = found[path] + more if path in found else more
                del more
            mx.eval(back, found)
            hidden_gradient[rows] = np.asarray(back)
        return loss, found


def _hidden_states_and_gradients(
    model: Decoder, parameters: dict[str, Any], arrays: Flat, hidden_gradient: mx.array, checkpoint: bool
) -> tuple[mx.array, Flat]:
    """The trained positions' hidden states (N, D), and all gradients but the head's, which depend on `hidden_gradient`; lazy."""
    model.update(parameters)  # compiled, what is not an input would be a constant of the program
    trained = {name: array for name, array in tree_flatten(model.trainable_parameters()) if not name.startswith("lm_head.")}

    def hidden_states(*values: mx.array) -> mx.array:
        model.update(tree_unflatten(list(zip(trained, values, strict=True))))
        return trained_hidden_states(model, arrays, checkpoint)

    if not trained:
        return hidden_states(), {}
    (hidden,), gradients = mx.vjp(hidden_states, list(trained.values()), [hidden_gradient])
    return hidden, dict(zip(trained, gradients, strict=True))
