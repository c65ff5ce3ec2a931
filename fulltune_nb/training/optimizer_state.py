"""Whether arrays are what an optimizer needs: its state from a file, and gradients of some rows."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from fulltune_nb.errors import CheckpointError, TrainingError
from fulltune_nb.training.update_rules import Shape, Slot


def check_state_arrays(slots: Mapping[str, Mapping[str, Slot]], arrays: Mapping[str, mx.array]) -> None:
    """Nothing where the arrays are `"step"` and those of the slots, module path -> name -> slot.

    Raises:
        CheckpointError: arrays are missing, unexpected, or of another shape or dtype.
    """
    expected = {f"{name}.{slot}": (s.shape, s.dtype) for name, own in slots.items() for slot, s in own.items()}
    expected["step"] = ((), mx.uint32)
    problems = [f"missing {name}" for name in expected.keys() - arrays.keys()]
    problems += [f"unexpected {name}" for name in arrays.keys() - expected.keys()]
    for name, (shape, dtype) in expected.items():
        if name in arrays and (arrays[name].shape != shape or arrays[name].dtype != dtype):
            problems.append(f"{name} is {arrays[name].dtype} {arrays[name].shape}, expected {dtype} {shape}")
    if problems:
        shown = "; ".join(sorted(problems)[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise CheckpointError(
            f"the optimizer state does not fit this model and config: {shown}. Resume with the model, optimizer and frozen "
            "parameters that the checkpoint was written with."
        )


def check_gradients(gradients: Mapping[str, mx.array], expected: Mapping[str, Shape | None]) -> None:
    """Nothing where each gradient has the expected shape.

    Raises:
        TrainingError: one has another, or there is no parameter of its name.
    """
    for name, gradient in gradients.items():
        if gradient.shape != expected[name]:
            raise TrainingError(
                f"gradient of {name}: expected the shape {expected[name] or 'of a parameter trainable at the start'}, got "
                f"{gradient.shape}. Make a new trainer after freezing or changing a model."
            )


def shape_of_rows(name: str, shape: Shape, rows: slice, optimizer: str, by_rows: bool) -> Shape:
    """What the gradient of some places on a tensor's first axis must look like.

    Raises:
        TrainingError: no such places, or a rule that needs the tensor whole.
    """
    if len(shape) < 2 or not by_rows:
        raise TrainingError(f"rows of {name} {shape}: {optimizer} updates this tensor as a whole. Give its whole gradient.")
    if rows.step not in (None, 1) or rows.start is None or rows.stop is None or not 0 <= rows.start < rows.stop <= shape[0]:
        raise TrainingError(f"rows of {name} {shape}: expected slice(start, stop) within 0 and {shape[0]}, got {rows}.")
    return (rows.stop - rows.start, *shape[1:])
