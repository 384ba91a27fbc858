"""The ratios this project aims at, one small function a row: `python -m benchmarks.aims`.

benchmarks.aims.<module> holds the rows; `AIMS` lists them by name once those modules are imported (`load`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.harness import ratio, rounds

MODULES = ("steps", "operators", "index", "quality", "start")


@dataclass(frozen=True)
class Measured:
    """A ratio (or what the aim is about) with its spread over `repeats`; `facts` are printed beside it."""

    ratio: float
    p20: float
    p80: float
    repeats: int
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Aim:
    """One row: `what` is measured `against` what, and how large the ratio may be; None where it is only printed."""

    name: str
    what: str
    against: str
    at_most: float | None
    measure: Callable[[], Measured]
    unit: str = ""

    def row(self) -> dict[str, object]:
        """Measure -> the row, without its signature."""
        found = self.measure()
        return {
            "op": "aims",
            "case": self.name,
            "what": self.what,
            "against": self.against,
            "ratio": found.ratio,
            "p20": found.p20,
            "p80": found.p80,
            "repeats": found.repeats,
            "aim": self.at_most,
            "unit": self.unit,
            "met": None if self.at_most is None else found.ratio <= self.at_most,
            **found.facts,
        }


AIMS: dict[str, Aim] = {}


def aim(
    name: str, *, what: str, against: str, at_most: float | None, unit: str = ""
) -> Callable[[Callable[[], Measured]], Callable[[], Measured]]:
    """Register the function below as the row `name`; the aim is met where its ratio is `at_most` that."""

    def register(measure: Callable[[], Measured]) -> Callable[[], Measured]:
        assert name not in AIMS, f"two rows are called {name}"
        AIMS[name] = Aim(name, what, against, at_most, measure, unit)
        return measure

    return register


def load() -> dict[str, Aim]:
    """Import every module of rows -> the rows by name."""
    for module in MODULES:
        importlib.import_module(f"benchmarks.aims.{module}")
    return AIMS


def race(
    ours: Callable[[], object],
    against: Callable[[], object],
    *,
    repeats: int,
    warmup: int = 1,
    facts: Mapping[str, object] | None = None,
) -> Measured:
    """Time ours and the other in turn, one thread -> their ratio, round by round."""
    times = rounds({"ours": ours, "against": against}, repeats=repeats, warmup=warmup)
    return Measured(*ratio(times["ours"], times["against"]), facts or {})


def spread(values: Sequence[float], facts: Mapping[str, object] | None = None) -> Measured:
    """Sum repeated measurements up: median, 20th and 80th percentile."""
    return Measured(*ratio(values, [1.0] * len(values)), facts or {})
