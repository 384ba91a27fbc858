"""fastsft/ops/sketch_matrix.py against the table of places and signs, in float64."""

import pytest
import torch

from fastsft import ops

# Sums of n products round to about sqrt(n) * 6e-8 of their norm; n < 10^5 a bucket here.
FLOAT32 = 1e-5

# [B, O, I]: tails, one-wide sides, no entries, more blocks than are hashed at a time, more than one slot.
CASES = {
    "one_block": (2, 1, 16),
    "one_by_one": (3, 1, 1),
    "one_wide": (2, 70, 1),
    "flat": (2, 1, 1000),
    "tails": (4, 7, 33),
    "rank_8": (3, 40, 8),
    "lora_a": (2, 16, 200),
    "many_blocks": (3, 150, 301),
    "no_matrices": (0, 5, 6),
    "no_columns": (2, 5, 0),
    "no_rows": (2, 0, 5),
}


def draw(shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def truth(matrices, size, seed):
    """Sketch entry by entry, in float64."""
    index, sign = ops.sjlt_table(tuple(matrices.shape[-2:]), size, seed)
    flat = matrices.double().cpu().flatten(-2)
    sketch = torch.zeros(flat.shape[0], size, dtype=torch.float64)
    for matrix, row in zip(flat, sketch, strict=True):
        row.index_add_(0, index, matrix * sign)
    return sketch


def add(matrices, out, seed, first_row=0, precondition=None, total=None):
    """Call the registered operator, which takes the rows of a larger matrix."""
    torch.ops.fastsft.sketch_matrix(matrices, precondition, total, out, seed, first_row)


def assert_near(actual, expected, tolerance=FLOAT32):
    """Compare in the norm of the whole: single entries may cancel to anything."""
    assert actual.shape == expected.shape
    error = (actual.double().cpu() - expected.double().cpu()).norm()
    assert error <= tolerance * expected.double().norm().item() + 1e-30, f"off by {error:.1e}"


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_reference_equals_the_table(case, device):
    matrices, precondition = (draw(shape, torch.float64, device) for shape in (CASES[case], CASES[case][1:]))
    total = torch.ones_like(precondition)
    sketch = ops.sketch_matrix(matrices, 32, 3, precondition=precondition, total=total)
    torch.testing.assert_close(sketch.cpu(), truth(matrices * precondition, 32, 3), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(total, 1 + matrices.sum(0), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_default_backend_equals_the_table(case, device):
    matrices = draw(CASES[case], torch.float32, device)
    precondition, total = draw(CASES[case][1:], device=device, seed=1), torch.ones(CASES[case][1:], device=device)
    sketch = ops.sketch_matrix(matrices, 32, 3, precondition=precondition, total=total)
    assert_near(sketch, truth(matrices.double() * precondition, 32, 3))
    assert_near(total, 1 + matrices.double().sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_native_equals_the_table(case, isa, dtype):
    # Half-width inputs are exact in float32, so the tolerance is float32's own.
    matrices = draw(CASES[case], dtype)
    precondition, total = draw(CASES[case][1:], dtype, seed=1), torch.ones(CASES[case][1:])
    assert_near(ops.sketch_matrix(matrices, 32, 3), truth(matrices, 32, 3))
    sketch = ops.sketch_matrix(matrices, 32, 3, precondition=precondition, total=total)
    assert sketch.dtype == torch.float32
    assert_near(sketch, truth(matrices.double() * precondition.double(), 32, 3))
    assert_near(total, 1 + matrices.double().sum(0))


@pytest.mark.parametrize("seed", [0, 2**31 + 7, 2**32 - 1])
def test_native_takes_every_seed_and_size(isa, seed):
    matrices = draw((2, 9, 50))
    for size in (16, 48, 4096, 4112):
        assert_near(ops.sketch_matrix(matrices, size, seed), truth(matrices, size, seed))


def test_native_hashes_blocks_past_32_bits(isa):
    # 3 blocks a row: rows before, across and after block 2^32, which falls within row 2^32 // 3.
    matrices = draw((2, 4, 40))
    for first_row in (2**32 // 3 - 6, 2**32 // 3 - 1, 2**32, 2**40 + 12345):
        sketch = torch.zeros(2, 64)
        add(matrices, sketch, 11, first_row)
        index, sign = ops.sjlt_table((4, 40), 64, 11, first_row=first_row)
        expected = torch.zeros(2, 64).index_add_(1, index, matrices.flatten(1) * sign)
        assert_near(sketch, expected)


def test_chunks_of_rows_sum_to_the_whole(device):
    matrices = draw((3, 20, 37), device=device)
    sketch = torch.zeros(3, 64, device=device)
    for first, last in ((0, 1), (1, 13), (13, 20)):
        add(matrices[:, first:last], sketch, 5, first)
    assert_near(sketch, truth(matrices, 64, 5))


def test_native_sketches_more_matrices_than_fit_one_pass(isa):
    # A pass holds 2^22 numbers of partial sketches: 128 matrices of 2 slots of 16384. Here they overlap in memory.
    matrices = draw((1024 * 1024 + 130,)).as_strided((130, 1024, 1024), (1, 1024, 1))
    total = torch.zeros(1024, 1024)
    sketch = ops.sketch_matrix(matrices, 16384, 1, total=total)
    some = [0, 127, 128, 129]
    assert_near(sketch[some], truth(matrices[some], 16384, 1))
    assert_near(total, matrices.sum(0, dtype=torch.float64))


@pytest.mark.parametrize("with_total", [False, True])
@pytest.mark.parametrize("shape", [(3, 700, 500), (2000, 1, 500)])
def test_native_gives_the_same_bits_with_any_number_of_threads(isa, threads, shape, with_total):
    matrices, results = draw(shape), []
    for number in (1, 2, 3, 8):
        threads(number)
        total = torch.zeros(shape[1:]) if with_total else None
        results.append((ops.sketch_matrix(matrices, 256, 1, total=total), total))
    for sketch, total in results[1:]:
        assert torch.equal(sketch, results[0][0])
        assert total is None or torch.equal(total, results[0][1])


def test_native_gives_each_matrix_the_same_bits_in_any_company(isa):
    matrices = draw((6, 60, 50))
    together = ops.sketch_matrix(matrices, 48, 2)
    order = [4, 0, 5, 2, 1, 3]
    assert torch.equal(ops.sketch_matrix(matrices[order], 48, 2), together[order])
    assert torch.equal(ops.sketch_matrix(matrices[3], 48, 2), together[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_reads_strided_matrices(isa, dtype):
    plain, precondition = draw((3, 21, 40), dtype), draw((21, 40), seed=1)
    expected = ops.sketch_matrix(plain, 64, 0, precondition=precondition)
    padded = torch.cat([plain, plain], 2)[:, :, :40]
    transposed = plain.transpose(0, 2).contiguous().transpose(0, 2)
    rows = torch.cat([plain, plain], 1)[:, :21]
    for matrices in (padded, transposed, rows):
        assert not matrices.is_contiguous()
        factor = precondition.T.contiguous().T
        assert torch.equal(ops.sketch_matrix(matrices, 64, 0, precondition=factor), expected)


def test_leading_dimensions_are_kept(device):
    matrices = draw((2, 3, 4, 20), device=device)
    sketch, total = ops.sketch_matrix(matrices, 48, 1), torch.zeros(4, 20, device=device)
    assert sketch.shape == (2, 3, 48)
    assert_near(ops.sketch_matrix(matrices, 48, 1, total=total).sum((0, 1)), sketch.double().sum((0, 1)))
    assert_near(total, matrices.double().sum((0, 1)))
    assert ops.sketch_matrix(matrices[0, 0], 48, 1).shape == (48,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_out_and_total_are_added_to(dtype, device):
    matrices = draw((2, 9, 20), dtype, device)
    out, total = (torch.full(shape, 3.0, dtype=dtype, device=device) for shape in ((2, 32), (9, 20)))
    add(matrices, out, 4, total=total)
    assert_near(out, truth(matrices, 32, 4) + 3)
    assert_near(total, matrices.double().sum(0) + 3)


def test_a_number_that_is_not_finite_is_not_lost(device):
    matrices = draw((2, 5, 30), device=device)
    matrices[1, 4, 29] = float("nan")
    sketch = ops.sketch_matrix(matrices, 32, 0)
    assert torch.isfinite(sketch[0]).all()
    assert sketch[1].isnan().sum() == 1


def test_carries_no_gradient_and_ignores_autocast(device):
    matrices = draw((2, 5, 30), device=device)
    expected = ops.sketch_matrix(matrices, 32, 0)
    with torch.autocast(device.type, torch.bfloat16):
        actual = ops.sketch_matrix(matrices.requires_grad_(), 32, 0)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("matrices", "change", "error", "sentence"),
    [
        (torch.ones(5), {}, ValueError, r"got torch.float32 \[5\]. A flat vector is a matrix of one row"),
        (torch.ones(2, 3, dtype=torch.int64), {}, ValueError, "must be floating point"),
        (torch.ones(2, 3), {"size": 40}, ValueError, "multiple of 16 above 0: got 40"),
        (torch.ones(2, 3), {"precondition": torch.ones(3, 2)}, ValueError, r"must be \[2, 3\] on cpu.*got \[3, 2\]"),
        (torch.ones(2, 3), {"precondition": torch.ones(2, 3, device="meta")}, ValueError, r"got \[2, 3\] on meta"),
        (torch.ones(2, 3), {"total": torch.ones(3, 2)}, ValueError, "`total` is added to in place"),
        (torch.ones(2, 3), {"total": torch.ones(2, 3).double()}, ValueError, "`total` is added to in place"),
        (torch.ones(2, 3), {"total": torch.ones(3, 2).T}, ValueError, r"strides \[1, 2\]"),
    ],
)
def test_bad_input_is_a_sentence(matrices, change, error, sentence):
    with pytest.raises(error, match=sentence):
        ops.sketch_matrix(matrices, **({"size": 32, "seed": 0} | change))


def test_float64_asked_of_native_fails_by_name(isa):
    with pytest.raises(RuntimeError, match=r"sketch_matrix was asked to run with backend 'cpp'.*float64"):
        ops.sketch_matrix(torch.ones(2, 3).double(), 16, 0)


@pytest.mark.parametrize("full", [True, False])
def test_registered_op_passes_opcheck(full, device):
    matrices, out = draw((2, 5, 30), device=device), torch.zeros(2, 32, device=device)
    extra = (torch.ones(5, 30, device=device), torch.zeros(5, 30, device=device)) if full else (None, None)
    torch.library.opcheck(torch.ops.fastsft.sketch_matrix.default, (matrices, *extra, out, 0, 0))


def test_compiles_in_one_graph(device):
    matrices, precondition = draw((2, 5, 30), device=device), draw((5, 30), device=device, seed=1)

    def run():
        total = torch.zeros(5, 30, device=device)
        return ops.sketch_matrix(matrices, 32, 7, precondition=precondition, total=total), total

    for actual, expected in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(), run(), strict=True):
        torch.testing.assert_close(actual, expected)
