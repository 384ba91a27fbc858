"""The result of store_topk, and how two of them become one."""

# Q queries

from typing import NamedTuple

import torch
from torch import Tensor


class TopK(NamedTuple):
    """The best rows of each query at both ends, best first. Fewer than k rows leave fillers behind them."""

    largest: Tensor  # [Q, k] float32, descending, then -inf
    largest_rows: Tensor  # [Q, k] int64, then -1
    smallest: Tensor  # [Q, k] float32, ascending, then +inf
    smallest_rows: Tensor  # [Q, k] int64, then -1
    sums: Tensor | None  # [Q, num_groups] float64: the scores of each group's rows, added up


def empty_topk(num_queries: int, k: int, num_groups: int | None, device: torch.device) -> TopK:
    """Make the result of no rows; `num_groups` None leaves the sums out."""
    values = torch.full((num_queries, k), float("inf"), device=device)
    rows = torch.full((num_queries, k), -1, dtype=torch.int64, device=device)
    sums = None if num_groups is None else values.new_zeros(num_queries, num_groups, dtype=torch.float64)
    return TopK(-values, rows, values, rows.clone(), sums)


def merge_topk(one: TopK, other: TopK) -> TopK:
    """Merge results over different rows, in any order, exactly: of equal scores the lower row number comes first.

    The k of `one` holds; `other` may hold any number of rows.

    `sums` are added in float64, so they alone depend on how the rows were cut (to 1e-16 of the sum of magnitudes).
    """
    k = one.largest.shape[1]
    largest = _best(one.largest, one.largest_rows, other.largest, other.largest_rows, k, descending=True)
    smallest = _best(one.smallest, one.smallest_rows, other.smallest, other.smallest_rows, k, descending=False)
    sums = None if one.sums is None or other.sums is None else one.sums + other.sums
    return TopK(*largest, *smallest, sums)


def _best(
    values: Tensor, rows: Tensor, more_values: Tensor, more_rows: Tensor, k: int, *, descending: bool
) -> tuple[Tensor, Tensor]:
    values, rows = torch.cat([values, more_values], 1), torch.cat([rows, more_rows], 1)
    rows, by_row = rows.sort(1)
    # Stable, hence in the order of rows where scores are equal.
    values, by_value = values.gather(1, by_row).sort(stable=True, dim=1, descending=descending)
    return values[:, :k].contiguous(), rows.gather(1, by_value)[:, :k].contiguous()
