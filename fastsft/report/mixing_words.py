"""Put mix and conflict into sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastsft.report.mixing import UNITS
from fastsft.report.words import places, with_error


def delay_sentence(mix: Mapping[str, Any]) -> str:
    """Say how long after a decision its mix came into force."""
    delay, unused = mix["delay"], mix["unused"]
    least, most = delay["least"], delay["most"]
    if most <= 0:
        said = "Each decision held from the very next step."
    else:
        steps = f"{most} step{'s' if most > 1 else ''}" if least == most else f"{least} to {most} steps"
        said = (
            "A decision holds from the first draw that has not been handed out yet: here "
            f"{steps} after it {'was' if most == 1 else 'were'} still drawn by the mix before."
        )
    if not unused:
        return said
    came = (
        "1 decision came too late: no step was drawn by it."
        if unused == 1
        else (f"{unused} decisions came too late: no step was drawn by them.")
    )
    return f"{said} {came}"


def conflict_sentences(conflict: Mapping[str, Any], opposed: Sequence[Any], harmed: Sequence[Any]) -> list[str]:
    """Say which abilities' gradients oppose each other, and which ability's data harmed another, beyond two errors.

    opposed, harmed: what `conflict.opposed` and `conflict.harmed` give; data that harmed its own ability counts.
    """
    said = []
    if conflict["cosines"]:
        pairs = [f"{one} and {other} ({with_error(cell, 2)})" for one, other, cell in opposed]
        said.append(
            f"Gradients that oppose each other, their cosine more than two standard errors below zero: {_few(pairs)}."
            if pairs
            else "No two abilities' gradients oppose each other by more than two standard errors."
        )
    if conflict["interference"]:
        entries = [
            f"data of {one} harmed {'its own ability' if one == other else other} "
            f"({with_error(cell, places([cell['value']], 2))})"
            for one, other, cell in harmed
        ]
        said.append(
            f"By effect, beyond two standard errors, in nats per thousand {UNITS[conflict['unit']]}: {_few(entries)}."
            if entries
            else "By effect, no ability's data harmed an ability by more than two standard errors."
        )
    return said


def applied_sentence(conflict: Mapping[str, Any]) -> str:
    """Say how a resolver's weights reached the gradients."""
    ways = {
        "lagged": "It weighed the abilities at each refresh, and the gradients of each ability's sources were "
        "multiplied by its factors until the next.",
        "exact": "It weighed the abilities within each step, and the gradients of each ability's sources were "
        "multiplied by its factors before they were added up.",
    }
    return ways.get(conflict["apply"], "The gradients of each ability's sources were multiplied by its factors.")


def _few(items: Sequence[str], most: int = 4) -> str:
    return "; ".join(items[:most]) + (f"; and {len(items) - most} more" if len(items) > most else "")
