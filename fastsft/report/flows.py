"""Add up what the drawn samples did, per sample and per source. phi in nats; negative helps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from fastsft.report.run import Run


@dataclass(frozen=True)
class SampleFlow:
    """One sample: its source, how often it was drawn, and its phi summed over the draws, per ability."""

    source: str
    draws: int
    phi: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Spread:
    """The draws of one source as one ability sees them: how many, their sum, and their standard deviation."""

    draws: int
    total: float
    deviation: float

    @property
    def half_width(self) -> float:
        """1.96 * sqrt(draws) * deviation: how far the sum would vary had other samples of the source been drawn."""
        return 1.96 * math.sqrt(self.draws) * self.deviation


def sample_flows(run: Run) -> dict[str, SampleFlow]:
    """Sum phi over the draws of each sample."""
    flows: dict[str, SampleFlow] = {}
    grouped = run.drawn.group_by(["sample_id", "source", "ability"]).aggregate([("phi", "sum"), ("phi", "count")])
    for sample, source, ability, total, draws in _rows(
        grouped, "sample_id", "source", "ability", "phi_sum", "phi_count"
    ):
        known = flows.get(sample)
        if known is None or draws > known.draws:
            flows[sample] = known = SampleFlow(source, draws, known.phi if known else {})
        known.phi[ability] = total
    return flows


def spreads(run: Run) -> dict[tuple[str, str], Spread]:
    """Spread of the draws by (ability, source), where at least two were scored."""
    grouped = run.drawn.group_by(["ability", "source"]).aggregate(
        [("phi", "count"), ("phi", "sum"), ("phi", "stddev", pc.VarianceOptions(ddof=1))]
    )
    rows = _rows(grouped, "ability", "source", "phi_count", "phi_sum", "phi_stddev")
    return {(ability, source): Spread(n, total, sd) for ability, source, n, total, sd in rows if n >= 2}


def _rows(table: pa.Table, *names: str) -> Iterator[tuple]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)
