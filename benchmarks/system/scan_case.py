"""The scan case, shared by ourselves and rivals: random rows, queries, and what torch does with them. No fastsft."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 8192
TOP = 10


def make_rows(num_rows: int, size: int, num_queries: int) -> tuple[Tensor, Tensor]:
    """Draw rows [N, K] and queries [Q, K], float32 normal numbers."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(num_rows, size, generator=generator),
        torch.randn(num_queries, size, generator=generator),
    )


def torch_topk(queries: Tensor, rows: Tensor, k: int = TOP) -> tuple[Tensor, Tensor]:
    """Find the k largest dot products of each query, a chunk of rows at a time, in the rows' own dtype.

    queries [Q, K], rows [N, K] -> scores [Q, k], row numbers [Q, k]. One sign only.
    """
    queries = queries.to(rows.dtype)
    best, places = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(rows), CHUNK):
        scores = (queries @ rows[start : start + CHUNK].T).float()
        chunk_best, chunk_places = scores.topk(min(k, scores.shape[1]))
        merged = torch.cat([best, chunk_best], 1).topk(min(k, best.shape[1] + chunk_best.shape[1]))
        places = torch.cat([places, chunk_places + start], 1).gather(1, merged.indices)
        best = merged.values
    return best, places
