"""Race sketch_matrix: the kernel, torch's index_add_ with a table made before (12 bytes an entry), the reference.

Modes: `sketch`; `and_total`: with a preconditioner, and the sum of the matrices. `read` is what torch takes to add the
matrices up once: nothing that reads them all is much faster.
"""

from collections.abc import Callable

import torch

from benchmarks.cases import SKETCH_MATRIX, SketchCase
from benchmarks.harness import interleave
from benchmarks.ops.bench_influence_dot import with_backend
from fastsft import ops

Variants = dict[str, dict[str, Callable[[], object]]]


def variants(case: SketchCase, device: str) -> Variants:
    """{mode: {provider: what to time}} on random data."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.matrices, case.rows, case.cols)
    matrices = torch.randn(*shape, generator=generator).to(getattr(torch, case.dtype)).to(device)
    precondition = torch.rand(shape[1:], generator=generator).to(device)
    total = torch.zeros(shape[1:], device=device)
    index, sign = ops.sjlt_table(shape[1:], case.sketch_size, 1, device)
    signed = sign * precondition.flatten()

    def sketch() -> object:
        return ops.sketch_matrix(matrices, case.sketch_size, 1)

    def sketch_and_total() -> object:
        return ops.sketch_matrix(matrices, case.sketch_size, 1, precondition=precondition, total=total)

    def index_add(factor: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(case.matrices, case.sketch_size, device=device)
        return out.index_add_(1, index, matrices.flatten(1) * factor)

    def index_add_and_total() -> object:
        total.add_(matrices.sum(0))
        return index_add(signed)

    fast = "cuda" if device == "cuda" else "cpp"
    return {
        "sketch": {
            "reference": with_backend("reference", sketch),
            fast: with_backend(fast, sketch),
            "index_add_": lambda: index_add(sign),
            "read": matrices.sum,
        },
        "and_total": {
            "reference": with_backend("reference", sketch_and_total),
            fast: with_backend(fast, sketch_and_total),
            "index_add_": index_add_and_total,
        },
    }


def race(device: str = "cpu") -> list[dict[str, object]]:
    """Time every case -> rows."""
    rows = []
    for case in SKETCH_MATRIX:
        for mode, providers in variants(case, device).items():
            timed = interleave(providers, device=device)
            median = {row["provider"]: row["median_ms"] for row in timed}
            where = {"op": "sketch_matrix", "case": case.name, "shape": case.shape, "dtype": case.dtype, "mode": mode}
            for row in timed:
                against = {
                    "ratio_to_reference": round(row["median_ms"] / median["reference"], 3),
                    "ratio_to_index_add": round(row["median_ms"] / median["index_add_"], 3),
                }
                rows.append(where | row | against)
    return rows
