"""Race sample_grad_project: the kernels, the reference, gradients by bmm and torch's index_add_ with a ready table.

Modes: the kinds, and `and_weight_grad`: kind sjlt that also gives the weight's gradient; beside it torch.mm alone
(`weight_grad_only`), as a backward pass without sketches computes that. `at_mm_rate_ms` is the time that forming the
gradients takes at the rate of a square torch.mm. A yardstick, no bound.
"""

from collections.abc import Callable

import torch

from benchmarks.cases import SAMPLE_GRAD_PROJECT, ProjectCase
from benchmarks.harness import gemm_rate, interleave
from benchmarks.ops.bench_influence_dot import with_backend
from fastsft import ops

Variants = dict[str, dict[str, Callable[[], object]]]


def variants(case: ProjectCase, device: str) -> Variants:
    """{mode: {provider: what to time}} on random data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.tokens, case.inputs, generator=generator).to(device)
    dy = torch.randn(case.tokens, case.outputs, generator=generator).to(device)
    offsets = torch.tensor([0, *case.lengths], device=device).cumsum(0)
    out = torch.zeros(len(case.lengths), case.sketch_size, device=device)
    weight_grad = torch.zeros(case.outputs, case.inputs, device=device)
    index, sign = ops.sjlt_table(tuple(weight_grad.shape), case.sketch_size, 1, device)

    def project(kind: str, **more: torch.Tensor) -> Callable[[], object]:
        return lambda: ops.sample_grad_project(x, dy, offsets, kind=kind, seed=1, out=out, **more)

    def materialise() -> torch.Tensor:
        grads = ops.document_grads(x, dy, offsets)
        out.index_add_(1, index, grads.flatten(1) * sign)
        return grads

    fast = "cuda" if device == "cuda" else "cpp"
    whole = project("sjlt", weight_grad=weight_grad)
    modes: Variants = {
        kind: {name: with_backend(name, project(kind)) for name in ("reference", fast)}
        for kind in ("sjlt", "factored", "kronecker")
    }
    modes["sjlt"]["bmm, index_add_"] = materialise
    modes["and_weight_grad"] = {
        "reference": with_backend("reference", whole),
        fast: with_backend(fast, whole),
        "bmm, index_add_": lambda: weight_grad.add_(materialise().sum(0)),
        "weight_grad_only": lambda: weight_grad.addmm_(dy.T, x),
    }
    return modes


def race(device: str = "cpu") -> list[dict[str, object]]:
    """Time every case -> rows."""
    rate = gemm_rate(device)
    rows = []
    for case in SAMPLE_GRAD_PROJECT:
        at_mm_rate = 2 * case.tokens * case.inputs * case.outputs / rate * 1e3
        for mode, providers in variants(case, device).items():
            timed = interleave(providers, device=device)
            reference = next(row["median_ms"] for row in timed if row["provider"] == "reference")
            where = {"op": "sample_grad_project", "case": case.name, "shape": case.shape, "dtype": "float32"}
            for row in timed:
                ratio = round(row["median_ms"] / reference, 3)
                against = {"at_mm_rate_ms": round(at_mm_rate, 4), "ratio_to_reference": ratio}
                rows.append(where | {"mode": mode} | row | against)
    return rows
