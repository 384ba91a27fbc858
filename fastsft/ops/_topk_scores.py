"""What a score of store_topk is: queries as the rows' format reads them, and the reference scan in plain torch."""

# N rows, K numbers of a row, M blocks of a row, Q queries

import torch
from torch import Tensor

from fastsft.ops._rows import Rows, decode_rows
from fastsft.ops._topk_merge import TopK, empty_topk, merge_topk

CHUNK = 8192  # rows scored at a time; N x Q never exists


def quantise(queries: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Round queries [Q, K] to int8 in [-127, 127] -> [Q, K], and float32 steps [Q, M]: 1 / 127 of a block's largest.

    A block of zeros has step zero.
    """
    parts = queries.unflatten(1, (blocks, -1))  # [Q, M, K / M]
    # Without whole copies: pages of memory that are new at each call cost more than the arithmetic.
    steps = torch.maximum(parts.amax(2), -parts.amin(2)) / 127
    # The division can pass 127 by rounding where a step is subnormal.
    numbers = (parts / torch.where(steps > 0, steps, 1)[..., None]).round_().clamp_(-127, 127)
    return numbers.flatten(1).to(torch.int8), steps


def scan(queries: Tensor, rows: Rows, k: int, first_row: int, groups: Tensor | None, num_groups: int) -> TopK:
    """Scan as store_topk does, without `into`: dot products in float64, in which those of integers are exact."""
    device = queries.device
    best = empty_topk(queries.shape[0], k, None if groups is None else num_groups, device)
    for begin in range(0, rows.data.shape[0], CHUNK):
        data, scales = rows.data[begin : begin + CHUNK], rows.scales
        scores = _score(queries, Rows(rows.format, data, None if scales is None else scales[begin : begin + CHUNK]))
        numbers = torch.arange(scores.shape[1], device=device) + (first_row + begin)
        numbers = numbers.expand_as(scores)
        sums = None if groups is None else _sums(scores, groups[begin : begin + CHUNK], num_groups)
        best = merge_topk(best, TopK(scores, numbers, scores, numbers, sums))
    return best


def _sums(scores: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Add scores [Q, N] up by group -> [Q, num_groups], float64."""
    inside = groups >= 0
    sums = scores.new_zeros(scores.shape[0], num_groups, dtype=torch.float64)
    return sums.index_add_(1, groups[inside], scores[:, inside].double())


def _score(queries: Tensor, rows: Rows) -> Tensor:
    """Score rows -> [Q, N] float32, as the docstring of store_topk defines."""
    if rows.scales is None:
        return (queries.to(torch.bfloat16).double() @ rows.data.double().T).float()
    blocks = rows.scales.shape[1]
    numbers, steps = quantise(queries, blocks)
    integers = decode_rows(rows._replace(scales=torch.ones_like(rows.scales)))
    dots = torch.einsum(
        "qmj,nmj->mqn", numbers.double().unflatten(1, (blocks, -1)), integers.double().unflatten(1, (blocks, -1))
    )
    scores = dots.new_zeros(dots.shape[1:], dtype=torch.float32)
    for m in range(blocks):
        scores = scores + dots[m].float() * (rows.scales[:, m] * steps[:, m, None])
    return scores
