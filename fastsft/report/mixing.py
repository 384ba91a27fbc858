"""Follow the mix of a steered run: which weights were in force when, what moved them, and what was really drawn.

Weights are shares of what is drawn and sum to one. A decision is taken after one step and holds from a later one: what
had already been handed to the loader is still drawn by the mix before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from fastsft.report.run import Run

# a change that three decimals would not show is none
MOVED = 5e-4
# what a step may say it drew, and how a reader calls it
UNITS = {"supervised": "supervised tokens", "tokens": "tokens", "documents": "documents"}

Weights = dict[str, float]


@dataclass(frozen=True)
class Move:
    """One decision: taken after `step`, in force from `from_step` on (draw `draw`, where the record says it).

    signal, error {source: the policy's own unit, or None}. moved: half the sum over sources of |after - before|, the
    share of the draws that go elsewhere than they would have.
    """

    version: int
    step: int
    from_step: int
    draw: int | None
    before: Weights
    after: Weights
    signal: dict[str, float | None]
    error: dict[str, float | None]
    why: str

    @property
    def moved(self) -> float:
        return distance(self.before, self.after)

    @property
    def changed(self) -> list[str]:
        """The sources whose weight moved, the one that moved most first."""
        sizes = {source: abs(self.after[source] - self.before.get(source, 0.0)) for source in self.after}
        return sorted((source for source in sizes if sizes[source] >= MOVED), key=lambda source: -sizes[source])


def distance(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Total variation: half the sum of |after - before|, from 0 to 1."""
    return 0.5 * sum(abs(after.get(source, 0.0) - before.get(source, 0.0)) for source in {**before, **after})


def moves(run: Run) -> list[Move]:
    """List the decisions in order; the mix a run begins with is none."""
    return [
        Move(
            version=event["version"],
            step=event["step"],
            from_step=event["from_step"],
            draw=event.get("draw"),
            before=event.get("before") or previous["weights"],
            after=event["weights"],
            signal=event.get("signal") or {},
            error=event.get("error") or {},
            why=event.get("why") or "",
        )
        for previous, event in pairwise(run.mixes)
    ]


def in_force(run: Run) -> list[tuple[int, Weights]]:
    """Pair each step from which another mix held with that mix; one that no step was drawn by is left out."""
    last = max(run.last_step, 1)
    held = {event["from_step"]: event["weights"] for event in run.mixes if event["from_step"] <= last}
    return sorted(held.items(), key=lambda pair: pair[0])


def mean_in_force(run: Run) -> Weights:
    """Average the weights over the steps that were taken."""
    held = in_force(run)
    if not held:
        return {}
    starts = [start for start, _ in held]
    weigh = Counter(max(0, bisect_right(starts, event["step"]) - 1) for event in run.steps) or Counter([0])
    return {
        source: sum(count * held[at][1].get(source, 0.0) for at, count in weigh.items()) / weigh.total()
        for source in run.sources
    }


def drawn_shares(run: Run) -> dict[str, Weights]:
    """Share of each source in what the run drew, by unit (a key of UNITS), where the steps say it."""
    shares = {}
    for unit in UNITS:
        total: Counter[str] = Counter()
        for event in run.steps:
            total.update(event.get(unit) or {})
        if total.total():
            shares[unit] = {source: total[source] / total.total() for source in run.sources}
    return shares


def delays(run: Run) -> list[int]:
    """Count, for each decision, the steps that were still drawn by the mix before."""
    return [move.from_step - move.step - 1 for move in moves(run)]


def summarize_mix(run: Run) -> dict[str, Any] | None:
    """Give report.json's `mix`, or None where nothing steered it."""
    if not run.mixes:
        return None
    decided, waited = moves(run), delays(run)
    return {
        "policy": run.mixes[0]["policy"],
        "unit": run.mixes[0].get("unit"),
        "start": run.mixes[0]["weights"],
        "end": (in_force(run) or [(1, run.mixes[0]["weights"])])[-1][1],
        "mean": mean_in_force(run),
        "drawn": drawn_shares(run),
        "decisions": len(decided),
        "moved": sum(bool(move.changed) for move in decided),
        "unused": sum(move.from_step > run.last_step for move in decided),
        "path_length": sum(move.moved for move in decided),
        "delay": {"least": min(waited), "median": median(waited), "most": max(waited)} if waited else None,
    }
