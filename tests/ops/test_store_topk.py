"""fastsft/ops/store_topk.py against all scores in float64, sorted."""

import numpy
import pytest
import torch

from fastsft import _native, ops
from fastsft.ops._topk_scores import CHUNK, quantise

K = 192

# Both ways of the kernels, and both together: a few queries along the row, many across the lanes, some left over.
QUERIES = (1, 3, 17, 64)
ROWS = (0, 1, 5, 1003)


def problem(format, num_rows, num_queries, blocks=1, size=K, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    sketches = torch.randn(num_rows, size, generator=generator).to(device)
    queries = torch.randn(num_queries, size, generator=generator).to(device)
    groups = torch.randint(-1, 3, (num_rows,), generator=generator).to(device)
    return queries, ops.encode_rows(sketches, format, blocks), groups


def all_scores(queries, rows):
    """Scores [Q, N] by a matrix product of what queries and rows stand for, in float64."""
    if rows.format == "bf16":
        queries = queries.bfloat16()
    else:
        numbers, steps = quantise(queries, rows.scales.shape[1])
        queries = (numbers.double().unflatten(1, (steps.shape[1], -1)) * steps.double()[..., None]).flatten(1)
    return queries.double() @ ops.decode_rows(rows).double().T


def assert_best(found, scores, k, tolerance, first_row=0):
    """Check both ends: the best values stand there in order, and each row has the score beside it."""
    for sign, values, rows in ((1, found.largest, found.largest_rows), (-1, found.smallest, found.smallest_rows)):
        n = min(k, scores.shape[1])
        assert values.shape == rows.shape == (scores.shape[0], k)
        assert values.dtype == torch.float32
        expected = (sign * scores).sort(1, descending=True).values[:, :n]
        torch.testing.assert_close(sign * values[:, :n].double(), expected, rtol=0, atol=tolerance)
        own = scores.gather(1, rows[:, :n] - first_row)
        torch.testing.assert_close(values[:, :n].double(), own, rtol=0, atol=tolerance)
        assert all(len(set(row)) == n for row in rows[:, :n].tolist())
        assert (values[:, n:] == -sign * float("inf")).all()
        assert (rows[:, n:] == -1).all()


def group_sums(scores, groups, num_groups):
    return torch.stack([scores[:, groups == g].sum(1) for g in range(num_groups)], 1)


def assert_same(one, other):
    for a, b in zip(one[:4], other[:4], strict=True):
        assert torch.equal(a, b)


# Scores are of size sqrt(K) = 14 and sums of K products: float32's epsilon times either, times ten.
NEAR = 2e-5


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("num_queries", QUERIES)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("format", ops.FORMATS)
def test_native_equals_all_scores_sorted(format, blocks, num_queries, num_rows, isa):
    queries, rows, groups = problem(format, num_rows, num_queries, blocks)
    found = ops.store_topk(queries, rows, 7, first_row=40, groups=groups, num_groups=3)
    scores = all_scores(queries, rows)
    assert_best(found, scores, 7, NEAR, first_row=40)
    torch.testing.assert_close(found.sums, group_sums(scores, groups, 3), rtol=0, atol=NEAR * num_rows**0.5)
    with ops.backend("reference"):
        reference = ops.store_topk(queries, rows, 7, first_row=40, groups=groups, num_groups=3)
    if format == "bf16":  # sums of products in another order
        torch.testing.assert_close(found.largest, reference.largest, rtol=0, atol=NEAR)
        torch.testing.assert_close(found.smallest, reference.smallest, rtol=0, atol=NEAR)
    else:
        assert_same(found, reference)
    torch.testing.assert_close(found.sums, reference.sums, rtol=0, atol=NEAR * num_rows**0.5)


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("format", ops.FORMATS)
def test_default_backend_equals_all_scores_sorted(format, blocks, num_rows, device):
    queries, rows, groups = problem(format, num_rows, 5, blocks, device=device)
    found = ops.store_topk(queries, rows, 4, groups=groups, num_groups=3)
    scores = all_scores(queries, rows)
    assert_best(found, scores, 4, NEAR)
    torch.testing.assert_close(found.sums, group_sums(scores, groups, 3), rtol=0, atol=NEAR * num_rows**0.5)


@pytest.mark.parametrize("format", ["int8", "1bit"])
def test_integer_formats_are_exact(format, device):
    """Integer dot products, with one rounding for the product of scales and one for the score."""
    queries, rows, _ = problem(format, 300, 18, device=device)
    numbers, steps = quantise(queries, 1)
    values = ops.decode_rows(rows._replace(scales=torch.ones_like(rows.scales)))
    scores = (numbers.double() @ values.double().T).float() * (steps * rows.scales.T)
    best = scores.sort(stable=True, dim=1, descending=True)
    found = ops.store_topk(queries, rows, 20)
    assert torch.equal(found.largest, best.values[:, :20])
    assert torch.equal(found.largest_rows, best.indices[:, :20])


def test_reference_crosses_its_chunks():
    queries, rows, groups = problem("int8", 2 * CHUNK + 5, 3, size=64)
    with ops.backend("reference"):
        found = ops.store_topk(queries, rows, 50, groups=groups, num_groups=3)
    scores = all_scores(queries, rows)
    assert_best(found, scores, 50, NEAR)
    torch.testing.assert_close(found.sums, group_sums(scores, groups, 3), rtol=0, atol=NEAR * CHUNK**0.5)


@pytest.mark.parametrize("num_queries", [2, 8, 16, 20])
@pytest.mark.parametrize("format", ops.FORMATS)
def test_of_equal_scores_the_lower_row_comes_first(format, num_queries, isa):
    # Whole numbers, so that equal scores are equal in any order of summation.
    sketches = torch.randint(-2, 3, (10, 64)).float().repeat(30, 1)
    sketches[5::10] = 0
    rows = ops.encode_rows(sketches, format)
    queries = torch.randint(-3, 4, (num_queries, 64)).float()
    queries[1] = 0
    found = ops.store_topk(queries, rows, 45)
    with ops.backend("reference"):
        assert_same(found, ops.store_topk(queries, rows, 45))
    assert found.largest_rows[1].tolist() == found.smallest_rows[1].tolist() == list(range(45))
    ties = found.largest[0, :-1] == found.largest[0, 1:]
    assert ties.sum() > 30
    assert (found.largest_rows[0].diff()[ties] > 0).all()


@pytest.mark.parametrize("format", ops.FORMATS)
def test_all_zero_rows_score_zero(format, device):
    rows = ops.encode_rows(torch.zeros(20, 64, device=device), format)
    found = ops.store_topk(torch.randn(2, 64).to(device), rows, 3)
    assert (found.largest == 0).all()
    assert found.smallest_rows.tolist() == [[0, 1, 2]] * 2


def test_no_queries(isa):
    _, rows, groups = problem("bf16", 9, 1)
    found = ops.store_topk(torch.empty(0, K), rows, 3, groups=groups, num_groups=3)
    assert [list(t.shape) for t in found] == [[0, 3]] * 4 + [[0, 3]]


@pytest.mark.parametrize("pieces", [1, 2, 7])
@pytest.mark.parametrize("format", ops.FORMATS)
def test_streaming_equals_one_call(format, pieces, device):
    queries, rows, groups = problem(format, 701, 19, device=device)
    rows.data[600:] = rows.data[:101]  # ties between pieces
    whole = ops.store_topk(queries, rows, 12, first_row=5, groups=groups, num_groups=3)
    result = None
    for index in torch.arange(701, device=device).tensor_split(pieces):
        some = ops.Rows(format, rows.data[index], None if rows.scales is None else rows.scales[index])
        number = 5 + int(index[0])
        result = ops.store_topk(queries, some, 12, first_row=number, groups=groups[index], num_groups=3, into=result)
    assert_same(result, whole)
    # On CUDA the scores of a tile are added up in float32, and tiles in float64.
    near = {"rtol": 1e-12, "atol": 1e-10} if device.type == "cpu" else {"rtol": 0, "atol": NEAR * 701**0.5}
    torch.testing.assert_close(result.sums, whole.sums, **near)


@pytest.mark.parametrize("num_queries", [1, 2, 3, 4, 40])
@pytest.mark.parametrize("format", ops.FORMATS)
def test_long_scans_equal_the_reference(format, num_queries, device):
    # On CUDA: several stretches, the kernel for bits at 1, 2 and 4 queries, and products by torch at 40.
    generator = torch.Generator().manual_seed(3)
    sketches = torch.randn(5003, 256, generator=generator)
    if format != "bf16":
        sketches[4000:4100] = sketches[:100]  # ties; sums of floats round by place
    rows = ops.encode_rows(sketches, format)
    queries = torch.randn(num_queries, 256, generator=generator)
    with ops.backend("reference"):
        truth = ops.store_topk(queries, rows, 7)
    rows = ops.Rows(format, rows.data.to(device), None if rows.scales is None else rows.scales.to(device))
    found = ops.store_topk(queries.to(device), rows, 7)
    assert found.largest_rows.tolist() == truth.largest_rows.tolist()
    assert found.smallest_rows.tolist() == truth.smallest_rows.tolist()
    torch.testing.assert_close(found.largest.cpu(), truth.largest, rtol=0, atol=0 if format != "bf16" else 3 * NEAR)


def test_merge_takes_results_in_any_order(device):
    queries, rows, _ = problem("int8", 90, 3, device=device)
    rows.data[30:60], rows.scales[30:60] = rows.data[60:], rows.scales[60:]  # ties between the parts
    parts = [
        ops.store_topk(queries, ops.Rows("int8", rows.data[i : i + 30], rows.scales[i : i + 30]), 40, first_row=i)
        for i in (0, 30, 60)
    ]
    backwards = ops.merge_topk(parts[2], ops.merge_topk(parts[1], parts[0]))
    assert_same(backwards, ops.store_topk(queries, rows, 40))


@pytest.mark.parametrize("format", ops.FORMATS)
def test_any_number_of_threads_gives_the_same_bits(format, isa):
    queries, rows, groups = problem(format, 20_000, 20, size=64)
    rows.data[10_000:] = rows.data[:10_000]
    before, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(ops.store_topk(queries, rows, 10, groups=groups, num_groups=3))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])
        assert torch.equal(result.sums, results[0].sums)


@pytest.mark.parametrize("num_queries", [1, 16])
@pytest.mark.parametrize("k", [1, 10, 4096])
def test_rows_in_the_worst_order(k, num_queries, isa):
    """Each row passes all before it, or is passed by all: every row enters a heap."""
    values = torch.arange(1.0, 201.0)
    for order in (values, -values, values.flip(0)):
        rows = ops.encode_rows(order[:, None].repeat(1, 64), "bf16")
        found = ops.store_topk(torch.ones(num_queries, 64), rows, k)
        assert_best(found, all_scores(torch.ones(num_queries, 64), rows), k, 0)


@pytest.mark.parametrize("num_queries", [1, 16])
@pytest.mark.parametrize("size", [4096, 1 << 16])
@pytest.mark.parametrize("format", ["int8", "1bit"])
def test_largest_integers_do_not_saturate(format, size, num_queries, isa):
    rows = ops.encode_rows(torch.tensor([[1.0], [-1.0]]).repeat(1, size), format)
    found = ops.store_topk(torch.ones(num_queries, size), rows, 2)
    top = 127.0 * (127 if format == "int8" else 1) * size
    expected = torch.tensor(top) * (rows.scales[0, 0] * (torch.ones(()) / 127))
    assert (found.largest == torch.stack([expected, -expected])).all()
    assert (found.smallest == torch.stack([-expected, expected])).all()


def test_minus_128_is_a_number_too(isa):
    """encode_rows never writes it, but a byte may hold it."""
    rows = ops.Rows("int8", torch.full((3, 128), -128, dtype=torch.int8), torch.ones(3, 2))
    for num_queries in (1, 16):
        found = ops.store_topk(torch.full((num_queries, 128), 127.0), rows, 1)
        assert (found.largest == -128 * 127 * 128).all()


@pytest.mark.parametrize("format", ops.FORMATS)
def test_reads_memory_mapped_rows(format, isa, tmp_path):
    queries, rows, _ = problem(format, 77, 6)
    raw = rows.data.view(torch.uint8).numpy()
    offset = 2  # rows need not begin with a cache line
    with open(tmp_path / "rows", "wb") as file:
        file.write(b"\0" * offset + raw.tobytes())
    mapped = numpy.memmap(tmp_path / "rows", dtype=numpy.uint8, mode="c", offset=offset, shape=raw.shape)
    data = torch.from_numpy(mapped).view(rows.data.dtype)
    assert data.data_ptr() % 64 == offset
    assert_same(ops.store_topk(queries, rows._replace(data=data), 5), ops.store_topk(queries, rows, 5))


def test_queries_need_not_be_contiguous(isa):
    for format in ops.FORMATS:
        queries, rows, groups = problem(format, 50, 6)
        strided = torch.stack([queries, queries], 2)[..., 0]
        strided_groups = torch.stack([groups, groups], 1)[:, 0]
        plain = ops.store_topk(queries, rows, 5, groups=groups, num_groups=3)
        other = ops.store_topk(strided, rows, 5, groups=strided_groups, num_groups=3)
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_results_carry_no_gradient(device):
    queries, rows, _ = problem("bf16", 9, 2, device=device)
    assert not ops.store_topk(queries.requires_grad_(), rows, 2).largest.requires_grad


def test_quantised_queries_stay_within_127():
    queries = torch.tensor([[3e-43, -3e-43], [1e38, -3e38], [0.0, 0.0], [1.0, 0.5]])
    numbers, steps = quantise(queries, 1)
    assert numbers.abs().max() == 127
    assert numbers[2].tolist() == [0, 0]
    assert steps[2] == 0
    assert numbers[3].tolist() == [127, 64]


def bad(**change):
    rows = ops.encode_rows(torch.ones(4, 128), "int8", 2)
    return {"queries": torch.ones(2, 128), "rows": rows, "k": 3} | change


def bad_rows(**change):
    return bad(rows=ops.encode_rows(torch.ones(4, 128), "int8", 2)._replace(**change))


def result_of(num_rows=4, k=3, **arguments):
    rows = ops.encode_rows(torch.ones(num_rows, 128), "int8", 2)
    with ops.backend("reference"):
        return ops.store_topk(torch.ones(2, 128), rows, k, **arguments)


GROUPS = torch.tensor([0, 1, -1, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (bad(queries=torch.ones(2, 64)), ValueError, r"with the K=128 of `rows`: got \[2, 64\]"),
        (bad(queries=torch.ones(128)), ValueError, r"must be \[Q, K\]"),
        (bad(queries=torch.ones(2, 128).double()), TypeError, r"float32: got torch.float64. Write `queries.float\(\)`"),
        (bad(queries=torch.full((2, 128), torch.inf)), ValueError, "query 0 has NaN or infinity"),
        (bad(queries=torch.ones(2, 128).index_fill(0, torch.tensor(1), torch.nan)), ValueError, "query 1 has NaN"),
        (bad(queries=torch.ones(2, 128, device="meta")), ValueError, "on the device of `queries`, meta: it is on cpu"),
        (bad(k=0), ValueError, "1 <= k <= 4096: got 0"),
        (bad(k=4097), ValueError, "got 4097"),
        (bad(first_row=-1), ValueError, "0 at least.*got -1"),
        (bad(groups=GROUPS), ValueError, "needs `num_groups`, 1 at least: got 0"),
        (bad(num_groups=2), ValueError, r"needs `groups` \[N=4\]"),
        (bad(groups=GROUPS[:3], num_groups=2), ValueError, r"must be int64 \[N=4\].*got torch.int64 \[3\]"),
        (bad(groups=GROUPS.int(), num_groups=2), ValueError, "got torch.int32"),
        (bad(groups=GROUPS, num_groups=1), ValueError, "-1 <= g < num_groups=1.*got -1 to 1"),
        (bad(groups=GROUPS - 1, num_groups=2), ValueError, "got -2 to 0"),
        (bad_rows(format="int4"), ValueError, "`format` must be one of bf16, int8, 1bit: got 'int4'"),
        (bad_rows(data=torch.ones(4, 128)), ValueError, "contiguous torch.int8 matrix: got torch.float32"),
        (bad_rows(data=torch.ones(128, 4, dtype=torch.int8).T), ValueError, r"strides \[1, 4\]"),
        (bad_rows(data=torch.ones(4, 100, dtype=torch.int8)), ValueError, "must be a multiple of 64 numbers a block"),
        (bad_rows(scales=None), ValueError, r"contiguous float32 \[N=4, M\]: got None"),
        (bad_rows(scales=torch.ones(3, 2)), ValueError, r"got torch.float32 \[3, 2\]"),
        (bad_rows(scales=torch.ones(4, 2).double()), ValueError, "got torch.float64"),
        (bad_rows(scales=torch.ones(2, 4).T), ValueError, r"strides \[1, 4\]"),
        (bad(rows=ops.Rows("bf16", torch.ones(4, 128).bfloat16(), torch.ones(4, 1))), ValueError, "None for bf16"),
        (
            bad(rows=ops.Rows("1bit", torch.zeros(1, 1 << 14, dtype=torch.uint8), torch.ones(1, 1))),
            ValueError,
            "65536 numbers at most.*got K=131072 in 1 blocks",
        ),
        (bad(into=result_of(k=2), first_row=4), ValueError, r"\[Q=2, k=3\]: got \[2, 2\]"),
        (bad(into=result_of(), first_row=2), ValueError, "holds row 2, and `first_row` is 2"),
        (bad(into=result_of(groups=GROUPS, num_groups=2), first_row=4), ValueError, "in every call or in none"),
        (bad(into=result_of(), first_row=4, groups=GROUPS, num_groups=2), ValueError, "its `sums` are None"),
    ],
)
def test_bad_input_is_a_sentence(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        ops.store_topk(**arguments)


def test_absent_kernels_are_a_sentence(monkeypatch):
    def absent(name):
        raise ImportError("No module named 'fastsft._C'")

    monkeypatch.setattr(_native.importlib, "import_module", absent)
    _native.why_absent.cache_clear()
    try:
        with ops.backend("cpp"), pytest.raises(RuntimeError, match="store_topk was asked to run with backend 'cpp'"):
            ops.store_topk(**bad())
    finally:
        _native.why_absent.cache_clear()
