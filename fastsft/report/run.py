"""Read a run directory into plain lists and arrays, once, for everything the report says.

Reads through `fastsft.record` only. What an event must hold is checked here; the rest of the room trusts it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastsft.record import INFLUENCE_COLUMNS, Record, RecordError, read_table

Event = dict[str, Any]

_INTERVAL_KEYS = ("measured", "by_source", "decay", "unfollowed", "residual")
_MIX_KEYS = ("version", "from_step", "policy", "weights")
_CONFLICT_KEYS = ("resolver", "factors")
_PLANTED_KINDS = {"harmful": list, "duplicates": list, "useless_source": str, "helper_source": str, "helps": list}


@dataclass(frozen=True)
class Run:
    """One run as read: events by kind, and the tables.

    drawn: one row per (step, sample, ability) with step, sample_id, source, ability, phi (float64).
    mixes: the mixes in order of their version, empty where nothing steered the mix; conflicts: what a resolver decided.
    samples: id, source, prompt, response. planted: the content of planted.json, or None.
    """

    record: Record
    start: Event
    abilities: list[str]
    sources: list[str]
    steps: list[Event]
    refreshes: list[Event]
    intervals: list[Event]
    mixes: list[Event]
    conflicts: list[Event]
    notes: list[Event]
    resumes: list[Event]
    end: Event | None
    drawn: pa.Table
    samples: pa.Table
    planted: Mapping[str, Any] | None

    @property
    def last_step(self) -> int:
        return max((event["step"] for event in (*self.steps, *self.intervals)), default=0)


def read_run(run_dir: str | Path) -> Run:
    """Read everything the report needs; a folder that is not a run is refused with a sentence."""
    record = Record.open(run_dir)
    by_kind: dict[str, list[Event]] = {}
    for event in record.events():
        by_kind.setdefault(event["event"], []).append(event)
    start = by_kind["start"][0]
    intervals, steps = by_kind.get("interval", []), by_kind.get("step", [])
    for interval in intervals:
        _check_interval(record, interval)
    mixes, conflicts = by_kind.get("mix", []), by_kind.get("conflict", [])
    for event, keys in (*((mix, _MIX_KEYS) for mix in mixes), *((event, _CONFLICT_KEYS) for event in conflicts)):
        _check_keys(record, event, keys)
    drawn = _read_drawn(record)
    named_later = [source for step in steps for source in step.get("documents", {})]
    named_later += [source for mix in mixes for source in mix["weights"]]
    named_later += [
        source for event in intervals for entry in event["abilities"].values() for source in entry["by_source"]
    ]
    return Run(
        record=record,
        start=start,
        abilities=_names(start, "abilities", (ability for event in intervals for ability in event["abilities"])),
        sources=_names(start, "sources", (*named_later, *pc.unique(drawn["source"]).to_pylist())),
        steps=steps,
        refreshes=by_kind.get("refresh", []),
        intervals=intervals,
        # a resumed run may say a version again: what it said last is what it drew by
        mixes=[mix for _, mix in sorted({mix["version"]: mix for mix in mixes}.items())],
        conflicts=conflicts,
        notes=by_kind.get("note", []),
        resumes=by_kind.get("resume", []),
        end=by_kind["end"][-1] if "end" in by_kind else None,
        drawn=drawn,
        samples=record.samples(),
        planted=_read_planted(record),
    )


def own_ability(run: Run, source: str) -> str | None:
    """Name the ability a source was gathered for: as its data entry says, or the ability of the same name."""
    named = run.start.get("data", {}).get(source, {}).get("ability")
    if named in run.abilities:
        return str(named)
    return source if source in run.abilities else None


def read_tokens(
    record: Record, wanted: set[str]
) -> tuple[dict[tuple[str, str], list[list[float]]], dict[str, list[str]]]:
    """Read the token scores of `wanted` samples, one list per draw by (ability, sample), and their token texts."""
    scores: dict[tuple[str, str], list[list[float]]] = {}
    for path in record.influence_parts():
        part = read_table(path)
        if "tokens" not in part.column_names:
            continue
        part = part.filter(pc.is_in(part["sample_id"], pa.array(sorted(wanted), pa.string())))
        for ability, sample, tokens in zip(
            part["ability"].to_pylist(), part["sample_id"].to_pylist(), part["tokens"].to_pylist(), strict=True
        ):
            if tokens:
                scores.setdefault((ability, sample), []).append(tokens)
    path = record.out / "token_text.parquet"
    if not path.exists():
        return scores, {}
    table = read_table(path)
    table = table.filter(pc.is_in(table["sample_id"], pa.array(sorted(wanted), pa.string())))
    return scores, dict(zip(table["sample_id"].to_pylist(), table["tokens"].to_pylist(), strict=True))


def _names(start: Event, key: str, later: Iterable[str]) -> list[str]:
    return list(dict.fromkeys((*start.get(key, []), *later)))


def _read_drawn(record: Record) -> pa.Table:
    # part by part, so that token lists of the whole run are never in memory together
    names = list(INFLUENCE_COLUMNS)
    schema = pa.schema({**INFLUENCE_COLUMNS, "phi": pa.float64()})
    parts = [read_table(path).select(names).cast(schema) for path in record.influence_parts()]
    table = pa.concat_tables(parts) if parts else schema.empty_table()
    undefined = len(table) - pc.sum(pc.is_finite(table["phi"].fill_null(float("nan")))).as_py() if len(table) else 0
    if undefined:
        raise RecordError(
            f"{record.out / 'influence'} holds {undefined} rows whose phi is not a number; mend or redo the run."
        )
    return table


def _check_interval(record: Record, interval: Event) -> None:
    for ability, entry in interval.get("abilities", {}).items():
        missing = [key for key in _INTERVAL_KEYS if key not in entry]
        if missing:
            raise RecordError(
                f"{record.path}: the interval that ends at step {interval['step']} has no {', '.join(missing)} "
                f"for ability {ability!r}. Was it written by another version?"
            )


def _check_keys(record: Record, event: Event, keys: Iterable[str]) -> None:
    missing = [key for key in keys if event.get(key) is None]
    if missing:
        raise RecordError(
            f"{record.path}: the {event['event']} event of step {event['step']} has no {', '.join(missing)}. "
            f"Was it written by another version?"
        )


def _read_planted(record: Record) -> Mapping[str, Any] | None:
    path = record.out / "planted.json"
    if not path.exists():
        return None
    try:
        planted = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RecordError(f"{path} is not JSON ({error.msg}). Mend or delete it.") from None
    if not isinstance(planted, dict):
        raise RecordError(
            f"{path} must be an object with keys {', '.join(_PLANTED_KINDS)}; got {type(planted).__name__}."
        )
    for key, kind in _PLANTED_KINDS.items():
        if planted.get(key) is not None and not isinstance(planted[key], kind):
            raise RecordError(f"{path}: `{key}` must be a {kind.__name__}; got {type(planted[key]).__name__}.")
    return planted
