"""What went through which part of a gated adapter: each expert, the memory, the router."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastsft.report.run import Run
from fastsft.report.words import places, signed

Parts = dict[str, dict[str, float]]


def summarize_experts(run: Run) -> dict[str, Parts] | None:
    """Add up {ability: {part: {source: nats}}} over the intervals; None where the model has no parts.

    Intervals with an undefined number are left out, as the ledger does.
    """
    found: dict[str, Parts] = {}
    for event in run.intervals:
        for ability, entry in event["abilities"].items():
            by_part = entry.get("by_part") or {}
            if any(value is None for sources in by_part.values() for value in sources.values()):
                continue
            for part, sources in by_part.items():
                total = found.setdefault(ability, {}).setdefault(part, dict.fromkeys(run.sources, 0.0))
                for source, value in sources.items():
                    total[source] = total.get(source, 0.0) + value
    return {ability: found[ability] for ability in run.abilities if ability in found} or None


def part_rows(experts: Mapping[str, Parts]) -> list[dict[str, Any]]:
    """Give one row per part with a cell per ability, all sources together."""
    parts = list(dict.fromkeys(part for each in experts.values() for part in each))
    values = {part: {ability: _sum(each.get(part)) for ability, each in experts.items()} for part in parts}
    return _rows(values)


def source_rows(parts: Parts, sources: list[str]) -> list[dict[str, Any]]:
    """Give one row per source with a cell per part, for one ability."""
    return _rows({source: {part: each.get(source, 0.0) for part, each in parts.items()} for source in sources})


def _sum(sources: Mapping[str, float] | None) -> float:
    return sum((sources or {}).values())


def _rows(values: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    known = [value for row in values.values() for value in row.values()]
    decimals, limit = places(known, 2), max(map(abs, known), default=0.0) or 1.0
    return [
        {
            "name": name,
            "cells": [
                {
                    "column": column,
                    "said": signed(value, decimals),
                    "weight": round(100 * abs(value) / limit),
                    "sign": "harms" if value > 0 else "helps",
                }
                for column, value in row.items()
            ],
        }
        for name, row in values.items()
    ]
