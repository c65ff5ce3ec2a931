"""The embedding: rows for token ids, and the gradient of its matrix, a sum of the rows' gradients by token.

MLX's own gradient is a scatter that adds. On a GPU its order is of chance, as are then the last digits, and in half precision a frequent
token loses what its later places add. There the sum is made of whole numbers, which is exact: the same bits in every order.

Dimension letters: B rows, T tokens, M = B * T places, V vocab_size, D hidden_size.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from fulltune_nb.cpu import on_cpu

EMBEDDING = "embed_tokens.weight"
"""Its name in a model, and the head's where both are one matrix."""


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
        return sums_by_token(ids.reshape(-1), cotangent.reshape(ids.size, -1), weight.shape[0])

    return rows(weight)


def sums_by_token(ids: mx.array, rows: mx.array, size: int) -> mx.array:
    """For each of `size` tokens the sum of its rows: ids (M,), rows (M, D) -> (size, D), in the dtype of the rows, on a GPU float32."""
    if on_cpu():
        return mx.zeros((size, rows.shape[-1]), dtype=rows.dtype).at[ids].add(rows)
    return with_exact_sums(mx.zeros((size, rows.shape[-1])), ids, rows)


def with_exact_sums(onto: mx.array, ids: mx.array, rows: mx.array) -> mx.array:
    """`onto` (V, D) in float32, to which each token's rows are added: ids (M,), rows (M, D).

    The rows, in units of a power of two, of which the largest element has 2^45 or so, are added up as whole numbers, in no order. Exact but
    for what is below a unit and the last rounding; NaN or inf where an element is.

    GPUs add to places in 32 bits only: a whole number is three or four digits, few enough bits each for M of them to be added. That is
    done at a token's first place, as a batch has fewer places than the vocabulary has tokens."""
    places, spare = len(ids), len(ids).bit_length()
    width, sizes = 31 - spare, 62 - spare  # bits of a digit, and of a whole number without its sign, which the highest digit has
    shifts = list(range(0, sizes + 1, width))
    masks = [2**width - 1] * (len(shifts) - 1) + [-1]
    largest = mx.maximum(rows.max(), -rows.min()).astype(mx.float32)
    units_of_one = mx.power(2.0, mx.minimum(sizes - mx.ceil(mx.log2(largest)), 126))  # float32 ends at 2^127
    digits = _digits(rows[:, None], units_of_one, *(mx.array(numbers, dtype=mx.int64)[:, None] for numbers in (shifts, masks)))

    first = mx.full((len(onto),), places, dtype=mx.int32).at[ids].minimum(mx.arange(places, dtype=mx.int32))[ids]  # (M,)
    sums = mx.zeros(digits.shape, dtype=mx.int32).at[first].add(digits)  # (M, digits, D)
    of_token = _number([sums[:, digit] for digit in range(len(shifts))], shifts, units_of_one)
    return onto.astype(mx.float32).at[ids].add(of_token)  # to each place once something, else zeros: in any order the same


@partial(mx.compile, shapeless=True)
def _digits(rows: mx.array, units_of_one: mx.array, shifts: mx.array, masks: mx.array) -> mx.array:
    """Rows (M, 1, D) in whole units, each as digits, the lowest first: (M, digits, D) int32."""
    whole = (rows.astype(mx.float32) * units_of_one).astype(mx.int64)
    return ((whole >> shifts) & masks).astype(mx.int32)


@partial(mx.compile, shapeless=True)
def _number(digits: list[mx.array], shifts: list[int], units_of_one: mx.array) -> mx.array:
    """What digits (M, D), the lowest first, are in units: (M, D) float32."""
    return sum(digit.astype(mx.int64) << shift for digit, shift in zip(digits, shifts, strict=True)).astype(mx.float32) / units_of_one
