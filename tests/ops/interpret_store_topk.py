"""The Triton kernels of store_topk in Triton's interpreter: test_store_topk_triton.py runs them."""

import pytest
import torch
from fastsft.triton_kernels import store_topk as kernels

from fastsft import ops
from fastsft.ops import _topk_scores

SMALL = {"BLOCK_N": 32, "BLOCK_Q": 16, "BLOCK_K": 32}
# blocks of a row, rows, queries, k
CASES = [(1, 300, 3, 5), (3, 70, 17, 4), (1, 4, 1, 7), (1, 0, 2, 3)]
WAYS = [*((format, "fused") for format in ops.FORMATS), ("bf16", "scored"), ("int8", "scored")]


def scan(queries, rows, k, groups=None, num_groups=0, tile=SMALL):
    if rows.scales is None:
        return kernels.scan("bf16", rows.data, None, queries.bfloat16(), None, k, groups, num_groups, tile=tile)[0]
    numbers, steps = _topk_scores.quantise(queries, rows.scales.shape[1])
    return kernels.scan(rows.format, rows.data, rows.scales, numbers, steps, k, groups, num_groups, tile=tile)[0]


@pytest.mark.parametrize(("format", "way"), WAYS)
@pytest.mark.parametrize(("blocks", "num_rows", "num_queries", "k"), CASES)
def test_scan_equals_reference(monkeypatch, format, way, blocks, num_rows, num_queries, k):
    monkeypatch.setattr(kernels, "FEW_QUERIES", 0)
    sketches, queries = torch.randn(num_rows, 64 * blocks), torch.randn(num_queries, 64 * blocks)
    if num_rows > 50 and format != "bf16":
        sketches[50] = sketches[3]  # of equal scores the lower row comes first; float sums round by place
    rows = ops.encode_rows(sketches, format, blocks)
    groups = torch.arange(num_rows) % 3 - 1
    with ops.backend("reference"):
        truth = ops.store_topk(queries, rows, k, groups=groups, num_groups=2)
    tile = SMALL if way == "fused" else None
    largest, largest_rows, smallest, smallest_rows, sums = scan(queries, rows, k, groups, 2, tile)
    # Integers are summed exactly; bfloat16 products in float32 and another order.
    near = {"rtol": 1e-5, "atol": 1e-5} if format == "bf16" or blocks > 1 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(largest, truth.largest, **near)
    torch.testing.assert_close(smallest, truth.smallest, **near)
    assert torch.equal(largest_rows, truth.largest_rows)
    assert torch.equal(smallest_rows, truth.smallest_rows)
    torch.testing.assert_close(sums, truth.sums, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("size", "k"), [(5, 3), (100, 7), (100, 100), (kernels.RANKED + 5, 20)])
def test_the_best_of_a_list_come_first(size, k):
    data, queries = torch.zeros(1, 64, dtype=torch.int8), torch.zeros(2, 64, dtype=torch.int8)
    work = kernels._Scan("int8", data, torch.ones(1, 1), queries, torch.ones(2, 1), k, None, 0, SMALL)
    keys = torch.randperm(4 * size).view(2, 2, size).contiguous()
    keys[1, 1, :] = kernels.NO_KEY
    work.thresholds = torch.full((2, 2), -1, dtype=torch.int32)
    keys[:, 0] <<= 32
    best = work.best(keys, 3)
    assert torch.equal(best[..., :k], keys.sort(dim=2, descending=True).values[..., :k])
    assert torch.equal(work.thresholds[:, 0], (best[:, 0, k - 1] >> 32).int())
    assert (best[..., k:] == kernels.NO_KEY).all()


def test_rows_that_come_in_order_of_their_score():
    # Every row of the second stretch is a candidate, more than its list holds.
    rows = ops.encode_rows(torch.arange(1.0, 301)[:, None] * torch.ones(1, 64), "int8")
    queries = torch.ones(1, 64)
    numbers, steps = _topk_scores.quantise(queries, 1)
    work = kernels._Scan("int8", rows.data, rows.scales, numbers, steps, 2, None, 0, SMALL)
    _, overflowed = work.sweep(16, 8)
    assert overflowed
    found, overflowed = work.sweep(16, 0)
    assert overflowed is None
    assert (0xFFFFFFFF - (found[0] & 0xFFFFFFFF)).tolist() == [[299, 298]]


def test_a_scan_that_overflows_is_done_again(monkeypatch):
    rows = ops.encode_rows(torch.arange(1.0, 701)[:, None] * torch.ones(1, 64), "int8")
    sweep, asked = kernels._Scan.sweep, []

    def with_little_room(self, capacity, growth):
        asked.append(growth)
        return sweep(self, 64, growth)

    monkeypatch.setattr(kernels._Scan, "sweep", with_little_room)
    with ops.backend("reference"):
        truth = ops.store_topk(torch.ones(1, 64), rows, 3)
    assert torch.equal(scan(torch.ones(1, 64), rows, 3)[1], truth.largest_rows)
    assert asked == [kernels.GROWTH, 0]
