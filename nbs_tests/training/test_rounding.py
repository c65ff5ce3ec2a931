import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.errors import TrainingError
from fulltune_nb.training.rounding import check_dtype, round_to, rounding_key, stored_dtype


def rounded(x, key, first=0):
    return np.array(round_to(x, mx.bfloat16, key, first).astype(mx.float32))


def from_bits(bits):
    return mx.array(np.array(bits, dtype=np.uint32)).view(mx.float32)


def test_what_bfloat16_can_represent_stays_as_it_is():
    every = from_bits(np.arange(2**16, dtype=np.uint32) << 16)
    kept = np.array(round_to(every, mx.bfloat16, rounding_key(0, 1, "a")).view(mx.uint16))
    exact = np.arange(2**16, dtype=np.uint16)
    nan = np.isnan(np.array(every))
    assert np.array_equal(kept[~nan], exact[~nan])
    assert np.isnan(np.array(round_to(every, mx.bfloat16, 5).astype(mx.float32))[nan]).all()


def test_everything_else_becomes_one_of_its_two_neighbours():
    bits = np.random.default_rng(0).integers(0, 0x7F7F0000, 100_000).astype(np.uint32) | (np.arange(100_000, dtype=np.uint32) % 2 << 31)
    found = np.array(round_to(from_bits(bits), mx.bfloat16, 7).view(mx.uint16)).astype(np.uint32)
    below = bits >> 16  # towards zero
    assert set(np.unique(found - below)) == {0, 1}
    assert np.array_equal(found[bits % 2**16 == 0], below[bits % 2**16 == 0])


def test_infinities_and_nans_of_any_payload_are_kept():
    x = from_bits([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001])
    for key in range(50):
        found = rounded(x, rounding_key(key, 0, ""))
        assert found[0] == np.inf and found[1] == -np.inf and np.isnan(found[2:]).all()


@pytest.mark.parametrize("low", [1, 13, 0x4000, 0x8000, 0xB000, 0xFFFF])
def test_it_goes_up_with_the_probability_that_makes_the_expectation_exact(low):
    n = 2**20
    share, wanted = 0.0, low / 2**16
    for start in (0, 3 * n):
        x = from_bits(np.full(n, 0x3F800000 | low))
        share += (rounded(x, rounding_key(3, 9, "w"), start) > 1).mean() / 2
    assert abs(share - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / (2 * n))


def draws(n, key, first=0):
    """Upper 7 bits of the random numbers, one bit of resolution at a time: 128 thresholds against the same stream."""
    ups = np.zeros(n, dtype=np.int64)
    for threshold in range(1, 128):
        ups += rounded(from_bits(np.full(n, 0x3F800000 | (threshold << 9))), key, first) > 1
    return ups  # uniform in 0..127


def test_the_random_bits_are_uniform_and_independent_of_neighbours_steps_and_tensors():
    n = 2**16
    base = draws(n, rounding_key(0, 1, "a"))
    counts = np.bincount(base, minlength=128)
    assert ((counts - n / 128) ** 2 / (n / 128)).sum() < 127 + 5 * np.sqrt(2 * 127)
    for other in (draws(n, rounding_key(0, 2, "a")), draws(n, rounding_key(0, 1, "b")), draws(n, rounding_key(1, 1, "a"))):
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / np.sqrt(n)
        together = np.bincount((base // 8) * 16 + other // 8, minlength=256)
        assert ((together - n / 256) ** 2 / (n / 256)).sum() < 255 + 5 * np.sqrt(2 * 255)
    for lag in (1, 2, 3, 64, 256, 1024, 4096):
        assert abs(np.corrcoef(base[lag:], base[:-lag])[0, 1]) < 5 / np.sqrt(n - lag)


def test_a_place_draws_independently_over_the_steps():
    x = from_bits(np.full(64, 0x3F808000))
    ups = np.stack([rounded(x, rounding_key(0, step, "a")) > 1 for step in range(4000)])  # (steps, places)
    assert abs(ups.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(4000)
    follows = (ups[1:] == ups[:-1]).mean(0)
    assert abs(follows - 0.5).max() < 5 * 0.5 / np.sqrt(4000)


def test_pieces_are_rounded_as_the_whole_is():
    x = mx.random.normal((64, 48), key=mx.random.key(0))
    whole = rounded(x, 11)
    for cuts in ((0, 64), (0, 1, 2, 40, 64), tuple(range(65))):
        pieces = [rounded(x[a:b], 11, a * 48) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert np.array_equal(np.concatenate(pieces), whole)
    shift = rounded(x[1:], 11, (2**32 + 1) * 48)
    assert shift.shape == (63, 48)


def test_large_arrays_draw_the_same_bits_as_their_pieces(monkeypatch):
    x = mx.random.normal((3000,), key=mx.random.key(0))
    whole = rounded(x, 11)
    monkeypatch.setattr("fulltune_nb.training.rounding.TABLE_SIZE", 512)
    assert np.array_equal(rounded(x, 11), whole)


def test_nearest_rounding_and_float32_need_no_key():
    x = mx.random.normal((100,), key=mx.random.key(0))
    assert mx.array_equal(round_to(x, mx.bfloat16, None), x.astype(mx.bfloat16)).item()
    assert round_to(x, mx.float32, 3) is x


def test_the_stored_dtype_is_the_checkpoints_unless_told_otherwise():
    assert stored_dtype("auto", "bfloat16") == mx.bfloat16
    assert stored_dtype("auto", "float16") == stored_dtype("auto", "float32") == stored_dtype("float32", "bfloat16") == mx.float32
    assert stored_dtype("bfloat16", "float32") == stored_dtype("bfloat16", "float16") == mx.bfloat16


def test_float16_is_refused_by_name():
    with pytest.raises(TrainingError, match="layers.0.weight is mlx.core.float16"):
        check_dtype("layers.0.weight", mx.float16)
