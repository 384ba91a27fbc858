"""store_topk: the best rows of a store for each query, at both ends, in one pass over the rows."""

# N rows, K numbers of a row, M blocks of a row, Q queries

import torch
from torch import Tensor

from fastsft import _native
from fastsft.ops import _cuda, _topk_rules, _topk_scores
from fastsft.ops._op import Implementation, Op, why_no_cpp, why_no_triton
from fastsft.ops._rows import FORMATS, Rows
from fastsft.ops._topk_merge import TopK, empty_topk, merge_topk

__all__ = ["TopK", "merge_topk", "store_topk"]


def store_topk(
    queries: Tensor,
    rows: Rows,
    k: int,
    *,
    first_row: int = 0,
    groups: Tensor | None = None,
    num_groups: int = 0,
    into: TopK | None = None,
) -> TopK:
    """Find the k largest and the k smallest scores of each query, exactly; add the scores up by group.

    queries [Q, K] float32, rows [N, K] as `encode_rows` gives them or memory-mapped; row n has the number
    first_row + n. groups [N] int64 is the group of each row, -1 for none. A result of earlier rows given as `into` is
    gone on from, so that a store can be read in pieces. Of equal scores the lower row number comes first.

    A score is what the row's format says, so that every backend can compute the same:

    bf16         the queries rounded to bfloat16; products summed in float32, in any order.
    int8, 1bit   the queries rounded too, in each block of K / M numbers: q8 = round(q / s), s = max |q| / 127. The
                 int32 dot product of a block with the row's integers (signs for 1bit) is exact, and
                 score = sum over m in order of float32(dot_m) * (scale_m * s_m), in float32. For M=1 these are the
                 same bits on every backend.

    Reads each row once, whatever Q is; N x Q scores never exist. On a CPU nothing depends on the number of threads.
    Rows must be finite. k is 4096 at most.
    """
    queries = queries.detach()
    _topk_rules.check_one_device(queries, rows, groups, into)
    _topk_rules.check_rows(rows)
    _topk_rules.check_queries(queries, rows)
    _topk_rules.check_k(k, first_row)
    _topk_rules.check_groups(groups, num_groups, rows.data.shape[0])
    if into is not None:
        _topk_rules.check_into(into, queries.shape[0], k, first_row, None if groups is None else num_groups)
    fresh = _OP(queries, rows, k, first_row, groups, num_groups, like=queries)
    if queries.is_cuda and groups is not None:
        # Only now, as the answer is waited for: the scan is done, and took a group that is not there for none.
        _topk_rules.check_range(groups, num_groups)
    return fresh if into is None else merge_topk(into, fresh)


def _numbers(queries: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Bring queries into what is multiplied: bfloat16 [Q, K], or int8 [Q, K] and their steps [Q, M]."""
    if rows.scales is None:
        return queries.to(torch.bfloat16).contiguous(), None
    return _topk_scores.quantise(queries, rows.scales.shape[1])


def _cpp(queries: Tensor, rows: Rows, k: int, first_row: int, groups: Tensor | None, num_groups: int) -> TopK:
    best = empty_topk(queries.shape[0], k, None if groups is None else num_groups, queries.device)
    numbers, steps = _numbers(queries, rows)
    # Named, so that a copy made here lives until the call returns.
    groups = None if groups is None else groups.contiguous()
    _native.module().store_topk(
        *(FORMATS.index(rows.format), rows.data.shape[0], rows.size),
        *(1 if steps is None else steps.shape[1], rows.data.data_ptr(), _pointer(rows.scales)),
        *(queries.shape[0], numbers.data_ptr(), _pointer(steps)),
        *(_pointer(groups), num_groups, first_row, k),
        *(_pointer(tensor) for tensor in best),
        torch.get_num_threads(),
    )
    return best


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _reference(queries: Tensor, rows: Rows, k: int, first_row: int, groups: Tensor | None, num_groups: int) -> TopK:
    _topk_rules.check_finite(queries)
    return _topk_scores.scan(queries, rows, k, first_row, groups, num_groups)


def _triton(queries: Tensor, rows: Rows, k: int, first_row: int, groups: Tensor | None, num_groups: int) -> TopK:
    from fastsft.triton_kernels import store_topk as kernels

    numbers, steps = _numbers(queries, rows)
    bad = (queries - queries).any()  # of anything but a finite number that is NaN, which counts as true
    found, is_bad = kernels.scan(
        *(rows.format, rows.data, rows.scales, numbers, steps, k, groups, num_groups),
        first_row=first_row,
        watch=bad,
        scan_bits=_cuda.store_topk_bits if _fits_bits_kernel(numbers, rows, groups) else None,
    )
    if is_bad:
        _topk_rules.check_finite(queries)
    return TopK(*found)


def _fits_bits_kernel(numbers: Tensor, rows: Rows, groups: Tensor | None) -> bool:
    """Say whether the CUDA kernel for bits takes a stretch from the Triton one."""
    return (
        rows.format == "1bit"
        and rows.scales is not None
        and rows.scales.shape[1] == 1
        and groups is None
        and numbers.shape[0] in _cuda.BITS_QUERIES
        and rows.data.shape[1] <= _cuda.BITS_BYTES
        and rows.data.shape[1] % 16 == rows.data.data_ptr() % 16 == 0
        and _cuda.why_no_library() is None
    )


_OP = Op(
    "store_topk",
    _reference,
    [
        Implementation(backend="cpp", device="cpu", run=_cpp, why_absent=why_no_cpp),
        Implementation(
            backend="triton",
            device="cuda",
            run=_triton,
            why_absent=why_no_triton,
            note="1, 2 or 4 queries on 1bit rows of one block without groups by a CUDA kernel, where it was built",
        ),
    ],
)
