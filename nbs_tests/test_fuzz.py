"""Whatever is in a file or a row, what comes of it is data, or an error of ours: never another exception, never a crash.

More, and other, examples: `FUZZ_EXAMPLES=2000 pytest nbs_tests/test_fuzz.py`.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fulltune_nb as ft
from fulltune_nb.data.read import read_file
from fulltune_nb.data.rows import row_problem
from fulltune_nb.data.settings import DataSettings
from fulltune_nb.errors import CheckpointError, ConfigError, DataError, ModelError, WeightsError
from fulltune_nb.models.families import FAMILIES
from fulltune_nb.models.folder import read_config_file, weight_files
from fulltune_nb.tensor_files import read_tensors
from fulltune_nb.training.state import read_state
from nbs_tests.models.parity import RAW

HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
QUICK = {"deadline": None, "suppress_health_check": HEALTH, "max_examples": int(EXAMPLES or 80), "derandomize": EXAMPLES is None}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
objects = lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)  # noqa: E731
values = st.recursive(scalars, objects, max_leaves=12)
messages = st.lists(values | st.fixed_dictionaries({}, optional={"role": values, "content": values, "tool_calls": values}), max_size=4)
rows = values | st.fixed_dictionaries(
    {}, optional={"text": values, "prompt": values, "completion": values, "messages": messages | values, "tools": values}
)


@pytest.fixture
def path(tmp_path):
    return lambda name: tmp_path / name


@settings(**QUICK)
@given(content=st.binary(max_size=400))
def test_any_bytes_as_rows(path, content):
    path("train.jsonl").write_bytes(content)
    split = read_file("train", path("train.jsonl"))
    assert len(split.rows) + split.blank_lines + len(split.problems) >= 1
    assert all(problem.startswith("train.jsonl:") for problem in split.problems)


@settings(**QUICK)
@given(lines=st.lists(rows, min_size=1, max_size=4))
def test_any_json_as_rows(path, tokenizer, lines):
    path("train.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    try:
        data = ft.load_data(path("train.jsonl").parent, tokenizer)
    except DataError as error:
        assert "train" in str(error)
    else:
        assert len(data.train) == len(lines)


@settings(**QUICK)
@given(row=st.dictionaries(st.sampled_from(["text", "prompt", "completion", "messages", "tools", "x"]), values | messages))
def test_any_row_in_memory(row):
    for format in ("chat", "completions", "text"):
        problem = row_problem(row, format, DataSettings())
        assert problem is None or isinstance(problem, str)


@settings(**QUICK)
@given(content=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_as_settings(path, content):
    path("config.yaml").write_bytes(content)
    try:
        ft.TrainConfig.from_yaml(path("config.yaml"))
    except ConfigError as error:
        assert "config.yaml" in str(error)


NAMES = st.sampled_from([*ft.TrainConfig().to_dict(), "learning-rate", "itters"])


@settings(**QUICK)
@given(content=st.dictionaries(NAMES, values, max_size=4))
def test_any_values_as_settings(path, content):
    path("config.yaml").write_text(json.dumps(content))
    for make in (lambda: ft.TrainConfig.from_yaml(path("config.yaml")), lambda: ft.TrainConfig.from_dict(content)):
        try:
            config = make()
        except ConfigError as error:
            assert str(error)
        else:
            assert ft.TrainConfig.from_dict(config.to_dict()) == config


@settings(**QUICK)
@given(changes=st.dictionaries(st.sampled_from([*RAW, "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window",
    "head_dim", "clip_qkv", "partial_rotary_factor", "num_local_experts", "num_experts_per_tok", "quantization_config"]),
    values, max_size=3), family=st.sampled_from(sorted(FAMILIES)))  # fmt: skip
def test_any_values_as_a_model_config(path, changes, family):
    path("config.json").write_text(json.dumps({**RAW, "model_type": family, **changes}))
    try:
        read_config_file(path("config.json"))
    except ModelError as error:
        assert "config.json" in str(error)


@settings(**QUICK)
@given(names=st.dictionaries(st.text(max_size=5), values | st.text(max_size=30), max_size=3) | values)
def test_any_values_as_an_index(path, names):
    path("model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError):
        weight_files(path("x").parent)


entries = st.fixed_dictionaries(
    {}, optional={"dtype": st.sampled_from(["F32", "BF16", "U8", "F8", 3]), "shape": st.lists(st.integers(-1, 9), max_size=3) | values,
                  "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | values})  # fmt: skip


@settings(**QUICK)
@given(
    header=st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), entries | values, max_size=4) | values,
    size=st.integers(0, 40),
)
def test_any_header_of_a_safetensors_file(path, header, size):
    text = json.dumps(header).encode()
    path("model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    _read(path("model.safetensors"), at_most=size)


@settings(**QUICK)
@given(content=st.binary(max_size=300), ending=st.sampled_from([".safetensors", ".npz"]))
def test_any_bytes_as_weights(path, content, ending):
    path("model").with_suffix(ending).write_bytes(content)
    _read(path("model").with_suffix(ending), at_most=len(content))


@settings(**QUICK)
@given(data=st.data())
def test_any_change_of_a_weights_file(path, data):
    """A few bytes of a good file replaced, taken out or put in."""
    ending = data.draw(st.sampled_from([".safetensors", ".npz"]))
    good = _good(ending)
    for _ in range(data.draw(st.integers(1, 3))):
        place, length = data.draw(st.integers(0, len(good))), data.draw(st.integers(0, 8))
        good = good[:place] + data.draw(st.binary(max_size=8)) + good[place + length :]
    path("model").with_suffix(ending).write_bytes(good)
    _read(path("model").with_suffix(ending), at_most=10_000)


def _good(ending):
    file = io.BytesIO()
    if ending == ".npz":
        with zipfile.ZipFile(file, "w") as archive:
            for name in "ab":
                array = io.BytesIO()
                np.save(array, np.arange(6, dtype=np.float32))
                archive.writestr(f"{name}.npy", array.getvalue())
        return file.getvalue()
    text = json.dumps({name: {"dtype": "F32", "shape": [6], "data_offsets": [24 * i, 24 * i + 24]} for i, name in enumerate("ab")}).encode()
    return struct.pack("<Q", len(text)) + text + np.arange(12, dtype=np.float32).tobytes()


def _read(path: Path, at_most: int) -> None:
    try:
        arrays = read_tensors(path)
    except WeightsError as error:
        assert path.name in str(error)
        return
    mx.eval(list(arrays.values()))
    assert sum(array.nbytes for array in arrays.values()) <= at_most


@settings(**QUICK)
@given(content=values, manifest=st.dictionaries(st.text(max_size=12), values, max_size=3) | values)
def test_any_values_as_a_checkpoint(path, content, manifest):
    folder = path("step-000003")
    folder.mkdir(exist_ok=True)
    (folder / "trainer.json").write_text(json.dumps(content))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as error:
        read_state(folder)
    assert "step-000003" in str(error.value)
