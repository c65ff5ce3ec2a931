"""Weights files on devices that are not the CPU: what no GPU computes in, and how a GPU's arrays are read."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from fulltune_nb import tensor_files
from fulltune_nb.cpu import on_cpu
from fulltune_nb.tensor_files import begin_checksum_of, read_tensors, write_tensors
from nbs_tests.gpu_like import gpu_like

DOUBLES = {"a": np.array([1 / 3, -1e300, np.nan]), "b": np.arange(6, dtype=np.float32).reshape(2, 3)}


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_float64_is_float32_on_a_gpu_made_by_the_host_and_told(ending, tmp_path):
    path = tmp_path / f"weights{ending}"
    np.savez(path, **DOUBLES) if ending == ".npz" else save_file(DOUBLES, path)
    with gpu_like(), pytest.warns(UserWarning, match=r"1 tensors of .*weights.* are float64 \(a\)"):
        arrays = read_tensors(path)
    assert {array.dtype for array in arrays.values()} == {mx.float32}
    with np.errstate(over="ignore"):
        assert all(np.array_equal(np.array(arrays[name]), array.astype(np.float32), equal_nan=True) for name, array in DOUBLES.items())
    with pytest.warns(UserWarning, match="float64"):
        dtype = read_tensors(path)["a"].dtype
    assert dtype == (mx.float64 if ending == ".npz" and on_cpu() else mx.float32)  # MLX reads no float64 from safetensors


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_an_array_on_cuda_is_read_by_copies_piece_by_piece_to_the_same_bytes(ending, tmp_path, monkeypatch):
    """`numpy.asarray` of a CUDA array would have MLX move it to memory shared with the host."""
    random = mx.random.normal((64, 33))
    arrays = {"a": random, "t": random.T, "b": random.astype(mx.bfloat16), "h": random.astype(mx.float16)[1:], "n": mx.array(7)}
    arrays |= {"z": mx.zeros((0, 3)), "flags": random > 0, "bytes": (random * 9).astype(mx.uint8)}
    mx.eval(arrays)
    write_tensors(tmp_path / f"plain{ending}", arrays)
    read, asarray = [], np.asarray
    monkeypatch.setattr(tensor_files, "device_kind", lambda: "cuda")
    monkeypatch.setattr(tensor_files, "COPIED_BYTES", 1000)
    monkeypatch.setattr(np, "asarray", lambda array, *rest: (read.append(array), asarray(array, *rest))[1])
    write_tensors(tmp_path / f"copied{ending}", arrays)
    checksum = begin_checksum_of(arrays)()  # in a thread of its own
    monkeypatch.undo()
    own = {asarray(array.view(mx.uint8)).ctypes.data for array in arrays.values() if array.size > 1}
    seen = [asarray(array.view(mx.uint8)) for array in read if isinstance(array, mx.array) and array.ndim]
    assert seen and all(part.nbytes <= 1000 and part.ctypes.data not in own for part in seen)
    again = mx.load(str(tmp_path / f"copied{ending}"))
    assert all(again[name].dtype == array.dtype and mx.array_equal(again[name], array) for name, array in arrays.items())
    if ending == ".safetensors":
        content = (tmp_path / "copied.safetensors").read_bytes()
        assert content == (tmp_path / "plain.safetensors").read_bytes() and hashlib.sha256(content).hexdigest() == checksum
