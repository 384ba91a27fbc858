"""What store_topk asks of its arguments, each with a sentence."""

# N rows, K numbers of a row, M blocks of a row, Q queries

import torch
from torch import Tensor

from fastsft.ops._rows import Rows, check_format
from fastsft.ops._topk_merge import TopK

MAX_K = 4096
# Numbers of a block of int8 or 1bit: 2^16 * 255 * 127 is an int32 (a kernel reads rows as unsigned bytes).
MAX_BLOCK = 1 << 16

_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8, "1bit": torch.uint8}


def check_rows(rows: Rows) -> None:
    data, scales = rows.data, rows.scales
    dtype = _DTYPES.get(rows.format)
    if dtype is not None and (data.dtype != dtype or data.ndim != 2 or not data.is_contiguous()):
        raise ValueError(
            f"`rows.data` of format {rows.format} must be a contiguous {dtype} matrix: got {data.dtype} "
            f"{list(data.shape)}, strides {list(data.stride())}. `encode_rows` makes such rows."
        )
    if rows.format == "bf16" and scales is not None:
        raise ValueError(f"`rows.scales` must be None for bf16: got {scales.dtype} {list(scales.shape)}.")
    if rows.format in ("int8", "1bit"):
        _check_scales(rows.format, scales, data.shape[0])
    blocks = 1 if scales is None else scales.shape[1]
    check_format(rows.format, rows.size, blocks)
    if scales is not None and rows.size // blocks > MAX_BLOCK:
        raise ValueError(
            f"a block of {rows.format} must have {MAX_BLOCK} numbers at most, as its dot product is an int32: "
            f"got K={rows.size} in {blocks} blocks. Encode the rows with more blocks."
        )


def _check_scales(format: str, scales: Tensor | None, N: int) -> None:
    if (
        scales is None
        or scales.dtype != torch.float32
        or scales.ndim != 2
        or scales.shape[0] != N
        or not scales.is_contiguous()
    ):
        got = "None" if scales is None else f"{scales.dtype} {list(scales.shape)}, strides {list(scales.stride())}"
        raise ValueError(f"`rows.scales` of format {format} must be contiguous float32 [N={N}, M]: got {got}.")


def check_queries(queries: Tensor, rows: Rows) -> None:
    if queries.dtype != torch.float32:
        raise TypeError(f"`queries` must be float32: got {queries.dtype}. Write `queries.float()`.")
    if queries.ndim != 2 or queries.shape[1] != rows.size:
        raise ValueError(
            f"`queries` must be [Q, K] with the K={rows.size} of `rows`: got {list(queries.shape)}. "
            f"Were both written with the same SketchSpec?"
        )
    if not queries.is_cuda:  # there, after the scan: each answer is a wait for the device
        check_finite(queries)


def check_finite(queries: Tensor) -> None:
    if bool(torch.isfinite(queries.sum())):  # a sum of finite numbers may overflow too: then look closely
        return
    ends = torch.stack([queries.amin(1), queries.amax(1)])  # either is NaN where a number is
    bad = (~torch.isfinite(ends)).any(0).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"`queries` must be finite: query {bad[0]} has NaN or infinity. Did its loss overflow?")


def check_k(k: int, first_row: int) -> None:
    if not 1 <= k <= MAX_K:
        raise ValueError(f"`k` must lie in 1 <= k <= {MAX_K}: got {k}. For more, sort the scores of all rows.")
    if first_row < 0:
        raise ValueError(f"`first_row` must be 0 at least, the number of the first of `rows`: got {first_row}.")


def check_groups(groups: Tensor | None, num_groups: int, N: int) -> None:
    if groups is None:
        if num_groups:
            raise ValueError(f"`num_groups` needs `groups` [N={N}], the group of each row: got {num_groups} and None.")
        return
    if groups.dtype != torch.int64 or groups.shape != (N,):
        raise ValueError(f"`groups` must be int64 [N={N}], one per row: got {groups.dtype} {list(groups.shape)}.")
    if num_groups < 1:
        raise ValueError(f"`groups` needs `num_groups`, 1 at least: got {num_groups}.")
    if not groups.is_cuda:
        check_range(groups, num_groups)


def check_range(groups: Tensor, num_groups: int) -> None:
    if groups.numel() and (groups.amin() < -1 or groups.amax() >= num_groups):
        raise ValueError(
            f"`groups` must lie in -1 <= g < num_groups={num_groups}, -1 for a row of none: "
            f"got {int(groups.amin())} to {int(groups.amax())}."
        )


def check_into(into: TopK, Q: int, k: int, first_row: int, num_groups: int | None) -> None:
    shapes = [list(t.shape) for t in into[:4]]
    if shapes != [[Q, k]] * 4:
        raise ValueError(f"`into` must be a result of the same queries and k, [Q={Q}, k={k}]: got {shapes[0]}.")
    sums = None if into.sums is None else list(into.sums.shape)
    if sums != (None if num_groups is None else [Q, num_groups]):
        raise ValueError(
            f"`into` must be a result with the same groups: its `sums` are {sums}, and num_groups is {num_groups}. "
            f"Give `groups` in every call or in none."
        )
    last = max((int(rows.amax()) for rows in (into.largest_rows, into.smallest_rows) if rows.numel()), default=-1)
    if last >= first_row:
        raise ValueError(
            f"`into` must be a result of earlier rows: it holds row {last}, and `first_row` is {first_row}. "
            f"Is `first_row` the number of rows before? `merge_topk` merges results in any order."
        )


def check_one_device(queries: Tensor, rows: Rows, groups: Tensor | None, into: TopK | None) -> None:
    others = {"rows.data": rows.data, "rows.scales": rows.scales, "groups": groups}
    if into is not None:
        others |= {f"into.{name}": tensor for name, tensor in into._asdict().items()}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != queries.device:
            raise ValueError(
                f"`{name}` must be on the device of `queries`, {queries.device}: it is on {tensor.device}."
            )
