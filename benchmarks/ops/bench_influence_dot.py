"""Race influence_dot: torch's bmm and separate consumers (reference), one fused pass, a token contraction.

Modes: `scores` of dense targets; `everything`: preconditioned scores, group sums and a sketch.
`at_mm_rate_ms` is the time that forming the gradients takes at the rate of a square torch.mm. A yardstick, no bound.
"""

from collections.abc import Callable

import torch

from benchmarks.cases import INFLUENCE_DOT, InfluenceCase
from benchmarks.harness import gemm_rate, interleave
from fastsft import ops


def with_backend(name: str, run: Callable[[], object]) -> Callable[[], object]:
    def wrapper() -> object:
        with ops.backend(name):
            return run()

    return wrapper


def variants(case: InfluenceCase, device: str) -> dict[str, dict[str, Callable[[], object]]]:
    """{mode: {provider: what to time}} on random data."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, dy = draw(case.tokens, case.inputs), draw(case.tokens, case.outputs)
    offsets = torch.tensor([0, *case.lengths], device=device).cumsum(0)
    targets = draw(case.targets, case.outputs, case.inputs)
    precondition = draw(case.outputs, case.inputs).abs()
    groups = torch.arange(len(case.lengths), device=device) % case.groups
    sums = torch.zeros(case.groups, case.outputs, case.inputs, device=device)
    sketch = torch.zeros(len(case.lengths), case.sketch_size, device=device)

    def scores() -> object:
        return ops.influence_dot(x, dy, offsets, targets)

    def everything() -> object:
        return ops.influence_dot(
            x, dy, offsets, targets, precondition=precondition, groups=groups, sums=sums, sketch=sketch, seed=1
        )

    def contraction() -> object:
        tokens = ops.influence_dot(x, dy, offsets, targets, per="token").scores
        return torch.segment_reduce(tokens, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)

    fast = "triton" if device == "cuda" else "cpp"
    return {
        "scores": {
            "reference": with_backend("reference", scores),
            fast: with_backend(fast, scores),
            "contraction": contraction,
        },
        "everything": {"reference": with_backend("reference", everything), fast: with_backend(fast, everything)},
    }


def race(device: str = "cpu") -> list[dict[str, object]]:
    """Time every case -> rows."""
    rate = gemm_rate(device)
    rows = []
    for case in INFLUENCE_DOT:
        at_mm_rate = 2 * case.tokens * case.inputs * case.outputs / rate * 1e3
        for mode, providers in variants(case, device).items():
            timed = interleave(providers, device=device)
            reference = next(row["median_ms"] for row in timed if row["provider"] == "reference")
            for row in timed:
                where = {
                    "op": "influence_dot",
                    "case": case.name,
                    "shape": case.shape,
                    "dtype": "float32",
                    "mode": mode,
                }
                ratio = round(row["median_ms"] / reference, 3)
                against = {"at_mm_rate_ms": round(at_mm_rate, 4), "ratio_to_reference": ratio}
                rows.append(where | row | against)
    return rows
