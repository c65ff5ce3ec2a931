"""`python -m fulltune_nb.convert`: both ways, bytes and dtypes kept, nothing overwritten, bad files refused."""

from __future__ import annotations

import json
import tracemalloc
import zipfile

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb import convert as command
from fulltune_nb.convert import main
from fulltune_nb.tensor_files import open_npz, open_safetensors, safetensors_metadata
from nbs_tests.memory_held import memory_held

ARRAYS = {
    "model.embed_tokens.weight": mx.random.normal((5, 3), key=mx.random.key(0)),
    "model.norm.weight": mx.array([1.5, -2.25, 3e30]).astype(mx.bfloat16),
    "half": mx.array([[0.5, 65504.0]], dtype=mx.float16),
    "count": mx.array(7, dtype=mx.int64),
    "flags": mx.array([True, False, True]),
    "empty": mx.zeros((0, 4)),
    "größe": mx.array([3], dtype=mx.uint8),
}


def same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert mx.array_equal(found[name], array), name


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "model.npz"
    mx.savez(str(path), **ARRAYS)
    return path


@pytest.fixture
def safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), ARRAYS, metadata={"base_model": "somewhere", "format": "mlx"})
    return path


def test_npz_becomes_safetensors_with_the_same_tensors(npz, tmp_path, capsys):
    assert main([str(npz), str(tmp_path / "out.safetensors")]) == 0
    same(mx.load(str(tmp_path / "out.safetensors")), ARRAYS)
    assert "7 tensors" in capsys.readouterr().out


def test_safetensors_becomes_npz_with_the_same_tensors(safetensors, tmp_path):
    assert main([str(safetensors), str(tmp_path / "out.npz")]) == 0
    same(mx.load(str(tmp_path / "out.npz")), ARRAYS)


def test_there_and_back_gives_the_same_bytes(safetensors, tmp_path):
    assert main([str(safetensors), str(tmp_path / "a.npz")]) == 0
    assert main([str(tmp_path / "a.npz"), str(tmp_path / "b.safetensors")]) == 0
    assert safetensors_metadata(tmp_path / "b.safetensors") == {"base_model": "somewhere", "format": "pt"}
    before = {tensor.name: b"".join(tensor.chunks()) for tensor in open_safetensors(safetensors)}
    after = {tensor.name: b"".join(tensor.chunks()) for tensor in open_safetensors(tmp_path / "b.safetensors")}
    assert before == after


def test_the_safetensors_library_reads_what_is_written(npz, tmp_path):
    from safetensors.numpy import load_file

    plain = tmp_path / "plain.npz"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], dtype=np.int16)}
    np.savez(plain, **arrays)
    assert main([str(plain), str(tmp_path / "out.safetensors")]) == 0
    found = load_file(tmp_path / "out.safetensors")
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_arrays_as_numpy_may_write_them_come_out_in_plain_order(tmp_path):
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {"fortran": np.asfortranarray(array), "big_endian": array.astype(">f4"), "column": np.asfortranarray(array[:, :1, :1])}
    np.savez_compressed(tmp_path / "in.npz", **arrays)
    assert main([str(tmp_path / "in.npz"), str(tmp_path / "out.safetensors")]) == 0
    found = mx.load(str(tmp_path / "out.safetensors"))
    assert all(np.array_equal(np.array(found[name]), arrays[name]) for name in arrays)


def test_bfloat16_that_numpy_wrote_as_raw_bytes_stays_bfloat16(tmp_path):
    np.savez(tmp_path / "in.npz", w=np.frombuffer(b"\x80\x3f\x00\x40", dtype="V2"))
    assert main([str(tmp_path / "in.npz"), str(tmp_path / "out.safetensors")]) == 0
    same(mx.load(str(tmp_path / "out.safetensors")), {"w": mx.array([1.0, 2.0], dtype=mx.bfloat16)})


def test_what_the_npz_says_about_itself_goes_along(npz, tmp_path):
    (tmp_path / "model.npz.json").write_text('{"base_model": "somewhere"}')
    assert main([str(npz), str(tmp_path / "out.safetensors")]) == 0
    assert safetensors_metadata(tmp_path / "out.safetensors") == {"format": "pt", "base_model": "somewhere"}


def test_an_existing_target_is_replaced_only_with_force(npz, tmp_path, capsys):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    assert main([str(npz), str(target)]) == 2
    assert "--force" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"
    assert main([str(npz), str(target), "--force"]) == 0
    same(mx.load(str(target)), ARRAYS)


def test_the_small_file_beside_an_npz_is_not_overwritten_either(safetensors, tmp_path, capsys):
    beside = tmp_path / "out.npz.json"
    beside.write_text("{}")
    assert main([str(safetensors), str(tmp_path / "out.npz")]) == 2
    assert beside.read_text() == "{}"
    assert not (tmp_path / "out.npz").exists()
    assert main([str(safetensors), str(tmp_path / "out.npz"), "--force"]) == 0
    assert json.loads(beside.read_text()) == {"base_model": "somewhere"}


def _cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def _pickled(path):
    np.savez(path.with_suffix(".npz"), w=np.array([{"a": 1}], dtype=object))


@pytest.mark.parametrize("name", ["model.npz", "model.safetensors"])
@pytest.mark.parametrize("spoil", [_cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"\xff" * 40)])
def test_a_broken_source_is_refused_and_nothing_is_left_behind(npz, safetensors, tmp_path, name, spoil, capsys):
    source = tmp_path / name
    spoil(source)
    target = tmp_path / "sub" / ("out.npz" if name.endswith("s") else "out.safetensors")
    assert main([str(source), str(target)]) == 2
    assert name in capsys.readouterr().err
    assert not target.parent.exists() or not list(target.parent.iterdir())


def test_damage_inside_a_tensor_of_an_npz_is_found(npz, tmp_path, capsys):
    with zipfile.ZipFile(npz) as archive:
        entry = archive.getinfo("model.embed_tokens.weight.npy")
    content = bytearray(npz.read_bytes())
    name_size, extra_size = (int.from_bytes(content[entry.header_offset + at :][:2], "little") for at in (26, 28))
    content[entry.header_offset + 30 + name_size + extra_size + entry.compress_size - 1] ^= 1
    npz.write_bytes(content)
    assert main([str(npz), str(tmp_path / "out.safetensors")]) == 2
    assert "model.embed_tokens.weight" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_python_objects_are_refused(npz, tmp_path, capsys):
    _pickled(npz)
    assert main([str(npz), str(tmp_path / "out.safetensors")]) == 2
    assert "object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [("model.npz", "out.npz", "both .npz"), ("model.npz", "out.bin", "found '.bin'"), ("none.npz", "out.safetensors", "No weights file"),
     ("model.pt", "out.npz", "found '.pt'"), ("model.npz", "model.npz", "both .npz")],
)  # fmt: skip
def test_wrong_names_are_bad_input(npz, tmp_path, source, target, message, capsys):
    assert main([str(tmp_path / source), str(tmp_path / target)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    source = tmp_path / f"in.{ending}"
    arrays = {f"layer.{number}": mx.zeros((1000, 2000)) for number in range(6)}  # 8 MB each
    mx.savez(str(source), **arrays) if ending == "npz" else mx.save_safetensors(str(source), arrays)
    before = memory_held()
    tracemalloc.start()
    try:
        command.convert(source, tmp_path / ("out.safetensors" if ending == "npz" else "out.npz"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6  # of 48 MB
    assert mx.get_peak_memory() <= before


def test_every_tensor_is_read_as_it_says(npz, safetensors):
    for tensors in (open_npz(npz), open_safetensors(safetensors)):
        assert {tensor.name: tensor.nbytes for tensor in tensors} == {name: array.nbytes for name, array in ARRAYS.items()}
        assert all(len(b"".join(tensor.chunks())) == tensor.nbytes for tensor in tensors)
