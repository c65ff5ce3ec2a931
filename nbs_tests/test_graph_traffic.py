"""The instrument that counts the bytes of a graph's kernels, on graphs whose bytes are known; larger ones are never made."""

import shutil

import mlx.core as mx
import pytest

from nbs_tests.graph_traffic import nodes, traffic

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="MLX shows a graph's shapes to C++ only")
TABLE = mx.zeros((10**6, 10**5))  # 400 GB if it were made


def test_a_kernel_reads_its_inputs_and_writes_its_output_once():
    a, b = mx.zeros((1000, 500)), mx.zeros((500, 200))
    found = traffic(mx.compile(lambda a, b: mx.exp(a @ b) * 2 + 1)(a, b), [a, b])
    assert found == {"Matmul": [1, 4 * (1000 * 500 + 500 * 200 + 1000 * 200)], "Compiled": [1, 4 * 2 * 1000 * 200 + 8]}


def test_views_cost_nothing_and_read_no_more_than_they_show():
    found = traffic(TABLE.T[:, :3].sum(axis=1), [TABLE])
    assert found == {"Sum": [1, 4 * (10**5 * 3 + 10**5)]}
    both = traffic(mx.compile(lambda a, b: a * b + 1)(TABLE[:3, :10], TABLE[:3, 10:20]), [TABLE])["Compiled"]
    assert both == [1, 4 * (30 + 30 + 30) + 4]
    assert traffic(mx.exp(mx.broadcast_to(mx.zeros((1,)) + 0, (1000,))))["Exp"] == [1, 4 * (1 + 1000)]


def test_axes_that_are_joined_in_another_order_are_copied():
    x = mx.zeros((2, 3, 5))
    assert traffic(x.transpose(0, 2, 1).reshape(2, 15), [x]) == {"Reshape": [1, 2 * 4 * 30]}
    assert traffic(x.reshape(6, 5), [x]) == {}


def test_rows_that_are_looked_up_or_written_are_all_that_counts_of_a_table():
    rows = mx.array([1, 2, 3])
    assert traffic(TABLE[rows], [TABLE])["Gather"] == [1, 4 * (2 * 3 * 10**5 + 3)]
    added = traffic(TABLE.at[rows].add(mx.ones((3, 10**5))), [TABLE])["Scatter"]
    assert added[1] == 4 * (3 * 3 * 10**5 + 2 * 3)


def test_what_is_computed_already_has_no_nodes():
    a = mx.ones((3,)) * 2
    mx.eval(a)
    assert nodes(a) == []
