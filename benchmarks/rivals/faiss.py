"""faiss-cpu 1.15.1: exact inner-product search, float32 and quantised, against torch over bf16 rows in chunks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.rivals._base import Contestant
from benchmarks.system.scan_case import TOP

FORMATS = {"Flat": "float32", "SQfp16": "float16", "SQ8": "8 bits"}


def contestants(rows: Tensor, queries: Tensor) -> dict[str, Contestant]:
    """One contestant an index type; each finds the TOP largest only."""
    import faiss

    faiss.omp_set_num_threads(1)

    def searcher(factory: str) -> Any:
        index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(rows[:20_000].numpy())
        index.add(rows.numpy())
        wanted = queries.numpy()
        return lambda: index.search(wanted, TOP)

    return {
        f"faiss {factory}": Contestant(f"faiss {factory}, {numbers} a number", searcher(factory))
        for factory, numbers in FORMATS.items()
    }
