"""What a layerwise step will need, from shapes alone; see `memory_model` for the whole-graph step.

Three moments, each beside the weights and the optimizer state:

- *loss*: every block's input, and a chunk of logits with what is computed from it;
- *block*: every block's input, and one block's activations, gradients and (weights of 16 bits) float32 copies of a matrix;
- *vocabulary*: some rows of the embedding's or the head's gradient, with the update's temporaries.
"""

from __future__ import annotations

from collections.abc import Mapping

from fulltune_nb.training import vocabulary
from fulltune_nb.training.loss import chunk_size
from fulltune_nb.training.memory_model import BYTES, Shape, Workload, activations_of_block, count


def layerwise_moments(work: Workload, update: int) -> dict[str, dict[str, int]]:
    """Moment -> part -> bytes, without weights and optimizer state.

    Args:
        work: the step's.
        update: bytes that an update of a piece needs.
    """
    model, positions = work.model, work.rows * work.tokens * work.micro_batches
    inputs = (model.num_layers + 1) * positions * model.hidden_size
    trained = max(1, round(positions * work.trained_share))
    hidden = 3 * trained * model.hidden_size
    rows = vocabulary.ranges(model.vocab_size, model.hidden_size)[0].stop
    kept = trained * model.vocab_size if trained * model.vocab_size <= vocabulary.KEPT_ELEMENTS else 0
    chunk = min(trained, chunk_size(rows)) * rows
    range_weights = rows * model.hidden_size
    found = {
        "loss": {"activations": inputs + hidden, "logits": kept + _LOGITS * chunk + work.half * range_weights},
        "block": {
            "activations": inputs + hidden + activations_of_block(work),
            "logits": kept,
            "gradients": _largest_piece(work),
            "float32 copies": work.half * _COPIES * _largest_matrix(work.parameters),
        },
        "vocabulary": {
            "activations": hidden + 2 * positions * model.hidden_size,
            "logits": kept + _LOGITS * chunk + work.half * range_weights,
            "gradients": 2 * range_weights,
        },
    }
    sized = {moment: {part: int(BYTES * size) for part, size in parts.items()} for moment, parts in found.items()}
    for moment in ("block", "vocabulary"):
        sized[moment]["update"] = update
    return sized


_LOGITS, _COPIES = 6, 2


def _largest_piece(work: Workload) -> int:
    """Elements of the largest group of gradients inside the blocks: a block's, or an expert's."""
    sizes: dict[str, int] = {}
    for name in work.trained:
        parts = name.split(".")
        if parts[0] == "layers":
            group = ".".join(parts[:5] if "experts" in parts else parts[:2])
            sizes[group] = sizes.get(group, 0) + count(work.parameters[name])
    return max(sizes.values(), default=0)


def _largest_matrix(parameters: Mapping[str, Shape]) -> int:
    inside = [count(shape) for name, shape in parameters.items() if name.startswith("layers.")]
    return max(inside, default=0)
