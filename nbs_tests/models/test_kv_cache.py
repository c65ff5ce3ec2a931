"""The key/value cache: what it gives back, what it drops, and that decoding in pieces changes nothing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fulltune_nb.models import kv_cache
from fulltune_nb.models.decoder import Decoder
from fulltune_nb.models.kv_cache import KVCache, make_cache
from fulltune_nb.models.model_config import read_config
from nbs_tests.gpu_like import gpu_like
from nbs_tests.models.model_cases import CASES, SMALL, random_ids


@pytest.fixture
def small_buffers(monkeypatch):
    """Buffers that grow by 4 tokens, so that a short test sees them full."""
    monkeypatch.setattr(kv_cache, "_GROWTH", 4)


def decoder_of(raw) -> Decoder:
    mx.random.seed(0)
    decoder = Decoder(read_config(raw))
    mx.eval(decoder.parameters())
    return decoder


def in_pieces(decoder: Decoder, ids: mx.array, lengths: list[int]) -> np.ndarray:
    """Logits of all tokens, computed a piece at a time."""
    cache, begin, logits = make_cache(decoder.config.windows), 0, []
    for length in lengths:
        logits.append(np.array(decoder(ids[:, begin : begin + length], cache)))
        begin += length
    assert begin == ids.shape[1]
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("lengths", [[27], [1] * 27, [5] + [1] * 22, [20, 7], [3, 1, 9, 1, 13], [1, 26]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_decoding_in_pieces_gives_the_logits_of_the_whole(case, lengths, small_buffers):
    decoder = decoder_of(CASES[case])
    ids = mx.array(random_ids(CASES[case], (2, 27), 0))
    np.testing.assert_allclose(in_pieces(decoder, ids, lengths), np.array(decoder(ids)), atol=2e-5)


@pytest.mark.parametrize("lengths", [[1] * 27, [20, 1, 1, 1, 1, 1, 1, 1], [5, 9, 1, 1, 11]], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].get("sliding_window")])
def test_on_a_gpu_one_token_needs_no_mask_for_its_window(case, lengths, small_buffers):
    decoder = decoder_of(CASES[case])
    ids = mx.array(random_ids(CASES[case], (2, 27), 0))
    expected = np.array(decoder(ids))
    with gpu_like():
        np.testing.assert_allclose(in_pieces(decoder, ids, lengths), expected, atol=2e-5)
        cache = make_cache(decoder.config.windows)
        decoder(ids, cache)
        assert [mask for _, mask in decoder.context(1, cache)] == [None] * decoder.config.num_layers


def test_decoding_goes_on_across_the_growth_of_full_size_buffers():
    decoder = decoder_of({"model_type": "mistral", **SMALL, "sliding_window": 200, "num_hidden_layers": 1})
    ids = mx.array(random_ids(SMALL, (1, 600), 0))
    np.testing.assert_allclose(in_pieces(decoder, ids, [250, 1, 4, 1, 1, 1, 300, 42]), np.array(decoder(ids)), atol=2e-5)


def numbered(begin: int, end: int) -> mx.array:
    """Keys (1, 1, T, 1) whose value is their position."""
    return mx.arange(begin, end, dtype=mx.float32).reshape(1, 1, -1, 1)


def test_everything_is_kept_without_a_window(small_buffers):
    cache = KVCache()
    for begin, end in ((0, 3), (3, 4), (4, 11), (11, 12)):
        keys, values = cache.update(numbered(begin, end), -numbered(begin, end))
        assert keys.flatten().tolist() == list(range(end))
        assert values.flatten().tolist() == [-position for position in range(end)]
        assert cache.offset == end


def test_with_a_window_all_that_the_new_tokens_see_is_kept(small_buffers):
    cache = KVCache(window=3)
    for position in range(40):
        first = cache.first_position(1)
        keys, _ = cache.update(numbered(position, position + 1), numbered(position, position + 1))
        assert keys.flatten().tolist() == list(range(first, position + 1))
        assert first <= max(0, position - 2)


def test_with_a_window_memory_stops_growing(small_buffers):
    cache, sizes = KVCache(window=6), set()
    for position in range(200):
        keys, _ = cache.update(numbered(position, position + 1), numbered(position, position + 1))
        sizes.add(keys.shape[2])
    assert max(sizes) <= 6 + 2 * 4


def test_a_piece_longer_than_the_window_is_given_back_whole(small_buffers):
    cache = KVCache(window=2)
    cache.update(numbered(0, 5), numbered(0, 5))
    keys, _ = cache.update(numbered(5, 15), numbered(5, 15))
    assert keys.flatten().tolist() == list(range(4, 15))


def test_a_cache_has_one_window_for_each_layer():
    assert [layer.window for layer in make_cache((None, 4, None))] == [None, 4, None]


def test_rows_of_a_batch_are_cached_side_by_side(small_buffers):
    decoder = decoder_of(CASES["qwen2_window_by_layer"])
    ids = mx.array(random_ids(SMALL, (3, 15), 0))
    together = in_pieces(decoder, ids, [6] + [1] * 9)
    for row in range(3):
        np.testing.assert_allclose(in_pieces(decoder, ids[row : row + 1], [6] + [1] * 9)[0], together[row], atol=2e-5)


def test_a_bfloat16_model_caches_in_bfloat16():
    decoder = decoder_of({"model_type": "llama", **SMALL})
    decoder.set_dtype(mx.bfloat16)
    cache, one_more = KVCache(), mx.ones((1, 2, 1, 6), dtype=mx.bfloat16)  # (B, K, T, C)
    decoder.layers[0].attention(mx.ones((1, 2, 24), dtype=mx.bfloat16), {"cos": mx.ones((2, 3)), "sin": mx.zeros((2, 3))}, None, cache)
    assert [kept.dtype for kept in cache.update(one_more, one_more)] == [mx.bfloat16] * 2
