"""Shape the page's tables on mix and conflict: sources at a glance, decisions, one ability against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from fastsft.report.conflict import Cells, sure
from fastsft.report.mixing import UNITS, Move
from fastsft.report.words import places, plain, signed

# decisions that stand on the page outright; with more, all of them are folded below
MAX_DECISIONS = 6


def mix_rows(mix: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Give the headings and one row per source: weights at the start, at the end and on average, shares drawn."""
    drawn = {
        unit: shares for unit, shares in mix["drawn"].items() if unit != "tokens" or "supervised" not in mix["drawn"]
    }
    columns = {"at the start": mix["start"], "at the end": mix["end"], "mean in force": mix["mean"]}
    columns |= {f"share of {UNITS[unit]}": shares for unit, shares in drawn.items()}
    rows = [
        {"source": source, "cells": [plain(column.get(source, 0.0)) for column in columns.values()]}
        for source in mix["mean"]
    ]
    return list(columns), rows


def decision_rows(moves: Sequence[Move]) -> list[dict[str, Any]]:
    """Give one row per decision: when, from when, what moved, what it rested on, why."""
    decimals = places([signal for move in moves for signal in move.signal.values()], 3)
    return [
        {
            "version": move.version,
            "step": move.step,
            "from_step": move.from_step,
            "draw": move.draw,
            "moved": move.moved,
            "changed": [
                {
                    "source": source,
                    "before": plain(move.before.get(source, 0.0)),
                    "after": plain(move.after[source]),
                    "sign": "up" if move.after[source] > move.before.get(source, 0.0) else "down",
                    "signal": _signal(move, source, decimals),
                }
                for source in move.changed
            ],
            "kept": [
                {"source": source, "weight": plain(move.after[source]), "signal": _signal(move, source, decimals)}
                for source in move.after
                if source not in move.changed
            ],
            "why": move.why,
        }
        for move in moves
    ]


def largest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Pick the decisions that moved the mix most, the largest first; all of them in order where they are few."""
    if len(rows) <= MAX_DECISIONS:
        return list(rows)
    return sorted((row for row in rows if row["changed"]), key=lambda row: -row["moved"])[:MAX_DECISIONS]


def effect_rows(cells: Cells, *, bad: int, limit: float | None = None, own: bool = True) -> list[dict[str, Any]]:
    """Give one row per ability with a cell per ability: number, error, sign, and weight in % for the colour.

    bad: the sign of numbers that stand for harm. limit: the size that is coloured most; the table's largest if not
    given. What is not surely on one side of zero has no colour. own: whether an ability on itself is like the others.
    """
    known = [cell for row in cells.values() for cell in row.values() if cell]
    sizes, errors = [abs(cell["value"]) for cell in known], [cell["error"] for cell in known if cell["error"]]
    # as many as a usual error needs to show a digit
    decimals = max(places(sizes, 2), places([median(errors)] if errors else [], 1))
    limit = limit or max(sizes, default=0.0) or 1.0
    return [
        {
            "name": name,
            "cells": [
                {**_cell(column, cell, decimals, limit, bad), "own": column == name and not own}
                for column, cell in row.items()
            ],
        }
        for name, row in cells.items()
    ]


def _cell(column: str, cell: Mapping[str, Any] | None, decimals: int, limit: float, bad: int) -> dict[str, Any]:
    value, error = (None, None) if cell is None else (cell["value"], cell["error"])
    clear = sure(cell, 1) or sure(cell, -1)
    return {
        "column": column,
        "said": signed(value, decimals),
        "error": "" if error is None else f"± {plain(error, decimals)}",
        "weight": min(100, round(100 * abs(value or 0.0) / limit)) if clear else 0,
        "sign": "harms" if bad * (value or 0.0) > 0 else "helps",
    }


def _signal(move: Move, source: str, decimals: int) -> str:
    signal, error = move.signal.get(source), move.error.get(source)
    if signal is None:
        return ""
    return signed(signal, decimals) + (f" ± {plain(error, decimals)}" if error is not None else "")
