"""Intervals by the bootstrap: queries and subsets drawn anew together, every method on the same draws.

An interval holds the middle 95 % of the draws. A draw takes M subsets and Q queries with replacement, each on its own
(crossed: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 2007, whose intervals are rather too wide than
too narrow). Ranks are formed anew within every draw, and one draw serves all methods, so differences are paired.
"""

# B draws, M subsets, Q queries

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 2000
# numbers of one block of draws: 64 MiB in float64
_BLOCK = 2**23


class Value(NamedTuple):
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Draws(NamedTuple):
    """How often each draw holds each subset [B, M] and each query [B, Q]."""

    subsets: Tensor
    queries: Tensor


def crossed_draws(num_subsets: int, num_queries: int, *, number: int = DRAWS, seed: int = 0) -> Draws:
    """Draw subsets and queries with replacement, independently of each other."""
    generator = torch.Generator().manual_seed(seed)
    return Draws(_counts(num_subsets, number, generator), _counts(num_queries, number, generator))


def _counts(size: int, number: int, generator: torch.Generator) -> Tensor:
    places = torch.randint(size, (number, size), generator=generator)
    return torch.zeros(number, size, dtype=torch.float64).scatter_add_(1, places, torch.ones(places.shape).double())


def between(values: Tensor) -> tuple[float, float]:
    """Give the ends of the middle 95 % of the draws [B]."""
    low, high = torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mean_over(values: Tensor, *, number: int = DRAWS, seed: int = 0) -> Value:
    """Average `values` [Q], or [S, Q] with seeds and queries drawn crossed; with the interval."""
    values = values.double()
    table = values[None] if values.dim() == 1 else values
    draws = crossed_draws(table.shape[0], table.shape[1], number=number, seed=seed)
    weights = draws.subsets[:, :, None] * draws.queries[:, None, :] if values.dim() == 2 else draws.queries[:, None, :]
    # every draw holds S seeds and Q queries in all, so its weights sum to the number of cells
    means = (weights * table).sum((1, 2)) / table.numel()
    return Value(float(table.mean()), *between(means))


def weighted_mean(values: Tensor, queries: Tensor) -> Tensor:
    """Average values [B, Q] of draws over the queries that each draw holds -> [B]."""
    return (values * queries).sum(1) / queries.sum(1)


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Correlate the ranks of [M, Q] down each column -> [Q], ties at their mean rank; 0 where a column is constant."""
    return spearman_draws(one, other, torch.ones(1, len(one), dtype=torch.float64))[0]


def spearman_draws(one: Tensor, other: Tensor, subsets: Tensor) -> Tensor:
    """Correlate the ranks of [M, Q] within every draw of rows, `subsets` [B, M] as counts -> [B, Q].

    The mean rank of row i in a draw is the number of drawn rows below it and half of those equal to it, so all draws
    are one product with [Q, M, M] comparisons and nothing is sorted. A column that is constant in a draw ranks
    nothing: its correlation is 0. Costs B * Q * M * M.
    """
    if one.shape != other.shape or len(one) != subsets.shape[1]:
        raise ValueError(
            f"both tables must be [M, Q], with the M of the draws: got {list(one.shape)}, {list(other.shape)} and "
            f"draws of {subsets.shape[1]}."
        )
    below = [_below(table.double()) for table in (one, other)]
    M, Q = one.shape
    step = max(1, _BLOCK // max(1, M * Q))
    return torch.cat([_correlate(below, counts) for counts in subsets.double().split(step)])


def _below(table: Tensor) -> Tensor:
    """[M, Q] -> [Q, M, M]: 1 where row j is below row i, 1/2 where they are equal."""
    if not bool(torch.isfinite(table).all()):
        raise ValueError("scores and losses to be ranked must be finite: there is a nan or an infinity among them.")
    columns = table.T
    less = columns[:, :, None] > columns[:, None, :]
    equal = columns[:, :, None] == columns[:, None, :]
    return less.double() + equal.double() / 2


def _correlate(below: list[Tensor], counts: Tensor) -> Tensor:
    """Correlate the two tables' ranks in a block of draws, `counts` [b, M] -> [b, Q]."""
    weights = counts[:, None, :] / counts.sum(1)[:, None, None]  # [b, 1, M]
    ranks = [torch.einsum("bj,qij->bqi", counts, each) for each in below]
    parts = [rank - (weights * rank).sum(2, keepdim=True) for rank in ranks]
    covariance = (weights * parts[0] * parts[1]).sum(2)
    # clamped: in a constant column the variance is 0 but for rounding
    variances = [(weights * part.square()).sum(2) for part in parts]
    flat = (variances[0] < 1e-9) | (variances[1] < 1e-9)
    found = covariance / (variances[0] * variances[1]).sqrt().masked_fill(flat, 1.0)
    return found.masked_fill(flat, 0.0)
