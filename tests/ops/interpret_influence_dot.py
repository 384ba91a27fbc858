"""The Triton kernels of influence_dot in Triton's interpreter: test_influence_dot_triton.py runs them.

float32 only: the interpreter takes bfloat16 for the integers that hold it.
"""

import pytest
import torch
from fastsft.triton_kernels import influence_dot as kernels

from fastsft import ops

# lengths, inputs, outputs: tails in both directions, more than one tile, one-wide sides, empty documents.
CASES = [([3, 0, 16, 1, 34], 19, 5), ([40, 33], 130, 17), ([7], 9, 140), ([2, 2], 1, 1), ([0], 5, 6), ([], 5, 6)]


@pytest.mark.parametrize(("lengths", "inputs", "outputs"), CASES)
def test_kernels_equal_reference(lengths, inputs, outputs):
    tokens = sum(lengths) + 3
    x, dy = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    offsets = torch.tensor([1, *lengths]).cumsum(0)
    targets, precondition = torch.randn(2, outputs, inputs), torch.rand(outputs, inputs)
    groups = torch.tensor([(2 * d + 1) % 3 for d in range(len(lengths))], dtype=torch.int64)
    double = [t.double() for t in (x, dy, targets, precondition)]
    truth = ops.influence_dot(*double[:2], offsets, double[2], precondition=double[3], groups=groups, num_groups=3)
    tokens_truth = torch.einsum("to,aoi,ti->ta", double[1], double[2], double[0])

    sums = torch.ones(3, outputs, inputs)
    scores = kernels.influence_dot(x, dy, offsets, targets, precondition, groups, sums)
    alone = kernels.influence_dot(x, dy, offsets, targets, precondition, None, None)
    only_sums = torch.zeros_like(sums)
    empty = kernels.influence_dot(x, dy, offsets, None, None, groups, only_sums)
    strided = kernels.influence_dot_tokens(x.T.contiguous().T, torch.cat([dy, dy], 1)[:, :outputs], targets)

    near = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(scores, truth.scores, **near)
    torch.testing.assert_close(alone, truth.scores, **near)
    torch.testing.assert_close(sums - 1, truth.sums, **near)
    torch.testing.assert_close(only_sums, truth.sums, **near)
    torch.testing.assert_close(strided, tokens_truth, **near)
    assert empty.shape == (len(lengths), 0)
