"""Put numbers into words: the same digits and the same sentences on the page, in the terminal, in a model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# shares of the gross flow; a small model left <= 0.03 when refreshed every 10 steps, 0.05-0.15 every 20
BALANCED, ROUGHLY = 0.05, 0.15
# relative; float32 rounds to 1e-7, bfloat16 to 4e-3, and a wrong optimizer or loss scale is far above
IDENTITY_LIMIT = 1e-2
# recorded residuals must be what the other entries leave, as a share of the gross flow
MISBOOKED_LIMIT = 1e-6
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def places(values: Iterable[float | None], digits: int = 3) -> int:
    """Choose decimals so that the largest of `values` shows `digits` significant digits, at least 2, at most 7."""
    largest = max((abs(value) for value in values if value), default=0.0)
    return min(7, max(2, digits - 1 - math.floor(math.log10(largest)))) if largest else 2


def signed(value: float | None, decimals: int = 3) -> str:
    """Write a change with its sign; what rounds to nothing is 0."""
    if value is None:
        return "–"
    text = f"{value:+.{decimals}f}"
    return "0" if not text.strip("+-0.") else text.replace("-", "−")


def plain(value: float | None, decimals: int = 3) -> str:
    return "–" if value is None else f"{value:.{decimals}f}".replace("-", "−")


def percent(share: float | None) -> str:
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:.0f} %"


def short(value: float | None) -> str:
    """Write a size of unknown magnitude in two digits."""
    if value is None:
        return "–"
    mantissa, _, exponent = f"{value:.2g}".partition("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_RAISED)}" if exponent else mantissa


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def verdict(entry: Mapping[str, Any], *rounding: float | None) -> tuple[str, str]:
    """Judge one ability's books: a grade (good, fair, poor, none) and what the badge says.

    rounding: the run's identity error and displacement error, which should be rounding.
    """
    if not entry["intervals"]:
        return "none", "no books yet"
    gross, share = entry["gross"], entry["residual_share"]
    if entry["misbooked"] > MISBOOKED_LIMIT * max(gross, abs(entry["measured"])):
        return "poor", "the record does not add up"
    if max((error for error in rounding if error is not None), default=0.0) > IDENTITY_LIMIT:
        return "poor", "the steps do not add up"
    if share is None:
        return "none", "nothing was booked to a source"
    if share <= BALANCED:
        return "good", f"books balance: {percent(share)} unexplained"
    if share <= ROUGHLY:
        return "fair", f"books roughly balance: {percent(share)} unexplained"
    return "poor", f"books do not balance: {percent(share)} unexplained"


def ranked(by_source: Mapping[str, float]) -> list[tuple[str, float]]:
    """Sort sources from the most helpful to the most harmful."""
    return sorted(by_source.items(), key=lambda item: item[1])


def change_sentence(ability: str, entry: Mapping[str, Any]) -> str:
    """Say what the ability gained or lost."""
    measured, error = entry["measured"], entry["measured_error"]
    decimals = places([measured], 2)
    size = plain(abs(measured), decimals) + (f" ± {plain(error, decimals)}" if error is not None else "")
    if error is not None and abs(measured) < 2 * error:
        said = f"{ability} hardly changed: its loss moved by {signed(measured, decimals)} ± {plain(error, decimals)}"
    elif measured < 0:
        said = f"{ability} improved: its loss fell by {size}"
    else:
        said = f"{ability} got worse: its loss rose by {size}"
    said += " nats per response token"
    if entry["loss_start"] is not None and entry["loss_end"] is not None:
        said += f", from {plain(entry['loss_start'])} to {plain(entry['loss_end'])}"
    return said + "."


def cause_sentence(entry: Mapping[str, Any]) -> str:
    """Say which sources moved the ability most, and what the books leave unexplained."""
    order = ranked(entry["by_source"])
    decimals = places(entry["by_source"].values(), 2)
    said = []
    if order and order[0][1] < 0:
        said.append(f"{order[0][0]} helped most ({signed(order[0][1], decimals)})")
    if order and order[-1][1] > 0:
        said.append(f"{order[-1][0]} harmed most ({signed(order[-1][1], decimals)})")
    elif len(order) > 1:
        said.append("no source harmed it")
    causes = ("; ".join(said) + ". ") if said else ""
    return f"{causes}The books leave {signed(entry['residual'], places([entry['residual']], 2))} nats unexplained."


def with_error(cell: Mapping[str, Any], decimals: int) -> str:
    """Write a number with its standard error."""
    return f"{signed(cell['value'], decimals)} ± {plain(cell['error'], decimals)}"
