import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.training.config import optimizer_settings
from fulltune_nb.training.eight_bit import ROOT_CODE, SIGNED_CODE, block_size
from fulltune_nb.training.optimizers import make_rule


def numbers(seed=0, rows=32, columns=512):
    """Of very different sizes within a block and between blocks."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)) * 10.0 ** rng.uniform(-3, 0, (rows, columns)) * 10.0 ** rng.uniform(-8, 2, (rows, 1))
    return x.astype(np.float32)


def again(code, x, block=256):
    shape = (*x.shape[:-1], x.shape[-1] // block)
    codes, scales = code.encode(mx.array(x), shape)
    assert codes.dtype == mx.uint8 and codes.shape == x.shape and scales.dtype == mx.float32 and scales.shape == shape
    return np.array(code.decode(codes, scales)), np.repeat(np.array(scales), block, axis=-1)


def test_a_first_moment_is_kept_to_within_half_a_step_of_its_root():
    x = numbers()
    found, scale = again(SIGNED_CODE, x)
    roots = np.sign(x) * np.sqrt(np.abs(x) / scale), np.sign(found) * np.sqrt(np.abs(found) / scale)
    assert np.abs(roots[0] - roots[1]).max() <= 0.5 / 127 + 1e-6
    assert np.array_equal(found == 0, np.sqrt(np.abs(x) / scale) < 0.5 / 127)


def test_a_second_moment_is_kept_to_within_half_a_step_of_its_fourth_root_and_never_vanishes():
    x = numbers() ** 2
    found, scale = again(ROOT_CODE, x)
    expected = np.maximum((x / scale) ** 0.25, 1 / 255)
    assert np.abs((found / scale) ** 0.25 - expected).max() <= 0.5 / 255 + 1e-6
    assert found.min() > 0


@pytest.mark.parametrize("code", [SIGNED_CODE, ROOT_CODE])
def test_the_largest_of_a_block_is_exact_and_encoding_twice_changes_nothing_more(code):
    x = np.abs(numbers())
    once, scale = again(code, x)
    largest = x == scale
    assert largest.any(axis=1).all()
    np.testing.assert_allclose(once[largest], x[largest], rtol=1e-6)
    twice, _ = again(code, once)
    np.testing.assert_allclose(twice, once, rtol=1e-5)


@pytest.mark.parametrize("code", [SIGNED_CODE, ROOT_CODE])
def test_zeros_and_numbers_near_the_end_of_float32_do_no_harm(code):
    for size in (0.0, 1e-45, 1e-39, 1e-30, 1e30, 3e38):
        x = np.full((2, 256), size, dtype=np.float32)
        x[1, ::2] = 0
        found, _ = again(code, x)
        assert np.isfinite(found).all() and found.max() <= size * 1.001 and (found[0] >= size * 0.999).all() or size < 1e-37
        assert np.isfinite(found).all() and found.max() <= size * 1.001


@pytest.mark.parametrize(
    "columns, block",
    [(2048, 256), (5632, 256), (896, 224), (384, 192), (100, 100), (257, None), (16, 16), (8, None), (2 * 131, 131), (11008, 256)],
)
def test_a_block_divides_a_row(columns, block):
    assert block_size(columns) == block


def test_small_tensors_vectors_and_rows_without_a_block_keep_float32():
    rule = make_rule("adamw8bit", optimizer_settings("adamw8bit", {}))
    assert rule.slots((64, 256))["m"].dtype == mx.uint8 and rule.slots((64, 256))["v_scale"].shape == (64, 1)
    assert rule.slots((4, 16, 512))["m_scale"].shape == (4, 16, 2)
    for shape in ((100_000,), (15, 256), (8192, 257)):
        assert {slot.dtype for slot in rule.slots(shape).values()} == {mx.float32} and set(rule.slots(shape)) == {"m", "v"}
    assert sum(slot.nbytes for slot in rule.slots((1024, 2048)).values()) == 2 * 1024 * 2048 * (1 + 4 / 256)
