"""Model files: weights laid over a loaded model, from safetensors and npz."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from fulltune_nb.errors import WeightsError
from fulltune_nb.models.folder import load_decoder, load_model_file
from nbs_tests.models.model_cases import random_ids
from nbs_tests.models.parity import EMBEDDING, HEAD, QUERY, RAW, TIED, dtypes, tensors_of

IDS = random_ids(RAW, (2, 9), 0)


def logits(model) -> np.ndarray:
    return np.array(model(mx.array(IDS)))


def write_model_file(path, tensors, dtype=mx.float32):
    arrays = {name: mx.array(array).astype(dtype) for name, array in tensors.items()}
    if path.suffix == ".npz":
        mx.savez(str(path), **arrays)
    else:
        mx.save_safetensors(str(path), arrays)
    return path


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_model_file_replaces_the_weights_in_the_models_dtype(ending, dtype, model_folder, tmp_path):
    model, new = load_decoder(model_folder()), tensors_of(seed=1)
    load_model_file(model, write_model_file(tmp_path / f"new{ending}", new, dtype))
    assert dtypes(model) == {mx.float32}
    expected = mx.array(new[EMBEDDING]).astype(dtype).astype(mx.float32)
    np.testing.assert_array_equal(np.array(model.embed_tokens.weight), np.array(expected))


def test_a_model_file_written_by_numpy_is_read(model_folder, tmp_path):
    model, new = load_decoder(model_folder()), tensors_of(seed=1)
    np.savez_compressed(tmp_path / "new.npz", **{name: np.asfortranarray(array.astype(np.float64)) for name, array in new.items()})
    load_model_file(model, tmp_path / "new.npz")
    assert dtypes(model) == {mx.float32}
    np.testing.assert_allclose(np.array(model.lm_head.weight), new[HEAD])


def test_each_tensor_keeps_its_own_dtype_under_a_model_file(model_folder, tmp_path):
    tensors = {name: mx.array(array).astype(mx.float32 if "norm" in name else mx.bfloat16) for name, array in tensors_of().items()}
    model = load_decoder(model_folder(tensors))
    load_model_file(model, write_model_file(tmp_path / "new.safetensors", tensors_of(seed=1)))
    assert model.norm.weight.dtype == mx.float32 and model.embed_tokens.weight.dtype == mx.bfloat16


@pytest.mark.parametrize("change", ["missing", "unexpected", "mis-shaped"])
def test_a_model_file_that_does_not_fit_changes_nothing(change, model_folder, tmp_path):
    model, new = load_decoder(model_folder()), tensors_of(seed=1)
    before = logits(model)
    if change == "missing":
        del new[QUERY]
    else:
        new["unknown" if change == "unexpected" else QUERY] = np.ones(3, np.float32)
    path = write_model_file(tmp_path / "new.npz", new)
    with pytest.raises(WeightsError, match=f"{re.escape(str(path))} does not fit"):
        load_model_file(model, path)
    np.testing.assert_array_equal(logits(model), before)


def test_names_of_another_tool_are_listed(model_folder, tmp_path):
    model = load_decoder(model_folder())
    with pytest.raises(WeightsError, match="tensors unexpected: layers.0.attention.wq.weight"):
        load_model_file(model, write_model_file(tmp_path / "new.npz", {"layers.0.attention.wq.weight": np.ones((2, 2))}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("new.bin", b"x", r"ends in .safetensors or .npz, found '.bin'"),
        ("new", b"x", "found no ending"),
        ("new.npz", None, "No weights file at"),
        ("new.npz", b"not a zip file", "cannot be read as npz"),
        ("new.safetensors", b"not safetensors at all", "cannot be read as safetensors"),
    ],
)
def test_unreadable_model_files_are_refused(name, content, message, model_folder, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_model_file(load_decoder(model_folder()), tmp_path / name)


def test_pickled_objects_in_an_npz_are_refused(model_folder, tmp_path):
    np.savez(tmp_path / "new.npz", **{QUERY: np.array([{"a": 1}], dtype=object)})
    with pytest.raises(WeightsError, match="of dtype object.*pickle"):
        load_model_file(load_decoder(model_folder()), tmp_path / "new.npz")


def test_a_model_file_with_another_head_for_a_tied_model_is_refused(model_folder, tmp_path):
    model = load_decoder(model_folder(raw=TIED))
    save_file(tensors_of(RAW), tmp_path / "new.safetensors")
    with pytest.raises(WeightsError, match="lm_head.weight that differs from its embeddings"):
        load_model_file(model, tmp_path / "new.safetensors")
