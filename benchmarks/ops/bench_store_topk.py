"""Race store_topk: one pass for both ends, against torch's product of 8192 rows at a time with topk, merged.

torch finds the largest only, we both ends. Each provider reads rows of its own format, named in `dtype`;
`ratio_to_reference` is against "torch bf16 chunked" throughout. `floor_ms` is the time of reading the provider's rows
once at the rate measured here: the bound for one query, not for many.
"""

from collections.abc import Callable

import torch

from benchmarks.cases import STORE_TOPK, StoreCase
from benchmarks.harness import interleave
from fastsft import ops

CHUNK = 8192
BASELINE = "torch bf16 chunked"


def chunked_topk(queries: torch.Tensor, data: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k largest scores of each query in plain torch -> values and rows [k, Q]."""
    queries, found = queries.to(data.dtype), []
    for begin in range(0, data.shape[0], CHUNK):
        values, rows = (data[begin : begin + CHUNK] @ queries.T).topk(k, 0)
        found.append((values, rows + begin))
    values, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    values, best = values.topk(k, 0)
    return values, rows.gather(0, best)


def read_rate(device: str) -> float:
    """Measure the bytes/s of a sum over 256 MiB of float32."""
    memory = torch.ones(1 << 26, device=device)
    (row,) = interleave({"sum": memory.sum}, repeats=9, device=device)
    return memory.numel() * 4 / (row["median_ms"] / 1e3)


def draw(case: StoreCase, device: str) -> tuple[torch.Tensor, dict[str, ops.Rows]]:
    """Random sketches [N, K], and the same encoded in every format."""
    sketches = torch.randn(case.rows, case.size, generator=torch.Generator().manual_seed(0)).to(device)
    encoded = {}
    for name in ops.FORMATS:
        # in pieces: encoding holds several copies
        parts = [ops.encode_rows(part, name) for part in sketches.split(CHUNK)]
        scales = None if parts[0].scales is None else torch.cat([part.scales for part in parts])
        encoded[name] = ops.Rows(name, torch.cat([part.data for part in parts]), scales)
    return sketches, encoded


def providers(
    case: StoreCase, sketches: torch.Tensor, encoded: dict[str, ops.Rows], queries: torch.Tensor, device: str
) -> dict[str, Callable[[], object]]:
    """What to time on one set of queries; our own providers are named for the backend and the format."""
    fast = "triton" if device == "cuda" else "cpp"

    def ours(rows: ops.Rows) -> Callable[[], object]:
        def run() -> object:
            with ops.backend(fast):
                return ops.store_topk(queries, rows, case.k)

        return run

    plain = {
        BASELINE: lambda: chunked_topk(queries, encoded["bf16"].data, case.k),
        "torch fp32 chunked": lambda: chunked_topk(queries, sketches, case.k),
    }
    return plain | {f"{fast} {name}": ours(rows) for name, rows in encoded.items()}


def bytes_read(provider: str, sketches: torch.Tensor, encoded: dict[str, ops.Rows]) -> int:
    if provider == "torch fp32 chunked":
        tensors = [sketches]
    else:
        rows = encoded["bf16" if provider == BASELINE else provider.split()[1]]
        tensors = [rows.data] if rows.scales is None else [rows.data, rows.scales]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def race(device: str = "cpu") -> list[dict[str, object]]:
    """Time every case -> rows."""
    rate = read_rate(device)
    rows = []
    for case in STORE_TOPK:
        sketches, encoded = draw(case, device)
        for number in case.queries:
            queries = torch.randn(number, case.size, generator=torch.Generator().manual_seed(1)).to(device)
            timed = interleave(providers(case, sketches, encoded, queries, device), repeats=9, device=device)
            baseline = next(row["median_ms"] for row in timed if row["provider"] == BASELINE)
            for row in timed:
                floor = bytes_read(row["provider"], sketches, encoded) / rate * 1e3
                where = {
                    "op": "store_topk",
                    "case": case.name,
                    "shape": f"N{case.rows} K{case.size} Q{number} top{case.k}",
                    "dtype": row["provider"].split()[1],
                    "mode": f"Q{number}",
                }
                against = {
                    "floor_ms": round(floor, 4),
                    "share_of_floor": round(floor / row["median_ms"], 3),
                    "ratio_to_reference": round(row["median_ms"] / baseline, 3),
                }
                rows.append(where | row | against)
    return rows
