"""Keys and values of the tokens seen so far, so that a new token costs one token's work.

Dimension letters: B rows, K key/value heads, T new tokens, S kept tokens, C head_dim.
"""

from __future__ import annotations

import mlx.core as mx

from fulltune_nb.cpu import on_cpu

_GROWTH = 256  # tokens; buffers grow in these steps, so that appending a token does not copy the whole cache


class KVCache:
    """The cache of one layer.

    With a `window`, tokens no later one can see are dropped whenever the buffer is full.
    """

    def __init__(self, window: int | None = None):
        self.window = window
        self.offset = 0
        """Tokens seen in all; the next token's position."""
        self._keys: mx.array | None = None
        self._values: mx.array | None = None
        self._start = 0  # position of the buffer's first token

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Appends (B, K, T, C) and returns all that is kept with it: (B, K, S, C) each."""
        length = keys.shape[2]
        self._make_room(keys, values)
        begin = self.offset - self._start
        self._keys[:, :, begin : begin + length] = keys
        self._values[:, :, begin : begin + length] = values
        first = self.first_position(length) - self._start
        self.offset += length
        end = begin + length
        return self._keys[:, :, first:end], self._values[:, :, first:end]

    @property
    def arrays(self) -> list[mx.array]:
        """Keys and values, (B, K, capacity, C) each; none as long as nothing was appended."""
        return [] if self._keys is None else [self._keys, self._values]

    def first_position(self, new_tokens: int) -> int:
        """Position of the first key that `update` will return for this many new tokens.

        For one on a GPU nothing before its window, so that attention needs no mask there.
        """
        kept = self._first_kept(new_tokens)
        if self.window is None or new_tokens > 1 or on_cpu():
            return kept
        return max(kept, self.offset + 1 - self.window)

    def _first_kept(self, new_tokens: int) -> int:
        """Position of the buffer's first token once there is room for this many new ones."""
        used = self.offset - self._start
        if self.window is None or self._keys is None or used + new_tokens <= self._keys.shape[2]:
            return self._start
        return max(self._start, self.offset - self.window + 1)

    def _make_room(self, keys: mx.array, values: mx.array) -> None:
        new_tokens = keys.shape[2]
        start = self._first_kept(new_tokens)
        kept = self.offset - start
        capacity = 0 if self._keys is None else self._keys.shape[2]
        if start == self._start and kept + new_tokens <= capacity:
            return
        capacity = -(-(kept + new_tokens) // _GROWTH) * _GROWTH
        self._keys = self._moved(self._keys, keys, start, kept, capacity)
        self._values = self._moved(self._values, values, start, kept, capacity)
        self._start = start

    def _moved(self, old: mx.array | None, new: mx.array, start: int, kept: int, capacity: int) -> mx.array:
        rows, heads, _, head_dim = new.shape
        room = mx.zeros((rows, heads, capacity - kept, head_dim), dtype=new.dtype)
        if old is None or kept == 0:
            return room
        begin = start - self._start
        return mx.concatenate([old[:, :, begin : begin + kept], room], axis=2)


def make_cache(windows: tuple[int | None, ...]) -> list[KVCache]:
    """One empty cache a layer; `windows` as in `ModelConfig.windows`."""
    return [KVCache(window) for window in windows]
