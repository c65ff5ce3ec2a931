"""Every family against transformers: `python -m nbs_tests.models.family_parity [family ...]`.

A case is a random small `config.json` (`family_cases`) with random weights that transformers made. All errors are relative: the norm of the
difference over that of the reference. Needs torch and mlx-lm.
"""

from __future__ import annotations

import fulltune_nb  # noqa: F401  first of all: it gives MLX its BLAS

# isort: split
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fulltune_nb.data.batches import Batch
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.families import FAMILIES
from fulltune_nb.models.folder import load_decoder, save_folder
from fulltune_nb.models.parameters import parameters_of, put_parameters, trainable_of
from fulltune_nb.training.engine import WholeGraph
from fulltune_nb.training.gradients import Engine
from fulltune_nb.training.layerwise import Layerwise
from nbs_tests.models.family_cases import PUBLISHED, cases_of, plain_case, scaled_down
from nbs_tests.models.model_cases import random_ids
from nbs_tests.models.parity import NO_GRADIENT, gradients, greedy, relative_error, write_folder
from nbs_tests.training.conftest import random_batch

IDS_SHAPE = (2, 27)
"""Rows and tokens: longer than every window, and than the length before rope is scaled."""
PACKED = (11, 16)
"""Lengths of the examples in one packed row: neither is longer than the length before rope is scaled."""
PROMPT_LENGTH = 5
CLEAR = 1e-3
"""No token of a greedy answer may be chosen by less than this share of the logits' spread: rounding could choose the other."""
LIMITS = {"logits": 1e-4, "gradients": 1e-3, "greedy": 0.0, "engines": 1e-5, "cancelled": 1e-3, "packing": 1e-4, "saved": 1e-5}
"""What a case's errors may be; `greedy` is the share of tokens that differ, `cancelled` see `engine_errors`."""
CANCELS = 1e-4
"""Share of the largest gradient that that of a single number is taken to be at least."""
EXACT = 1e-5
"""What errors of logits may be where float32 allows it; see `logits_limit`."""


def compare(raw: dict[str, Any], seed: int, folder: Path, new_tokens: int = 64) -> dict[str, float]:
    """The errors of one case, by what was compared."""
    from nbs_tests.models import torch_reference as reference

    model = reference.build(raw, seed)
    write_folder(folder / "source", raw, reference.checkpoint(model))
    decoder = load_decoder(folder / "source")
    ids = random_ids(raw, IDS_SHAPE, seed)
    expected = reference.logits(model, ids)
    errors = {"logits": position_error(decoder(mx.array(ids)), expected)}
    prompt, answer = clear_answer(reference, raw, seed, new_tokens)
    errors["greedy"] = float(np.mean(greedy(decoder, prompt, new_tokens) != answer))
    errors |= engine_errors(decoder, raw["vocab_size"])
    errors["packing"] = packing_error(decoder, ids)
    save_folder(folder / "saved", decoder, None)
    errors["saved"] = position_error(reference.logits(reference.load(folder / "saved"), ids), expected)
    if (most := max(errors["logits"], errors["packing"])) > EXACT and most > logits_limit(model, ids, expected):
        raise AssertionError(f"logits differ by {errors['logits']:.1e}, packed {errors['packing']:.1e}: more than float32 takes away")
    expected_gradients = reference.gradients(model, ids)
    for checkpoint in (False, True):
        found = gradients(decoder, ids, checkpoint)
        errors["gradients"] = max(errors.get("gradients", 0.0), tensors_error(found, expected_gradients))
    return errors


def logits_limit(model: Any, ids: np.ndarray, expected: np.ndarray) -> float:
    """What the error of logits may be: `EXACT`, or where more, twice that of transformers itself when a rounding moves its weights."""
    from nbs_tests.models import torch_reference as reference

    return min(max(EXACT, 2 * position_error(reference.rounded_logits(model, ids), expected)), LIMITS["logits"])


def position_error(found: np.ndarray | mx.array, expected: np.ndarray) -> float:
    """The largest relative error of any position: logits (B, T, V)."""
    found, expected = (np.asarray(array, dtype=np.float64) for array in (found, expected))
    return float((np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


def tensors_error(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest relative error of any tensor's gradient; infinite where one is missing, or is there where none should be."""
    return max(tensor_errors(found, expected).values()) if found.keys() == expected.keys() else np.inf


def tensor_errors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """The relative error of each tensor's gradient; infinite where there is one and none should be, or where it is not finite."""
    largest, errors = max(np.linalg.norm(array) for array in expected.values()), {}
    for name, array in expected.items():
        if np.linalg.norm(array) <= NO_GRADIENT * largest:  # rounding noise, such as of a router that has no choice
            errors[name] = 0.0 if np.linalg.norm(found[name]) <= NO_GRADIENT * largest else np.inf
        elif array.size == 1:  # all positions add up to one number, where much cancels
            error = float(np.abs(found[name] - array).item())
            errors[name] = error / max(float(np.abs(array).item()), CANCELS * largest)
        else:
            errors[name] = relative_error(found[name], array)
    return {name: error if np.isfinite(error) else np.inf for name, error in errors.items()}


def clear_answer(reference: Any, raw: dict[str, Any], seed: int, new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A prompt (1, T) and transformers' greedy answer (new_tokens,), of which no token is a close call."""
    for number in range(20):
        model = reference.build(raw, seed)  # each time: `dynamic` rope of transformers remembers the longest text
        prompt = random_ids(raw, (1, PROMPT_LENGTH), number)
        answer, gap = reference.greedy_with_gap(model, prompt, new_tokens)
        if gap > CLEAR:
            return prompt, answer
    raise AssertionError(f"no prompt with a clear answer: {raw}")


def engine_errors(decoder: Decoder, vocab_size: int) -> dict[str, float]:
    """How far a step's gradients by the lean engine are from those by the fast one.

    Returns:
        `engines`, and apart from it `cancelled`: the error of gradients that float32 cannot tell, because as much goes away in their sums.
        That is so of each that moves by half its error, or more, where its model's weights move by what float32 rounds.
    """
    batches = [random_batch(vocab_size, 3, 20, 1), random_batch(vocab_size, 2, 13, 2)]
    fast = step_gradients(WholeGraph(decoder), decoder, batches)
    errors, cancelled = tensor_errors(step_gradients(Layerwise(decoder), decoder, batches), fast), {}
    if max(errors.values()) > EXACT:
        models = [rounded(decoder, seed) for seed in range(4)]
        moved = [tensor_errors(step_gradients(WholeGraph(model), model, batches), fast) for model in models]
        limits = {name: 2 * max(move[name] for move in moved) for name in errors}
        cancelled = {name: errors.pop(name) for name, limit in limits.items() if EXACT < errors[name] <= limit}
    return {"engines": float(max(errors.values())), "cancelled": float(max(cancelled.values(), default=0.0))}


def step_gradients(engine: Engine, decoder: Decoder, batches: list[Batch]) -> dict[str, np.ndarray]:
    """The gradients of a step by module path; NaN where no piece brought any."""
    whole = {name: np.full(array.shape, np.nan, np.float32) for name, array in trainable_of(decoder).items()}
    for piece in engine.gradients(1, batches).pieces():
        for name, gradient in piece.gradients.items():
            whole[name][piece.rows or slice(None)] = np.array(gradient)
    return whole


def rounded(decoder: Decoder, seed: int) -> Decoder:
    """The same model with each weight moved by as much as float32 rounds."""
    moved, random = Decoder(decoder.config), np.random.default_rng(seed)
    arrays = {name: np.array(array) for name, array in parameters_of(decoder).items()}
    changed = {name: array * (1 + random.standard_normal(array.shape) * 2**-24) for name, array in arrays.items()}
    put_parameters(moved, {name: mx.array(array.astype(np.float32)) for name, array in changed.items()})
    return moved


def packing_error(decoder: Decoder, ids: np.ndarray) -> float:
    """How far the logits of examples in one row are from those of each example alone."""
    row = ids[:1, : sum(PACKED)]
    segments = mx.array(np.repeat(np.arange(len(PACKED)), PACKED)[None].astype(np.int32))
    packed = np.array(decoder.head(decoder.hidden_states(mx.array(row), segments=segments)))
    ends = np.cumsum(PACKED)
    alone = [np.array(decoder(mx.array(row[:, end - length : end]))) for end, length in zip(ends, PACKED, strict=True)]
    return position_error(packed, np.concatenate(alone, axis=1))


def mlx_lm_error(family: str) -> float | None:
    """How far mlx-lm is from transformers, of a folder that we saved; None where it has no such family."""
    from mlx_lm.utils import load_model

    from nbs_tests.models import torch_reference as reference

    of_family = [raw for raw in PUBLISHED.values() if raw["model_type"] == family]
    published = (scaled_down(raw) for raw in of_family if "short_factor" not in (raw.get("rope_scaling") or ()))  # the long ones always
    raw = next(published, None) or plain_case(family)  # a real one where there is one: mlx-lm asks for keys that others may leave out
    model = reference.build(raw, 0)
    ids = random_ids(raw, (2, 9), 0)  # no longer than a window, which mlx-lm has in its caches alone
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder, "source"))  # config.json in transformers' own words
        save_folder(Path(folder, "saved"), load_decoder(Path(folder, "source")), None)
        try:
            theirs, _ = load_model(Path(folder, "saved"))
            found = np.array(theirs(mx.array(ids)))
        except (Exception, SystemExit) as error:  # its module of olmo ends the process
            print(f"mlx-lm cannot load {family}: {type(error).__name__}: {str(error)[:100]}")
            return None
        return position_error(found, reference.logits(model, ids))


# ---- many cases ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Of all cases of a family: the largest error of each comparison, and what went wrong."""

    cases: int
    errors: dict[str, float]
    problems: tuple[str, ...]


def run(family: str, count: int, seed: int = 0, new_tokens: int = 64) -> Result:
    """Compares `count` cases of a family."""
    largest: dict[str, float] = {}
    problems = []
    for i, raw in enumerate(cases_of(family, count, seed)):
        try:
            with tempfile.TemporaryDirectory() as folder:
                errors = compare(raw, i, Path(folder), new_tokens)
        except Exception as error:  # one case that cannot be computed is no reason to leave the others out
            problems.append(f"{family} case {i}: {type(error).__name__}: {error}\n  {raw}")
            continue
        wrong = {name: error for name, error in errors.items() if not error <= LIMITS.get(name, np.inf)}
        if wrong:
            problems.append(f"{family} case {i}: {wrong}\n  {raw}")
        largest |= {name: max(largest.get(name, 0.0), error) for name, error in errors.items()}
    return Result(count, largest, tuple(problems))


def main(families: list[str], count: int = 8) -> int:
    """Compares, prints, and says how many cases failed."""
    failed = 0
    for family in families:
        result = run(family, count)
        result.errors["mlx-lm"] = mlx_lm_error(family)
        print(family, " ".join(f"{name} {'-' if error is None else f'{error:.1e}'}" for name, error in result.errors.items()), flush=True)
        print("\n".join(result.problems), end="\n" if result.problems else "", flush=True)
        failed += len(result.problems)
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:] or list(FAMILIES))))
