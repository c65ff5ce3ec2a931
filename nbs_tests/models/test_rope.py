"""Rotary positions: both dialects of config.json, the scalings, and the rotation itself."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.errors import ModelError
from fulltune_nb.models.rope import Rope, RopeConfig, inverse_frequencies, read_ropes, rotate, rotation_table
from nbs_tests.gpu_like import gpu_like
from nbs_tests.models.family_cases import cases_of
from nbs_tests.models.model_cases import FAMILIES, LLAMA3
from nbs_tests.models.parity import need_torch
from nbs_tests.models.real_configs import EXPECTED

DEFAULTS = {"rope_theta": 1e4, "max_position_embeddings": 2048}
LLAMA3_KEYS = tuple((key, float(value)) for key, value in LLAMA3.items())


def read(**values) -> RopeConfig:
    return read_ropes({**DEFAULTS, **values}, 8, "config.json")[0]


def table(config: RopeConfig, length: int, offset: int = 0):
    return rotation_table(mx.array(inverse_frequencies(config)), mx.arange(offset, offset + length))


# ---- reading ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({}, {"rope_parameters": None}, RopeConfig(1e4, 8)),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(5e5, 8)),
        (
            {"rope_theta": 2e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4}},
            RopeConfig(2e4, 8, 1.0, "linear", (("factor", 2.0),)),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            RopeConfig(5e5, 8, 1.0, "llama3", LLAMA3_KEYS),
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_scaling": None},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            RopeConfig(1e4, 4, 0.5),
        ),
    ],
)
def test_both_dialects_say_the_same(old, new, expected):
    assert read(**old) == read(**new) == expected


def test_parameters_given_by_kind_of_layer_are_one_where_they_agree():
    kind = {"rope_type": "default", "rope_theta": 1e6}
    assert read(rope_parameters={"full_attention": kind, "sliding_attention": dict(kind)}).theta == 1e6
    with pytest.raises(ModelError, match="differ between kinds of layers"):
        read(rope_parameters={"full_attention": kind, "sliding_attention": {**kind, "rope_theta": 1e4}})


def test_llama3_takes_the_models_own_length_where_the_original_one_is_left_out():
    partial = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    assert dict(read(rope_scaling={"rope_type": "llama3", **partial}).parameters)["original_max_position_embeddings"] == 2048


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"rope_type": "su", "factor": 4.0}}, "'su' is not supported; supported are default, linear, dynamic"),
        ({"rope_scaling": {"type": "dynamic"}}, "'dynamic' needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [2, 2]}}, "mrope_section, which is not understood"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "short_factor.* list of 4 numbers, found 1"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.4}, "0.4 of head_dim 8 gives 3 rotated dimensions; an even number is needed"),
        ({"partial_rotary_factor": 0.0}, "gives 0 rotated dimensions"),
        ({"rope_scaling": "linear"}, "must be objects, found 'linear'"),
    ],
)
def test_unsupported_scalings_are_refused(values, message):
    with pytest.raises(ModelError, match=message):
        read(**values)


# ---- frequencies -----------------------------------------------------------------------------------------------------------


def test_default_frequencies_fall_geometrically_from_one():
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(1e4, 8)), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_linear_scaling_stretches_all_wavelengths():
    plain, scaled = RopeConfig(1e4, 8), RopeConfig(1e4, 8, 1.0, "linear", (("factor", 4.0),))
    np.testing.assert_allclose(inverse_frequencies(scaled) * 4, inverse_frequencies(plain), rtol=1e-6)


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    plain = inverse_frequencies(RopeConfig(1e4, 64))
    scaled = inverse_frequencies(RopeConfig(1e4, 64, 1.0, "llama3", (*LLAMA3_KEYS[:3], ("original_max_position_embeddings", 256.0))))
    wavelengths = 2 * math.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 256 / 4], plain[wavelengths < 256 / 4])
    np.testing.assert_allclose(scaled[wavelengths > 256] * 8, plain[wavelengths > 256], rtol=1e-6)
    between = (wavelengths > 256 / 4) & (wavelengths < 256)
    assert between.any() and np.all(scaled[between] < plain[between]) and np.all(scaled[between] > plain[between] / 8)


def test_frequencies_are_those_of_transformers():
    need_torch()
    import importlib

    from transformers import AutoConfig

    from fulltune_nb.models.model_config import read_config

    small = [raw for family in FAMILIES for raw in cases_of(family, 4)]
    for raw in [*(raw for raw, _, _ in EXPECTED.values()), *small]:
        family = raw["model_type"]
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        reference = getattr(module, f"{family.capitalize()}RotaryEmbedding")(AutoConfig.for_model(**raw))
        np.testing.assert_allclose(inverse_frequencies(read_config(raw).rope), reference.inv_freq.numpy(), rtol=2e-6)


# ---- rotation --------------------------------------------------------------------------------------------------------------


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    x = mx.random.normal((2, 3, 5, 8), key=mx.random.key(0))
    rotated = rotate(x, table(RopeConfig(1e4, 8), 5))
    np.testing.assert_allclose(np.array(rotated[:, :, 0]), np.array(x[:, :, 0]), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(np.array(rotated), axis=-1), np.linalg.norm(np.array(x), axis=-1), rtol=1e-5)
    assert np.abs(np.array(rotated[:, :, 1:] - x[:, :, 1:])).max() > 0.1


def test_products_depend_on_the_distance_of_positions_alone():
    query, key = mx.random.normal((1, 1, 1, 8), key=mx.random.key(1)), mx.random.normal((1, 1, 1, 8), key=mx.random.key(2))
    config = RopeConfig(1e4, 8)
    products = [
        (rotate(query, table(config, 1, offset + 3)) * rotate(key, table(config, 1, offset))).sum().item() for offset in (0, 1, 50, 1000)
    ]
    np.testing.assert_allclose(products, products[0], atol=1e-3)


def test_a_partial_rotation_leaves_the_other_dimensions_alone():
    x = mx.random.normal((1, 2, 6, 12), key=mx.random.key(0))
    rotated = rotate(x, table(RopeConfig(1e4, 4, 1 / 3), 6))
    assert rotated.shape == x.shape
    np.testing.assert_array_equal(np.array(rotated[..., 4:]), np.array(x[..., 4:]))
    assert not np.allclose(np.array(rotated[..., :4]), np.array(x[..., :4]))


def test_an_offset_continues_the_positions():
    whole, rest = table(RopeConfig(1e4, 8), 7), table(RopeConfig(1e4, 8), 3, offset=4)
    for name, last in rest.items():
        np.testing.assert_array_equal(np.array(whole[name][4:]), np.array(last))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_rotation_keeps_the_dtype(dtype):
    assert rotate(mx.ones((1, 1, 3, 8), dtype=dtype), table(RopeConfig(1e4, 8), 3)).dtype == dtype


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        RopeConfig(1e4, 8),
        RopeConfig(1e4, 4, 0.5),
        RopeConfig(1e4, 8, 1.0, "llama3", LLAMA3_KEYS),
        *(RopeConfig(1e4, size, size / 8, "yarn", (("factor", 4.0), ("original_max_position_embeddings", 16.0))) for size in (8, 4)),
        RopeConfig(1e4, 8, 1.0, "dynamic", (("factor", 2.0), ("max_position_embeddings", 16.0))),
    ],
    ids=lambda config: f"{config.scaling}-{config.rotary_dim}",
)
def test_a_gpus_kernel_rotates_as_the_table_does(config, interleaved, monkeypatch):
    x = mx.random.normal((2, 3, 40, 8), key=mx.random.key(0))
    expected = rotate(x, Rope(config).rotation(11, 40), interleaved)
    calls, rope = [], mx.fast.rope
    monkeypatch.setattr(mx.fast, "rope", lambda *args, **settings: (calls.append(1), rope(*args, **settings))[1])
    with gpu_like():
        found = rotate(x, Rope(config).rotation(11, 40), interleaved)
    assert calls
    np.testing.assert_allclose(np.array(found), np.array(expected), atol=2e-6)


def test_on_a_gpu_places_that_do_not_follow_one_another_and_rows_of_other_lengths_keep_the_table():
    segments, lengths = mx.array([[0, 0, 1, 1]]), mx.array([3, 4])
    dynamic = RopeConfig(1e4, 8, 1.0, "dynamic", (("factor", 2.0), ("max_position_embeddings", 2.0)))
    with gpu_like():
        assert "cos" in Rope(dynamic).rotation(0, 4, segments) and "cos" in Rope(dynamic).rotation(0, 4, lengths=lengths)
        assert "wavelengths" in Rope(RopeConfig(1e4, 8)).rotation(0, 4, segments)  # products depend on the distance alone
