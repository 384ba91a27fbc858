"""Gather the page's part on mix and conflict: its charts, its tables, its sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastsft.report import conflict, figures, mixing, mixing_figures, mixing_tables, mixing_words
from fastsft.report.run import Run


def draw(run: Run, summary: Mapping[str, Any], width: figures.Width) -> dict[str, Any]:
    """Describe the charts this run has the numbers for."""
    charts: dict[str, Any] = {}
    if summary["mix"]:
        decided = mixing.moves(run)
        charts["mix-weights"] = mixing_figures.weights(run, width)
        if "supervised" in summary["mix"]["drawn"]:
            charts["mix-supervised"] = figures.mix(run, "supervised", width)
        if any(signal is not None for move in decided for signal in move.signal.values()):
            charts["mix-signal"] = mixing_figures.signals(run, decided, width)
    seen = conflict.course(run)
    if seen is not None and len(seen.steps) > 1 and mixing_figures.opposing(seen):
        charts["cosines"] = mixing_figures.cosines(run, seen, width)
    if run.conflicts:
        charts["factors"] = mixing_figures.factors(run, width)
    return charts


def told(run: Run, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Give the template its tables and sentences."""
    said: dict[str, Any] = {}
    if summary["mix"]:
        rows = mixing_tables.decision_rows(mixing.moves(run))
        columns, shares = mixing_tables.mix_rows(summary["mix"])
        said = {"all_moves": rows, "top_moves": mixing_tables.largest(rows), "mix_columns": columns, "mix_rows": shares}
        said["delay"] = mixing_words.delay_sentence(summary["mix"]) if rows else ""
    if summary["conflict"]:
        known = summary["conflict"]
        slopes = known["slopes"] or {}
        drawn, pairs = mixing_figures.MAX_PAIRS, len(run.abilities) * (len(run.abilities) - 1) // 2
        said |= {
            "conflict_said": mixing_words.conflict_sentences(known, conflict.opposed(known), conflict.harmed(known)),
            "cosine_rows": mixing_tables.effect_rows(known["cosines"] or {}, bad=-1, limit=1.0, own=False),
            "interference_rows": mixing_tables.effect_rows(known["interference"] or {}, bad=1),
            "slope_rows": mixing_tables.effect_rows(slopes, bad=1)
            if any(cell for row in slopes.values() for cell in row.values())
            else [],
            "unit": mixing.UNITS.get(known["unit"], ""),
            "applied": mixing_words.applied_sentence(known),
            "more_pairs": drawn if pairs > drawn else 0,
        }
    return said
