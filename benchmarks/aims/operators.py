"""Operators alone, and the bytes they leave: the flat sketch, the scans, the store."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.aims import Measured, aim, race, spread
from benchmarks.system.scan_case import TOP, make_rows, torch_topk
from fastsft import ops
from fastsft.store import StoreWriter

SCANS = {
    ("bf16", 1): 0.45,
    ("bf16", 64): 0.75,
    ("int8", 1): 0.2,
    ("int8", 64): 0.55,
    ("1bit", 1): 0.06,
}


@aim(
    "sjlt_flat",
    what="blocked SJLT of flat vectors [4, 1 M] to 4096",
    against="torch index_add_, buckets and signs given",
    at_most=0.33,
)
def sjlt_flat() -> Measured:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 1_000_000, generator=generator)
    buckets = torch.randint(4096, (1_000_000,), generator=generator)
    signs = torch.randint(2, (1_000_000,), generator=generator) * 2.0 - 1

    def index_add() -> Tensor:
        return torch.zeros(4, 4096).index_add_(1, buckets, vectors * signs)

    return race(lambda: ops.sketch_matrix(vectors[:, None], 4096, 1), index_add, repeats=15, warmup=3)


@functools.lru_cache(maxsize=1)
def scan_rows(num_rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows [N, K] and 64 queries; the last shape asked for is kept, and its float32 rows take 400 MB."""
    return make_rows(num_rows, size, 64)


def scan(format: str, num_queries: int, num_rows: int, size: int) -> Measured:
    """Both ends and exact, against torch's largest alone, from bf16 rows."""
    rows, queries = scan_rows(num_rows, size)
    queries = queries[:num_queries].contiguous()
    ours, theirs = ops.encode_rows(rows, format), rows.bfloat16()
    facts = {"shape": f"N{num_rows} K{size} Q{num_queries} top-{TOP}"}
    return race(
        lambda: ops.store_topk(queries, ours, TOP),
        lambda: torch_topk(queries, theirs),
        repeats=9,
        warmup=2,
        facts=facts,
    )


for (format, num_queries), limit in SCANS.items():
    aim(
        f"scan_{format}_q{num_queries}",
        what=f"scan of {format} rows, {num_queries} queries, both signs",
        against="torch bf16 in chunks and topk, one sign",
        at_most=limit,
    )(functools.partial(scan, format, num_queries, 100_000, 1024))

aim(
    "scan_1bit_q1_k4096",
    what="scan of 1bit rows, K=4096, 1 query, both signs",
    against="torch bf16 in chunks and topk, one sign",
    at_most=None,
)(functools.partial(scan, "1bit", 1, 25_000, 4096))


@aim("store_bytes_1bit", what="bytes of a 1bit store, K=4096", against="a bf16 store", at_most=round(1 / 15, 4))
def store_bytes_1bit() -> Measured:
    sketches = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    sizes = {format: store_bytes(sketches, format) for format in ("bf16", "1bit")}
    a_row = {f"{format}_bytes_a_row": round(size / len(sketches), 1) for format, size in sizes.items()}
    return spread([sizes["1bit"] / sizes["bf16"]] * 2, {"counted": "every file, manifest and ids too", **a_row})


def store_bytes(sketches: Tensor, format: str) -> int:
    """Write rows with ids of 20 characters -> bytes of all files."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "store"
        writer = StoreWriter.create(
            folder,
            spec={"kind": "sjlt"},
            size=sketches.shape[1],
            format=format,
            sources=["maths", "code"],
            model={"name": "none", "digest": "none"},
        )
        ids = [f"source/{number * 2654435761 % 2**52:013x}" for number in range(len(sketches))]
        sources = [("maths", "code")[number % 2] for number in range(len(sketches))]
        writer.append(sketches, ids=ids, sources=sources, tokens=[100 + number % 99 for number in range(len(sketches))])
        writer.close()
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
