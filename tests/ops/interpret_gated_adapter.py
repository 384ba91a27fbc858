"""The Triton kernels of gated_adapter in Triton's interpreter: test_gated_adapter_triton.py runs them.

float32 only: the interpreter takes bfloat16 for the integers that hold it.
"""

import sys
from dataclasses import replace

import pytest
import torch
from fastsft.triton_kernels import gated_adapter as kernels

from fastsft import ops
from fastsft.ops import _gated_chosen as chosen_products
from fastsft.ops import _gated_parts as parts
from fastsft.ops._gated_chosen import Chosen, Sequences, _add_reference, _times_reference

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


def choosing(lengths, num_rows, num_columns):
    """Sequences of these lengths that each have some of the rows of a weight, in an order of their own."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    columns = torch.stack([torch.randperm(num_rows)[:num_columns] for _ in lengths])
    sequences = Sequences.packed(offsets, torch.ones(offsets[-1], dtype=torch.bool))
    return Chosen(torch.zeros(len(lengths), 0), columns, sequences)


# lengths; rows of the weight, of which so many a sequence; numbers of a row: tails and empty sequences everywhere,
# lengths that fill their tiles, columns and numbers that do not fill 16 or take several tiles, more sequences than 128
CHOSEN = [
    ((3, 70, 0, 64, 130), 40, 19, 45),
    ((0, 0, 5, 0), 3, 3, 1),
    ((64, 128), 16, 16, 64),
    ((63, 1, 65), 150, 101, 9),
    ((1,), 1, 1, 70),
    ((1, 0) * 70 + (66,), 6, 2, 5),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("lengths", "num_rows", "num_columns", "size"), CHOSEN)
def test_products_with_chosen_rows_equal_the_loop(lengths, num_rows, num_columns, size, transposed):
    T, chosen = sum(lengths), choosing(lengths, num_rows, num_columns)
    where = chosen.columns, chosen.sequences.offsets
    weight = strided(size, num_rows).T if transposed else strided(num_rows, size)
    x, z, into = strided(T, size), strided(T, num_columns), strided(T, size)
    kept = [(tensor, tensor.clone()) for tensor in (x, z, weight, *where)]
    found = kernels.times_chosen(x, weight, *where)
    torch.testing.assert_close(found, _times_reference(x.double(), weight.double(), chosen), **NEAR)
    truth = _add_reference(into.double(), z.double(), weight.double(), chosen, 0.5)
    again, version = into.clone(), into._version
    assert kernels.add_chosen(into, z, weight, *where, 0.5) is into
    torch.testing.assert_close(into, truth, **NEAR)
    assert into._version > version  # autograd knows
    # in any layout the same bits
    across = again.T.contiguous().T
    assert torch.equal(kernels.add_chosen(across, z.T.contiguous().T, weight.contiguous(), *where, 0.5), into)
    assert torch.equal(kernels.times_chosen(x.T.contiguous().T, weight.contiguous(), *where), found)
    assert all(torch.equal(now, then) for now, then in kept)


def test_rows_that_no_sequence_has_and_numbers_beside_a_matrix_are_not_touched():
    chosen = choosing((40, 0, 30), 9, 4)
    where = chosen.columns, chosen.sequences.offsets
    weight, x, z, beside = torch.randn(20, 5), torch.randn(70, 5), torch.randn(70, 4), torch.zeros(72, 8)
    weight[9:] = torch.nan
    assert kernels.times_chosen(x, weight, *where).isfinite().all()
    kernels.add_chosen(beside[1:71, 2:7], z, weight, *where, 1.0)
    assert beside[1:71, 2:7].all()
    beside[1:71, 2:7] = 0
    assert not beside.any()


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_chosen_rows_of_no_tokens(lengths):
    columns, offsets = torch.zeros(len(lengths), 3, dtype=torch.int64), torch.zeros(len(lengths) + 1, dtype=torch.int64)
    assert kernels.times_chosen(torch.randn(0, 5), torch.randn(4, 5), columns, offsets).shape == (0, 3)
    into = torch.randn(0, 5)
    assert kernels.add_chosen(into, torch.randn(0, 3), torch.randn(4, 5), columns, offsets, 1.0) is into


def test_no_chosen_rows_and_no_numbers():
    columns, offsets = torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 3, 5])
    assert kernels.times_chosen(torch.randn(5, 4), torch.randn(6, 4), columns, offsets).shape == (5, 0)
    into = torch.randn(5, 4)
    before = into.clone()
    assert torch.equal(kernels.add_chosen(into, torch.randn(5, 0), torch.randn(6, 4), columns, offsets, 1.0), before)
    one = columns.new_zeros(2, 1)
    assert not kernels.times_chosen(torch.randn(5, 0), torch.randn(6, 0), one, offsets).any()
    # one number a row, as far apart as it likes
    into = torch.zeros(1, 5).T
    assert kernels.add_chosen(into, torch.ones(5, 1), torch.ones(6, 1), one, offsets, 1.0).all()


@pytest.mark.parametrize(("gate", "per"), [("topk", "sequence"), ("topk", "task"), ("one_hot", "task")])
def test_gated_adapter_with_these_kernels_equals_all_products(gate, per, monkeypatch):
    """Both passes as a GPU takes them where kernels are asked for by name."""
    lengths, experts, rank, memory = (40, 0, 70, 33), 5, 4, 3
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    sequences = Sequences.packed(offsets, torch.rand(offsets[-1]) < 0.5)
    x, a = strided(sum(lengths), 9), torch.randn(experts * rank + memory + (experts if per == "sequence" else 0), 9)
    base, b = torch.nn.Linear(9, 11), torch.randn(11, experts * rank + memory)
    table = torch.randn(6, experts) if (gate, per) == ("topk", "task") else None
    told = {"gate": gate, "per": per, "base": base, "sequences": sequences, "table": table, "scale": 0.5}
    told |= {"task": torch.tensor([3, 1, 4, 1]) if per == "task" else None, "num_frozen": 1}
    leaves = [leaf.requires_grad_() for leaf in (x, a, b)]
    dy = torch.randn(sum(lengths), 11)

    def run(skip):
        y = ops.gated_adapter(x, a, b, num_experts=experts, rank=rank, skip=skip, **told)
        return [y, *torch.autograd.grad(y, [*leaves, *base.parameters()], dy)]

    expected, called = run(skip=False), []

    def interpreted(found, name):
        def kernel(*args):
            called.append(name)
            return found.run(*args)

        return [replace(found, device="cpu", why_absent=lambda: None, run=kernel)]

    for op in (parts._FORWARD, parts._BACKWARD, chosen_products._TIMES, chosen_products._ADD):
        monkeypatch.setattr(op, "implementations", interpreted(*op.implementations, op.name))

    def outer(z, x, num_rows, chosen):
        return chosen_products._outer_dense(z, x, num_rows, chosen.columns, chosen.sequences.document)

    monkeypatch.setattr(sys.modules["fastsft.ops.gated_adapter"], "outer_chosen", outer)
    with ops.backend("triton"):
        actual = run(skip=None)
    for found, truth in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, truth, **NEAR)
    forward, backward = ["gated_times_chosen", "gated_epilogue", "gated_add_chosen"], ["gated_epilogue"]
    backward += ["gated_times_chosen", "gated_epilogue_backward", "gated_add_chosen"]
    assert called == forward + backward
