"""Scores of tokens, and their sums over documents: the side of influence_dot that needs no document's gradient.

On a CPU these are plain GEMMs with little to fuse, where torch is at the machine's ceiling already (a 256 x 64 x 4096
product by hand took as long as torch.mm): there is no C++ here.
"""

# T tokens, D documents, I inputs, O outputs, A targets, C factor rank

import torch
from torch import Tensor

from fastsft.ops import _cuda
from fastsft.ops._op import Implementation, Op, why_no_triton
from fastsft.ops._register import register
from fastsft.ops._rules import check_offsets


def _inside(offsets: Tensor, scores: Tensor) -> Tensor:
    """Zero the scores of tokens that belong to no document."""
    token = torch.arange(scores.shape[0], device=scores.device)
    return torch.where(((token >= offsets[0]) & (token < offsets[-1]))[:, None], scores, 0)


def _dense_reference(x: Tensor, dy: Tensor, offsets: Tensor, targets: Tensor) -> Tensor:
    x, dy = x.to(targets.dtype), dy.to(targets.dtype)
    scores = x.new_zeros(targets.shape[0], x.shape[0])
    for a, target in enumerate(targets):
        # Contract the wider side first: what remains per token is as narrow as it can be.
        if x.shape[1] >= dy.shape[1]:
            scores[a] = ((x @ target.T) * dy).sum(1)
        else:
            scores[a] = ((dy @ target) * x).sum(1)
    return _inside(offsets, scores.T.contiguous())


def _dense_triton(x: Tensor, dy: Tensor, offsets: Tensor, targets: Tensor) -> Tensor:
    from fastsft.triton_kernels import influence_dot as kernels

    return _inside(offsets, kernels.influence_dot_tokens(x, dy, targets))


_DENSE = Op(
    "influence_dot_tokens",
    _dense_reference,
    [Implementation(backend="triton", device="cuda", run=_dense_triton, why_absent=why_no_triton)],
)


@register("influence_dot_tokens")
def dense(x: Tensor, dy: Tensor, offsets: Tensor, targets: Tensor) -> Tensor:
    """Score tokens dy_t . targets_a . x_t: targets [A, O, I] -> [T, A]."""
    check_offsets(offsets, x.shape[0])
    return _DENSE(x, dy, offsets, targets, like=x)


@dense.register_fake
def _(x: Tensor, dy: Tensor, offsets: Tensor, targets: Tensor) -> Tensor:
    return targets.new_empty(x.shape[0], targets.shape[0])


def _factored_reference(x: Tensor, dy: Tensor, offsets: Tensor, u: Tensor, v: Tensor) -> Tensor:
    A, O, C = u.shape
    left = dy.to(u.dtype) @ u.transpose(0, 1).reshape(O, A * C)  # [T, A * C]
    right = x.to(u.dtype) @ v.transpose(0, 1).reshape(x.shape[1], A * C)
    return _inside(offsets, (left * right).unflatten(1, (A, C)).sum(2))


_FACTORED = Op("influence_dot_factored", _factored_reference, [])


@register("influence_dot_factored")
def factored(x: Tensor, dy: Tensor, offsets: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Score tokens (dy_t U_a) . (x_t V_a): u [A, O, C], v [A, I, C] -> [T, A]. GEMMs on every device."""
    check_offsets(offsets, x.shape[0])
    return _FACTORED(x, dy, offsets, u, v, like=x)


@factored.register_fake
def _(x: Tensor, dy: Tensor, offsets: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return u.new_empty(x.shape[0], u.shape[0])


def _segment_sum_reference(values: Tensor, offsets: Tensor) -> Tensor:
    # Not index_add_, whose order on CUDA is not fixed.
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)


_SEGMENT_SUM = Op(
    "segment_sum",
    _segment_sum_reference,
    [Implementation(backend="cuda", device="cuda", run=_cuda.segment_sum, why_absent=_cuda.why_no_library)],
)


@register("segment_sum")
def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum the rows of each document: values [T, A], offsets [D + 1] -> [D, A]."""
    check_offsets(offsets, values.shape[0])
    return _SEGMENT_SUM(values, offsets, like=values)


@segment_sum.register_fake
def _(values: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1, values.shape[1])
