"""The Triton kernels of gated_adapter in Triton's interpreter: test_gated_adapter_triton.py runs them.

float32 only: the interpreter takes bfloat16 for the integers that hold it.
"""

import pytest
import torch
from fastsft.triton_kernels import gated_adapter as kernels

from fastsft.ops import _gated_parts as parts

# Sums of up to 1500 products of float32, in another order than the truth's in float64: 1500 * 2^-24 of their size.
NEAR = {"rtol": 1e-5, "atol": 1e-4, "check_dtype": False}
# tokens, experts, rank, memory: tails of tokens, sizes that are no powers of two, no memory, more columns than a tile
SHAPES = [(131, 1, 16, 5), (700, 1, 3, 0), (70, 3, 3, 7), (33, 3, 16, 0), (17, 8, 16, 1), (3, 2, 1500, 9)]


def strided(rows, columns):
    """Columns of a wider matrix, as z lies beside the router's logits."""
    return torch.randn(rows, columns + 3)[:, :columns]


def double(job):
    return job._replace(z=job.z.double(), gates=job.gates.double())


def check_epilogue(z, dh, gates, document, width, gate=None, top_k=2):
    """Compare both directions with the reference in float64."""
    job, before = double(parts.Epilogue(z, gates, document, gate, top_k)), (z.clone(), dh.clone(), gates.clone())
    h_truth, values_truth = parts._forward_reference(job, width)
    dz_truth, dgates_truth = parts._backward_reference(job._replace(gates=values_truth), dh.double(), width)
    h, values = kernels.epilogue(z, gates, document, width, gate, top_k)
    dz, dgates = kernels.epilogue_backward(dh, z, values, document, width, gate)
    for found, truth in ((h, h_truth), (values, values_truth), (dz, dz_truth), (dgates, dgates_truth)):
        torch.testing.assert_close(found, truth, **NEAR)
    assert all(torch.equal(now, then) for now, then in zip((z, dh, gates), before))
    return h, values


@pytest.mark.parametrize("rows", ["of documents", "one", "of tokens"])
@pytest.mark.parametrize(("tokens", "experts", "rank", "memory"), SHAPES)
def test_epilogue_of_values_equals_reference(tokens, experts, rank, memory, rows):
    width = experts * rank
    num_rows = {"of documents": 4, "one": 1, "of tokens": tokens}[rows]
    gates = torch.randn(num_rows, experts).clamp_min(0)  # some are 0
    document = torch.randint(num_rows, (tokens,)) if rows == "of documents" else None
    z, dh = strided(tokens, width + memory), strided(tokens, width + memory)
    h, values = check_epilogue(z, dh, gates, document, width)
    assert values is gates
    assert torch.equal(h[:, width:], z[:, width:])


@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "topk"])
@pytest.mark.parametrize(("tokens", "experts", "rank", "memory"), SHAPES)
def test_epilogue_of_logits_equals_reference(tokens, experts, rank, memory, gate):
    width = experts * rank
    z, dh, logits = (strided(tokens, columns) for columns in (width + memory, width + memory, experts))
    for top_k in {1, 2, experts} if gate == "topk" else {2}:
        _, values = check_epilogue(z, dh, 3 * logits, None, width, gate, min(top_k, experts))
        if gate == "topk":
            assert ((values > 0).sum(1) == min(top_k, experts)).all()


def test_of_equal_logits_the_lowest_expert_is_chosen():
    z, logits = torch.randn(2, 3), torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    for top_k, chosen in ((1, [[0, 1, 0], [1, 0, 0]]), (2, [[0, 0.5, 0.5], [0.5, 0.5, 0]])):
        _, values = kernels.epilogue(z, logits, None, 3, "topk", top_k)
        assert torch.equal(values, torch.tensor(chosen, dtype=torch.float32))


@pytest.mark.parametrize("gate", ["sigmoid", "softmax", "topk"])
def test_infinite_and_missing_logits_give_what_torch_gives(gate):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[-inf, 1.0, -inf], [-inf, 1.0, 2.0], [nan, 1.0, 2.0], [1.0, 2.0, nan]])
    _, values = kernels.epilogue(torch.randn(4, 3), logits, None, 3, gate, 2)
    torch.testing.assert_close(values, parts.gate_values(logits, gate, 2), equal_nan=True)


def test_no_tokens():
    z, gates = torch.randn(0, 8), torch.randn(2, 3)
    document = torch.zeros(0, dtype=torch.int64)
    h, values = kernels.epilogue(z, gates, document, 6, None, 2)
    dz, dgates = kernels.epilogue_backward(z, z, gates, document, 6, None)
    of_tokens = kernels.epilogue(z, gates[:0], None, 6, "softmax", 2)
    assert h.shape == dz.shape == of_tokens[0].shape == (0, 8)
    assert dgates.shape == of_tokens[1].shape == (0, 3)
    assert values is gates
    dh, db = kernels.products(torch.randn(0, 5), torch.randn(5, 3), torch.randn(0, 2))
    assert dh.shape == (0, 3)
    assert torch.equal(db, torch.zeros(5, 2))
    active = kernels.active_tiles(gates, document, 16)
    assert active.shape == (0, 3)
    assert kernels.shrink_active(z, torch.randn(6, 8), active, 16).shape == (0, 6)
    assert kernels.expand_active(z, torch.randn(0, 6), torch.randn(8, 6), active, 16, 2.0).shape == (0, 8)


def test_memory_without_experts_passes():
    z, dh, gates = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 0)
    assert torch.equal(kernels.epilogue(z, gates, None, 0, None, 2)[0], z)
    dz, dgates = kernels.epilogue_backward(dh, z, gates, None, 0, None)
    assert torch.equal(dz, dh)
    assert dgates.shape == (3, 0)


# tokens, outputs, R, S: one program, parts of either product, both; tails everywhere; the last is torch's
@pytest.mark.parametrize(
    ("tokens", "outputs", "rank", "columns"),
    [(9, 5, 3, 3), (150, 70, 16, 1), (7, 300, 16, 10), (150, 300, 20, 32), (1, 1, 1, 1), (9, 5, 33, 3)],
)
def test_products_equal_torch(tokens, outputs, rank, columns):
    dy, b, h = strided(tokens, outputs), strided(outputs, rank), strided(tokens, columns)
    dh, db = kernels.products(dy, b, h)
    torch.testing.assert_close(dh, dy.double() @ b.double(), **NEAR)
    torch.testing.assert_close(db, dy.double().T @ h.double(), **NEAR)


def test_parts_of_products_move_less_than_dy():
    for size in (2, 4):
        for rank in range(1, kernels.MOST_RANK + 1):
            for tokens, outputs in ((8192, 2048), (256, 4096), (4096, 100)):
                sizes, stretch = kernels.products_blocks(tokens, outputs, rank, size)
                chunks, stretches = -(-tokens // sizes["BLOCK_T"]), -(-outputs // stretch)
                of_db = 8 * outputs * rank * chunks if chunks > 1 else 0
                of_dh = 8 * tokens * rank * stretches if stretches > 1 else 0
                assert max(of_db, of_dh) <= size * tokens * outputs / 2
                assert stretch % sizes["BLOCK_O"] == 0


def test_active_experts_come_first():
    gates = torch.tensor([[0.5, 0, 0, 0.5], [0, 0, 0.1, 0], [0, 0, 0, 0]])
    document = torch.tensor([0] * 4 + [1] * 3 + [2] * 2)
    assert kernels.active_tiles(gates, document, 4).tolist() == [[0, 3, -2, -3], [2, -1, -2, -4], [-1, -2, -3, -4]]


@pytest.mark.parametrize(("experts", "rank"), [(1, 16), (3, 3), (3, 70), (8, 16)])
def test_products_with_active_experts_equal_those_of_all(experts, rank):
    # sequences shorter and longer than a tile, and a tail
    document = torch.arange(4).repeat_interleave(torch.tensor([3, 40, 0, 12]))
    gates = torch.rand(4, experts) * (torch.rand(4, experts).argsort(1) < 2)
    gates[3] = 0
    active = kernels.active_tiles(gates, document, 16)
    speaks = (gates != 0)[document].repeat_interleave(rank, 1)  # [T, R]
    x, a, b = strided(55, 19), strided(experts * rank, 19), strided(150, experts * rank)
    y = strided(55, 150)
    z = kernels.shrink_active(x, a, active, 16)
    dense = x.double() @ a.double().T
    torch.testing.assert_close(torch.where(speaks, z, 0), torch.where(speaks, dense, 0), **NEAR)
    for tile, listed in enumerate(active.tolist()):
        others = [expert for expert in range(experts) if expert not in listed]
        assert not z.unflatten(1, (experts, rank))[16 * tile : 16 * tile + 16, others].any()
    h, before = torch.where(speaks, z, 0), y.clone()
    out = kernels.expand_active(y, h, b, active, 16, 0.5)
    torch.testing.assert_close(out, before.double() + 0.5 * h.double() @ b.double().T, **NEAR)
    assert torch.equal(y, before)


def test_columns_of_inactive_experts_are_not_read():
    gates, document = torch.tensor([[1.0, 0.0]]), torch.zeros(20, dtype=torch.int64)
    active = kernels.active_tiles(gates, document, 16)
    h, b, y = torch.randn(20, 6), torch.randn(4, 6), torch.randn(20, 4)
    h[:, 3:] = torch.nan
    out = kernels.expand_active(y, h, b, active, 16, 1.0)
    torch.testing.assert_close(out, y + h[:, :3] @ b[:, :3].T)
