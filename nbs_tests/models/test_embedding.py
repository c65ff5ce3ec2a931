"""The embedding's gradient: on a GPU the same bits in every order of rows, exact to float32's last digit. MLX computes on the CPU."""

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.models.embedding import lookup, sums_by_token
from fulltune_nb.training.vocabulary import embedding_gradient
from nbs_tests.gpu_like import gpu_like
from nbs_tests.models.parity import relative_error

TOKENS, SIZE, PLACES = 500, 24, 4096


@pytest.fixture(scope="module")
def drawn():
    """Ids (M,), of which some are frequent and many absent; gradients (M, D) of very different sizes; their sums in float64."""
    random = np.random.default_rng(0)
    ids = np.minimum(random.zipf(1.2, PLACES) - 1, TOKENS - 1).astype(np.int32)
    rows = (random.standard_normal((PLACES, SIZE)) + 0.5) * np.exp(2 * random.standard_normal((PLACES, 1)))
    rows = np.array(mx.array(rows.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32))
    sums = np.zeros((TOKENS, SIZE))
    np.add.at(sums, ids, rows.astype(np.float64))
    return ids, rows, sums


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_it_is_the_same_to_the_last_bit_in_every_order(drawn, dtype):
    ids, rows, expected = drawn
    weight, random, found = mx.zeros((TOKENS, SIZE), dtype=dtype), np.random.default_rng(1), []
    with gpu_like():
        for _ in range(20):
            order = random.permutation(PLACES)
            one, cotangent = mx.array(ids[order]).reshape(4, -1), mx.array(rows[order]).astype(dtype).reshape(4, -1, SIZE)
            found.append(np.array(mx.vjp(lambda w, one=one: lookup(w, one), [weight], [cotangent])[1][0]))
    assert all(np.array_equal(one, found[0]) for one in found)
    assert found[0].dtype == np.float32 and relative_error(found[0], expected) < 1e-7
    seen = np.unique(ids)
    assert max(relative_error(found[0][token], expected[token]) for token in seen) < 1e-6 and not np.delete(found[0], seen, axis=0).any()


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**-40, 2.0**100])
def test_its_size_does_not_matter(drawn, scale):
    ids, rows, expected = drawn
    with gpu_like():
        found = np.array(sums_by_token(mx.array(ids), mx.array(rows * np.float32(scale)), TOKENS))
    assert relative_error(found.astype(np.float64) / scale, expected) < 1e-7


def test_a_range_of_rows_has_its_part(drawn):
    ids, rows, expected = drawn
    with gpu_like():
        parts = [embedding_gradient(ids, mx.array(rows), slice(begin, begin + 125)) for begin in range(0, TOKENS, 125)]
    assert relative_error(np.concatenate([np.array(part) for part in parts]), expected) < 1e-7


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_shows(value):
    with gpu_like():
        assert not np.isfinite(np.array(sums_by_token(mx.array([1, 1]), mx.array([[1.0], [value]]), 3))[1])
        assert not np.array(sums_by_token(mx.array([1, 1]), mx.zeros((2, 1)), 3)).any()


def test_on_a_cpu_it_is_that_of_mlx(drawn):
    ids, rows, _ = (mx.array(array) for array in drawn)
    weight = mx.zeros((TOKENS, SIZE))
    (ours,), (theirs,) = (mx.vjp(look, [weight], [rows])[1] for look in (lambda w: lookup(w, ids), lambda w: w[ids]))
    assert mx.array_equal(ours, theirs)
