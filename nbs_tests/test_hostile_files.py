"""Damaged and hostile files: each is a clear error that names the file and says what to do. Nothing is executed, memory is bounded.

Each case is a function that makes a file in a folder, and what the error must say. `RAN` is a file that a payload would make.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import resource
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import fulltune_nb as ft
from fulltune_nb.errors import CheckpointError, ConfigError, DataError, FulltuneError, GenerationError, ModelError, WeightsError
from fulltune_nb.model_json import read_json
from fulltune_nb.models.folder import load_decoder, weight_files
from fulltune_nb.settings import read_yaml
from fulltune_nb.tensor_files import open_npz, open_safetensors, read_tensors
from nbs_tests.models.conftest import model_folder  # noqa: F401  a fixture
from nbs_tests.models.parity import RAW
from nbs_tests.training.conftest import make_data, make_lm, make_trainer  # noqa: F401  fixtures
from nbs_tests.training.test_resuming import rewrite_state

MEMORY = 300 * 2**20  # bytes that reading a small hostile file may take at most


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def nothing_runs_and_memory_is_bounded(tmp_path):
    ran = tmp_path / "RAN"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield ran
    assert not ran.exists(), "a payload was executed"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY


def says(error, path, *texts):
    """The error names the file, says what is wrong, and is of a readable length."""
    message = str(error.value)
    assert Path(path).name in message and all(text in message for text in texts), message
    assert len(message) < 3000 and message.isprintable() or "\n" in message


# ---- safetensors ---------------------------------------------------------------------------------------------------------------


def safetensors(header, data=b"\0" * 16, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(offsets, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}


WHOLE = {"a": entry([0, 8], (2,)), "b": entry([8, 16], (2,))}
SAFETENSORS = {
    "empty": (b"", "header too small"),
    "shorter than a header's length": (b"\x10\0\0", "header too small"),
    "header of 2^63 bytes": (safetensors(WHOLE, size=2**63), "header too large"),
    "header of a terabyte": (safetensors(WHOLE, size=2**40), "header too large"),
    "header longer than the file": (safetensors(WHOLE, size=5000), "invalid header length"),
    "header cut short": (safetensors(WHOLE, size=20), "invalid JSON in header"),
    "header that is no JSON": (safetensors(b"\xff\xfe" * 30), "invalid UTF-8 in header"),
    "header nested 100,000 deep": (safetensors(b'{"a":' + b"[" * 100_000), "recursion limit"),
    "header that is a list": (safetensors([1, 2]), "invalid type: sequence"),
    "header that is a number": (safetensors(b"12345678"), "invalid type: integer"),
    "number of 10,000 digits": (safetensors(b'{"a": ' + b"9" * 10_000 + b"}"), "number out of range"),
    "a name twice": (safetensors(json.dumps({**WHOLE, "c": entry([8, 16], (2,))}).replace('"c"', '"b"').encode()), "'b' is given twice"),
    "a key twice in an entry": (safetensors(b'{"a": {"dtype":"F32","dtype":"F16","shape":[4]}}'), "duplicate field `dtype`"),
    "entry that is no object": (safetensors({"a": [0, 16]}), "invalid type: integer"),
    "entry without offsets": (safetensors({"a": {"dtype": "F32", "shape": [4]}}), "missing field `data_offsets`"),
    "metadata that is a list": (safetensors({"__metadata__": [1], **WHOLE}), "invalid type: sequence"),
    "unknown dtype": (safetensors({"a": entry([0, 16], dtype="F7")}), "unknown variant `F7`"),
    "dtype that is a list": (safetensors({"a": {**entry([0, 16]), "dtype": ["F32"]}}), "invalid type: sequence"),
    "negative offset": (safetensors({"a": entry([-16, 0])}), "invalid value: integer `-16`"),
    "float offset": (safetensors({"a": entry([0.0, 16.0])}), "invalid type: floating point"),
    "offset that is true": (safetensors({"a": entry([False, True], ())}), "invalid type: boolean"),
    "offsets the wrong way round": (safetensors({"a": entry([16, 0])}), "invalid offset for tensor `a`"),
    "three offsets": (safetensors({"a": entry([0, 8, 16])}), "expected 2 elements"),
    "offsets beyond the end": (safetensors({"a": entry([0, 64], (16,))}), "file not fully covered"),
    "offsets of 2^62": (safetensors({"a": entry([2**62, 2**62 + 16])}), "invalid offset for tensor `a`"),
    "overlapping tensors": (safetensors({"a": entry([0, 16]), "b": entry([8, 16], (2,))}), "invalid offset for tensor `b`"),
    "the same bytes twice": (safetensors({"a": entry([0, 16]), "b": entry([0, 16])}), "invalid offset for tensor"),
    "a hole between tensors": (safetensors({"a": entry([0, 4], (1,)), "b": entry([8, 16], (2,))}), "invalid offset for tensor `b`"),
    "bytes after the last tensor": (safetensors(WHOLE, b"\0" * 24), "file not fully covered"),
    "shape that is larger than its bytes": (safetensors({"a": entry([0, 16], (2**20, 2**20))}), "invalid shape, data type, or offset"),
    "shape whose product overflows": (safetensors({"a": entry([0, 16], (2**30, 2**30, 2**4))}), "overflow computing buffer size"),
    "shape of 2^40 by nothing": (safetensors({"a": entry([0, 0], (2**40, 0)), "b": entry([0, 16])}), "beyond what an array can have"),
    "negative size": (safetensors({"a": entry([0, 16], (-4,))}), "invalid value: integer `-4`"),
    "float size": (safetensors({"a": entry([0, 16], (4.0,))}), "invalid type: floating point"),
    "shape of 1,000 dimensions": (safetensors({"a": entry([0, 16], (1,) * 999 + (4,))}), "beyond what an array"),
    "shape that is a text": (safetensors({"a": {**entry([0, 16]), "shape": "4"}}), "invalid type: string"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_safetensors_file_that_lies_is_refused(case, tmp_path):
    content, said = SAFETENSORS[case]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        read_tensors(path)
    says(error, path, said)
    with pytest.raises(WeightsError) as error:
        [list(tensor.chunks()) for tensor in open_safetensors(path)]
    says(error, path, said)


def test_a_true_safetensors_file_is_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    for header, data in ((WHOLE, b"\0" * 16), ({"a": entry([0, 0], (0, 3)), "b": entry([0, 16])}, b"\0" * 16), ({}, b"")):
        path.write_bytes(safetensors(header, data))
        assert set(read_tensors(path)) == set(header)


@pytest.mark.parametrize("place", range(0, 900, 37))
def test_a_bit_flipped_in_a_header_never_reads_as_something_else(place, tmp_path):
    """Either an error, or tensors of the sizes that are in the file: never a crash, never more than the file has."""
    path = tmp_path / "weights.safetensors"
    mx.save_safetensors(str(path), {f"layer.{i}.weight": mx.ones((3, 4)) * i for i in range(8)})
    content = bytearray(path.read_bytes())
    content[place % (len(content) - 384)] ^= 1 << (place % 8)
    path.write_bytes(bytes(content))
    try:
        arrays = read_tensors(path)
        mx.eval(list(arrays.values()))
        assert sum(array.nbytes for array in arrays.values()) == 8 * 48
    except WeightsError as error:
        assert "weights.safetensors" in str(error)


# ---- npz -----------------------------------------------------------------------------------------------------------------------


def npy(array, descr=None, shape=None):
    """An .npy file, whose header may say something else than its data."""
    file = io.BytesIO()
    header = {"descr": descr or np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def npz(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)


def pickled(path, ran):
    np.savez(path, a=np.array([Payload(ran)], dtype=object))


def pickled_under_another_name(path, ran):
    npz(path, [("a.npy", pickle.dumps(Payload(ran)))])


def bomb(path, ran):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        file.write(npy(np.zeros(0, np.uint8), shape=(2**27,)))
        for _ in range(128):  # not all of it at once: memory is measured here
            file.write(bytes(2**20))


def bomb_of_many(path, ran):
    zeros = npy(np.zeros(2**20, np.float32))
    npz(path, [(f"{i}.npy", zeros) for i in range(40)], zipfile.ZIP_DEFLATED)


def flipped(path, ran):
    np.savez(path, a=np.arange(1000, dtype=np.float32))
    content = bytearray(path.read_bytes())
    content[1500] ^= 4
    path.write_bytes(bytes(content))


def encrypted(path, ran):
    np.savez(path, a=np.ones(3))
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(bytes(content))


def unknown_compression(path, ran):
    np.savez(path, a=np.ones(3))
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.index(signature) + offset] = 99
    path.write_bytes(bytes(content))


def cut(path, ran):
    np.savez(path, a=np.ones(3000))
    path.write_bytes(path.read_bytes()[:-100])


def bad_deflate(path, ran):
    np.savez_compressed(path, a=np.arange(1000, dtype=np.float64))
    content = bytearray(path.read_bytes())
    content[300:400] = zlib.compress(b"something else")[:1] * 100
    path.write_bytes(bytes(content))


def a_script_in_it(path, ran):
    npz(path, [("a.npy", npy(np.ones(3))), ("../../evil.py", "import os")])


def twice(path, ran):
    with pytest.warns(UserWarning, match="Duplicate"):
        npz(path, [("a.npy", npy(np.ones(3)))] * 2)


NPZ = {
    "pickled object": (pickled, "dtype object"),
    "pickle without a header": (pickled_under_another_name, "cannot be read as npz"),
    "zip bomb": (bomb, "would unpack to"),
    "zip bomb of many entries": (bomb_of_many, "would unpack to"),
    "bit flipped in the data": (flipped, "cannot be read as npz"),
    "encrypted": (encrypted, "cannot be read as npz"),
    "unknown compression": (unknown_compression, "cannot be read as npz"),
    "cut short": (cut, "cannot be read as npz"),
    "compressed data damaged": (bad_deflate, "cannot be read as npz"),
    "an entry that is no array": (a_script_in_it, "expected .npy entries only"),
    "an entry twice": (twice, "there twice"),
    "no entries": (lambda path, ran: npz(path, []), "no tensor in it"),
    "no archive": (lambda path, ran: path.write_bytes(b"PK\x03\x04" + b"x" * 500), "cannot be read as npz"),
    "shape beyond the data": (lambda path, ran: npz(path, [("a.npy", npy(np.ones(3), shape=(2**20, 2**20)))]), "should have"),
    "negative shape": (lambda path, ran: npz(path, [("a.npy", npy(np.ones(3), shape=(-3,)))]), "beyond what an array"),
    "shape smaller than the data": (lambda path, ran: npz(path, [("a.npy", npy(np.ones(3), shape=(2,)))]), "should have"),
    "dtype that is code": (
        lambda path, ran: npz(path, [("a.npy", npy(np.ones(3)).replace(b"'<f8'", b"open(0)"))]),
        "cannot be read as npz",
    ),
    "structured dtype": (lambda path, ran: np.savez(path, a=np.zeros(2, [("x", "f4"), ("y", "i4")])), "of dtype"),
    "texts": (lambda path, ran: np.savez(path, a=np.array(["text"])), "of dtype"),
    "npy of a later version": (lambda path, ran: npz(path, [("a.npy", b"\x93NUMPY\x09\x00" + b"x" * 100)]), "cannot be read as npz"),
}


@pytest.mark.parametrize("case", NPZ)
def test_an_npz_that_is_damaged_or_made_up_is_refused(case, tmp_path, nothing_runs_and_memory_is_bounded):
    make, said = NPZ[case]
    path = tmp_path / "model.npz"
    make(path, nothing_runs_and_memory_is_bounded)
    with pytest.raises(WeightsError) as error:
        mx.eval(list(read_tensors(path).values()))
    says(error, path, said)
    with pytest.raises(WeightsError) as error:
        [list(tensor.chunks()) for tensor in open_npz(path)]
    says(error, path)


def test_compressed_and_fortran_ordered_npz_files_are_still_read(tmp_path):
    array = np.asfortranarray(np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32))
    np.savez_compressed(tmp_path / "model.npz", a=array, b=np.float32(3))
    assert np.array_equal(np.array(read_tensors(tmp_path / "model.npz")["a"]), array)


# ---- what is no file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "model.npz"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "missing", "link to itself"])
def test_what_is_no_file_is_never_opened(name, kind, tmp_path):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    with pytest.raises(WeightsError) as error:
        read_tensors(path)
    says(error, path)


# ---- model folders -------------------------------------------------------------------------------------------------------------


def config(**changes):
    return json.dumps({**RAW, **changes})


CONFIGS = {
    "no JSON": ("{", "cannot be read as JSON"),
    "nested 100,000 deep": ("[" * 100_000, "cannot be read as JSON"),
    "number of 10,000 digits": ('{"a": ' + "9" * 10_000 + "}", "cannot be read as JSON"),
    "a list": ("[]", "must hold a JSON object"),
    "no family": ("{}", "model_type is None"),
    "a family that is a list": (config(model_type=["llama"]), "model_type is"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers is 1,000,000,000"),
    "half a layer": (config(num_hidden_layers=1.5), "num_hidden_layers"),
    "a size that is a text": (config(hidden_size="24"), "hidden_size"),
    "a negative size": (config(vocab_size=-1), "vocab_size"),
    "an activation that is code": (config(hidden_act="__import__('os')"), "hidden_act is"),
    "an activation that is a list": (config(hidden_act=["silu"]), ""),
    "an epsilon that is a text": (config(rms_norm_eps="tiny"), ""),
    "rope that is a text": (config(rope_parameters="yes", rope_scaling="yes"), ""),
    "a theta that is a list": (config(rope_theta=[1]), "rope_theta must be"),
    "a key twice": ('{"model_type": "llama", "model_type": "gemma"}', "'model_type' is given twice"),
    "UTF-16": (config().encode("utf-16"), "cannot be read as JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + config().encode(), "cannot be read as JSON"),
    "a billion experts": (config(model_type="granitemoe", num_local_experts=10**9), "num_local_experts is 1,000,000,000"),
    "a truth that is a text": (config(tie_word_embeddings="false"), "tie_word_embeddings must be true or false"),
    "a truth that is a number": (config(attention_bias=7), "attention_bias must be true or false"),
    "an epsilon that is not a number": (config(rms_norm_eps=math.nan), "rms_norm_eps must be"),
    "more positions than there are": (config(max_position_embeddings=10**30), "max_position_embeddings must be"),
    "a padding that is a text": (config(pad_token_id="<pad>"), "pad_token_id must be"),
    "more than all dimensions rotated": (config(partial_rotary_factor=2), "partial_rotary_factor must be"),
    "rope of a negative factor": (config(rope_scaling={"rope_type": "linear", "factor": -1}), "factor must be"),
    "rope of an endless factor": (config(rope_scaling={"rope_type": "dynamic", "factor": math.inf}), "factor must be"),
    "rope of a huge factor": (config(rope_scaling={"rope_type": "linear", "factor": 10**400}), "factor must be"),
    "rope of a text": (config(rope_scaling={"rope_type": "linear", "factor": "2"}), "factor must be"),
    "rope of a theta of nothing": (config(rope_theta=0), "rope_theta must be"),
    "rope that blends nothing": (
        config(rope_scaling={"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}), "must be smaller than",
    ),
    **{f"{key} of a billion": (config(**{key: 10**9}), " no tensor of the weights has so many numbers") for key in (
        "head_dim", "vocab_size", "intermediate_size")},
    "a billion heads": (config(num_attention_heads=10**9, head_dim=8), "no tensor of the weights"),
    "layers' kinds that are numbers": (config(layer_types=[1, 2]), "layer_types"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_is_refused(case, model_folder):  # noqa: F811
    text, said = CONFIGS[case]
    path = model_folder()
    (path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError) as error:
        load_decoder(path)
    says(error, path / "config.json", said)


INDEXES = {
    "a file above": "../model.safetensors",
    "an absolute path": "/etc/passwd",
    "the folder itself": ".",
    "the folder above": "..",
    "a path of windows": "..\\model.safetensors",
    "no safetensors": "pytorch_model.bin",
    "a number": 7,
    "a list": ["model.safetensors"],
    "a missing shard": "model-00009-of-00009.safetensors",
    "a name with a zero byte": "model\0.safetensors",
    "nothing": "",
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_names_other_files_is_refused(case, model_folder):  # noqa: F811
    path = model_folder()
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": INDEXES[case]}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError) as error:
        weight_files(path)
    says(error, path)


def test_a_json_file_that_is_too_large_or_a_pipe_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ModelError, match=r"config.json has 1,099,511,627,776 bytes"):
        read_json(tmp_path / "config.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ModelError, match="is no file"):
        read_json(tmp_path / "pipe.json")


# ---- chat templates ------------------------------------------------------------------------------------------------------------

TEMPLATES = {
    "Python's classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('touch RAN') }}",
    "globals of a filter": "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
    "the loop's context": "{{ self._TemplateReference__context }}{{ lipsum.__globals__['os'] }}",
    "attributes by a filter": "{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).mro() }}",
    "a format text": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}{{ 1/0 }}",
    "changing what it is given": "{{ messages.append(1) }}{{ messages.clear() }}",
    "a loop without end": "{% for i in range(10**12) %}x{% endfor %}",
    "an import": "{% import 'os' as os %}",
    "an include": "{% include '/etc/passwd' %}",
    "a syntax error": "{% for %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_chat_template_that_reaches_out_is_refused(case, make_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(TEMPLATES[case])
    rows = {"train": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}]}
    with pytest.raises(DataError) as error:
        ft.load_data(rows, tokenizer)
    assert error.value.problems[0].startswith("train:1: ") and "template" in str(error.value)
    from fulltune_nb.chat_template import chat_ids

    with pytest.raises(GenerationError, match="chat template refused"):
        chat_ids(tokenizer, rows["train"][0]["messages"], None, 500)


# ---- settings ------------------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "a Python object": "iters: !!python/object/apply:os.system ['touch RAN']",
    "a Python name": "iters: !!python/name:os.system",
    "a module": "iters: !!python/module:os",
    "a tag of its own": "iters: !evil 3",
    "a billion laughs": LAUGHS,
    "a value that contains itself": "freeze: &a [*a]",
    "merges of merges": "a: &a {x: 1}\nb: &b {<<: [*a, *a]}\n<<: *b\n",
    "an alias of nothing": "iters: *nothing",
    "nested 100,000 deep": "freeze: " + "[" * 100_000,
    "two documents": "iters: 3\n---\niters: 4\n",
    "binary": "\0\1\2",
    "a list": "- 1\n- 2",
    "a text": "hello",
    "a key that is a list": "[1, 2]: 3",
    "a number of 10,000 digits": "iters: " + "9" * 10_000,
    "a tab": "iters:\t3\n\tseed: 3",
    "an unknown name": "itters: 3",
    "a key twice": "iters: 3\niters: 4",
    "a wrong type": "iters: [3]",
    "not a number": "learning_rate: .nan",
    "endless": "learning_rate: .inf",
}


@pytest.mark.parametrize("case", YAML)
def test_a_settings_file_that_is_not_just_settings_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(YAML[case])
    with pytest.raises(ConfigError) as error:
        ft.TrainConfig.from_yaml(path)
    says(error, path)


def test_ordinary_aliases_are_still_read(tmp_path):
    (tmp_path / "config.yaml").write_text("freeze: &names ['*norm*']\ntrain_only: *names\n")
    assert read_yaml(tmp_path / "config.yaml")["train_only"] == ["*norm*"]


# ---- rows ----------------------------------------------------------------------------------------------------------------------

TURN = {"role": "user", "content": "Hi"}
ROWS = {
    "a text with half a character": {"text": "\ud800"},
    "a chat with half a character": {"messages": [{"role": "user", "content": "\udfff"}]},
    "a role with half a character": {"messages": [{"role": "\ud800", "content": "Hi"}]},
    "a number": {"text": 3},
    "a list": {"text": ["Hi"]},
    "an object": {"text": {"a": "Hi"}},
    "null": {"text": None},
    "nothing": {},
    "messages that are an object": {"messages": {"role": "user"}},
    "no messages": {"messages": []},
    "a message that is a text": {"messages": ["Hi"]},
    "a message that is null": {"messages": [None]},
    "no role": {"messages": [{"content": "Hi"}]},
    "a role that is a list": {"messages": [{"role": ["user"], "content": "Hi"}]},
    "no content": {"messages": [{"role": "user"}]},
    "content with a picture": {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
    "arguments that are no JSON": {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
    "tools that are a text": {"messages": [TURN], "tools": "add"},
    "a completion that is missing": {"prompt": "Hi"},
    "a completion that is a number": {"prompt": "Hi", "completion": 3},
    "a prompt that is null": {"prompt": None, "completion": "Hi"},
}


@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named_by_file_and_line(case, tokenizer, tmp_path):
    alike = {"messages": {"messages": [TURN]}, "prompt": {"prompt": "a", "completion": "b"}}
    good = json.dumps(alike.get(next(iter(ROWS[case]), "text"), {"text": "Hi"}))
    (tmp_path / "train.jsonl").write_text("\n".join([good, good, json.dumps(ROWS[case]), good]))
    with pytest.raises(DataError) as error:
        ft.load_data(tmp_path, tokenizer)
    assert [problem.split(" ")[0] for problem in error.value.problems] == ["train.jsonl:3:"]


# ---- checkpoints ---------------------------------------------------------------------------------------------------------------


def cut_weights(folder, outside):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def flip(name, place=-9):
    def damage(folder, outside):
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(bytes(content))

    return damage


def link(name):
    def damage(folder, outside):
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return damage


def manifest(change):
    def damage(folder, outside):
        content = json.loads((folder / "manifest.json").read_text())
        change(content)
        (folder / "manifest.json").write_text(json.dumps(content))

    return damage


def write(name, text):
    return lambda folder, outside: (folder / name).write_text(text)


def state(change):
    return lambda folder, outside: rewrite_state(folder, change)


CHECKPOINTS = {
    "weights cut short": cut_weights,
    "a bit of the weights": flip("model.safetensors"),
    "a bit of the optimizer": flip("optimizer.safetensors"),
    "a bit of the state": flip("trainer.json", 30),
    "a bit of the config": flip("config.json"),
    "a bit of the tokenizer": flip("tokenizer.json"),
    "weights missing": lambda folder, outside: (folder / "model.safetensors").unlink(),
    "manifest missing": lambda folder, outside: (folder / "manifest.json").unlink(),
    "manifest no JSON": write("manifest.json", "{"),
    "manifest too deep": write("manifest.json", "[" * 100_000),
    "manifest a list": write("manifest.json", "[]"),
    "manifest empty": write("manifest.json", "{}"),
    "manifest of numbers": manifest(lambda content: content.update({"config.json": 3})),
    "manifest that names a file above": manifest(lambda content: content.update({"../x": "0"})),
    "manifest that names an absolute path": manifest(lambda content: content.update({"/etc/passwd": "0"})),
    "manifest that leaves a file out": manifest(lambda content: content.pop("config.json")),
    "a file more": write("model-2.safetensors", "x"),
    "weights that are a link": link("model.safetensors"),
    "state that is a link": link("trainer.json"),
    "manifest that is a link": link("manifest.json"),
    "state without a step": state(lambda content: content.pop("step")),
    "state of another step": state(lambda content: content.update(step=3)),
    "state of a negative step": state(lambda content: content.update(step=-1)),
    "state with a text for a step": state(lambda content: content.update(step="6")),
    "state without a history": state(lambda content: content.update(history=None)),
    "state with a random state of texts": state(lambda content: content.update(random=["a", "b"])),
    "state without a fingerprint": state(lambda content: content.update(data={"source": None})),
    "state with a wrong patience": state(lambda content: content.update(patience={"best_loss": "x"})),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizer):
    """A run directory with checkpoints of the steps 3 and 6; to be copied."""
    from nbs_tests.training.conftest import TINY_LLAMA, make_rows

    folder = tmp_path_factory.mktemp("finished")
    settings = ft.TrainConfig(batch_size=4, iters=6, learning_rate=1e-3, save_every=3, mask_prompt=True)
    data = ft.load_data({"train": make_rows(10)}, tokenizer, config=settings)
    trainer = ft.Trainer(ft.LanguageModel.from_config(TINY_LLAMA, tokenizer, seed=1), data, settings, folder / "run")
    trainer.run()
    return folder / "run", data


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_damaged_checkpoint_is_passed_over_and_told(case, finished, tmp_path):
    source, data = finished
    run = shutil.copytree(source, tmp_path / "run", ignore=lambda *_: ["run.lock"])
    CHECKPOINTS[case](run / "checkpoints" / "step-000006", tmp_path / "outside")
    trainer = ft.Trainer.resume(run, data=data)
    assert trainer.step_count == 3
    told = [event.message for event in trainer.history.events if "damaged checkpoint" in event.message]
    assert len(told) == 1 and "step-000006" in told[0] and len(told[0]) < 1000
    if case != "state of another step":  # which is a whole one, under a wrong name
        with pytest.raises(CheckpointError):
            trainer.restore(run / "checkpoints" / "damaged-step-000006")


STATES = {
    "a config that is none": lambda content: content.update(config={"itters": 3}),
    "a config of wrong types": lambda content: content.update(config={"iters": "x"}),
    "a history of numbers": lambda content: content.update(history=[1, 2]),
    "a history of lists": lambda content: content.update(history=[{"kind": []}]),
    "a step beyond the run": lambda content: content.update(config={**content["config"], "iters": 2}),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_made_up_with_a_true_checksum_is_refused(case, finished, tmp_path):
    source, data = finished
    run = shutil.copytree(source, tmp_path / "run", ignore=lambda *_: ["run.lock"])
    (run / "config.yaml").unlink()
    rewrite_state(run / "checkpoints" / "step-000006", STATES[case])
    with pytest.raises(FulltuneError):
        ft.Trainer.resume(run, data=data)


def test_there_are_enough_of_them():
    kinds = (SAFETENSORS, NPZ, CONFIGS, INDEXES, TEMPLATES, YAML, ROWS, CHECKPOINTS, STATES)
    assert sum(map(len, kinds)) >= 40
