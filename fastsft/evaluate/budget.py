"""How many retrainings a budget of time allows, by the time of the first ones."""

# M subsets, S seeds

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from fastsft.evaluate.truth import EvaluationError

MIN_SUBSETS, MIN_SEEDS = 12, 2
# more subsets first, then more seeds: (seeds, from so many subsets, at most)
_SIZES = ((4, 48, 100), (3, 32, 64), (MIN_SEEDS, MIN_SUBSETS, 48))
_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(budget: str | float) -> float:
    """Read a time: "90s", "30m", "2h", or a number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])?", str(budget).strip())
    if not match or float(match[1]) <= 0:
        raise EvaluationError(f"`budget` must be a time such as 90s, 30m or 2h: got {budget!r}.")
    return float(match[1]) * _UNITS[match[2] or "s"]


@dataclass(frozen=True)
class Clock:
    """What retraining costs, and when it must end. full: seconds of one on all samples, beside others."""

    end: float
    budget: float
    full: float
    overhead: float
    processes: int
    share: float
    removals: int

    @property
    def removal_seconds(self) -> float:
        return self.removals * self.full / self.processes + (self.overhead if self.removals else 0.0)

    def sizes(self) -> tuple[int, int]:
        """How many subsets and seeds the time left allows; a sentence where that is too few."""
        left = self.end - time.time() - self.removal_seconds - self.overhead
        runs = max(0.0, left) * self.processes / self.full  # retrainings on all samples that fit
        for seeds, fewest, most in _SIZES:
            subsets = int((runs - (seeds - MIN_SEEDS)) / (seeds * self.share))
            if subsets >= fewest:
                return min(subsets, most), seeds
        needed = MIN_SUBSETS * MIN_SEEDS * self.share * self.full / self.processes
        minutes = (self.budget - left + needed) / 60 * 1.1
        raise EvaluationError(
            f"`budget` must allow for {MIN_SUBSETS} subsets with {MIN_SEEDS} seeds at least, {needed / 60:.1f} min of "
            f"retraining with {self.processes} processes ({self.full:.1f} s on all samples): {max(0.0, left) / 60:.1f} "
            f"of its {self.budget / 60:.1f} min are left for that. Give {minutes:.0f}m or more; what is done is kept."
        )
