"""Search a store: exact top-k of both signs for every query, and sums by source, one shard in memory at a time."""

# Q queries, N rows, K numbers of a row, S sources

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastsft.ops import Rows, TopK, store_topk
from fastsft.store._files import StoreError
from fastsft.store.reader import Store


class Hit(NamedTuple):
    """One row that was found; step and tokens are None where the store does not know them."""

    row: int
    id: str
    source: str
    step: int | None
    tokens: int | None
    score: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """What `search` found: scores and row numbers of `fastsft.ops.TopK`, and what the store knows of the rows."""

    store: Store
    top: TopK
    # rows of each source, int64 [S]
    counts: Tensor | None

    @property
    def sums(self) -> Tensor | None:
        """Return the sum of the scores of each source's rows, float64 [Q, S], in the order of `store.sources`."""
        return self.top.sums

    @property
    def means(self) -> Tensor | None:
        """Return the mean score of each source's rows, float64 [Q, S]; NaN for a source without rows."""
        return None if self.sums is None or self.counts is None else self.sums / self.counts.to(self.sums.device)

    def largest(self, query: int) -> list[Hit]:
        """Return the rows with the largest scores, largest first; as many as the store has, at most k."""
        return self._hits(self.top.largest_rows[query], self.top.largest[query])

    def smallest(self, query: int) -> list[Hit]:
        """Return the rows with the smallest scores, smallest first."""
        return self._hits(self.top.smallest_rows[query], self.top.smallest[query])

    def _hits(self, rows: Tensor, scores: Tensor) -> list[Hit]:
        there = rows >= 0
        numbers = rows[there].tolist()
        known = self.store.meta.take(numbers).to_pylist()
        return [Hit(row=row, score=score, **item) for row, item, score in zip(numbers, known, scores[there].tolist())]


def search(store: Store, queries: Tensor, k: int, *, by_source: bool = True) -> Found:
    """Score every row against every query; keep the k largest and the k smallest, and each source's sum.

    queries [Q, K] float32, sketched with the store's spec. Scores are those of `fastsft.ops.store_topk`, on the
    device of `queries`. Reads the store once; never holds Q x N scores.
    """
    if queries.ndim != 2 or queries.shape[1] != store.size:
        raise StoreError(
            f"`queries` [Q, K] must have the K of {store.path}: got {tuple(queries.shape)}, expected K={store.size}. "
            f"Were they sketched with its spec, {store.spec}?"
        )
    S = len(store.sources)
    counts = torch.zeros(S, dtype=torch.int64)
    top = None
    for first, rows, groups in store.shards():
        here = _on(queries.device, rows)
        counts += torch.bincount(groups, minlength=S)
        numbers = groups.to(queries.device) if by_source else None
        top = store_topk(queries, here, k, first_row=first, groups=numbers, num_groups=S if by_source else 0, into=top)
    if top is None:
        raise StoreError(f"{store.path} has no rows to search: its writer appended none, or was killed before a shard.")
    return Found(store=store, top=top, counts=counts if by_source else None)


def _on(device: torch.device, rows: Rows) -> Rows:
    return Rows(rows.format, rows.data.to(device), None if rows.scales is None else rows.scales.to(device))
