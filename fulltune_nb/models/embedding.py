"""The embedding: rows for token ids, and the gradient of its matrix, a sum of the rows' gradients by token.

MLX's own gradient is a scatter that adds. On a GPU its order is of chance, as are then the last digits, and in half precision a frequent
token loses what its later places add. There the sum is made of whole numbers, which is exact: the same bits in every order.

Dimension letters: B rows, T tokens, M = B * T places, V vocab_size, D hidden_size.
"""

from __future__ import annotations

import mlx.core as mx

from fulltune_nb.cpu import on_cpu


def lookup(weight: mx.array, ids: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
    """Rows of an embedding (V, D) for ids (B, T), in `dtype` or the weight's own: (B, T, D). On a GPU the gradient is float32."""
    dtype = weight.dtype if dtype is None else dtype
    if on_cpu() and (dtype == weight.dtype or dtype != mx.float32):
        return weight[ids].astype(dtype)

    @mx.custom_function
    def rows(weight: mx.array) -> mx.array:
        return weight[ids].astype(dtype)

    @rows.vjp
    def summed(weight: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        # In float32 also on a CPU: in half precision a frequent token's gradient would lose what its later places add.
        return sums_by_token(ids.reshape(-1), cotangent.astype(mx.float32).reshape(ids.size, -1), weight.shape[0])

    return rows(weight)


def sums_by_token(ids: mx.array, rows: mx.array, size: int) -> mx.array:
    """For each of `size` tokens the sum of its rows: ids (M,), rows (M, D) -> (size, D), in the dtype of the rows, on a GPU float32."""
    if on_cpu():
        return mx.zeros((size, rows.shape[-1]), dtype=rows.dtype).at[ids].add(rows)
    return _exact_sums(ids, rows.astype(mx.float32), size)


def _exact_sums(ids: mx.array, rows: mx.array, size: int) -> mx.array:
    """As `sums_by_token`, in no order: rows (M, D) in units of a power of two, of which the largest element has 2^45 or so, are added up as
    whole numbers, token after token. A token's sum is what there is at its last row, less what there was before its first. Exact but for
    what is below a unit and the last rounding; NaN or inf where an element is."""
    bits = 62 - len(ids).bit_length()  # for one row; the sum of all has at most 63
    units_of_one = mx.power(2.0, mx.minimum(bits - mx.ceil(mx.log2(mx.abs(rows).max())), 126))  # float32 ends at 2^127
    order = mx.argsort(ids)
    tokens, places = ids[order], mx.arange(len(ids), dtype=mx.int32)
    sums = mx.cumsum((rows[order] * units_of_one).astype(mx.int64), axis=0)  # (M, D)

    edge = mx.array([True])
    edges = mx.concatenate([edge, tokens[1:] != tokens[:-1], edge])  # (M + 1,): where a token's rows begin, or all have ended
    first = mx.cummax(mx.where(edges[:-1], places, 0))  # (M,): of each row's token
    before = mx.where(first[:, None] > 0, sums[mx.maximum(first - 1, 0)], 0)
    of_token = mx.where(edges[1:, None], (sums - before).astype(mx.float32) / units_of_one, 0)
    return mx.zeros((size, rows.shape[-1])).at[tokens].add(of_token)  # to each place once something, else zeros: in any order the same
