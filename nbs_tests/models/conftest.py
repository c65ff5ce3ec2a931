"""Fixtures for the tests of the models."""

import json

import mlx.core as mx
import pytest

from nbs_tests.models.parity import RAW, tensors_of


@pytest.fixture
def model_folder(tmp_path):
    """`model_folder(tensors=None, raw=RAW)`: a folder with config.json and model.safetensors, of random weights if not given."""

    def make(tensors=None, raw=RAW):
        path = tmp_path / "model"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(raw))
        arrays = tensors_of(raw) if tensors is None else tensors
        mx.save_safetensors(str(path / "model.safetensors"), {name: mx.array(array) for name, array in arrays.items()})
        return path

    return make
