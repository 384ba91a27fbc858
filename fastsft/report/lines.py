"""Say a run in about ten plain lines, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastsft.report.conflict import harmed, opposed
from fastsft.report.mixing import UNITS
from fastsft.report.words import duration, percent, places, plain, ranked, short, signed, verdict, with_error

# named in one line; the page has all
MAX_SOURCES, MAX_PAIRS = 4, 3


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Write the lines a person wants to know after a run: one per ability, then how far to trust them."""
    lines = [_headline(summary)]
    width = max((len(ability) for ability in summary["abilities"]), default=0)
    lines += [f"{ability:<{width}}  {_ability(summary['ledger'][ability])}" for ability in summary["abilities"]]
    lines += [*_trust(summary), *_planted(summary["planted"])]
    lines += [*_mix(summary["mix"]), *_conflict(summary["conflict"])]
    if summary["step_ratio"] is not None:
        lines.append(f"cost: a step with the books takes {summary['step_ratio']:.2f} times as long as one without")
    return [line.replace("−", "-") for line in lines]


def _headline(summary: Mapping[str, Any]) -> str:
    model = summary["model"] or {}
    named = " ".join(str(part) for part in (model.get("name"), summary["method"] and f"({summary['method']})") if part)
    time = f" in {duration(summary['seconds'])}" if summary["seconds"] is not None else ""
    state = (
        f"{summary['steps']} steps{time}"
        if summary["finished"]
        else f"stopped or still running at step {summary['steps']}"
    )
    resumed = f", resumed at step {', '.join(map(str, summary['resumed_at']))}" if summary["resumed_at"] else ""
    return f"{summary['name']}: {named + ', ' if named else ''}{state}{resumed}"


def _ability(entry: Mapping[str, Any]) -> str:
    if not entry["intervals"]:
        return "no interval booked yet"
    decimals = places([entry["measured"], *entry["by_source"].values()])
    error = f" ± {plain(entry['measured_error'], decimals)}" if entry["measured_error"] is not None else ""
    words = "better" if entry["measured"] < 0 else "worse"
    if entry["measured_error"] is not None and abs(entry["measured"]) < 2 * entry["measured_error"]:
        words = "no clear change"
    order = ranked(entry["by_source"])
    causes = []
    if order and order[0][1] < 0:
        causes.append(f"most helped by {order[0][0]} ({signed(order[0][1], decimals)})")
    if order and order[-1][1] > 0:
        causes.append(f"most harmed by {order[-1][0]} ({signed(order[-1][1], decimals)})")
    return f"{words}, {signed(entry['measured'], decimals)}{error} nats: " + (", ".join(causes) or "no source moved it")


def _trust(summary: Mapping[str, Any]) -> list[str]:
    booked = {ability: entry for ability, entry in summary["ledger"].items() if entry["intervals"]}
    if not booked:
        return []
    lines = [_each("unexplained share of what was booked", booked, "residual_share", "start_only_share")]
    poor = [
        name
        for name, entry in booked.items()
        if verdict(entry, summary["identity_error"], summary["displacement_error"])[0] == "poor"
    ]
    if poor:
        lines.append(f"do not trust the books of {', '.join(poor)}: refresh more often, or read the report's last part")
    pairs = [f"{name} {value:.2f}" for name, value in summary["correlation"].items() if value is not None]
    told = [f"predicted and measured change per interval correlate: {', '.join(pairs)}"] if pairs else []
    if summary["identity_error"] is not None:
        told.append(f"captured gradients miss {short(summary['identity_error'])} of the optimizer's")
    left_out = sum(entry["intervals_left_out"] for entry in summary["ledger"].values())
    if left_out:
        told.append(f"{left_out} intervals left out, their loss was not a number")
    return [*lines, "; ".join(told)] if told else lines


def _each(words: str, booked: Mapping[str, Any], key: str, rival: str) -> str:
    mine = ", ".join(f"{name} {percent(entry[key])}" for name, entry in booked.items())
    if any(entry[rival] is None for entry in booked.values()):
        return f"{words}: {mine}"
    theirs = ", ".join(percent(entry[rival]) for entry in booked.values())
    return f"{words}: {mine} (with gradients from interval starts alone: {theirs})"


def _mix(mix: Mapping[str, Any] | None) -> list[str]:
    if mix is None:
        return []
    start, end = mix["start"], mix["end"]
    sizes = {source: abs(weight - start.get(source, 0.0)) for source, weight in end.items()}
    # what two decimals would not show is not said
    moved = sorted((source for source in end if sizes[source] >= 0.005), key=lambda source: -sizes[source])
    said = [f"{source} {plain(start.get(source, 0.0), 2)} -> {plain(end[source], 2)}" for source in moved[:MAX_SOURCES]]
    said += [f"{len(moved) - MAX_SOURCES} more"] if len(moved) > MAX_SOURCES else []
    steady = ", ".join(f"{source} {plain(weight, 2)}" for source, weight in list(start.items())[:MAX_SOURCES])
    end_said = ", ".join(said) or f"ends as it began, {steady}"
    decided = f"{mix['moved']} of {mix['decisions']} decisions moved it" if mix["decisions"] else "nothing was decided"
    return [f"mix ({mix['policy']}): {end_said}; {decided}"]


def _conflict(conflict: Mapping[str, Any] | None) -> list[str]:
    pairs = opposed(conflict) if conflict else []
    if conflict is None or not pairs:
        return []
    said = [f"{one} and {other} {with_error(cell, 2)}" for one, other, cell in pairs[:MAX_PAIRS]]
    line = f"conflict: gradient cosine, optimizer metric, below zero: {', '.join(said)}"
    across = [(one, other, cell) for one, other, cell in harmed(conflict) if one != other]
    if across:
        one, other, cell = across[0]
        size = with_error(cell, places([cell["value"]], 2))
        line += f"; by the books data of {one} harmed {other} most, {size} nats per 1000 {UNITS[conflict['unit']]}"
    return [line]


def _planted(planted: Mapping[str, Any] | None) -> list[str]:
    if planted is None:
        return []
    lines = []
    if planted["harmful_auc"] is not None:
        lines.append(
            f"planted harmful samples: AUC {planted['harmful_auc']:.2f} among {planted['harmful_scored']} planted ones "
            f"and their neighbours (random scores: {planted['random_auc']:.2f})"
        )
    told = []
    if planted["duplicates_found"] is not None:
        told.append(
            f"{percent(planted['duplicates_found'])} of {planted['duplicates_planted']} twins found by equal text"
        )
    if planted["useless_source_share"] is not None:
        told.append(
            f"useless source {planted['useless_source']} moved {percent(planted['useless_source_share'])} of the flow"
        )
    if planted["helper_ok"] is not None:
        helped = "helps" if planted["helper_ok"] else "does not help"
        told.append(f"helper {planted['helper_source']} {helped} {' and '.join(planted['helper_entries'])}")
    return [*lines, "; ".join(told)] if told else lines
