"""Say how far the abilities pull against each other: their gradients' cosines, and what a resolver made of them.

Letters: R refreshes, A abilities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsft.report.effects import Effects, interference, slopes
from fastsft.report.run import Run

Array = NDArray[np.float64]

# of the mean squared norm, added to each norm: a gradient that is all noise then has a cosine near zero, not any
SHRINK = 0.1
# how many standard errors from zero something must be to be said
SURE = 2.0

Cell = Mapping[str, Any]
# row -> column -> {"value", "error" (None where unknown)}, or None where nothing is known
Cells = Mapping[str, Mapping[str, Cell | None]]


@dataclass(frozen=True)
class Course:
    """The cosines at each refresh: steps [R], values [R, A, A] with nan where a number was not finite."""

    steps: list[int]
    values: Array

    def mean(self) -> tuple[Array, Array]:
        """Average over refreshes, [A, A], and its standard error from their spread (nan below three of them).

        Neighbours in time are alike, so the error is widened by sqrt((1 + r) / (1 - r)), where r is the correlation
        of each refresh with the next. The target rows are the same at all of them: how far the cosines would vary
        with other rows is not in it.
        """
        known = np.isfinite(self.values)
        count = known.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(known, self.values, 0.0).sum(axis=0) / count
            left = np.where(known, self.values - mean, 0.0)
            squares = (left**2).sum(axis=0)
            alike = np.clip(np.nan_to_num((left[1:] * left[:-1]).sum(axis=0) / squares), 0.0, 0.9)
            error = np.sqrt(squares / (count - 1) / count * (1 + alike) / (1 - alike))
        return mean, np.where(count >= 3, error, np.nan)


def cosines(gram: Array, norms: Array) -> Array:
    """Turn inner products [A, A] into cosines, shrunken toward zero: G_ij / sqrt((n_i + tau) (n_j + tau)).

    norms [A]: squared norms, noise included. tau = 0.1 * mean norm. The diagonal of `gram` is free of noise where
    that of `norms` is not, so that of the cosines says how much of each gradient is more than noise.
    """
    floor = np.sqrt(norms + SHRINK * norms.mean())
    with np.errstate(invalid="ignore", divide="ignore"):
        return gram / np.outer(floor, floor)


def course(run: Run) -> Course | None:
    """Read the cosines of every refresh that has a Gram matrix.

    The refresh before the first step is left out where there are others: the optimizer has no metric there yet.
    """
    events = [event for event in run.refreshes if event.get("gram") and event.get("norms")]
    events = [event for event in events if event["step"] > 0] or events
    if not events or len(run.abilities) < 2:
        return None
    tables = [cosines(_numbers(event["gram"]), _numbers(event["norms"])) for event in events]
    return Course([event["step"] for event in events], np.array(tables))


def summarize_conflict(run: Run) -> dict[str, Any] | None:
    """Give report.json's `conflict`, or None where nothing in the record speaks of it."""
    seen = course(run)
    effects = {"interference": interference(run), "slopes": slopes(run)} if len(run.abilities) > 1 else {}
    if seen is None and not run.conflicts and not any(effects.values()):
        return None
    unit = next((effect.unit for effect in effects.values() if effect), None)
    return {
        "cosines": None if seen is None else _named(run.abilities, run.abilities, *seen.mean()),
        "refreshes": 0 if seen is None else len(seen.steps),
        **{key: _effects(run, effects.get(key)) for key in ("interference", "slopes")},
        "unit": unit,
        "resolver": run.conflicts[-1]["resolver"] if run.conflicts else None,
        "apply": run.conflicts[-1].get("apply") if run.conflicts else None,
        "factors": _factors(run),
    }


def sure(cell: Cell | None, sign: int) -> bool:
    """Tell whether a number lies on that side of zero by more than SURE standard errors."""
    return cell is not None and cell["error"] is not None and bool(sign * cell["value"] > SURE * cell["error"])


def opposed(conflict: Mapping[str, Any]) -> list[tuple[str, str, Cell]]:
    """Pairs of abilities whose cosine is surely below zero, the lowest first."""
    table = conflict["cosines"] or {}
    found = [(one, other, table[one][other]) for one, other in combinations(table, 2) if sure(table[one][other], -1)]
    return sorted(found, key=lambda pair: pair[2]["value"])


def harmed(conflict: Mapping[str, Any]) -> list[tuple[str, str, Cell]]:
    """Give (ability of the data, ability harmed, entry) where the books surely have harm, the largest first."""
    table: Cells = conflict["interference"] or {}
    found = [(one, other, cell) for one, row in table.items() for other, cell in row.items() if cell and sure(cell, 1)]
    return sorted(found, key=lambda pair: -pair[2]["value"])


def _factors(run: Run) -> dict[str, dict[str, float]] | None:
    if not run.conflicts:
        return None
    columns: dict[str, list[float]] = {}
    for event in run.conflicts:
        for ability, factor in event["factors"].items():
            if factor is not None:
                columns.setdefault(ability, []).append(factor)
    return {
        ability: {
            "last": column[-1],
            "mean": math.fsum(column) / len(column),
            "least": min(column),
            "most": max(column),
        }
        for ability, column in columns.items()
    }


def _effects(run: Run, effects: Effects | None) -> dict[str, Any] | None:
    return None if effects is None else _named(effects.groups, run.abilities, effects.values, effects.errors)


def _named(rows: list[str], columns: list[str], values: Array, errors: Array) -> dict[str, Any]:
    return {
        row: {
            column: {"value": float(value), "error": float(error) if math.isfinite(error) else None}
            if math.isfinite(value)
            else None
            for column, value, error in zip(columns, *pair, strict=True)
        }
        for row, *pair in zip(rows, values.tolist(), errors.tolist(), strict=True)
    }


def _numbers(values: Any) -> Array:
    # a number that was not finite is null in the record
    return np.array(values, dtype=np.float64)
